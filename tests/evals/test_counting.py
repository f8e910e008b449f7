"""Every metric that TOFU has, in one evaluation that asks nothing twice and changes nothing."""

import copy
import json
import math

import pytest
import small_tofu
import tiny
import torch

from unlora.evals import build_suites
from unlora.evals.eval_model import LazyModel
from unlora.evals.pass_plan import questions
from unlora.evals.passes import (
    generation,
    gradient_norms,
    hidden_states,
    loglikelihood,
    score_passes,
    text_classifier,
)
from unlora.evals.runner import PassRunner
from unlora.forward import vocab_stats
from unlora.model.guards import evaluation_is_pure


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("counting"), tiny.tokenizer()
    data = small_tofu.write_splits(folder / "TOFU", holdout=9)
    config = small_tofu.eval_config(data, "eval.tofu.batch_size=null")
    config["tofu"] |= {
        "metrics": small_tofu.every_metric(),
        "fluency_classifier": small_tofu.save_classifier(folder / "classifier", tokenizer),
    }
    (suite,) = build_suites(config, tokenizer=tokenizer, template_args=small_tofu.TEMPLATE_ARGS)
    return suite


@pytest.fixture
def model():
    # room for questions after seven others
    return tiny.adapted(tiny.llama(max_position_embeddings=4096))


@pytest.fixture
def asked(monkeypatch):
    """The questions in the order in which they were answered by a model."""
    found = []
    original = PassRunner._run

    def watched(self, name, data):
        found.extend((name, one) for one in data)
        return original(self, name, data)

    monkeypatch.setattr(PassRunner, "_run", watched)
    return found


def test_every_question_is_asked_exactly_once(suite, model, asked, tmp_path):
    summary = suite.evaluate(model, tmp_path)
    assert len(asked) == len(set(asked)) and set(asked) == set(questions(suite.requests))
    counts = {name: sum(one == name for one, _ in asked) for name, _ in asked}
    # forget, its paraphrases and perturbations, holdout, both after others, retain likewise, ...
    assert counts == {"score": 13, "score_root": 3, "hidden": 1, "hidden_root": 1,
                      "gradient_norm": 2, "generate": 5, "reread": 2, "legible": 1}  # fmt: skip
    need_logs = set(suite.not_computable)
    assert set(summary) == set(small_tofu.every_metric()) - need_logs
    log = json.loads((tmp_path / "TOFU_EVAL.json").read_text())
    for name in ("mia_recall", "mia_reference", "mia_gradnorm", "forget_fluency", "retain_fluency",
                 "forget_Q_A_gibberish", "representation_similarity"):  # fmt: skip
        assert math.isfinite(log[name]["agg_value"]), name
    # two of nine examples are not among the seven that are shown
    assert log["mia_recall"]["unscored"] == 7


@pytest.mark.slow
def test_each_pass_is_one_call_whatever_the_number_of_its_data(suite, model, monkeypatch):
    calls = []
    modules = {"score": score_passes, "generate": generation, "gradient_norm": gradient_norms,
               "hidden": hidden_states, "fluency_prob": text_classifier}  # fmt: skip
    for name, module in modules.items():
        original = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *args, _name=name, _original=original, **kwargs: (
                calls.append(_name) or _original(*args, **kwargs)
            ),
        )
    suite.evaluate(model)
    # answers; those under the root; texts under the root. Two models are looked into.
    assert sorted(calls) == sorted(
        ["score"] * 3 + ["hidden"] * 2 + ["generate", "gradient_norm", "fluency_prob"]
    )


def prefixes(tree, rows):
    """What stands before each scored token of the rows of a tree."""
    return {
        tuple(rows[i].input_ids[:t])
        for i in tree.rows
        for t in range(1, len(rows[i].labels))
        if rows[i].labels[t] != -100
    }


@pytest.mark.slow
def test_only_what_predicts_a_scored_token_meets_the_vocabulary(suite, model, monkeypatch):
    rows = [row for source in suite.sources.values() for some in source.answers for row in some]
    ask = lambda: loglikelihood.score(  # noqa: E731
        model, rows, [""] * len(rows), pad_id=0, end_id=None
    )
    expected = ask()  # what the architecture allows is known from here on
    places, in_body, at_head, made = [], [], [], []

    def numbers_of(products, at, labels):
        places.append((len(products[0][0]), len(at)))
        return vocab_stats.numbers_of(products, at, labels)

    original = loglikelihood.trees
    monkeypatch.setattr(loglikelihood, "numbers_of", numbers_of)
    monkeypatch.setattr(
        loglikelihood, "trees", lambda *a, **k: made.extend(found := original(*a, **k)) or found
    )
    model.get_output_embeddings().get_base_layer().register_forward_pre_hook(
        lambda module, args: at_head.append(args[0].numel())
    )
    model.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: in_body.append(args[0].numel())
    )
    found = ask()
    assert all((a.logp == b.logp).all() for a, b in zip(found, expected, strict=True))
    num_scored = sum(len(record.logp) for record in found)
    num_places = sum(len(prefixes(tree, rows)) for tree in made)
    assert at_head == [0] * len(in_body) and len(places) == len(in_body)
    assert sum(at for _, at in places) == num_scored
    assert sum(distinct for distinct, _ in places) == num_places < num_scored
    # trees: less is read than the rows have, padding included
    read = sum(len(row.input_ids) for row in rows)
    assert sum(in_body) < 0.8 * read
    loglikelihood._ABILITIES[model] = loglikelihood.Abilities(trees=False, blocks=True)
    with_trees = sum(in_body)
    in_body.clear()
    ask()
    assert sum(in_body) > 1.2 * with_trees


def test_whole_logits_are_of_those_places_only(suite, model, monkeypatch):
    """Where the head cannot be asked in blocks it is still asked about these places only."""
    rows = [row for some in suite.sources["forget_perturbed"].answers for row in some]
    ask = lambda: loglikelihood.score(  # noqa: E731
        model, rows, [""] * len(rows), pad_id=0, end_id=None
    )
    ask()
    loglikelihood._ABILITIES[model] = loglikelihood.Abilities(trees=True, blocks=False)
    seen, made = [], []
    original = loglikelihood.trees
    monkeypatch.setattr(
        loglikelihood, "trees", lambda *a, **k: made.extend(found := original(*a, **k)) or found
    )
    model.get_output_embeddings().get_base_layer().register_forward_pre_hook(
        lambda module, args: seen.append(args[0].shape[1])
    )
    num_scored = sum(len(record.logp) for record in ask())
    assert sum(seen) == sum(len(prefixes(tree, rows)) for tree in made) < num_scored


@pytest.mark.slow
def test_an_evaluation_with_every_pass_changes_nothing(suite, model):
    model.train()
    model.base_model.model.model.layers[0].eval()  # a mode of its own
    weights = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    # transformers puts hooks of its own on layers that are asked for their states, for good
    model(torch.tensor([[5, 6]]), output_hidden_states=True)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    adapters = [m.active_adapters for m in model.modules() if hasattr(m, "lora_A")]
    state = torch.get_rng_state()
    with evaluation_is_pure(model):
        suite.evaluate(model)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert [m.active_adapters for m in model.modules() if hasattr(m, "lora_A")] == adapters
    assert not any(m.disable_adapters for m in model.modules() if hasattr(m, "lora_A"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_plan_says_what_would_be_asked(suite, model, asked):
    planned = suite.plan(LazyModel.of(model))
    assert [(row["pass"], row["data"]) for row in planned] == questions(suite.requests)
    assert asked == [] and not any(row["kept"] for row in planned)
    by_question = {(row["pass"], row["data"]): row for row in planned}
    assert by_question["score", "forget_perturbed"]["rows"] == 10
    prompts = suite.sources["forget"].prompts
    assert by_question["generate", "forget"]["tokens"] == sum(len(p) + 8 for p in prompts)
