"""Every shipped config composes, and what it names exists and belongs together."""

from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import TrainingArguments

from unlora.cli import compose
from unlora.config import read
from unlora.config.resolve import model_section
from unlora.data import HANDLERS
from unlora.errors import InputError
from unlora.objectives import TERMS
from unlora.trainer import Plugins, UnlearningLoss
from unlora.trainer.arguments import OURS

CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG_OF = {"finetune": "train", "unlearn": "unlearn", "eval": "eval"}
EXPERIMENTS = sorted(
    file.relative_to(CONFIGS / "experiment").with_suffix("").as_posix()
    for file in (CONFIGS / "experiment").rglob("*.yaml")
    if "study" not in file.parts
)
# the experiments of benchmarks, and the one that needs a model and data of the user's
OWN = "eval/own/default"
REQUEST = "unlearn/request/lora"  # which `unlora forget` fills in
BENCHMARKS = [name for name in EXPERIMENTS if "/own/" not in name and name != REQUEST]
NEEDED = {
    experiment: (
        f"data.{'train' if experiment.startswith('finetune') else 'forget'}='{Path(__file__)}'",
        "model.model_args.pretrained_model_name_or_path=owner/name",
    )
    for experiment in set(EXPERIMENTS) - set(BENCHMARKS)
}
NEEDED[REQUEST] += (f"data.retain='{Path(__file__)}'",)
MODELS = sorted(
    file.stem for file in (CONFIGS / "model").glob("*.yaml") if not file.stem.startswith("any")
)
PLUGINS = sorted(file.stem for file in (CONFIGS / "plugin").glob("*.yaml"))
TRAINERS = sorted(file.stem for file in (CONFIGS / "trainer").glob("*.yaml"))
PROMISED_LORA = {
    "target_modules": [
        "q_proj",
        "v_proj",
        "k_proj",
        "o_proj",
        "gate_proj",
        "down_proj",
        "up_proj",
        "lm_head",
    ],
    "r": 128,
    "lora_alpha": 128,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": "CAUSAL_LM",
}


def composed(experiment: str, *overrides: str):
    name = CONFIG_OF[experiment.split("/")[0]]
    return compose.composed(name, [f"experiment={experiment}", *overrides])


@cache
def config_of(experiment: str, *overrides: str):
    return read(composed(experiment, *overrides))


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_complete(experiment):
    config = config_of(experiment, *NEEDED.get(experiment, ()))
    kind = experiment.split("/")[0]
    assert config.mode == kind
    assert config.paths.output_dir == f"./saves/{kind}/{config.task_name}"
    assert config.eval or experiment == REQUEST or experiment.startswith("finetune/own/")
    assert all(suite["handler"] for suite in config.eval.values())
    if kind == "eval":
        return
    args = config.trainer.args
    layout = args["per_device_train_batch_size"], args["gradient_accumulation_steps"]
    # pocket/lora has the same effective batch in one go: its model is small
    assert layout == ((16, 1) if experiment.endswith("pocket/lora") else (4, 4))
    assert set(args) <= {field.name for field in fields(TrainingArguments)} | set(OURS)
    loss = UnlearningLoss.build(config.trainer.handler, **config.trainer.method_args)
    for part in ("train",) if kind == "finetune" else loss.parts:
        if (experiment, part) in (
            ("unlearn/own/default", "retain"),
            ("unlearn/own/lora", "retain"),
        ):
            continue  # the user's
        # refusals are the alternate answers where no data set gives others
        assert config.data.get(part) or part == "alternate"
    for part in ("train", "forget", "retain", "alternate"):
        for data_set in (config.data.get(part) or {}).values():
            assert data_set["handler"] in HANDLERS


@pytest.mark.default_cases(3)
@pytest.mark.parametrize("experiment", BENCHMARKS)
def test_weights_and_tokenizer_belong_together(experiment):
    model = config_of(experiment).model
    weights = model.model_args["pretrained_model_name_or_path"]
    tokenizer = model.tokenizer_args["pretrained_model_name_or_path"]
    targets = list(model.targets.values())
    published = [t for x in targets for t in (x.values() if isinstance(x, dict) else [x])]
    assert weights == tokenizer or weights in published or weights.startswith("./saves/")


@pytest.mark.slow
def test_task_names_are_distinct():
    names = [config_of(x, *NEEDED.get(x, ())).task_name for x in EXPERIMENTS]
    assert len(set(names)) == len(names)


@pytest.mark.default_cases(2)
@pytest.mark.parametrize(
    "experiment, learning_rate, epochs",
    [("finetune/tofu/lora", 2e-4, 3), ("finetune/muse/lora", 2e-4, 3)]
    + [(f"unlearn/{benchmark}/lora", 1e-4, 5) for benchmark in ("tofu", "muse", "wmdp")],
)
@pytest.mark.parametrize(
    "model, weights",
    [
        (None, "Qwen/Qwen2.5-3B-Instruct"),
        ("Llama-2-7b-hf-lora", "NousResearch/Llama-2-7b-hf"),
        ("Llama-2-7b-chat-hf-lora", "NousResearch/Llama-2-7b-chat-hf"),
    ],
)
def test_lora_experiments_have_the_promised_settings(
    experiment, learning_rate, epochs, model, weights
):
    config = config_of(experiment, *([f"model={model}"] if model else []))
    args = config.trainer.args
    assert (args["learning_rate"], args["num_train_epochs"]) == (learning_rate, epochs)
    assert args["warmup_epochs"] == 0.1
    layout = args["per_device_train_batch_size"], args["gradient_accumulation_steps"]
    # pocket/lora has the same effective batch in one go: its model is small
    assert layout == ((16, 1) if experiment.endswith("pocket/lora") else (4, 4))
    assert config.model.use_lora
    assert config.model.lora_config == PROMISED_LORA
    assert config.model.model_args["pretrained_model_name_or_path"] == weights
    assert config.model.model_args["device_map"] == "auto"


def test_muse_is_finetuned_on_its_training_text():
    train = config_of("finetune/muse/lora", "data_split=Books", "data_sub_set=retain").data["train"]
    hub = train["MUSE_train"]["args"]["hf_args"]
    assert hub == {"path": "tamarsonha/MUSE-Books-Train", "split": "retain"}


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_composes(model):
    config = config_of("unlearn/wmdp/lora", f"model={model}").model
    assert config.use_lora == model.endswith("-lora")
    plain = config_of("unlearn/wmdp/lora", f"model={model.removesuffix('-lora')}").model
    assert (
        config.model_args["pretrained_model_name_or_path"]
        == (plain.tokenizer_args["pretrained_model_name_or_path"])
    )
    assert (config.template_args, config.lora_config) == (plain.template_args, plain.lora_config)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["any", "any-lora"])
def test_any_model_brings_its_own_settings(model):
    path = "model.model_args.pretrained_model_name_or_path=owner/name"
    section = config_of("unlearn/wmdp/lora", f"model={model}", path).model
    assert section.as_trained and section.use_lora == model.endswith("-lora")
    assert (section.template_args, section.tokenizer_args) == ({}, {})
    assert section.model_args["device_map"] == "auto" and "torch_dtype" not in section.model_args
    assert not config_of("unlearn/wmdp/lora").model.as_trained


def test_the_figures_on_own_data_are_those_of_tofu_by_name_and_definition():
    own, tofu = (
        config_of(x, *NEEDED.get(x, ())).eval[x.split("/")[1]] for x in (OWN, "eval/tofu/default")
    )
    alike = own["metrics"].keys() & tofu["metrics"].keys()
    assert len(alike) > 30
    for name in alike - {"collapsed"}:
        assert own["metrics"][name] == tofu["metrics"][name]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("sign", ["", "++"])
def test_lora_is_a_choice_for_a_model_without_it(sign):
    override = f"{sign}model.use_lora=true"
    config = config_of("unlearn/wmdp/default", "model=Qwen2.5-7B-Instruct", override)
    assert config.model.use_lora and config.model.lora_config == PROMISED_LORA


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("model", ["Phi-3.5-mini-instruct-lora", "Phi-4-mini-instruct-lora"])
def test_fused_projections_have_targets_of_their_own(model):
    targets = config_of("unlearn/wmdp/lora", f"model={model}").model.lora_config
    assert "qkv_proj" in targets["target_modules"] and "q_proj" not in targets["target_modules"]


UNLEARNING = [
    name
    for name in BENCHMARKS
    if name.startswith("unlearn/") and name.endswith(("/default", "/lora"))
]


WITHOUT_SUITE = {
    "pocket": ("eval=lm_eval", "~eval.tofu"),
    "tofu": ("eval=lm_eval", "~eval.tofu"),
    "muse": ("eval=lm_eval", "~eval.muse"),
}
PRODUCT = [
    # by default every trainer meets one experiment, and every experiment some trainers
    pytest.param(experiment, trainer, marks=[pytest.mark.slow] if (i + j) % len(UNLEARNING) else [])
    for i, trainer in enumerate(name for name in TRAINERS if name != "finetune")
    for j, experiment in enumerate(UNLEARNING)
]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("experiment, trainer", PRODUCT)
def test_every_trainer_composes_with_every_experiment(experiment, trainer):
    # the many files of an evaluation say nothing about a trainer, and take most of the time
    without = WITHOUT_SUITE.get(experiment.split("/")[1], ())
    config = config_of(experiment, f"trainer={trainer}", *without)
    assert config.trainer.handler in TERMS
    loss = UnlearningLoss.build(config.trainer.handler, **config.trainer.method_args)
    assert loss.forget is not None and loss.handler == config.trainer.handler
    if config.model.use_lora:
        Plugins.build(config.trainer.plugins, loss, use_lora=True)
    elif config.trainer.plugins:  # LoKU and ReGLU say where an adapter starts
        with pytest.raises(InputError, match="Set model.use_lora=true"):
            Plugins.build(config.trainer.plugins, loss, use_lora=False)
    given = config_of(experiment).trainer.args
    assert config.trainer.args["learning_rate"] == given["learning_rate"], "the experiment's"


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("plugin", PLUGINS)
def test_every_plugin_composes_and_is_known(plugin):
    config = config_of("unlearn/tofu/lora", "trainer=NPO", f"plugin={plugin}").trainer
    loss = UnlearningLoss.build(config.handler, **config.method_args)
    assert list(config.plugins) == [plugin]
    assert Plugins.build(config.plugins, loss, use_lora=True) != Plugins()
    assert set(Plugins.KINDS) == set(PLUGINS)


@pytest.mark.slow
def test_several_plugins_are_a_list():
    config = config_of("unlearn/tofu/lora", "trainer=LoKU", "plugin=[SAM,BalDRO]").trainer
    assert set(config.plugins) == {"FILA", "SAM", "BalDRO"}


@pytest.mark.slow
def test_a_file_of_the_users_is_a_data_set_and_what_is_evaluated(tmp_path):
    file = tmp_path / "my.jsonl"
    file.write_text("")
    given = (*NEEDED["unlearn/own/lora"][1:], "trainer=NPO", "answer_key=reply")
    files = tuple(f"++data.{part}='{file}'" for part in ("forget", "retain", "holdout"))
    config = config_of("unlearn/own/lora", *given, *files)
    assert set(config.data) == {"anchor", "forget", "retain"}
    assert config.data["forget"]["own"]["args"] == {
        "hf_args": {"path": str(file)}, "question_key": "question", "answer_key": "reply"
    }  # fmt: skip
    for part in ("forget", "retain", "holdout"):
        asked = config.eval["own"]["data"][part]
        assert asked["hf_args"]["path"] == str(file) and asked["answer_key"] == "reply"
    gone = (*given, f"++data.forget='{tmp_path / 'm.jsonl'}'")
    with pytest.raises(InputError, match="no such file. Did you mean 'my.jsonl'"):
        config_of("unlearn/own/lora", *gone)


def test_data_set_files_hold_the_set_they_are_named_after():
    files = list((CONFIGS / "data/datasets").glob("*.yaml"))
    assert len(files) >= 12
    for file in files:
        content = OmegaConf.load(file)
        assert list(content) == [file.stem]


def test_one_key_reaches_data_and_evaluation():
    overrides = ("forget_split=forget05", "retain_split=retain95", "holdout_split=holdout05")
    config = config_of("unlearn/tofu/lora", *overrides, "retain_logs_path=logs.json")
    assert config.data["forget"]["TOFU_QA_forget"]["args"]["hf_args"]["name"] == "forget05"
    assert config.data["retain"]["TOFU_QA_retain"]["args"]["hf_args"]["name"] == "retain95"
    suite = config.eval["tofu"]
    assert (suite["forget_split"], suite["holdout_split"]) == ("forget05", "holdout05")
    assert suite["retain_logs_path"] == "logs.json"


def test_reading_changes_nothing():
    cfg = composed("unlearn/wmdp/lora")
    before = OmegaConf.to_yaml(cfg)
    read(cfg)
    assert OmegaConf.to_yaml(cfg) == before
    plain = {"model_args": {"pretrained_model_name_or_path": "x"}, "use_lora": True}
    assert model_section(plain).lora_config == PROMISED_LORA
    assert plain == {"model_args": {"pretrained_model_name_or_path": "x"}, "use_lora": True}


@pytest.mark.parametrize(
    "lora_config, said",
    [
        ({"r": "8"}, "model.lora_config.r is '8' (text); it must be a whole number."),
        ({"r": 0}, "model.lora_config.r is 0; it must be greater than 0."),
        ({"r": True}, "model.lora_config.r is True; it must be a whole number."),
        ({"lora_dropout": 1}, "model.lora_config.lora_dropout is 1; it must be less than 1."),
        ({"lora_alhpa": 8}, "Did you mean 'lora_alpha'?"),
        ({"bias": "lora_only"}, "trained biases would stay on. Set model.lora_config.bias=none."),
        ({"modules_to_save": ["lm_head"]}, "Name the modules in target_modules instead."),
        ({"init_lora_weights": "loftq"}, "such a start rewrites the weights below"),
        ({"init_lora_weights": False}, "true, gaussian, orthogonal, pissa, olora."),
        ({"init_lora_weights": 1}, "true, gaussian, orthogonal, pissa, olora."),
        ({"layers_to_transform": "0"}, "it must be a whole number, or a list of them."),
        ({"layers_to_transform": [0, True]}, "it must be a whole number, or a list of them."),
        ({"exclude_modules": 3}, "it must be a module name, or a list of them."),
        ({"layers_pattern": {"a": 1}}, "it must be a name, or a list of them."),
        ({"rank_pattern": {"q_proj": "8"}}, "rank_pattern.q_proj is '8' (text)"),
        ({"alpha_pattern": {"q_proj": 0}}, "it must be greater than 0."),
        ({"target_modules": []}, "a list of module names, a regular expression, or all-linear"),
    ],
)
def test_wrong_lora_settings_are_refused(lora_config, said):
    model = {"model_args": {"pretrained_model_name_or_path": "x"}, "lora_config": lora_config}
    with pytest.raises(InputError) as error:
        model_section(model)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "lora_config",
    [
        {"init_lora_weights": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "pissa"},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"layers_to_transform": [0, 1], "layers_pattern": None},
        {"exclude_modules": "lm_head", "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"x": 8}},
    ],
)
def test_settings_of_peft_are_passed_on(lora_config):
    model = {"model_args": {"pretrained_model_name_or_path": "x"}, "lora_config": lora_config}
    assert model_section(model).lora_config == {**PROMISED_LORA, **lora_config}


@pytest.mark.parametrize("targets", [["q_proj"], r".*\.(q|v)_proj", "all-linear"])
def test_target_modules_may_be_a_list_a_pattern_or_all(targets):
    args = {"pretrained_model_name_or_path": "x"}
    section = model_section({"model_args": args, "lora_config": {"target_modules": targets}})
    assert section.lora_config == {**PROMISED_LORA, "target_modules": targets}


def test_several_mistakes_are_reported_together():
    cfg = composed("unlearn/wmdp/lora")
    OmegaConf.set_struct(cfg, False)
    cfg.model.model_args.torch_dtype = "bfloat61"
    cfg.trainer.args.learning_rate = "fast"
    cfg.retain_splt = "retain90"
    with pytest.raises(InputError) as error:
        read(cfg)
    said = sorted(str(error.value).splitlines())
    assert len(said) == 3
    assert said[0].startswith("Unknown key 'retain_splt'. Did you mean 'retain_split'?")
    assert "Unknown dtype 'bfloat61'. Did you mean 'bfloat16'?" in said[1]
    assert said[2] == "trainer.args.learning_rate is 'fast' (text); it must be a number."


def test_torch_dtypes_are_dtypes():
    import torch

    args = {"pretrained_model_name_or_path": "x", "torch_dtype": torch.float16}
    assert model_section({"model_args": args}).model_args["torch_dtype"] is torch.float16


@pytest.mark.parametrize(
    "given, read",
    [
        ({"torch_dtype": "bfloat16", "dtype": "float32"}, "float32"),
        ({"torch_dtype": "bfloat16", "dtype": None}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_a_dtype_wins_over_the_default_torch_dtype(given, read):
    args = {"pretrained_model_name_or_path": "x"}
    section = model_section({"model_args": {**args, **given}})
    assert section.model_args == {**args, "torch_dtype": read}


@pytest.mark.parametrize("value", ["auto", "sequential", "cpu", "cuda:1", {"": 0}, None])
def test_device_maps_are_known(value):
    args = {"pretrained_model_name_or_path": "x", "device_map": value}
    assert model_section({"model_args": args}).model_args["device_map"] == value


@pytest.mark.parametrize("value", ["atuo", "cuda:x", 0, True, ["cpu"]])
def test_unknown_device_maps_are_refused(value):
    args = {"pretrained_model_name_or_path": "x", "device_map": value}
    with pytest.raises(InputError, match="model.model_args.device_map is .*it must be auto, "):
        model_section({"model_args": args})


@pytest.mark.default_cases(2)
@pytest.mark.parametrize(
    "name, read", [("1", "1"), ("'1.5'", "1.5"), ("a/b", "a/b"), ("a..b", "a..b")]
)
def test_task_names_are_text(name, read):
    config = config_of("unlearn/wmdp/lora", f"task_name={name}")
    assert config.task_name == read
    assert config.paths.output_dir == f"./saves/unlearn/{read}"


@pytest.mark.default_cases(2)
@pytest.mark.parametrize("name", ["", "'  '", ".", "..", "../x", "a/../../b", "/absolute/x", "a/"])
def test_task_names_stay_inside_saves(name):
    with pytest.raises(
        InputError, match=r"task_name is .* below saves/<mode>. Give task_name=NAME"
    ):
        config_of("unlearn/wmdp/lora", f"task_name={name}")


def test_warmup_is_a_number():
    overrides = ("++trainer.args.warmup_ratio=abc", "++trainer.args.warmup_steps=-1")
    with pytest.raises(InputError) as error:
        config_of("unlearn/wmdp/lora", *overrides)
    assert "trainer.args.warmup_ratio is 'abc' (text); it must be a number." in str(error.value)
    assert "trainer.args.warmup_steps is -1" in str(error.value)


@pytest.mark.default_cases(1)
@pytest.mark.parametrize(
    "override, said",
    [
        ("data.forget=null", "data.forget is not set."),
        ("data.retain=null", "trainer.method_args.alpha is 1.0, but data.retain is not set."),
        ("trainer.handler=FinetuneTrainer", "mode is unlearn, but trainer.handler is"),
        ("model.lineage=stak", "Did you mean 'stack'?"),
        ("task_name=???", "task_name has no value. Give task_name=..."),
        ("data_split=${nothing}", "nothing"),
        ("trainer.args.output_dir=out", "Set paths.output_dir instead."),
        ("paths.output_dir=.", "a run needs a folder of its own."),
        ("paths.output_dir=", "a run needs a folder of its own."),
    ],
)
def test_contradictions_are_refused(override, said):
    with pytest.raises(InputError) as error:
        config_of("unlearn/wmdp/lora", "trainer=NPO", override)
    assert said in str(error.value)
