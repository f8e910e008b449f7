import pytest
from pretended import study

from unlora.errors import InputError
from unlora.studies.config import read


def searching(**changes):
    return {**study()["search"], "trials": 2, "space": {"every": {"x": [1, 2]}}, **changes}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seeds": 3}, "seeds is 3: it must be a list of whole numbers"),
        ({"seeds": [1, 1]}, "a seed stands in it twice"),
        ({"methods": {}}, "methods is {}: it must name methods"),
        ({"methods": {"gold": ["x=1"]}}, "cannot be called 'gold'"),
        ({"methods": {"NPO": "trainer=NPO"}}, "NPO is 'trainer=NPO': it must be a list"),
        ({"methods": {"..": ["x=1"]}}, "cannot be called '..'"),
        ({"methods": {"a\nb": ["x=1"]}}, "cannot be called"),
        ({"methods": {"x" * 300: ["x=1"]}}, "at most 80 letters"),
        ({"seeds": [-1]}, "a seed is at least 0"),
        ({"workers": 0}, "workers is 0"),
        ({"seedz": [1]}, "Did you mean 'seeds'"),
        ({"target": 3}, "or a model that is there already"),
        ({"search": searching(trial=1)}, "Unknown key of search 'trial'. Did you mean 'trials'"),
        ({"search": searching(seed=1)}, "which is one of seeds"),
        ({"unlearn": ["model.model_args.token=s3cret"]}, r"token=\(hidden\) would be written"),
        ({"methods": {"NPO": ["trainer.args.hub_token=s3cret"]}}, "set HF_TOKEN, and leave it out"),
        ({"search": searching(), "gold": None}, "search.trials needs gold"),
        ({"search": searching(space={"NPO": {"x": [1]}})}, "GradDiff has nothing to search"),
        ({"search": searching(space={"every": {"x": {"low": 2, "high": 1}}})}, "list of choices"),
        ({"search": searching(space={"every": {"x": {"low": 0, "high": 1, "log": True}}})}, "low"),
    ],
)
def test_a_wrong_study_is_refused_before_anything_runs(change, message):
    with pytest.raises(InputError, match=message):
        read(study(**change))


def test_a_study_without_mistakes_is_read():
    assert read(study(search=searching())).search["trials"] == 2
