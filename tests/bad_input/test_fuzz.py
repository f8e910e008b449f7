"""Config fuzzing: whatever is typed either is a config or ends in a message with exit code 2.

25 examples every night; `make fuzz` tries 2,000 (UNLORA_EXAMPLES=2000).
"""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from unlora.cli.main import main

STARTS = (
    "unlearn experiment=unlearn/wmdp/lora",
    "unlearn experiment=unlearn/wmdp/lora trainer=NPO",
    "train experiment=finetune/pocket/lora",
    "eval experiment=eval/wmdp/default model=Qwen2.5-0.5B-Instruct",
)
KEYS = tuple(
    """
    task_name seed mode paths.output_dir global_batch_size data data.forget data.retain data.anchor
    forget_split retain_logs_path question_key plan output trainer trainer.handler plugin
    trainer.on_divergence trainer.plugins trainer.plugins.SAM.rho trainer.args
    trainer.args.learning_rate trainer.args.num_train_epochs trainer.args.max_steps
    trainer.args.per_device_train_batch_size trainer.args.gradient_accumulation_steps
    trainer.args.warmup_epochs trainer.args.warmup_ratio trainer.args.weight_decay
    trainer.args.seed trainer.args.optim trainer.args.lr_scheduler_type trainer.args.save_strategy
    trainer.args.eval_strategy trainer.args.report_to trainer.args.bf16 trainer.args.fp16
    trainer.args.logging_steps trainer.args.save_steps trainer.args.metric_for_best_model
    trainer.args.max_grad_norm trainer.args.gradient_checkpointing trainer.args.deepspeed
    trainer.args.fsdp trainer.args.resume_from_checkpoint trainer.method_args
    trainer.method_args.beta trainer.method_args.gamma trainer.method_args.alpha
    trainer.method_args.layer trainer.method_args.retain_loss_type
    trainer.method_args.steering_coeff model model.model_args model.use_lora model.lineage
    model.model_args.pretrained_model_name_or_path model.model_args.torch_dtype
    model.model_args.device_map model.model_args.attn_implementation model.model_args.token
    model.tokenizer_args model.template_args.system_prompt model.lora_config model.lora_config.r
    model.lora_config.lora_alpha model.lora_config.lora_dropout model.lora_config.target_modules
    model.lora_config.bias model.lora_config.init_lora_weights eval eval.wmdp collator
    hydra.run.dir
    """.split()
)
WORDS = (
    *("null", "true", "false", "0", "-1", "1", "3", "2.5", "1e-4", "-1e30", "nan", "inf", "-inf"),
    *("''", "' '", "x", "auto", "none", "NPO", "[]", "[1,a]", "{}", "{a:1}", "{a:{b:[1]}}", "???"),
    *(
        "${seed}",
        "${nowhere}",
        "${a.b",
        "${oc.env:HOME}",
        "[",
        "}",
        "'",
        "..",
        "/",
        "a b",
        "ü✓\u202e",
    ),
    *(
        "1,2",
        "x,y",
        "9" * 40,
        "0x10",
        "1_000",
        "yes",
        "@x",
        "~",
        "$(x)",
        "!!python/none",
        "\\",
        "=",
    ),
)


def changed(key: str, how: int) -> str:
    """The key with a letter doubled, lost or in capitals, or one level more or less."""
    middle = len(key) // 2
    return (
        key[:middle] + key[middle] + key[middle:],
        key[:middle] + key[middle + 1 :],
        key.upper(),
        key + ".more",
        key.rpartition(".")[0] or key,
    )[how]


keys = some.sampled_from(KEYS) | some.builds(
    changed, some.sampled_from(KEYS), some.integers(min_value=0, max_value=4)
)
values = (
    some.sampled_from(WORDS)
    | some.integers().map(str)
    | some.floats().map(str)
    | some.text(max_size=12).filter(lambda text: "\0" not in text)
)
overrides = some.builds(
    lambda sign, key, value: f"{sign}{key}={value}",
    some.sampled_from(("", "", "", "+", "++", "@")),
    keys,
    values,
) | some.builds("~{}".format, keys)


class Reached(Exception):
    """Everything that can be seen in a config is right."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Runs end where a model would be looked for."""
    import unlora.model
    import unlora.recipes.training_plan

    def reached(*args, **kwargs):
        raise Reached

    for name in ("check_model", "get_model", "load_tokenizer"):
        monkeypatch.setattr(unlora.model, name, reached)
        monkeypatch.setattr(unlora.recipes.training_plan, name, reached)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.slow
@settings(
    max_examples=int(os.environ.get("UNLORA_EXAMPLES", "25")),
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(start=some.sampled_from(STARTS), typed=some.lists(overrides, min_size=1, max_size=3))
def test_whatever_is_typed_is_a_config_or_ends_in_a_message(start, typed, capfd):
    try:
        main([*start.split(), *typed])
    except Reached:
        return
    except SystemExit as ended:
        message = capfd.readouterr().err
        assert ended.code == 2, message
        assert message.strip() and "Traceback" not in message, message
    else:  # a plan, or nothing to evaluate
        capfd.readouterr()
