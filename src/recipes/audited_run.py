"""Find what an audit needs: the three models and the rows, from a run folder and what it names."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlora.audits.attack_runner import AuditData
from unlora.audits.subject import AuditedModel, Role
from unlora.config import read
from unlora.config.audit_config import PARTS, AuditConfig
from unlora.config.resolve import shipped
from unlora.data.chat_encoding import Chat
from unlora.data.rows import ReadRows
from unlora.errors import InputError
from unlora.evals.dataset_checks import check_source
from unlora.evals.datasets import Source
from unlora.evals.suite_checks import KINDS
from unlora.model import ResolvedModel, load_tokenizer, resolve_model
from unlora.model.run_defaults import OF_MODEL
from unlora.recipes.audit_checks import (
    check_models,
    refuse_another_root,
    warn_of_other_sets,
    warn_of_rows_it_never_saw,
)
from unlora.recipes.baselines.retain_model import find_gold
from unlora.recipes.run_history import RUN_CONFIG, History, run_config, start_of
from unlora.registry import unknown
from unlora.runs.safe_loading import read_json

ROOT = "the root model without adapters"
NEVER_SAW = "a model that never saw the data"
Declared = Mapping[str, dict[str, Any] | None]  # the data set of each part
TRAINING_KEYS = ("hf_args", "question_key", "answer_key", "text_key", "max_length")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AuditedRun:
    """A run with all that its audit needs.

    Attributes:
        config: of its training.
        baseline: what the retain model is, in words.
    """

    folder: Path
    config: Mapping[str, Any]
    unlearned: AuditedModel
    target: AuditedModel
    retain: AuditedModel
    data: AuditData
    baseline: str

    @property
    def models(self) -> tuple[AuditedModel, AuditedModel, AuditedModel]:
        """Unlearned model, target, retain model."""
        return self.unlearned, self.target, self.retain


def find_run(config: AuditConfig) -> AuditedRun:
    """Look for everything; no weights are loaded.

    Raises:
        InputError: something is missing, or does not belong together.
    """
    folder = Path(config.run).expanduser()
    if not folder.is_dir():
        raise InputError(f"There is no run folder {config.run!r}. Give one: saves/unlearn/NAME.")
    trained = run_config(folder)
    if trained is None:
        raise InputError(
            f"{config.run!r} has no {RUN_CONFIG} that says what it was made to forget. Give a run "
            "folder of `unlora unlearn`."
        )
    unlearned = _model("unlearned", str(folder), trained)
    target = _model("target", _target(config, folder, trained), trained)
    wanted = config.retain_model
    evaluated = _as_evaluated(folder, trained)
    declared = {part: _declared(part, config, evaluated) for part in PARTS}
    path = _auto_retain(folder, trained, declared) if wanted == "auto" else wanted
    if path is None:
        retain, baseline = _root(unlearned, trained), ROOT
    else:
        retain, baseline = _model("retain", path, trained), NEVER_SAW
        refuse_another_root(unlearned, retain)
    check_models(unlearned, target, retain)
    data = _data(config, evaluated, unlearned, declared)
    warn_of_rows_it_never_saw(target, data.forget)
    return AuditedRun(folder, trained, unlearned, target, retain, data, baseline)


def _model(role: Role, path: str, trained: Mapping[str, Any]) -> AuditedModel:
    return AuditedModel.of(role, path, resolve_model(_section(path, trained)))


def _section(path: str, trained: Mapping[str, Any]) -> Any:
    """Any model, loaded as this machine loads the audited one."""
    placed = {
        key: trained["model"]["model_args"][key]
        for key in ("device_map", "attn_implementation")
        if key in trained["model"]["model_args"]
    }
    ours = {key: value for key, value in shipped("model/any.yaml").items() if key != "defaults"}
    args = {"pretrained_model_name_or_path": path, **placed}
    return {**ours, "model_args": args, "lora_config": dict(shipped("lora/default.yaml"))}


def _target(config: AuditConfig, folder: Path, trained: Mapping[str, Any]) -> str:
    if config.target != "auto":
        return config.target
    if trained.get("mode") != "unlearn":
        raise InputError(
            f"{config.run!r} was not made to forget ({trained.get('mode')}), so it names no model "
            "from before. Give target=RUN, or the run folder of `unlora unlearn`."
        )
    return start_of(folder, trained)


def _auto_retain(folder: Path, trained: Mapping[str, Any], declared: Declared) -> str | None:
    """The model behind the run's retain log, or a run that never saw the rows; None without."""
    for name in ("eval_config.json", RUN_CONFIG):
        file = folder / name
        content = read_json(file) if file.is_file() else {}
        for suite in (content.get("eval") or {}).values():
            log = suite.get("retain_logs_path")
            if isinstance(log, str) and (model := _model_of_log(Path(log), folder)):
                return model
    beside = folder.parent / "gold"  # of a study
    if run_config(beside):
        return str(beside)
    parts = {part: section for part, section in declared.items() if section}
    suites = [s for s in (trained.get("eval") or {}).values() if s.get("handler") in KINDS]
    for suite in suites or [{}]:
        suite = {"data": {**(suite.get("data") or {}), **parts}}
        try:
            gold = find_gold(read(trained), suite, History.of(str(folder)), lambda run: False)
        except (InputError, KeyError, TypeError):  # its data are gone, or of another version
            continue
        if gold is not None:
            return str(gold)
    return None


def _model_of_log(log: Path, folder: Path) -> str | None:
    """The run folder that a log lies in."""
    for parent in (log, *log.parents[:2]):
        if run_config(parent) and parent.resolve() != folder.resolve():
            return str(parent)
    return None


def _root(unlearned: AuditedModel, trained: Mapping[str, Any]) -> AuditedModel:
    lineage = unlearned.resolved.lineage
    if not lineage.links:
        raise InputError(
            f"{unlearned.path!r} has no adapters to switch off, so there is no model beside it "
            "that never saw the forget rows. Train one without them, and give retain_model=RUN."
        )
    bare = resolve_model(_section(lineage.root, trained))
    own = unlearned.resolved.section  # in the same template, dtype and quantisation
    loaded = {key: value for key, value in own.model_args.items() if key in OF_MODEL}
    alike = {key: getattr(own, key) for key in ("template_args", "tokenizer_args", "quantisation")}
    alike["model_args"] = {**bare.section.model_args, **loaded}
    section = bare.section.model_copy(update=alike)
    return AuditedModel.of("retain", lineage.root, ResolvedModel(section, bare.lineage))


def _data(
    config: AuditConfig, trained: Mapping[str, Any], unlearned: AuditedModel, declared: Declared
) -> AuditData:
    if declared["forget"] is None:
        raise InputError(
            f"{config.run!r} names no forget rows, neither in its section eval nor in data. Give "
            "data.forget.hf_args.path=FILE."
        )
    resolved = unlearned.resolved
    chat = Chat(load_tokenizer(resolved), resolved.section.template_args)
    datasets_dir = config.datasets_dir or (trained.get("paths") or {}).get("datasets_dir")
    load = ReadRows(datasets_dir)
    sources: dict[str, Source | None] = {}
    for part, section in declared.items():
        try:
            sources[part] = _source(part, section, chat, load)
        except InputError as error:
            raise InputError(f"The {part} rows of the audit: {error}") from error
    forget = sources["forget"]
    assert forget is not None
    if forget.several:
        raise InputError("The forget rows have several answers each. Give rows with one.")
    warn_of_other_sets(config, trained, declared)
    known = {part: section for part, section in declared.items() if section is not None}
    return AuditData(forget, sources["retain"], sources["holdout"], known, load)


def _source(
    part: str, section: Mapping[str, Any] | None, chat: Chat, load: ReadRows
) -> Source | None:
    if section is None:
        return None
    check_source(section, "data", part)
    source = Source(part, section, chat, load)
    if not source.missing and (absent := source.absent):
        raise InputError(unknown("column", absent[0], source.rows[0]))
    if part != "forget" and source.several:
        logger.warning(
            "the audit does without %s rows: each of them has several answers. Give "
            "data.%s.hf_args of rows with one", part, part,
        )  # fmt: skip
        return None
    if part == "forget" and source.missing:
        raise InputError(source.missing)
    return None if source.missing else source


def _as_evaluated(folder: Path, trained: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a run, with the suites that it was evaluated by if it was not made to forget.

    Those of a fine-tuning ask about the default splits, whatever others are made to forget. An
    evaluation by no suite of rows (lm-eval alone) says nothing of them.
    """
    file = folder / "eval_config.json"
    if trained.get("mode") == "unlearn" or not file.is_file():
        return trained
    content = read_json(file)
    suites = {k: s for k, s in (content.get("eval") or {}).items() if s.get("handler") in KINDS}
    if not suites:
        return trained
    return {**trained, "eval": suites, "paths": content.get("paths") or trained.get("paths")}


def _declared(part: str, config: AuditConfig, trained: Mapping[str, Any]) -> dict[str, Any] | None:
    """The data set of a part: as given, as the run evaluates on it, or as it was trained on it."""
    data_set: dict[str, Any] | None = None
    suites = [s for s in (trained.get("eval") or {}).values() if s.get("handler") in KINDS]
    for suite in suites:
        section = (suite.get("data") or {}).get(part)
        if section and (section.get("hf_args") or {}).get("path"):
            longest = {"max_new_tokens": suite.get("max_new_tokens", 200)}
            data_set = {k: v for k, v in (longest | section).items() if v is not None}
            break
    if data_set is None:
        data_set = _as_trained((trained.get("data") or {}).get(part))
    if part in config.data:
        settings = config.data[part]
        below = data_set or {"handler": "QADataset", "question_key": "question",
                          "answer_key": "answer"}  # fmt: skip
        is_other = settings.get("handler", below["handler"]) != below["handler"]
        data_set = {**({} if is_other else below), **settings}  # another kind has other keys
    if data_set and config.max_new_tokens is not None:
        data_set = {**data_set, "max_new_tokens": config.max_new_tokens}
    return data_set


def _as_trained(sets: Any) -> dict[str, Any] | None:
    """A data set of training as evaluation declares it."""
    for declared in (sets or {}).values() if isinstance(sets, Mapping) else ():
        args = {k: v for k, v in declared["args"].items() if k in TRAINING_KEYS}
        if declared["handler"] == "QADataset":
            return {"handler": "QADataset", "question_key": "question", "answer_key": "answer",
                    "max_new_tokens": 200, **args}  # fmt: skip
        return {"handler": "CompletionDataset", "text_key": "text", **args}
    return None
