import pytest
from pretended import here, study

from unlora.errors import InputError
from unlora.studies import scheduler
from unlora.studies.config import read
from unlora.studies.tuning import judge, search

TARGET, GOLD = {"p": 0.9, "q": 1.0, "u": 0.8}, {"p": 0.1, "q": 0.5, "u": 0.8}
AIM = {"forget": ["p", "q"], "utility": "u", "keep": 0.9}
RATE = "trainer.args.learning_rate"


def test_a_trial_is_judged_by_its_distance_to_gold():
    # p: |.3 - .1| / .8 = .25; q: |.5 - .5| / .5 = 0; their mean; .76 / .8 = .95
    found = judge({"p": 0.3, "q": 0.5, "u": 0.76}, TARGET, GOLD, **AIM)
    assert (found.distance, found.utility) == (pytest.approx(0.125), pytest.approx(0.95))
    assert found.feasible and found.value == pytest.approx(0.125 / 1.125)
    assert judge(GOLD, TARGET, GOLD, **AIM).distance == 0
    assert judge(TARGET, TARGET, GOLD, **AIM).distance == 1


def test_overshooting_gold_is_a_distance_too():
    below = judge({"p": 0.0, "q": 0.5, "u": 0.8}, TARGET, GOLD, **AIM)
    assert below.distance == pytest.approx(0.1 / 0.8 / 2)


def test_without_its_utility_a_trial_comes_behind_all_others():
    lost = judge({**GOLD, "u": 0.4}, TARGET, GOLD, **AIM)
    less = judge({**GOLD, "u": 0.6}, TARGET, GOLD, **AIM)
    assert not lost.feasible and lost.value == pytest.approx(1 + 0.9 - 0.5)
    assert less.value < lost.value
    assert judge(TARGET, TARGET, GOLD, **AIM).value < less.value
    far = judge({"p": 90.0, "q": 0.5, "u": 0.8}, TARGET, GOLD, **AIM)  # 56 times as far as target
    assert far.feasible and far.value < less.value


def test_a_trial_without_a_figure_has_no_judgement():
    assert judge({"p": None, "q": 0.5, "u": 0.8}, TARGET, GOLD, **AIM) is None


def test_metrics_that_do_not_tell_the_models_apart_are_refused():
    with pytest.raises(InputError, match="in which target and gold do not differ"):
        judge(GOLD, TARGET, {**GOLD, "p": 0.9}, **AIM)
    with pytest.raises(InputError, match="asks for r, which the target has no value of"):
        judge(GOLD, TARGET, GOLD, **{**AIM, "forget": ["r"]})
    with pytest.raises(InputError, match="u, which is 0 for the target"):
        judge(GOLD, {**TARGET, "u": 0.0}, GOLD, **AIM)


@pytest.fixture
def go(folder, pretended):
    def run(trials=3, launch=here, seed=7):
        settings = {
            **study()["search"], "trials": trials, "seed": seed,
            "space": {"every": {RATE: {"low": 1e-3, "high": 1e-1, "log": True}},
                      "NPO": {"trainer.method_args.beta": [0.1, 0.5]}},
        }  # fmt: skip
        pretended.clear()
        done = scheduler.Done()
        return search(read(study(search=settings)), folder, launch, done)

    return run


@pytest.mark.slow
def test_every_method_has_the_same_number_of_trials_and_the_best_is_kept(go):
    best, trials = go()
    assert [t["method"] for t in trials] == ["NPO"] * 3 + ["GradDiff"] * 3
    mine = [t for t in trials if t["method"] == "NPO"]
    assert {RATE, "trainer.method_args.beta"} == set(mine[0]["params"])
    assert len({t["params"][RATE] for t in mine}) == 3
    closest = min(mine, key=lambda t: t["distance"])
    assert closest["distance"] < max(t["distance"] for t in mine)
    assert best["NPO"][0] == "trainer=NPO"
    assert f"{RATE}={closest['params'][RATE]}" in best["NPO"]
    assert all(t["feasible"] and t["state"] == "complete" for t in trials)


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(go, pretended, tmp_path):
    class Stop(BaseException):
        pass

    calls = []

    def stopping(stages):
        calls.append(1)
        if len(calls) == 6:  # within the second round
            here(stages[:1])
            raise Stop
        return here(stages)

    with pytest.raises(Stop):
        go(launch=stopping)
    after = go()
    assert 0 < len(pretended) < 4 + 2 * 6  # what was done is not done again
    again = go()
    assert again == after and pretended == []
    (tmp_path / "home").rename(tmp_path / "other")
    assert go() == after  # as it comes out when nothing interrupts it


@pytest.mark.slow
def test_more_trials_are_added_to_those_there_are(go, pretended):
    _, first = go(trials=1)
    _, more = go(trials=2)
    assert [t for t in more if t["number"] < 1] == first
    assert len(pretended) == 4  # one training and one evaluation of each method
