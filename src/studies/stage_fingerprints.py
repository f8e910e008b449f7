"""Hash all that the result of a stage depends on."""

import functools
import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from unlora.cli.compose import composed
from unlora.config.checks import ROWS_AT_ONCE
from unlora.config.resolve import plain, shipped
from unlora.runs.atomic_files import files_below
from unlora.runs.hashes import digest, sha256
from unlora.runs.safe_loading import read_json
from unlora.studies import audit_stages
from unlora.studies.stages import Stage

# of trainer.args: they say what is kept, shown or in memory, not what is learnt
NOT_LEARNT = (
    "output_dir", "report_to", "run_name", "resume_from_checkpoint", "save_strategy", "save_steps",
    "save_total_limit", "save_only_model", "logging_steps", "logging_strategy",
    "logging_first_step", "disable_tqdm", "log_level", "dataloader_num_workers",
    "dataloader_pin_memory",
)  # fmt: skip
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
HF_ARGS = ("hf_args", "few_shot_dataset_hf_args")  # which rows a data set has
# of a suite: they say how it is asked and where that is written, not what it says
NOT_SAID = (
    "output_dir", "overwrite", "cache", "batch_size", "token_budget", "retain_logs_path",
    "target_logs_path", "panel", "panel_rows",
)  # fmt: skip


def config_of(stage: Stage) -> dict[str, Any]:
    """The resolved config that ``train.run`` or ``eval.run`` is given for a stage."""
    assert stage.kind in ("train", "eval")
    return _training(stage) if stage.kind == "train" else _evaluation(stage)


def key(stage: Stage) -> str:
    """A hash of what the result depends on; the stages before must be finished.

    Raises:
        InputError: a model or data that the stage needs are not there, or are damaged.
    """
    if stage.kind in ("audit", "dial"):
        return _of_audit(stage)
    config = config_of(stage)
    parts: list[Any] = [stage.kind, config["model"]["model_args"]["pretrained_model_name_or_path"]]
    parts[1] = model_content(parts[1])
    datasets_dir = config["paths"].get("datasets_dir")
    if stage.kind == "train":
        model = {k: v for k, v in config["model"].items() if k != "targets"}
        trainer = {k: v for k, v in config["trainer"].items() if k != "on_change"}
        chooses = bool(trainer["args"].get("load_best_model_at_end"))
        left_out = ("output_dir", "report_to", "run_name") if chooses else NOT_LEARNT
        trainer["args"] = {k: v for k, v in trainer["args"].items() if k not in left_out}
        data = {k: _data(v, datasets_dir) for k, v in (config.get("data") or {}).items()}
        if trainer["args"].get("gradient_checkpointing") == "auto":  # as it was once called
            trainer["args"]["gradient_checkpointing"] = True
        if trainer["args"].get("per_device_train_batch_size") == "auto":  # the rows of a step count
            trainer["args"]["per_device_train_batch_size"] = ROWS_AT_ONCE
        if config.get("global_batch_size") is not None:  # it decides over those in trainer.args
            trainer["args"]["global_batch_size"] = config["global_batch_size"]
        parts += [_without_paths(model), trainer, data]
        parts.append(_tokenizer(config["model"]["tokenizer_args"]))
        if chooses:  # the best checkpoint depends on when it is looked for, and by what
            parts.append({
                name: [suite.get("panel"), suite.get("panel_rows"), _suite(suite, datasets_dir)]
                for name, suite in config["eval"].items()
            })  # fmt: skip
    else:
        parts.append({name: _suite(suite, datasets_dir) for name, suite in config["eval"].items()})
        parts.append(_asked_as(stage))
    parts += _quantised(config["model"])
    return digest(*parts)


def _of_audit(stage: Stage) -> str:
    config = audit_stages.config_of(stage).model_dump()
    models = [config.pop(name) for name in ("run", "target", "retain_model")]
    rows, datasets_dir = audit_stages.rows_of(stage)
    suites = [_suite(suite, datasets_dir) for suite in rows["eval"].values()]
    content = [None if model is None else model_content(model) for model in models]
    trained = _data(rows["data"], datasets_dir)
    others = [_data(config["data"], datasets_dir)] if config["data"] else []
    return digest(stage.kind, config, content, suites, trained, stage.params.get("to"), *others)


def _training(stage: Stage) -> dict[str, Any]:
    config = _composed(stage) if stage.again is None else _repeated(stage)
    args = config["trainer"]["args"]
    args["seed"] = stage.seed
    if keeps_no_checkpoints(args):  # some are needed to go on where it was stopped
        args |= {"save_strategy": "epoch", "save_total_limit": 1}
    return config


def training_args(stage: Stage) -> Mapping[str, Any]:
    """``trainer.args`` as they were asked for."""
    config = composed(stage.config, stage.overrides) if stage.again is None else _repeated(stage)
    args: Mapping[str, Any] = config["trainer"]["args"]
    return args


def _repeated(stage: Stage) -> dict[str, Any]:
    """The config of a run that was, for another folder and with other sections."""
    config: dict[str, Any] = read_json(Path(str(stage.again)) / "run_config.json")
    config |= {**stage.params, "task_name": stage.run, "paths": {**config["paths"]}}
    config["paths"]["output_dir"] = stage.folder
    config["trainer"]["args"] |= {"output_dir": stage.folder, "resume_from_checkpoint": None}
    config["model"]["model_args"]["pretrained_model_name_or_path"] = stage.model
    for suite in (config.get("eval") or {}).values():
        suite["output_dir"] = stage.folder
    return config


def _composed(stage: Stage) -> dict[str, Any]:
    cfg = composed(stage.config, stage.overrides)
    cfg.paths.output_dir = stage.folder
    cfg.task_name = stage.run
    if stage.model:
        cfg.model.model_args.pretrained_model_name_or_path = stage.model
    if stage.retain_log and "retain_logs_path" in cfg:
        cfg.retain_logs_path = stage.retain_log
    for name, value in stage.params.items():
        OmegaConf.update(cfg, name, value, force_add=True)
    return plain(cfg)


def keeps_no_checkpoints(args: Mapping[str, Any]) -> bool:
    """Whether ``trainer.args`` want none beside the result."""
    # YAML reads a bare no as false
    return str(args.get("save_strategy", "no")).lower() in ("no", "false")


def _evaluation(stage: Stage) -> dict[str, Any]:
    """The suites of the unlearning experiment, for one model, asked as that was trained."""
    cfg = composed(stage.config, stage.overrides)
    if stage.retain_log and "retain_logs_path" in cfg:
        cfg.retain_logs_path = stage.retain_log
    cfg.model.model_args.pretrained_model_name_or_path = stage.model  # where none is named yet
    whole = plain(cfg)
    suites = {name: dict(suite) for name, suite in whole["eval"].items()}
    for suite in suites.values():
        suite["output_dir"] = stage.evals
        for which, roles in (("retain_log", ("target", "method")), ("target_log", ("method",))):
            name = f"{which}s_path"
            if name in suite:  # one's own reference serves where the study makes none
                own = suite[name] if stage.role in roles else None
                suite[name] = getattr(stage, which) or own
    return {
        "mode": "eval",
        "task_name": stage.run,
        "seed": 0,
        "model": {
            **{k: v for k, v in shipped("model/any.yaml").items() if k != "defaults"},
            "model_args": _loading(whole["model"]["model_args"], str(stage.model)),
            **_as_experiment(whole["model"], str(stage.model)),
            "tokenizer_args": {},
            "lora_config": shipped("lora/default.yaml"),
        },
        "paths": {**whole["paths"], "output_dir": stage.folder},
        "eval": suites,
    }


def _loading(args: Mapping[str, Any], path: str) -> dict[str, Any]:
    """How the model comes into memory, as the unlearning experiment has it."""
    keys = ("attn_implementation", "device_map", "max_memory", "trust_remote_code", "token")
    return {"pretrained_model_name_or_path": path} | {k: args[k] for k in keys if k in args}


def _as_experiment(model: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A model that no run has made is quantised as the unlearning experiment has it."""
    if (Path(path) / "run_config.json").is_file() or "quantisation" not in model:
        return {}
    return {"quantisation": model["quantisation"]}


def model_content(path: str) -> Any:
    """A model by its content: hashes of the root's files and of every adapter."""
    from unlora.model.lineage import Lineage, fingerprint
    from unlora.model.load import resolve

    lineage = Lineage.read(resolve(path))
    # a run that was trained in full is its own root
    root = fingerprint(lineage.root) if lineage.local_root else [lineage.root, lineage.fingerprint]
    links = [(link.sha256, link.config_sha256) for link in lineage.links]
    folders = [folder for folder in (Path(path), *lineage.folders) if folder.is_dir()]
    return [root, links, [_tokenizer_files(folder) for folder in folders]]


def _tokenizer(args: Mapping[str, Any]) -> Any:
    """A tokenizer by its content, where it is on this machine."""
    from unlora.model.load import resolve

    settings = dict(args)
    path = resolve(str(settings.pop("pretrained_model_name_or_path", "")))
    return [settings, _tokenizer_files(Path(path)) if path and Path(path).is_dir() else path]


def _tokenizer_files(folder: Path) -> list[tuple[str, str]]:
    files = [folder / name for name in TOKENIZER]
    return [(file.name, sha256(file)) for file in files if file.is_file()]


def _asked_as(stage: Stage) -> Any:
    """The settings of its training that say how a model is asked."""
    file = Path(str(stage.model)) / "run_config.json"
    if not file.is_file():
        return None
    model = json.loads(file.read_text("utf-8"))["model"]
    settings = [model.get("template_args"), model["model_args"].get("torch_dtype")]
    return settings + _quantised(model)


def _quantised(model: Mapping[str, Any]) -> list[Any]:
    """How the weights are quantised as they are loaded, and by what; nothing where they are not."""
    quantisation = model.get("quantisation") or model["model_args"].get("quantization_config")
    if not quantisation:
        return []
    try:
        return [quantisation, metadata.version("bitsandbytes")]
    except metadata.PackageNotFoundError:  # which is said before anything is trained
        return [quantisation]


def _without_paths(model: Mapping[str, Any]) -> dict[str, Any]:
    """The section without where the weights are; their content counts."""
    args = dict(model["model_args"])
    args.pop("pretrained_model_name_or_path")
    tokenizer = {k: v for k, v in model["tokenizer_args"].items() if "path" not in k}
    return {**model, "model_args": args, "tokenizer_args": tokenizer}


def _suite(suite: Mapping[str, Any], datasets_dir: str | None) -> Any:
    settings = {name: value for name, value in suite.items() if name not in NOT_SAID}
    if settings.get("only") is None:  # as before there was such a key
        settings.pop("only", None)
    logs = [_log(suite.get(which)) for which in ("retain_logs_path", "target_logs_path")]
    return [settings, logs, [_rows(args, datasets_dir) for args in _hub_args(suite.get("data"))]]


def _data(part: Any, datasets_dir: str | None) -> Any:
    return [part, [_rows(args, datasets_dir) for args in _hub_args(part)]]


def _hub_args(content: Any) -> Iterator[Mapping[str, Any]]:
    """The ``hf_args`` of every data set in a part of a config; one without a path has no rows."""
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if name in HF_ARGS and isinstance(value, Mapping):
            if value.get("path") is not None:
                yield value
        else:
            yield from _hub_args(value)


def local_rows(args: Mapping[str, Any], datasets_dir: str | None) -> list[dict[str, Any]] | None:
    """The rows of a data set that is on this machine; None for one on the hub."""
    from unlora.data.rows import SUFFIXES, load_rows

    path = args["path"]
    named = Path(path).suffix.lower() in SUFFIXES
    local = datasets_dir or path == "pocket" or Path(path).exists() or named
    return load_rows(**args, datasets_dir=datasets_dir) if local else None


def _rows(args: Mapping[str, Any], datasets_dir: str | None) -> str | None:
    return _hash_of_rows(json.dumps(args, sort_keys=True), datasets_dir)


@functools.cache
def _hash_of_rows(args: str, datasets_dir: str | None) -> str | None:
    """Of local rows; a data set on the hub is known by its name and revision alone."""
    rows = local_rows(json.loads(args), datasets_dir)
    return None if rows is None else digest(rows)


def _log(path: str | None) -> Any:
    """The logs that figures are compared with, by content; other references by their name."""
    if not path or not Path(path).exists():
        return path
    files = [Path(path)] if Path(path).is_file() else files_below(Path(path), "*_EVAL.json")
    return [(file.name, sha256(file)) for file in files]


def outputs(stage: Stage) -> Iterator[Path]:
    """The files of a finished stage that others read."""
    if stage.kind == "audit":
        yield from audit_stages.outputs(stage)
        return
    folder = Path(stage.evals if stage.kind == "eval" else stage.folder)
    patterns = ("*_EVAL.json", "*_SUMMARY.json", "*.safetensors", "lineage.json", "manifest.json")
    for pattern in patterns[:2] if stage.kind == "eval" else patterns[2:]:
        yield from sorted(folder.glob(pattern))
