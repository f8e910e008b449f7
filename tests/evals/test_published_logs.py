"""Published logs recompute from their own per-example values."""

import math
import zlib

import numpy as np
import pytest
from omegaconf import OmegaConf

from unlora.cli.compose import composed
from unlora.evals.metrics import METRICS
from unlora.evals.metrics.aggregates import agg_memorization, agg_privacy, model_utility
from unlora.evals.metrics.mia import mia_gradnorm
from unlora.evals.metrics.privacy import privleak, privleak_bounded
from unlora.evals.metrics.probability import probability_w_options, truth_ratio
from unlora.evals.metrics.rouge import rouge, rouge_ascii
from unlora.evals.metrics.tofu import forget_quality, forget_quality_ks, forget_quality_log10
from unlora.evals.pass_plan import read_request
from unlora.evals.passes.declaration import pass_of
from unlora.evals.records import Generated, Scored
from unlora.results.baseline_log import BaselineLog, find_log
from unlora.results.value import Value

FULL = "tofu_Llama-3.2-1B-Instruct_full/evals_forget10"
RETAIN = "tofu_Llama-3.2-1B-Instruct_retain90"
TARGET, RETRAIN = "muse_Llama-2-7b-hf_News_target", "muse_Llama-2-7b-hf_News_retrain"
ATTACKS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")
OTHER_ATTACKS = ("mia_gradnorm", "mia_reference")  # not in every log
UTILITY = [
    *("retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio"),
    *("ra_Q_A_Prob_normalised", "ra_Q_A_ROUGE", "ra_Truth_Ratio"),
    *("wf_Q_A_Prob_normalised", "wf_Q_A_ROUGE", "wf_Truth_Ratio"),
]


@pytest.fixture
def logs(realdata):
    folders = {"full": (FULL, "TOFU"), "retain": (RETAIN, "TOFU"),
               "target": (TARGET, "MUSE"), "retrain": (RETRAIN, "MUSE")}  # fmt: skip
    return {
        name: BaselineLog(realdata / "eval_logs" / folder, kind)
        for name, (folder, kind) in folders.items()
    }


def assert_recomputes(log, name, value):
    assert value.value == pytest.approx(log.value(name).value, abs=1e-6), name


@pytest.mark.parametrize("which", ["full", "retain"])
def test_tofu_aggregates_recompute(logs, which):
    log = logs[which]
    value = log.value
    for name, entry in log.entries.items():
        if name.endswith("_Prob"):
            found = entry.as_value()
            assert_recomputes(log, name, Value.mean(found.per_example, "prob"))
            for row in found.per_example:
                expected = np.exp(-np.array(row["avg_loss"]))
                np.testing.assert_allclose(row["prob"], expected, atol=1e-6)
    for who, correct in (("forget", "PARA_Prob"), ("retain", "PARA_Prob"), ("ra", "Prob"),
                         ("wf", "Prob")):  # fmt: skip
        aggregator = "closer_to_1_better" if who == "forget" else "true_better"
        name = "forget_truth_ratio" if who == "forget" else f"{who}_Truth_Ratio"
        if name not in log.entries:
            name = f"{who}_Truth_Ratio"
        pair = value(f"{who}_Q_A_{correct}"), value(f"{who}_Q_A_PERT_Prob")
        found = truth_ratio(*pair, aggregator=aggregator)
        assert_recomputes(log, name, found)
        np.testing.assert_allclose(
            found.column("score"), value(name).column("score"), rtol=1e-5, atol=1e-6
        )
    for who in ("ra", "wf"):
        pair = value(f"{who}_Q_A_Prob"), value(f"{who}_Q_A_PERT_Prob")
        assert_recomputes(log, f"{who}_Q_A_Prob_normalised", probability_w_options(*pair))
    assert_recomputes(log, "model_utility", model_utility([value(name) for name in UTILITY]))


def test_the_retain_log_gives_the_published_forget_quality_and_privleak(logs):
    full, retain = logs["full"], logs["retain"]
    name = "forget_truth_ratio"
    quality = forget_quality(full.value(name), retain.value(name)).value
    published = full.value("forget_quality").value
    assert math.log10(quality) == pytest.approx(math.log10(published), abs=1e-6)
    leak = privleak(full.value("mia_min_k"), retain.value("mia_min_k"))
    assert_recomputes(full, "privleak", leak)


def test_forget_quality_says_the_same_in_three_ways(logs):
    ratios = [logs[which].value("forget_truth_ratio") for which in ("full", "retain")]
    three = (forget_quality, forget_quality_log10, forget_quality_ks)
    p, log10, ks = (metric(*ratios).value for metric in three)
    assert log10 == pytest.approx(math.log10(p)) and log10 < -20
    # the statistic by its definition: the largest distance of two cumulative distributions
    grid = np.concatenate([ratio.column("score") for ratio in ratios])
    below = [(ratio.column("score") <= grid[:, None]).mean(axis=1) for ratio in ratios]
    assert ks == pytest.approx(np.abs(below[0] - below[1]).max()) and 0.3 < ks < 0.5


def test_the_aggregates_of_the_report_part_the_target_from_the_retain_model(logs):
    found = {}
    for which in ("full", "retain"):
        value = logs[which].value
        para, wrong = value("forget_Q_A_PARA_Prob"), value("forget_Q_A_PERT_Prob")
        share = truth_ratio(para, wrong, aggregator="prob_mean")
        rows = zip(para.per_example, wrong.per_example, strict=True)
        literal = [
            row["prob"] / (row["prob"] + math.exp(-np.mean(others["avg_loss"])))
            for row, others in rows
        ]
        assert share.value == pytest.approx(np.mean(literal), abs=1e-6)
        parts = [value("extraction_strength"), value("exact_memorization"), para, share]
        memorization = agg_memorization(*parts).value
        assert memorization == pytest.approx(4 / sum(1 / (1 - part.value) for part in parts))
        closeness = [privleak_bounded(value(a), logs["retain"].value(a)) for a in ATTACKS]
        found[which] = memorization, agg_privacy(closeness).value
    # the target's attacks are more than twice the retain model's, so s_MIA is 0
    assert found["full"] == (pytest.approx(0.0868, abs=1e-4), 0)
    assert found["retain"] == (pytest.approx(0.5848, abs=1e-4), 1)


def test_the_muse_retrain_log_gives_the_published_privleak(logs):
    target, retrain = logs["target"], logs["retrain"]
    leak = privleak(target.value("mia_min_k"), retrain.value("mia_min_k"))
    assert_recomputes(target, "privleak", leak)


@pytest.mark.parametrize("which", ["full", "retain", "target", "retrain"])
def test_membership_and_memorization_recompute(logs, which):
    log = logs[which]
    for name in (*ATTACKS, *(name for name in OTHER_ATTACKS if name in log.entries)):
        value = log.value(name)
        parts = [[row["score"] for row in part] for part in value.per_example.values()]
        found = mia_gradnorm(*parts)  # the area under the curve of any two lists of scores
        assert_recomputes(log, name, found)
        assert found.interval[0] <= found.value <= found.interval[1]
    for name in ("exact_memorization", "extraction_strength"):
        assert_recomputes(log, name, Value.mean(log.value(name).per_example, "score"))


@pytest.mark.parametrize("which", ["full", "retain", "target", "retrain"])
def test_rouge_recomputes_from_every_stored_text(logs, which):
    log = logs[which]
    rouge_type = "rougeL_recall" if which in ("full", "retain") else "rougeL_f1"
    names = [name for name in log.entries if name.endswith("_ROUGE")]
    assert names
    for name in names:
        rows = log.value(name).per_example
        said = [Generated(r["input"], r["ground_truth"], r["generation"]) for r in rows]
        found = rouge_ascii(said, rouge_type=rouge_type)
        for expected, row in zip(rows, found.per_example, strict=True):
            for key in ("rouge1_recall", "rougeL_f1", "rougeL_recall"):
                assert row[key] == pytest.approx(expected[key], abs=1e-6)
        assert_recomputes(log, name, found)
        default = rouge(said, rouge_type=rouge_type).value
        assert default == pytest.approx(found.value, abs=0.0037)  # as docs/metrics.md has it


def records(request, log):
    """Answers that give a metric on data the published numbers of each example."""
    value = log.value(request.name)
    rows = value.per_example
    if request.handler == "rouge":
        return [[Generated(r["input"], r["ground_truth"], r["generation"]) for r in rows]]
    if request.handler == "probability":
        return [[answer(row["avg_loss"]) for row in rows]]
    if request.handler == "probability_of_each":
        return [[[answer(loss) for loss in row["avg_loss"]] for row in rows]]
    size = len(zlib.compress(b"text")) if request.handler == "mia_zlib" else 1
    return [[answer(row["score"] * size) for row in rows[part]] for part in request.inputs]


def answer(loss):
    one = np.ones(1, dtype=np.float64)
    return Scored(-loss * one, one > 0, 0 * one, one, "text", ended=False)


@pytest.mark.parametrize(
    "suite, which, reference",
    [("tofu", "full", "retain"), ("tofu", "retain", "retain"), ("muse", "target", "retrain")],
)
def test_the_shipped_metrics_give_the_published_values(logs, suite, which, reference):
    log, retain = logs[which], logs[reference]
    cfg = composed("eval/" + suite, ["+paths.output_dir=unused"])
    metrics = OmegaConf.to_container(cfg.eval[suite].metrics)
    # what the log holds; the truth ratio of forget data is there under one name
    known = set(metrics) & {*log.entries, "forget_Truth_Ratio"}
    # neither tokens nor gradients nor what the root model makes of the answers are in the log
    known -= {"exact_memorization", "extraction_strength", "mia_gradnorm", "mia_reference"}
    if which == reference:
        known -= {"forget_quality", "privleak"}  # published against no model at all
    for name in known:
        request = read_request(name, metrics[name])
        sources = request.sources()
        if any(pass_of(kind) for kind, _ in sources):
            inputs = records(request, log)
        else:
            inputs = [(retain if kind == "reference" else log).value(of) for kind, of in sources]
            inputs = [inputs] if request.handler == "model_utility" else inputs
        # published ROUGE sees ASCII words only
        handler = "rouge_ascii" if request.handler == "rouge" else request.handler
        found = METRICS[handler].fn(*inputs, **request.settings)
        published = "forget_truth_ratio" if name == "forget_Truth_Ratio" else name
        assert found.value == pytest.approx(log.value(published).value, rel=1e-5, abs=1e-6), name
    assert len(known) >= (24 if suite == "tofu" else 5)


def test_a_run_folder_stands_for_its_log(realdata):
    folder = realdata / "eval_logs" / RETAIN
    assert find_log(folder, "TOFU") == find_log(folder / "TOFU_EVAL.json", "TOFU")
