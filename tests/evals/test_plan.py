"""Which questions a set of metrics needs, and how answers reach them."""

import numpy as np
import pytest

from unlora.errors import InputError
from unlora.evals.plan import Request, evaluate, needed, not_computable, questions
from unlora.evals.records import Scored, Value

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
ORDERED = needed(REQUESTS, [request.name for request in REQUESTS])


def test_each_question_is_asked_once():
    asked = []

    def run(kind, data):
        asked.append((kind, data))
        return RECORDS if kind == "score" else []

    values = evaluate(ORDERED, run, lambda name: Value(0.5))
    assert asked == [("generate", "forget"), ("score", "forget"), ("score", "holdout")]
    assert sorted(values) == sorted(request.name for request in REQUESTS)
    assert values["leak"].value == pytest.approx(0)


def test_a_part_of_the_metrics_asks_only_what_it_needs():
    assert questions(needed(REQUESTS, ["utility"])) == [("score", "forget")]


def test_a_metric_comes_after_what_it_needs():
    names = [request.name for request in ORDERED]
    assert names.index("prob") < names.index("utility")
    assert names.index("attack") < names.index("leak")


def test_a_missing_reference_is_said_in_words_and_not_guessed():
    run = lambda kind, data: RECORDS  # noqa: E731
    values = evaluate(needed(REQUESTS, ["leak"]), run, lambda name: Value.missing("no log"))
    assert values["leak"].not_computed == "no log"
    assert values["attack"].value == 0.5


def test_what_cannot_be_computed_is_known_before_the_model_is_asked():
    found = not_computable(ORDERED, lambda name: Value.missing("no log"), {})
    assert found == {"leak": "no log"}
    found = not_computable(ORDERED, lambda name: Value(0.5), {"forget": "gone"})
    assert found == dict.fromkeys(("utility", "prob", "memory", "rouge", "attack", "leak"), "gone")
    assert not_computable(ORDERED, lambda name: Value(0.5), {}) == {}


def test_missing_data_reach_every_metric_that_needs_them_and_are_not_asked_about():
    asked = []

    def run(kind, data):
        asked.append(data)
        return RECORDS

    values = evaluate(needed(REQUESTS, ["leak", "prob"]), run, Value.missing, {"holdout": "gone"})
    assert asked == ["forget"]
    assert values["attack"].not_computed == values["leak"].not_computed == "gone"
    assert values["prob"].not_computed is None


def test_unknown_and_circular_metrics_are_refused():
    with pytest.raises(InputError, match="Did you mean 'prob'"):
        needed(REQUESTS, ["porb"])
    circle = [Request(a, "model_utility", {"parts": [b]}) for a, b in (("a", "b"), ("b", "a"))]
    with pytest.raises(InputError, match="a -> b -> a"):
        needed(circle, ["a"])
    with pytest.raises(InputError, match="Metric a needs another metric"):
        needed([circle[0]], ["a"])
