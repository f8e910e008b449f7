"""What changes between a run and its resumption is noticed, and what may change is not."""

import copy

import pytest
import torch
from small_trainer import small_trainer, trained
from tiny import rows

from unlora.data.pairs import Parts
from unlora.errors import InputError
from unlora.trainer import resume
from unlora.trainer.argument_table import DECIDES, FREE, IGNORED, ONLY, OURS
from unlora.trainer.arguments import training_arguments
from unlora.trainer.checkpoints import write_record
from unlora.trainer.resume import differences, resumption, run_settings

CONFIG = {
    "model": {
        "use_lora": True, "lineage": "auto", "as_trained": False, "targets": {},
        "model_args": {"pretrained_model_name_or_path": "a", "torch_dtype": "bfloat16"},
        "tokenizer_args": {"pretrained_model_name_or_path": "a"},
        "template_args": {"apply_chat_template": True},
        "lora_config": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": ["q"]},
    },
    "trainer": {
        "handler": "NPO", "plugins": {}, "on_divergence": "stop", "on_change": "stop",
        "method_args": {"beta": 0.1, "alpha": 1.0, "retain_loss_type": "NLL"}, "args": {},
    },
    "eval": {"own": {"handler": "OwnDataEvaluator", "panel_rows": 5, "output_dir": "a"}},
}  # fmt: skip
ARGS = {"report_to": "none", "learning_rate": 1e-4, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "seed": 1}  # fmt: skip
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "a", "eval_strategy": "epoch",
        "save_strategy": "epoch"}  # fmt: skip


def settings(config=CONFIG, *, rows_of=None, root=("x", ()), anchor="forget", **args):
    parts = rows_of or {"forget": rows([3, 4, 5]), "retain": rows([2, 6], seed=1)}
    made = training_arguments(ARGS | args, output_dir="anywhere")
    return run_settings(config, made, Parts(parts, anchor), root)


def edited(where, value):
    config = copy.deepcopy(CONFIG)
    *above, last = where.split(".")
    section = config
    for key in above:
        section = section[key]
    section[last] = value
    return config


def with_rows(**parts):
    return {"forget": rows([3, 4, 5]), "retain": rows([2, 6], seed=1)} | parts


def other_label():
    changed = rows([3, 4, 5])
    changed[1].labels[-1] += 1
    return changed


OF_ARGS = {
    "num_train_epochs": 4, "max_steps": 9, "learning_rate": 2e-4, "weight_decay": 0.1,
    "warmup_steps": 3, "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2},
    "optim": "sgd", "optim_args": "a=1", "optim_target_modules": "all-linear", "adam_beta1": 0.8,
    "adam_beta2": 0.9, "adam_epsilon": 1e-6, "max_grad_norm": 0.5, "bf16": True, "seed": 2,
    "data_seed": 3, "dataloader_drop_last": True,
}  # fmt: skip
OF_CONFIG = {
    "trainer.handler": "GradDiff", "trainer.plugins": {"GRU": {}}, "trainer.on_divergence": "skip",
    "trainer.method_args.beta": 0.5, "trainer.method_args.alpha": 2.0,
    "trainer.method_args.gamma": 2.0, "trainer.method_args.retain_loss_type": "KL",
    "model.use_lora": False, "model.lineage": "stack", "model.lora_config.r": 8,
    "model.lora_config.lora_alpha": 16, "model.lora_config.lora_dropout": 0.1,
    "model.lora_config.target_modules": ["q", "v"], "model.lora_config.use_rslora": True,
    "model.lora_config.rank_pattern": {"q": 2}, "model.model_args.torch_dtype": "float32",
    "model.model_args.attn_implementation": "eager",
    "model.model_args.quantization_config": {"load_in_4bit": True},
    "model.template_args.system_prompt": "Be brief.",
}  # fmt: skip
OF_ROWS = {
    "a row that was edited": (with_rows(forget=other_label()), "data.forget"),
    "a row more": (with_rows(forget=rows([3, 4, 5, 1])), "data.forget"),
    "a row fewer": (with_rows(forget=rows([3, 4])), "data.forget"),
    "rows in another order": (with_rows(forget=rows([3, 4, 5])[::-1]), "data.forget"),
    "a retain file that was cut": (with_rows(retain=rows([2], seed=1)), "data.retain"),
    "alternate answers": (with_rows(alternate=rows([1, 1, 1])), "data.alternate"),
}
CHANGED = {
    **{f"trainer.args.{k}": lambda k=k, v=v: settings(**{k: v}) for k, v in OF_ARGS.items()},
    **{where: lambda w=where, v=v: settings(edited(w, v)) for where, v in OF_CONFIG.items()},
    "rows of a step": lambda: settings(gradient_accumulation_steps=3),
    "data.anchor": lambda: settings(anchor="retain"),
    "root": lambda: settings(root=("y", ())),
}
MAY_CHANGE = {
    "one batch in place of two": {
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1
    },
    "more batches": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "what is kept": {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2},
    "what is logged": {"logging_steps": 7, "disable_tqdm": True, "run_name": "other"},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "a panel that chooses nothing": {"eval_strategy": "steps", "eval_steps": 2},
    "a default that is spelt out": {"weight_decay": 0.0, "max_grad_norm": 1.0},
    "how the data are read": {"dataloader_num_workers": 2, "dataloader_pin_memory": False},
}  # fmt: skip


@pytest.mark.default_cases(10)
@pytest.mark.parametrize("key", CHANGED)
def test_a_change_is_named(key):
    changed = differences(settings(), CHANGED[key]())
    assert any(name == key or name.startswith(f"{key}.") for name in changed)


def test_rows_at_once_that_are_chosen_may_take_the_place_of_those_that_are_set():
    assert differences(settings(), settings(edited("trainer.batch_is_auto", True))) == {}


@pytest.mark.parametrize("what", OF_ROWS)
def test_a_change_of_the_data_is_named(what):
    parts, key = OF_ROWS[what]
    changed = differences(settings(), settings(rows_of=parts))
    assert list(changed) == [key]
    assert str(changed[key]["now"]).startswith(f"{len(parts[key.split('.')[1]])} rows")


def test_a_change_of_the_packages_or_of_this_code_is_named(monkeypatch):
    before = settings()
    monkeypatch.setattr(resume.metadata, "version", lambda name: "9.9")
    monkeypatch.setattr(resume, "_code", lambda: "other")
    changed = differences(before, settings())
    assert list(changed) == [f"packages.{name}" for name in sorted((*resume.PACKAGES, "unlora"))]


def test_what_chooses_the_best_checkpoint_counts_where_it_is_kept():
    panel = edited("eval.own.panel_rows", 9)
    assert differences(settings(), settings(panel)) == {}
    assert list(differences(settings(**BEST), settings(panel, **BEST))) == ["eval.own.panel_rows"]
    elsewhere = edited("eval.own.output_dir", "b")
    assert differences(settings(**BEST), settings(elsewhere, **BEST)) == {}
    later = BEST | {"eval_delay": 3}
    assert "trainer.args.eval_delay" in differences(settings(**BEST), settings(**later))


@pytest.mark.parametrize("what", MAY_CHANGE)
def test_what_the_result_does_not_depend_on_may_change(what):
    assert differences(settings(), settings(**MAY_CHANGE[what])) == {}


def test_where_the_model_lies_may_change_if_it_is_the_same():
    moved = edited("model.model_args.pretrained_model_name_or_path", "b")
    assert differences(settings(), settings(moved)) == {}
    assert differences(settings(), settings(edited("trainer.on_change", "resume"))) == {}


def checkpoint(folder, **facts):
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    write_record(folder, folder / "trainer_state.json", facts)
    return str(folder)


def test_all_differences_are_named_in_one_message(tmp_path):
    path = checkpoint(tmp_path / "checkpoint-4", settings=settings())
    now = settings(edited("trainer.method_args.beta", 0.5), learning_rate=3e-4)
    with pytest.raises(InputError) as error:
        resumption(path, now, "stop")
    said = str(error.value).splitlines()
    assert said[0] == f"The run of the checkpoint {path!r} had other settings:"
    assert "  trainer.args.learning_rate: 0.0001 then, 0.0003 now" in said
    assert "  trainer.method_args.beta: 0.1 then, 0.5 now" in said
    assert said[-1].endswith("set trainer.on_change=resume.") and len(said) == 4
    assert resumption(path, settings(), "stop").resumed[-1]["changed"] == {}


def test_by_consent_it_goes_on_and_says_what_each_part_ran_with(tmp_path):
    before = [{"checkpoint": "checkpoint-2", "seconds": 1.0, "changed": {}}]
    path = checkpoint(tmp_path / "checkpoint-4", settings=settings(), resumed=before, seconds=7.5)
    found = resumption(path, settings(learning_rate=3e-4), "resume")
    changed = {"trainer.args.learning_rate": {"before": 1e-4, "now": 3e-4}}
    now = {"checkpoint": "checkpoint-4", "seconds": 7.5, "changed": changed}
    assert list(found.resumed) == [*before, now] == found.facts()["resumed"]
    assert found.seconds >= 7.5 and found.settings["trainer.args.learning_rate"] == 3e-4


@pytest.mark.parametrize("key", ["model.lora_config.r", "model.use_lora", "trainer.handler"])
def test_what_the_checkpoint_fits_alone_cannot_be_consented_to(tmp_path, key):
    path = checkpoint(tmp_path / "checkpoint-4", settings=settings())
    with pytest.raises(InputError, match="cannot be gone on from with another"):
        resumption(path, settings(edited(key, OF_CONFIG[key])), "resume")


@pytest.mark.slow
def test_settings_that_changed_by_consent_are_used(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    small_trainer(tmp_path / "one", **saved).train()
    path = str(tmp_path / "one" / "checkpoint-2")

    def resumed(changed):
        other = small_trainer(tmp_path / "two", learning_rate=2e-2, weight_decay=0.5)
        entry = {"checkpoint": "checkpoint-2", "seconds": 1.0, "changed": changed}
        other.resumption = resume.Resumption({}, [entry])
        other.train(resume_from_checkpoint=path)
        return other

    kept, changed = resumed({}), resumed({"trainer.args.learning_rate": {}})
    assert next(g["weight_decay"] for g in kept.optimizer.param_groups) == 0.0
    assert next(g["weight_decay"] for g in changed.optimizer.param_groups) == 0.5
    rates = [entry["learning_rate"] for entry in changed.state.log_history if "loss" in entry]
    assert rates == pytest.approx([1e-2, 7.5e-3, 1e-2, 5e-3])  # then half of the new 2e-2
    assert any(
        not torch.equal(one, other)
        for one, other in zip(trained(kept).values(), trained(changed).values(), strict=True)
    )


def test_every_argument_of_the_installed_trainer_is_known():
    """A new version of transformers may bring one whose meaning here nobody has thought about."""
    from transformers import TrainingArguments

    tables = [*DECIDES, *FREE, *IGNORED, *OURS, *ONLY]
    assert len(tables) == len(set(tables))
    assert set(TrainingArguments.__dataclass_fields__) - {"_n_gpu"} - set(tables) == set()
