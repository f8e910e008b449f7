"""One whole run of each kind through the entry points, on a tiny model and pocket's rows."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tiny import llama, tokenizer

from unlora.cli.compose import composed
from unlora.cli.main import normalised
from unlora.data.pocket import rows
from unlora.errors import GuardError, InputError
from unlora.evals.passes import batching
from unlora.model import get_model
from unlora.model.probe import Probe
from unlora.recipes import evaluate as evaluation
from unlora.recipes import train
from unlora.recipes.who_saw import who_saw
from unlora.trainer.term_losses import TermLosses

METRICS = ("forget_Q_A_Prob", "retain_Q_A_Prob", "exact_memorization", "forget_Q_A_ROUGE")
COMMON = (
    "model.model_args.torch_dtype=float32",
    "model.lora_config.r=4",
    "eval.tofu.panel_rows=2",
    "eval.tofu.max_new_tokens=2",
    "forget_split=forget01",
    "holdout_split=holdout01",
)
TRAINING = ("trainer.args.max_steps=4", "trainer.args.per_device_train_batch_size=2",
            "trainer.args.learning_rate=1e-2", "trainer.args.disable_tqdm=true")  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama(max_position_embeddings=512).save_pretrained("root")
    tokenizer().save_pretrained("root")
    return tmp_path


def config(name, experiment, *overrides):
    weights = "model.tokenizer_args.pretrained_model_name_or_path=root"
    words = [f"experiment={experiment}", weights, *COMMON, *overrides]
    cfg = composed(name, normalised(words))
    OmegaConf.set_struct(cfg, False)
    cfg.eval.tofu.metrics = {m: cfg.eval.tofu.metrics[m] for m in METRICS}
    return cfg


def weights(path):
    return f"model.model_args.pretrained_model_name_or_path={path}"


def finetune(*overrides):
    return train.run(
        config("train", "finetune/pocket/lora", weights("root"), *TRAINING, *overrides)
    )


def unlearn(*overrides):
    return train.run(config("unlearn", "unlearn/pocket/lora", "trainer=NPO", *TRAINING, *overrides))


def manifest(path):
    return json.loads((path / "manifest.json").read_text())


@pytest.mark.slow
def test_finetune_unlearn_and_evaluate(folder, caplog):
    caplog.set_level("INFO")
    finetune("task_name=full", "eval=null")
    assert caplog.messages[-1].startswith("next: unlora chat ./saves/finetune/full, or: unlora unl")
    assert not (folder / "saves" / "finetune" / "full" / "evals").exists()
    start = weights("saves/finetune/full")
    summary = unlearn(
        start, "task_name=npo", "trainer.args.eval_strategy=steps", "trainer.args.eval_steps=2",
        "trainer.args.save_strategy=steps", "trainer.args.save_steps=2",
        "trainer.args.load_best_model_at_end=true",
        "trainer.args.metric_for_best_model=forget_Q_A_ROUGE", "trainer.args.eval_on_start=true",
    )  # fmt: skip
    run = folder / "saves" / "unlearn" / "npo"
    table, finished, following = caplog.messages[-3:]
    assert [line.split()[0] for line in table.splitlines()] == sorted(METRICS)
    assert finished == "finished: ./saves/unlearn/npo" and "unlora report" in following
    written = manifest(run)
    assert set(written["guards"]) == {
        "start equals target", "gradients alive", "saved equals trained", "evaluation is pure",
    }  # fmt: skip
    assert written["effective_batch"] == 2 and written["optimiser_steps"] == 4
    assert written["data"]["forget"]["rows"] == 6 == written["row_hashes"]["rows"]["forget"]
    answer = who_saw([dict(rows("forget01")[0])], [run])
    assert [(x.link, x.part, x.match) for x in answer.rows[0]] == [
        (run, "forget", "exact"), (Path("saves/finetune/full"), "train", "exact")
    ]  # fmt: skip
    assert written["seed"] == 42 and set(summary) == set(METRICS)
    panels = [e for e in written["training"] if "eval_forget_Q_A_ROUGE" in e]
    assert len(panels) == 3 and all("eval_retain_Q_A_Prob" in e for e in panels)
    assert (run / "checkpoint-2" / "adapter_model.safetensors").is_file()
    log = json.loads((run / "evals" / "TOFU_EVAL.json").read_text())
    assert log["forget_Q_A_Prob"]["agg_value"] == pytest.approx(summary["forget_Q_A_Prob"])

    again = evaluation.run(
        config("eval", "eval/pocket/default", "model=pocket-lora", weights(run), "task_name=npo")
    )
    for metric in METRICS:
        assert again[metric] == pytest.approx(summary[metric], abs=1e-5)
    assert (folder / "saves" / "eval" / "npo" / "eval_manifest.json").is_file()


@pytest.mark.slow
def test_an_interrupted_run_resumes_where_it_was(folder):
    finetune("task_name=full")
    save = ("trainer.args.save_strategy=steps", "trainer.args.save_steps=2")
    unlearn(weights("saves/finetune/full"), "task_name=npo", *save)
    run = folder / "saves" / "unlearn" / "npo"

    def said():
        section = {"model_args": {"pretrained_model_name_or_path": str(run)}}
        return Probe.take(get_model(section, trainable=False)[0])

    whole = said()
    for left in ("checkpoint-4/trainer_state.json", "adapter_model.safetensors", "manifest.json"):
        (run / left).unlink()
    (run / "checkpoint-4").rename(folder / "gone")
    resume = "trainer.args.resume_from_checkpoint=true"
    unlearn(weights("saves/finetune/full"), "task_name=npo", *save, resume)
    assert whole.difference(get_model(
        {"model_args": {"pretrained_model_name_or_path": str(run)}}, trainable=False
    )[0])[0] == 0  # fmt: skip
    assert not (folder / "saves" / "unlearn" / "npo.previous-1").exists()
    assert manifest(run)["resumed"][0]["checkpoint"] == "checkpoint-2"
    assert manifest(run)["resumed"][0]["changed"] == {}
    kept = (run / "run_config.json").read_text()
    changed = (*save, resume, "trainer.args.learning_rate=2e-2", "trainer.method_args.beta=0.5")
    with pytest.raises(InputError) as error:
        unlearn(weights("saves/finetune/full"), "task_name=npo", *changed)
    assert "trainer.args.learning_rate: 0.01 then, 0.02 now" in str(error.value)
    assert (run / "run_config.json").read_text() == kept, "nothing is written"
    with pytest.raises(InputError, match="belongs on .*full, but the model is root"):
        unlearn(weights("root"), "task_name=npo", *save, resume)


@pytest.mark.slow
def test_a_checkpoint_that_is_not_there_is_one_sentence(folder):
    with pytest.raises(InputError, match="has no checkpoint"):
        finetune("task_name=full", "trainer.args.resume_from_checkpoint=true")
    with pytest.raises(InputError, match="is no checkpoint"):
        finetune("task_name=full", "trainer.args.resume_from_checkpoint=saves")


@pytest.mark.slow
def test_a_run_never_overwrites_the_model_it_starts_from(folder):
    finetune("task_name=full")
    with pytest.raises(InputError, match="holds the model it starts from"):
        unlearn(weights("saves/finetune/full"), "paths.output_dir=saves/finetune/full")
    assert (folder / "saves" / "finetune" / "full" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_a_failure_before_training_leaves_the_earlier_run_alone(folder):
    finetune("task_name=full")
    (folder / "root" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="damaged"):
        finetune("task_name=full")
    assert not (folder / "saves" / "finetune" / "full.previous-1").exists()


@pytest.mark.slow
def test_what_an_earlier_run_left_is_never_taken_for_this_ones(folder):
    finetune("task_name=full")
    run = folder / "saves" / "finetune" / "full"
    (run / "manifest.json").unlink()  # as if it had been interrupted at the very end
    finetune("task_name=full", "model.use_lora=false")
    assert not (run / "lineage.json").exists() and (run / "model.safetensors").is_file()
    assert (folder / "saves" / "finetune" / "full.previous-1" / "lineage.json").is_file()


@pytest.mark.slow
def test_divergence_ends_the_run_in_words(folder):
    with pytest.raises(GuardError, match="divergence: retain_loss is"):
        finetune("task_name=full", "trainer.args.learning_rate=1e30", "trainer.args.optim=sgd",
                 "trainer.args.max_grad_norm=0.0")  # fmt: skip


@pytest.mark.slow
def test_where_memory_runs_out_log_and_manifest_say_so_and_the_result_is_the_same(
    folder, monkeypatch, caplog
):
    start = weights("root")
    whole = unlearn(start, "task_name=whole")
    losses, asked = TermLosses.compute, batching._with_memory

    def little_for_training(self, model, inputs, *args, **kwargs):
        if len(inputs["forget"]["number"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(self, model, inputs, *args, **kwargs)

    def little_for_evaluation(ask, batch):
        def fail(batch):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return asked(fail if len(batch) > 1 else ask, batch)

    monkeypatch.setattr(TermLosses, "compute", little_for_training)
    monkeypatch.setattr(batching, "_with_memory", little_for_evaluation)
    summary = unlearn(start, "task_name=halved", "eval.tofu.cache=false")
    assert summary == pytest.approx(whole, rel=1e-4)
    run = folder / "saves" / "unlearn"
    assert "memory_ran_out" not in manifest(run / "whole")
    said = manifest(run / "halved")["memory_ran_out"]
    assert said["training"] == {"rows_at_once": 1, "of": 2, "from_step": 1}
    assert said["evaluation"] and all("going on with half" in line for line in said["evaluation"])
    assert all(line in caplog.text for line in said["evaluation"])
    assert "Memory ran out at step 1 on 2 rows" in caplog.text
