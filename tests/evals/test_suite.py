"""A whole evaluation on a tiny model and a few rows."""

import copy
import json
import logging
import math
import re

import pytest
import tiny
import torch
from omegaconf import OmegaConf
from small_tofu import TEMPLATE_ARGS, eval_config, qa, write_splits

from unlora.cli.compose import composed
from unlora.config.metrics import shipped_metrics
from unlora.errors import InputError
from unlora.evals import LazyModel, build_suites, check
from unlora.evals.metrics import METRICS
from unlora.evals.passes import generation, gradient_norms, hidden_states, score_passes
from unlora.evals.passes.decoding import decoding_of
from unlora.evals.suite_checks import check_suite

NEED_RETAIN_LOG = {
    "forget_quality", "forget_quality_ks", "forget_quality_log10", "privleak", "s_mia_loss",
    "s_mia_zlib", "s_mia_min_k", "s_mia_min_k_plus_plus", "agg_privacy", "agg",
}  # fmt: skip
NEED_ROOT = {"mia_reference", "forget_fluency", "agg_utility", "agg"}
# eight letters are too few words to repeat any
WITHOUT_WORDS = {"forget_repetition", "retain_repetition"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Rows under the names of TOFU's splits."""
    return write_splits(tmp_path_factory.mktemp("data") / "TOFU")


@pytest.fixture
def adapted():
    """A model with an adapter that does something."""
    return tiny.adapted()


def same(values, tolerance=1e-6):
    return pytest.approx(values, abs=tolerance, nan_ok=True)


def build(folder, tokenizer, *overrides, only=None):
    config = eval_config(folder, *overrides)
    if only:
        config["tofu"]["metrics"] = {only: config["tofu"]["metrics"][only]}
    (suite,) = build_suites(config, tokenizer=tokenizer, template_args=TEMPLATE_ARGS)
    return suite


@pytest.mark.slow
def test_the_whole_suite_with_the_models_own_log_as_reference(folder, tokenizer, adapted, tmp_path):
    first = build(folder, tokenizer)
    without = first.evaluate(adapted, tmp_path)
    missing = NEED_RETAIN_LOG | {"agg_utility"}
    assert set(without) == set(first.config["metrics"]) - missing
    log = json.loads((tmp_path / "TOFU_EVAL.json").read_text())
    for name in missing:
        assert log[name]["agg_value"] is None
        key = "target_logs_path" if name == "agg_utility" else "retain_logs_path"
        assert key in log[name]["not_computed"], name
    summary = json.loads((tmp_path / "TOFU_SUMMARY.json").read_text())
    assert set(summary["not_computed"]) == missing

    again = tmp_path / "again"
    logs = [f"eval.tofu.{which}_logs_path={tmp_path}" for which in ("retain", "target")]
    summary = build(folder, tokenizer, *logs).evaluate(adapted, again)
    assert set(summary) == set(first.config["metrics"])
    assert summary["forget_quality"] == pytest.approx(1)
    assert summary["forget_quality_log10"] == pytest.approx(0, abs=1e-6)
    assert summary["forget_quality_ks"] == pytest.approx(0, abs=1e-6)
    assert summary["privleak"] == pytest.approx(0, abs=1e-6)
    assert [summary[name] for name in summary if name.startswith("s_mia")] == pytest.approx([1] * 4)
    assert summary["agg_privacy"] == pytest.approx(1)
    # a target that is as bad is no yardstick
    assert without["collapsed"] == summary["collapsed"] == 1
    assert {name: summary[name] for name in without} == same(without)
    written = json.loads((again / "TOFU_SUMMARY.json").read_text())
    assert written.pop("note").startswith("Target and retain model do not differ")
    undefined = {name for name, value in summary.items() if math.isnan(value)}
    assert set(written.pop("not_scored")) == undefined
    assert {name: math.nan if v is None else v for name, v in written.items()} == same(summary)
    # random weights write no word of an answer, so that there is no utility to lose
    assert summary["model_utility"] == 0
    assert undefined <= WITHOUT_WORDS | {"agg_utility", "agg"}


def test_the_log_has_the_published_names_and_shape(folder, tokenizer, adapted, tmp_path, realdata):
    build(folder, tokenizer).evaluate(adapted, tmp_path)
    ours = json.loads((tmp_path / "TOFU_EVAL.json").read_text())
    place = "eval_logs/tofu_Llama-3.2-1B-Instruct_full/evals_forget10/TOFU_EVAL.json"
    published = json.loads((realdata / place).read_text())
    assert set(published) <= set(ours)
    compared = {name for name in published if "not_computed" not in ours[name]}
    assert compared == set(published) - NEED_RETAIN_LOG
    for name in compared:
        assert set(ours[name]) - {"interval95"} == set(published[name]), name
        for part in ("forget", "holdout", None):
            entry, like = (log[name].get(part, log[name]) for log in (ours, published))
            if "value_by_index" in entry:
                assert set(entry["value_by_index"]["0"]) == set(like["value_by_index"]["0"]), name


@pytest.mark.slow
def test_each_question_reaches_the_model_once(folder, tokenizer, adapted, monkeypatch):
    seen = []
    modules = {"score": score_passes, "generate": generation, "gradient_norm": gradient_norms,
               "hidden": hidden_states}  # fmt: skip
    for name, module in modules.items():
        original = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *args, _name=name, _original=original, **kwargs: (
                seen.append((_name, len(args[1]))) or _original(*args, **kwargs)
            ),
        )
    build(folder, tokenizer).evaluate(adapted)
    # answers, paraphrases and perturbed answers of 5 forget and 6 retain rows, and so on
    answers = sum((5, 5, 10, 6, 6, 12, 4, 12, 3, 9, 6))
    root, written = 5 + 6, 5
    assert sorted(seen) == sorted(
        [("score", answers), ("score", root), ("score", written), ("gradient_norm", 5 + 6),
         ("generate", 5 + 6 + 4 + 3)]
    )  # fmt: skip


@pytest.mark.slow
def test_the_panel_is_cheap_and_takes_further_metrics(folder, tokenizer, model):
    suite = build(folder, tokenizer, "eval.tofu.panel_rows=2")
    panel = suite.evaluate(model, panel=True)
    assert sorted(panel) == ["exact_memorization", "forget_Q_A_Prob", "retain_Q_A_Prob"]
    wider = suite.evaluate(model, panel=True, also=["retain_Truth_Ratio"])
    assert set(wider) - set(panel) >= {"retain_Truth_Ratio", "retain_Q_A_PERT_Prob"}
    assert suite.metrics["forget_Q_A_Prob"] is False and suite.metrics["retain_Q_A_Prob"] is True
    assert "privleak" not in suite.metrics  # neither end is better
    with pytest.raises(InputError, match="Did you mean 'model_utility'"):
        suite.evaluate(model, panel=True, also=["model_utilty"])


def test_only_some_metrics_and_those_they_are_made_of(folder, tokenizer, model, tmp_path):
    suite = build(folder, tokenizer, "eval.tofu.only=[retain_Q_A_PERT_Prob,mia_loss]")
    assert set(suite.sources) == {"forget", "holdout", "retain_perturbed"}  # no others are read
    assert set(suite.evaluate(model, tmp_path)) == {"mia_loss", "retain_Q_A_PERT_Prob"}
    made_of = build(folder, tokenizer, "eval.tofu.only=[retain_Truth_Ratio]")
    assert "retain_Q_A_PERT_Prob" in made_of.metrics and "mia_loss" not in made_of.metrics
    assert suite.evaluate(model, panel=True) == {}  # nothing of the panel was asked for


@pytest.mark.parametrize("handler", ["probability", "rouge", "repetition"])
def test_rows_of_several_answers_are_refused_by_every_pass_that_takes_one(
    handler, folder, tokenizer
):
    slot = next(iter(METRICS[handler].inputs))
    metrics = {"mine": {"handler": handler, "inputs": {slot: "forget_perturbed"}}}
    config = eval_config(folder)
    config["tofu"] |= {"metrics": metrics, "panel": []}
    sentence = f"metric mine: {handler} wants one answer per row, and .* forget_perturbed has sev"
    with pytest.raises(InputError, match=sentence):
        build_suites(config, tokenizer=tokenizer, template_args=TEMPLATE_ARGS, prepare=False)


@pytest.mark.slow
def test_batch_size_does_not_change_the_summary(folder, tokenizer, model):
    small = build(folder, tokenizer, "eval.tofu.batch_size=1").evaluate(model)
    large = build(folder, tokenizer, "eval.tofu.batch_size=50").evaluate(model)
    assert small == same(large, 1e-5)
    assert {name for name, value in small.items() if math.isnan(value)} == WITHOUT_WORDS


@pytest.mark.slow
def test_an_empty_answer_is_counted_in_the_log(folder, tokenizer, model, tmp_path, caplog):
    data = tmp_path / "TOFU"
    data.mkdir()
    for file in folder.iterdir():
        (data / file.name).write_text(file.read_text())
    rows = [qa(n) for n in range(5)]
    rows[2]["answer"] = " "
    (data / "forget10_perturbed.json").write_text("\n".join(json.dumps(row) for row in rows))
    with caplog.at_level(logging.WARNING):
        build(data, tokenizer).evaluate(model, tmp_path)
    entry = json.loads((tmp_path / "TOFU_EVAL.json").read_text())["forget_Q_A_Prob"]
    assert entry["unscored"] == 1 and entry["value_by_index"]["2"]["prob"] is None
    assert entry["agg_value"] > 0
    assert "1 rows not scored" in caplog.text


@pytest.mark.slow
def test_a_dead_model_has_no_values_and_is_called_broken(
    folder, tokenizer, adapted, tmp_path, caplog
):
    build(folder, tokenizer).evaluate(adapted, tmp_path)  # the log of a model that is alive
    adapted.get_output_embeddings().weight.data.fill_(math.nan)
    logs = [f"eval.tofu.{which}_logs_path={tmp_path}" for which in ("retain", "target")]
    suite = build(folder, tokenizer, *logs)
    with caplog.at_level(logging.WARNING):
        values = suite.evaluate(adapted, tmp_path / "dead")
    assert set(values) == set(suite.config["metrics"])
    assert values.pop("collapsed") == 1
    assert all(math.isnan(value) for value in values.values())
    texts = [(tmp_path / "dead" / f"TOFU_{kind}.json").read_text() for kind in ("EVAL", "SUMMARY")]
    log, summary = (json.loads(text, parse_constant=pytest.fail) for text in texts)
    assert set(summary["not_scored"]) == set(values)
    broken = log.pop("collapsed")
    assert broken["agg_value"] == summary["collapsed"] == 1
    assert broken["note"] == "the utility has no value: 6 rows could not be scored"
    for name, entry in log.items():
        assert entry["agg_value"] is summary[name] is None
        assert entry["not_scored"] == summary["not_scored"][name]
    for name in ("exact_memorization", "extraction_strength", "forget_Q_A_ROUGE", "forget_Q_A_Prob",
                 "forget_Truth_Ratio", "forget_Q_A_PERT_Prob", "forget_repetition",
                 "forget_fluency"):  # fmt: skip
        assert log[name]["unscored"] == 5 and "not finite" in log[name]["not_scored"]
    for name in ("mia_loss", "mia_reference", "mia_gradnorm"):
        assert log[name]["unscored"] == 11
    assert log["forget_Q_A_ROUGE"]["value_by_index"]["0"]["generation"] is None
    # of its parts the one that could score fewest rows
    assert log["model_utility"]["unscored"] == 6
    assert log["model_utility"]["not_scored"].startswith("6 rows could not be scored")
    assert re.search("no value: .*model_utility.*: 6 rows could not be scored", caplog.text)


@pytest.mark.slow
def test_cut_rows_are_counted(folder, tokenizer, model, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        suite = build(folder, tokenizer)
        suite.evaluate(model, tmp_path)
    log = json.loads((tmp_path / "TOFU_EVAL.json").read_text())
    assert "max_length" not in caplog.text and not any("cut" in entry for entry in log.values())
    lengths = [len(answers[0].input_ids) for answers in suite.sources["forget"].answers]
    assert sorted(lengths) == [min(lengths)] * 2 + [min(lengths) + 1] * 3
    with caplog.at_level(logging.WARNING):
        override = f"+eval.tofu.data.forget.max_length={min(lengths)}"
        build(folder, tokenizer, override).evaluate(model, tmp_path)
    assert "3 of 5 rows of forget cut to max_length" in caplog.text
    log = json.loads((tmp_path / "TOFU_EVAL.json").read_text())
    # the prompts fit, so nothing that is written is cut
    of_forget = ("forget_Q_A_Prob", "exact_memorization", "extraction_strength", "mia_loss",
                 "mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "mia_gradnorm")  # fmt: skip
    found = {name: entry["cut"] for name, entry in log.items() if "cut" in entry}
    assert found == dict.fromkeys(of_forget, 3)


def test_each_data_set_reads_its_own_columns(folder, tokenizer):
    def lines(name):
        return [json.loads(line) for line in (folder / f"{name}.json").read_text().splitlines()]

    suite = build(folder, tokenizer)
    splits = {"forget": "forget10_perturbed", "retain": "retain_perturbed",
              "real_authors": "real_authors_perturbed", "world_facts": "world_facts_perturbed",
              "holdout": "holdout10"}  # fmt: skip
    columns = {"": "answer", "_paraphrased": "paraphrased_answer", "_perturbed": "perturbed_answer"}
    for name, source in suite.sources.items():
        part = next(part for part in splits if name.startswith(part))
        rows = lines(splits[part])
        answers = [row[columns[name.removeprefix(part)]] for row in rows]
        assert source.texts(range(len(source))) == [
            text for a in answers for text in (a if isinstance(a, list) else [a])
        ], name
        questions = [row["question"] for row in rows]
        assert all(q in text for q, text in zip(questions, source.prompt_texts, strict=True))
    assert len(suite.sources) == 11


@pytest.mark.slow
def test_metrics_without_their_reference_are_known_before_there_is_a_model(
    folder, tokenizer, model, tmp_path
):
    suite = build(folder, tokenizer)
    reasons = suite.not_computable
    assert set(reasons) == NEED_RETAIN_LOG | {"agg_utility"}
    assert "retain_logs_path" in reasons["forget_quality"]
    assert "target_logs_path" in reasons["agg_utility"]
    without_root = suite.not_computable_for(LazyModel.of(model))
    assert set(without_root) == NEED_RETAIN_LOG | NEED_ROOT
    assert "no adapter" in without_root["mia_reference"]
    suite.evaluate(model, tmp_path)
    retain = f"eval.tofu.retain_logs_path={tmp_path}"
    again = build(folder, tokenizer, retain)
    # the log of a model without a root has no fluency that a target could have had
    assert set(again.not_computable) == {"agg_utility", "agg"}
    both = build(folder, tokenizer, retain, f"eval.tofu.target_logs_path={tmp_path}")
    assert "forget_fluency" in both.not_computable["agg_utility"]


@pytest.mark.slow
def test_nothing_is_left_to_wish_for_with_a_retain_log_and_a_target_log(
    folder, tokenizer, adapted, tmp_path
):
    build(folder, tokenizer).evaluate(adapted, tmp_path)
    logs = [f"eval.tofu.{which}_logs_path={tmp_path}" for which in ("retain", "target")]
    suite = build(folder, tokenizer, *logs)
    assert suite.not_computable == suite.not_computable_for(LazyModel.of(adapted)) == {}


@pytest.mark.slow
def test_a_question_key_that_some_data_lack(folder, tokenizer, model):
    suite = build(folder, tokenizer, "eval.tofu.question_key=paraphrased_question")
    summary = suite.evaluate(model)
    assert "forget_Q_A_Prob" in summary and "mia_loss" not in summary
    assert "no column 'paraphrased_question'" in suite.missing["holdout"]
    with pytest.raises(InputError, match="Did you mean 'paraphrased_question'"):
        build(folder, tokenizer, "eval.tofu.question_key=paraphrased_qestion")


def test_a_log_is_not_replaced_against_the_users_will(folder, tokenizer, model, tmp_path):
    suite = build(folder, tokenizer, "eval.tofu.overwrite=false")
    (tmp_path / "TOFU_EVAL.json").write_text("{}")
    with pytest.raises(InputError, match="overwrite=true"):
        suite.evaluate(model, tmp_path)


def test_a_retain_log_of_other_data_is_refused(folder, tokenizer, model, tmp_path):
    entry = {"agg_value": 0.5, "value_by_index": {str(i): {"score": 1.0} for i in range(7)}}
    (tmp_path / "TOFU_EVAL.json").write_text(json.dumps({"forget_truth_ratio": entry}))
    with pytest.raises(InputError, match="has 7 rows for forget_truth_ratio, this evaluation 5"):
        build(folder, tokenizer, f"eval.tofu.retain_logs_path={tmp_path}")


@pytest.mark.default_cases(2)
@pytest.mark.parametrize(
    "override, message",
    [
        ("eval.tofu.handler=TOFUEvaluater", "Did you mean 'TOFUEvaluator'"),
        ("+eval.tofu.bach_size=3", "Did you mean 'batch_size'"),
        ("eval.tofu.batch_size=0", "must be greater than 0"),
        ("eval.tofu.metrics.privleak.handler=privleek", "Did you mean 'privleak'"),
        ("eval.tofu.metrics.mia_loss.inputs.holdout=holdut", "Did you mean 'holdout'"),
        ("~eval.tofu.metrics.wf_Truth_Ratio", "model_utility needs another metric"),
        ("eval.tofu.panel=[forget_Prob]", "Did you mean 'forget_Q_A_Prob'"),
        ("eval.tofu.only=[mia_los]", "metric in eval.tofu.only 'mia_los'. Did you mean 'mia_loss'"),
        (
            "eval.tofu.only=[mia_recall]",
            r"'mia_recall', .* Add it: \+eval/tofu_metrics=\[mia_recall\]",
        ),
        ("eval.tofu.only=[]", "eval.tofu.only is empty. Name metrics, or leave it out for all."),
        ("eval.tofu.only=mia_loss", "only is 'mia_loss' .text.; it must be a list"),
        ("eval.tofu.retain_logs_path=nowhere", "retain_logs_path 'nowhere' is not there"),
        ("eval.tofu.data.forget.handler=QADatset", "Did you mean 'QADataset'"),
        ("eval.tofu.data=3", "eval.tofu.data is 3; it must be a section with keys"),
        ("+eval.tofu.data.forget.stop=x", "data.forget.stop is 'x' .text.; it must be a list"),
        ("+eval.tofu.data.forget.several=x", "several is 'x' .text.; it must be true or false"),
        ("eval.tofu.data.forget.answer_key=null", "data.forget.answer_key is missing"),
    ],
)
def test_wrong_config_is_refused_before_there_is_a_model(folder, override, message):
    with pytest.raises(InputError, match=message):
        check(eval_config(folder, override))


def test_several_mistakes_are_reported_together(folder):
    with pytest.raises(InputError) as error:
        check(eval_config(folder, "+eval.tofu.bach_size=3", "eval.tofu.panel_rows=-1"))
    assert "bach_size" in str(error.value) and "panel_rows" in str(error.value)


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("key", ["retain_logs_path", "target_logs_path"])
@pytest.mark.parametrize("text", ["not json", "[]", '{"a": 1}'])
def test_a_log_that_is_none_is_refused(folder, tmp_path, text, key):
    file = tmp_path / "TOFU_EVAL.json"
    file.write_text(text)
    what = "is not JSON" if text == "not json" else "is no evaluation log"
    with pytest.raises(InputError, match=f"{key} '{re.escape(str(file))}' {what}"):
        check(eval_config(folder, f"eval.tofu.{key}={file}"))


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("suite", ["tofu", "muse", "lm_eval"])
def test_every_shipped_suite_passes_the_check(suite):
    cfg = composed("eval/" + suite, ["+paths.output_dir=unused"])
    check(OmegaConf.to_container(cfg.eval, resolve=True))


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("suite", ["tofu", "muse"])
def test_every_metric_can_be_added_from_the_command_line(suite):
    names = set(shipped_metrics(suite))
    shipped = composed("eval/" + suite, ["+paths.output_dir=unused"]).eval[suite]
    more = ",".join(sorted(names - set(shipped.metrics)))
    cfg = composed(
        "eval",
        [f"experiment=eval/{suite}/default", f"+eval/{suite}_metrics=[{more}]"],
    )
    assert set(shipped.metrics) < set(cfg.eval[suite].metrics) == names
    check(OmegaConf.to_container(cfg.eval, resolve=True))


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("suite", ["tofu", "muse", "rwku", "own"])
def test_one_switch_makes_every_rouge_of_a_suite_the_published_one(suite):
    config = eval_config("unused", suite=suite)[suite]
    found = {}
    for words in ("unicode", "ascii"):
        requests = check_suite(suite, {**config, "rouge": words, "target_logs_path": None})
        found[words] = [r.handler for r in requests if r.handler.startswith("rouge")]
    assert found["unicode"] and set(found["unicode"]) == {"rouge"}
    assert found["ascii"] == ["rouge_ascii"] * len(found["unicode"])


def test_the_shipped_metrics_have_the_published_settings():
    for suite, rouge_type in (("tofu", "rougeL_recall"), ("muse", "rougeL_f1")):
        metrics = eval_config("unused", suite=suite)[suite]["metrics"]
        found = {m["rouge_type"] for name, m in metrics.items() if name.endswith("_ROUGE")}
        assert found == {rouge_type}
    metrics = eval_config("unused")["tofu"]["metrics"]
    ratios = {n: m["aggregator"] for n, m in metrics.items() if m["handler"] == "truth_ratio"}
    of_forget = ("forget_truth_ratio", "forget_Truth_Ratio")
    assert ratios == dict.fromkeys(of_forget, "closer_to_1_better") | dict.fromkeys(
        ("retain_Truth_Ratio", "ra_Truth_Ratio", "wf_Truth_Ratio"), "true_better"
    ) | {"forget_truth_ratio_prob_mean": "prob_mean"}


def muse_rows():
    text = "The quiet river was long and golden near the harbour of Oslo"
    words = text.split()
    verbmem = [{"prompt": " ".join(words[:n]), "gt": " ".join(words[n:])} for n in (4, 6, 8)]
    pairs = [{"question": f"Where is {n}?", "answer": f"In Oslo {n}"} for n in range(4)]
    texts = [{"text": f"{text} {n} and {n * n}."} for n in range(4)]
    return {
        ("verbmem", "forget"): verbmem,
        ("knowmem", "forget_qa"): pairs,
        ("knowmem", "forget_qa_icl"): pairs[:2],
        ("knowmem", "retain_qa"): pairs[::-1],
        ("knowmem", "retain_qa_icl"): pairs[2:],
        ("privleak", "forget"): texts,
        ("privleak", "holdout"): [{"text": f"Unlike it, {text}."}, *texts[:3]],
    }


MUSE_TAGS = {"user_start_tag": "Question: ", "user_end_tag": "\n", "asst_start_tag": "Answer: ",
             "asst_end_tag": "\n\n"}  # fmt: skip


@pytest.fixture
def muse(monkeypatch):
    """The rows of MUSE that its suite will read."""
    rows = muse_rows()
    monkeypatch.setattr(
        "unlora.data.rows.load_rows", lambda path, name, split, datasets_dir: rows[name, split]
    )
    return rows


def test_muse_end_to_end(tokenizer, model, tmp_path, muse):
    rows = muse
    config = eval_config(None, suite="muse")
    (suite,) = build_suites(config, tokenizer=tokenizer, template_args=MUSE_TAGS)
    assert suite.sources["forget_knowmem"].prompt_texts[0].count("Question: ") == 3
    summary = suite.evaluate(model, tmp_path)
    log = json.loads((tmp_path / "MUSE_EVAL.json").read_text())
    need_log = {"privleak", "s_mia_loss", "s_mia_zlib", "s_mia_min_k", "s_mia_min_k_plus_plus",
                "forget_verbmem_rel_diff", "forget_knowmem_rel_diff",
                "retain_knowmem_rel_diff"}  # fmt: skip
    need_root = {"mia_reference", "forget_verbmem_fluency"}
    assert set(summary) == set(config["muse"]["metrics"]) - need_log - need_root
    for names, why in ((need_log, "retain_logs_path"), (need_root, "no adapter")):
        assert all(why in log[name]["not_computed"] for name in names)
    forget, holdout = (
        [row["score"] for row in log["mia_min_k"][part]["value_by_index"].values()]
        for part in ("forget", "holdout")
    )
    assert holdout[1:] == forget[:3] and len({*forget, *holdout}) == 5  # the same texts, and others
    found = [(here < there) + (here == there) / 2 for here in forget for there in holdout]
    assert summary["mia_min_k"] == sum(found) / 16
    # plain text has no end token: every token of the continuation counts
    text = suite.sources["verbmem"].texts([0])[0]
    assert text.strip() == rows["verbmem", "forget"][0]["gt"]
    assert set(suite.evaluate(model, panel=True)) == {"exact_memorization", "retain_knowmem_ROUGE"}


def say(model, script):
    """Make the model write these tokens after any prompt, and the last of them ever after."""
    decoding_of(model.eval(), pad_id=0)  # else it is tried, and takes tokens of the script
    steps = iter([*script, *[script[-1]] * 1000])

    def scripted(module, args, logits):
        logits = torch.zeros_like(logits)
        logits[..., next(steps)] = 1
        return logits

    model.lm_head.register_forward_hook(scripted)


def written(suite, model, folder):
    suite.evaluate(model, folder)
    file = folder / f"{suite.kind}_EVAL.json"
    (entry,) = json.loads(file.read_text()).values()
    (text,) = {row["generation"] for row in entry["value_by_index"].values()}
    return text


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("metric", ["forget_knowmem_ROUGE", "retain_knowmem_ROUGE"])
@pytest.mark.parametrize("stop", ["\n\n", "\nQuestion", "Question:"])
def test_a_generation_ends_before_the_next_question(stop, metric, tokenizer, model, tmp_path, muse):
    config = eval_config(None, suite="muse")
    metrics = config["muse"]["metrics"]
    config["muse"] |= {
        "metrics": {metric: metrics[metric]},
        "panel": [],
        "batch_size": 50,
    }
    (suite,) = build_suites(config, tokenizer=tokenizer, template_args=MUSE_TAGS)
    say(model, tokenizer(f"In Oslo 0 {stop} what?").input_ids)
    assert written(suite, model, tmp_path) == "In Oslo 0"


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("end", ["<|turn_end|>", "<|end|>"])
def test_a_generation_ends_at_the_end_of_the_turn_and_of_the_text(
    end, folder, tokenizer, model, tmp_path
):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|turn_end|>"]}
    )
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|turn_end|>")
    suite = build(folder, tokenizer, "eval.tofu.panel=[]", "eval.tofu.batch_size=50",
                  only="forget_Q_A_ROUGE")  # fmt: skip
    assert suite.chat.end_id != tokenizer.eos_token_id
    say(model, tokenizer(f"Ana{end}more").input_ids)
    assert written(suite, model, tmp_path) == "Ana"
