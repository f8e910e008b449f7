"""Which questions a set of metrics needs, and how answers reach them."""

import numpy as np
import pytest

from unlora.errors import InputError
from unlora.evals.pass_plan import Request, evaluate, needed, not_computable, questions
from unlora.evals.records import Generated, Scored
from unlora.results.value import Value

ONE = np.ones(1, dtype=np.float32)
RECORDS = [Scored(-ONE, ONE > 0, -ONE, ONE, "text", ended=False)]
REQUESTS = [
    Request("utility", "model_utility", {"parts": ["prob"]}),
    Request("prob", "probability", {"answers": "forget"}),
    Request("memory", "exact_memorization", {"answers": "forget"}),
    Request("rouge", "rouge", {"answers": "forget"}),
    Request("attack", "mia_loss", {"forget": "forget", "holdout": "holdout"}),
    Request("leak", "privleak", {"attack": "attack", "retain": "attack"}),
]
ANSWERS = {
    ("score", "forget"): RECORDS,
    ("score", "holdout"): RECORDS,
    ("generate", "forget"): [Generated("Who?", "Ana", "Ana")],
}
ORDERED = needed(REQUESTS, [request.name for request in REQUESTS])


def test_each_question_is_asked_once():
    asked = questions(ORDERED)
    assert asked == [("score", "forget"), ("score", "holdout"), ("generate", "forget")]
    values = evaluate(ORDERED, ANSWERS, lambda which, name: Value(0.5))
    assert sorted(values) == sorted(request.name for request in REQUESTS)
    assert values["leak"].value == pytest.approx(0)


def test_a_pass_over_what_was_written_comes_after_the_writing():
    requests = [
        Request("fluent", "fluency", {"answers": "forget", "truth": "retain"}),
        Request("clean", "gibberish", {"answers": "retain"}),
    ]
    asked = questions(requests)
    assert sorted(asked) == [
        ("generate", "forget"), ("generate", "retain"), ("legible", "retain"),
        ("reread", "forget"), ("score_root", "retain"),
    ]  # fmt: skip
    for later in ("reread", "legible"):
        (place,) = [n for n, (name, _) in enumerate(asked) if name == later]
        assert asked.index(("generate", asked[place][1])) < place


def test_a_part_of_the_metrics_asks_only_what_it_needs():
    assert questions(needed(REQUESTS, ["utility"])) == [("score", "forget")]


def test_a_metric_comes_after_what_it_needs():
    names = [request.name for request in ORDERED]
    assert names.index("prob") < names.index("utility")
    assert names.index("attack") < names.index("leak")


def test_a_missing_reference_is_said_in_words_and_not_guessed():
    no_log = lambda which, name: Value.missing("no log")  # noqa: E731
    values = evaluate(needed(REQUESTS, ["leak"]), ANSWERS, no_log)
    assert values["leak"].not_computed == "no log"
    assert values["attack"].value == 0.5


def test_each_log_is_asked_for_what_stands_in_it():
    requests = [
        *REQUESTS,
        Request("broken", "collapsed", {"utility": "utility", "repetition": "memory",
                                        "target": "prob"}),
    ]  # fmt: skip
    asked = []

    def log(which, name):
        asked.append((which, name))
        return Value(0.5)

    evaluate(needed(requests, ["leak", "broken"]), ANSWERS, log)
    assert set(asked) == {("reference", "attack"), ("target", "prob")}


def test_an_optional_input_may_be_left_out_or_missing():
    inputs = {"utility": "prob", "repetition": "memory"}
    parts = REQUESTS[1:3]
    for given in ({}, {"target": "prob"}):
        request = Request("broken", "collapsed", inputs | given, {"max_repetition": 1.0})
        missing = lambda which, name: Value.missing("no log")  # noqa: E731
        assert not_computable([*parts, request], missing) == {}
        assert evaluate([*parts, request], ANSWERS, missing)["broken"].value == 0
    # with the log of the target half of whose likelihood is lost
    request = Request("broken", "collapsed", inputs | {"target": "prob"}, {"max_repetition": 1.0})
    found = evaluate([*parts, request], ANSWERS, lambda which, name: Value(0.99))["broken"]
    assert found.value == 1 and "of the target's" in found.note


def test_what_cannot_be_computed_is_known_before_the_model_is_asked():
    no_log = lambda which, name: Value.missing("no log")  # noqa: E731
    log = lambda which, name: Value(0.5)  # noqa: E731
    assert not_computable(ORDERED, no_log) == {"leak": "no log"}
    gone = lambda name, data: "gone" if data == "forget" else None  # noqa: E731
    all_of_forget = ("utility", "prob", "memory", "rouge", "attack", "leak")
    assert not_computable(ORDERED, log, gone) == dict.fromkeys(all_of_forget, "gone")
    mute = lambda name, data: "mute" if name == "generate" else None  # noqa: E731
    assert not_computable(ORDERED, log, mute) == {"rouge": "mute"}
    assert not_computable(ORDERED, log) == {}


def test_missing_data_reach_every_metric_that_needs_them():
    gone = lambda name, data: "gone" if data == "holdout" else None  # noqa: E731
    requests = needed(REQUESTS, ["leak", "prob"])
    answers = {("score", "forget"): RECORDS}  # nothing else is looked up
    values = evaluate(requests, answers, lambda which, name: Value.missing("no log"), gone)
    assert values["attack"].not_computed == values["leak"].not_computed == "gone"
    assert values["prob"].not_computed is None and values["prob"].value > 0


def test_unknown_and_circular_metrics_are_refused():
    with pytest.raises(InputError, match="Did you mean 'prob'"):
        needed(REQUESTS, ["porb"])
    circle = [Request(a, "model_utility", {"parts": [b]}) for a, b in (("a", "b"), ("b", "a"))]
    with pytest.raises(InputError, match="a -> b -> a"):
        needed(circle, ["a"])
    with pytest.raises(InputError, match="Metric a needs another metric"):
        needed([circle[0]], ["a"])
