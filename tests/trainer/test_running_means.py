"""Numbers for the log."""

from unlora.trainer.running_means import RunningMeans


def test_numbers_are_logged_as_means_and_begin_again():
    means = RunningMeans()
    for value in (1.0, 2.0, 6.0):
        means.add("loss", value)
    means.add("multiplier", 4.0)
    assert means.gather() == {"loss": [1.0, 2.0, 6.0], "multiplier": [4.0]}
    assert means.pop() == {"loss": 3.0, "multiplier": 4.0} and means.pop() == {}


def test_what_came_since_a_mark_is_added_up_or_dropped():
    means = RunningMeans()
    means.add("loss", 1.0)
    mark = means.mark()
    for value in (2.0, 3.0):
        means.add("loss", value)
        means.add("new", value)
    means.merge_since(mark)
    assert means.gather() == {"loss": [1.0, 5.0], "new": [5.0]}
    means.drop_since(mark)
    assert means.gather() == {"loss": [1.0], "new": []}
    assert means.pop() == {"loss": 1.0}, "a name without a number is not logged"


def test_a_resumed_run_has_the_numbers_of_its_checkpoint():
    means = RunningMeans()
    means.load({"loss": [1.0, 2.0]})
    means.add("loss", 6.0)
    assert means.pop() == {"loss": 3.0}
