import os

import pytest
import torch

from unlora.errors import InputError
from unlora.trainer import arguments
from unlora.trainer.arguments import choose_best_by, set_warmup, training_arguments


def build(tmp_path, **given):
    return training_arguments({"report_to": "none", **given}, output_dir=str(tmp_path))


def test_an_unknown_key_names_the_nearest(tmp_path):
    with pytest.raises(InputError, match="'learnin_rate'. Did you mean 'learning_rate'"):
        build(tmp_path, learnin_rate=1e-4)


def test_a_value_that_trainer_refuses_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="trainer.args: .*sometimes"):
        build(tmp_path, eval_strategy="sometimes")


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("save_steps", "abc", "a number"),
        ("logging_steps", "abc", "a number"),
        ("adam_beta1", "0.9", "a number"),
        ("data_seed", "abc", "a whole number"),
        ("dataloader_num_workers", 1.5, "a whole number"),
        ("save_total_limit", True, "a whole number"),
        ("fp16", "yes", "true or false"),
        ("run_name", 1, "text"),
        ("warmup_ratio", "abc", "a number"),
        ("warmup_steps", "abc", "a "),
    ],
)
def test_a_value_of_a_wrong_type_names_its_key_and_what_is_allowed(tmp_path, key, value, allowed):
    with pytest.raises(InputError) as error:
        build(tmp_path, **{key: value})
    assert f"trainer.args.{key} is {value!r}; it must be {allowed}" in str(error.value)


def test_values_of_wrong_types_are_reported_together(tmp_path):
    with pytest.raises(InputError) as error:
        build(tmp_path, save_steps="abc", data_seed="abc")
    assert len(str(error.value).splitlines()) == 2


def test_values_that_a_type_stands_for_are_accepted(tmp_path):
    args = build(
        tmp_path, adam_beta1=0, save_steps=2, logging_steps=0.5, data_seed=None, warmup_steps=2,
        resume_from_checkpoint=True, optim="adamw_torch", dataloader_pin_memory=None,
        logging_first_step=None, lr_scheduler_kwargs={}, report_to=["none"],
    )  # fmt: skip
    assert (args.adam_beta1, args.save_steps, args.logging_steps) == (0, 2, 0.5)
    assert args.logging_first_step is False  # null is as if it were not given
    with pytest.raises(InputError, match="Unknown key"):
        build(tmp_path, learnin_rate=None)


def test_keys_of_older_versions_are_accepted(tmp_path):
    build(tmp_path, logging_dir="x", overwrite_output_dir=True, do_train=True)


def test_no_worker_loads_what_is_encoded_already(tmp_path):
    workers = {"dataloader_num_workers": 2, "dataloader_persistent_workers": True}
    assert build(tmp_path, **workers, dataloader_prefetch_factor=4).dataloader_num_workers == 0


@pytest.mark.parametrize(
    "batch, accumulate, rows, epochs, expected",
    [
        (4, 4, 400, 0.1, 2),  # 25 steps an epoch; 2.5 rounds to the even 2
        (4, 4, 3600, 0.1, 22),  # 225 steps an epoch
        (16, 1, 400, 1.0, 25),
        (4, 4, 10, 1.0, 1),
    ],
)
def test_warmup_epochs_are_optimiser_steps(tmp_path, batch, accumulate, rows, epochs, expected):
    args = build(
        tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate
    )
    set_warmup(args, {"warmup_epochs": epochs}, rows)
    assert args.warmup_steps == expected


def test_warmup_ratio_is_a_share_of_all_steps(tmp_path):
    args = build(tmp_path, per_device_train_batch_size=10, num_train_epochs=2)
    set_warmup(args, {"warmup_ratio": 0.1}, 100)
    assert args.warmup_steps == 2


def test_a_given_warmup_wins_over_the_default_in_epochs(tmp_path):
    layout = {"per_device_train_batch_size": 10, "num_train_epochs": 2}
    args = build(tmp_path, **layout, warmup_steps=7)
    set_warmup(args, {"warmup_epochs": 1.0, "warmup_steps": 7, "warmup_ratio": None}, 100)
    assert args.warmup_steps == 7
    set_warmup(args, {"warmup_epochs": 1.0, "warmup_ratio": 0.1}, 100)
    assert args.warmup_steps == 2
    set_warmup(args, {"warmup_epochs": 1.0, "warmup_steps": None, "warmup_ratio": None}, 100)
    assert args.warmup_steps == 10
    with pytest.raises(InputError, match="one of .*warmup_steps and .*warmup_ratio"):
        build(tmp_path, warmup_steps=7, warmup_ratio=0.1)


@pytest.mark.parametrize("key", ["resume_from_checkpoint", "fsdp"])
def test_false_is_as_if_not_given(key, tmp_path):
    assert not getattr(build(tmp_path, **{key: False}), key)


def test_gradient_checkpointing_is_not_reentrant_by_default(tmp_path):
    args = build(tmp_path, gradient_checkpointing=True)
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_bfloat16_is_not_forced_on_a_machine_without_a_gpu(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    args = training_arguments({"report_to": "none"}, output_dir=str(tmp_path), dtype=torch.bfloat16)
    assert not args.bf16 and args.use_cpu


def test_the_precision_of_a_run_is_its_own(tmp_path, monkeypatch):
    arguments._precision_of_the_launcher.cache_clear()
    monkeypatch.delenv(arguments.PRECISION, raising=False)
    build(tmp_path, bf16=True)
    assert os.environ.get(arguments.PRECISION) in (None, "bf16")
    build(tmp_path)
    assert os.environ.get(arguments.PRECISION) in (None, "no")
    arguments._precision_of_the_launcher.cache_clear()
    monkeypatch.setenv(arguments.PRECISION, "bf16")  # by accelerate launch
    build(tmp_path)
    assert os.environ[arguments.PRECISION] == "bf16"
    arguments._precision_of_the_launcher.cache_clear()


class Suite:
    metrics = {"forget_Q_A_Prob": False, "model_utility": True, "forget_quality": True}
    not_computable = {"forget_quality": "the retain model is missing"}

    def evaluate(self, model, *, panel, also):
        return {"panel": panel, "also": also}


@pytest.mark.parametrize("name, up", [("forget_Q_A_Prob", False), ("eval_model_utility", True)])
def test_any_metric_may_choose_the_best_and_its_direction_is_known(tmp_path, name, up):
    given = {"metric_for_best_model": name}
    args = build(tmp_path, **given)
    (panel,) = choose_best_by(args, given, [Suite()])
    assert args.metric_for_best_model == "eval_" + name.removeprefix("eval_")
    assert args.greater_is_better is up
    assert panel(None) == {"panel": True, "also": [name.removeprefix("eval_")]}


def test_the_best_by_an_unknown_metric_names_the_nearest(tmp_path):
    given = {"metric_for_best_model": "forget_QA_Prob"}
    with pytest.raises(InputError, match="Did you mean 'forget_Q_A_Prob'"):
        choose_best_by(build(tmp_path, **given), given, [Suite()])


@pytest.mark.parametrize("suites", [[], [Suite()]])
def test_the_best_needs_a_suite_and_the_name_of_its_metric(tmp_path, suites):
    given = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.raises(InputError) as error:
        choose_best_by(build(tmp_path, **given), given, suites)
    assert "Set eval=SUITE and trainer.args.metric_for_best_model=NAME." in str(error.value)
    assert ("Known: forget_Q_A_Prob, forget_quality, model_utility." in str(error.value)) == bool(
        suites
    )


def test_the_best_by_a_metric_that_lacks_its_reference_is_refused(tmp_path):
    given = {"metric_for_best_model": "forget_quality"}
    with pytest.raises(InputError, match="will have no value: the retain model is missing"):
        choose_best_by(build(tmp_path, **given), given, [Suite()])
