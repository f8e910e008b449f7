"""A benchmark as its config declares it: data, metrics on them, and where the log goes."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from unlora.data.chat import Chat
from unlora.errors import InputError
from unlora.evals import passes
from unlora.evals.logs import RetainLog, write_log
from unlora.evals.plan import Request, evaluate, needed, not_computable, questions, read_request
from unlora.evals.records import Generated, Scored
from unlora.evals.sources import ReadRows, Source, check_source
from unlora.registry import unknown
from unlora.run import is_main_process

KINDS = {"TOFUEvaluator": "TOFU", "MUSEEvaluator": "MUSE"}
OWN_KEYS = ("handler", "output_dir", "overwrite", "retain_logs_path", "batch_size",
            "max_new_tokens", "panel", "panel_rows", "data", "metrics")  # fmt: skip
# read by interpolations in ``data`` only
OTHER_KEYS = ("path", "forget_split", "holdout_split", "question_key", "data_split")
logger = logging.getLogger(__name__)


def check_suite(name: str, config: Mapping[str, Any]) -> list[Request]:
    """The metrics of a suite, each after what it needs.

    Raises:
        InputError: everything that is wrong in the config, in one message.
    """
    problems: list[str] = []

    def collect(check: Any, *args: Any) -> Any:
        try:
            return check(*args)
        except InputError as error:
            problems.append(f"eval.{name}: {error}")
            return None

    for key in config:
        if key not in OWN_KEYS + OTHER_KEYS:
            problems.append(unknown(f"key of eval.{name}", key, OWN_KEYS + OTHER_KEYS))
    for key in ("batch_size", "max_new_tokens", "panel_rows"):
        number = config.get(key, 1)
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            problems.append(f"eval.{name}.{key} is {number!r}; it must be a number above 0.")
    for source, declared in (config.get("data") or {}).items():
        collect(check_source, source, declared)
    metrics = config.get("metrics") or {}
    if not metrics:
        problems.append(f"eval.{name} has no metrics. Add some under eval.{name}.metrics.")
    requests = [collect(read_request, metric, metrics[metric]) for metric in sorted(metrics)]
    known = [request for request in requests if request is not None]
    for request in known:
        for kind, source in request.sources():
            if kind in ("score", "score_each", "generate") and source not in config["data"]:
                missing = unknown("data set", source, config["data"])
                problems.append(f"eval.{name}: metric {request.name}: {missing}")
    if len(known) == len(requests):
        collect(needed, known, metrics)
        for metric in config.get("panel") or ():
            if metric not in metrics:
                problems.append(unknown(f"metric in eval.{name}.panel", metric, metrics))
    collect(RetainLog, config.get("retain_logs_path"), KINDS[config["handler"]])
    if problems:
        raise InputError("\n".join(problems))
    return needed(known, metrics)


class Suite:
    """A benchmark, ready to be asked about any number of models.

    Its data are read and tokenised here, once, before there is a model.
    """

    def __init__(
        self,
        name: str,
        config: Mapping[str, Any],
        *,
        tokenizer: PreTrainedTokenizerBase,
        template_args: Mapping[str, Any],
        datasets_dir: str | None,
    ):
        self.requests = check_suite(name, config)
        self.name, self.config, self.kind = name, config, KINDS[config["handler"]]
        self.chat = Chat(tokenizer, template_args)
        self.retain = RetainLog(config.get("retain_logs_path"), self.kind)
        asked = questions(self.requests)
        self.sources = {}
        load = ReadRows(datasets_dir)
        for source in sorted({source for _, source in asked}):
            try:
                self.sources[source] = Source(source, config["data"][source], self.chat, load)
            except InputError as error:
                raise InputError(f"eval.{name}: data set {source}: {error}") from error
        self.missing = self._missing_columns()
        self._check_rows()
        for kind, source in asked:
            if source not in self.missing:
                found = self.sources[source]
                _ = found.texts if kind == "score" else found.prompt_texts
        for source, found in self.sources.items():
            if source not in self.missing and (cut := found.num_cut(range(len(found)))):
                logger.warning(
                    "%s: %d of %d rows of %s cut to max_length", name, cut, len(found), source
                )

    @property
    def output_dir(self) -> Path:
        """Where the config wants the log."""
        return Path(self.config["output_dir"])

    @property
    def metrics(self) -> dict[str, bool]:
        """The metrics that may choose a checkpoint -> whether higher is better."""
        return {
            request.name: request.higher_is_better
            for request in self.requests
            if request.higher_is_better is not None
        }

    @property
    def not_computable(self) -> dict[str, str]:
        """The metrics that will have no value, whatever the model says -> why."""
        return not_computable(self.requests, self.retain.value, self.missing)

    def evaluate(
        self,
        model: nn.Module,
        output_dir: str | Path | None = None,
        *,
        panel: bool = False,
        also: Sequence[str] = (),
    ) -> dict[str, float]:
        """Every metric's value; NaN where there was nothing to score.

        What cannot be computed is left out here; the log says why in words, and so does a
        warning.

        Args:
            output_dir: where the log goes; no log is written without it.
            panel: only the metrics of ``panel`` on ``panel_rows`` examples of each data set.
            also: further metrics for the panel.

        Raises:
            InputError: ``also`` names no metric, or there is a log already and ``overwrite`` is
                false.
        """
        if output_dir is not None:
            self._check_overwrite(Path(output_dir))
        requests, limit = self.requests, None
        if panel:
            requests = needed(self.requests, [*(self.config.get("panel") or ()), *also])
            limit = self.config["panel_rows"]
        chosen = {name: _spread(len(source), limit) for name, source in self.sources.items()}
        asked = [question for question in questions(requests) if question[1] not in self.missing]
        with tqdm(
            total=sum(self._num_rows(kind, chosen[name], name) for kind, name in asked),
            unit="row",
            disable=None if is_main_process() else True,
            leave=False,
        ) as bar:
            run = partial(self._run, model, chosen, bar)
            values = evaluate(requests, run, self.retain.value, self.missing)
        for request in requests:
            value = replace(values[request.name], cut=self._num_cut(request, chosen))
            values[request.name] = value
            if value.not_computed or value.not_scored:
                why = value.not_computed or value.not_scored
                logger.warning("%s: %s is not computed: %s", self.name, request.name, why)
            elif value.unscored:
                logger.warning(
                    "%s: %s: %d rows not scored", self.name, request.name, value.unscored
                )
        if output_dir is not None and is_main_process():
            write_log(Path(output_dir), self.kind, values)
        return {name: value.value for name, value in values.items() if not value.not_computed}

    def _run(
        self, model: nn.Module, chosen: Mapping[str, list[int]], bar: tqdm, kind: str, name: str
    ) -> list[Any]:
        """The records of one question."""
        bar.set_description(f"{self.kind} {kind} {name}")
        source, rows, tokenizer = self.sources[name], chosen[name], self.chat.tokenizer
        common = {"batch_size": self.config["batch_size"], "progress": bar.update}
        if kind == "generate":
            prompts = [source.prompts[i] for i in rows]
            ends = {self.chat.end_id, tokenizer.eos_token_id} - {None}
            length = source.config.get("max_new_tokens", self.config["max_new_tokens"])
            texts = passes.generate(
                model, prompts, tokenizer, end_ids=sorted(ends), max_new_tokens=length, **common
            )
            return [
                Generated(source.prompt_texts[i], source.references[i], _cut(text, source.stop))
                for i, text in zip(rows, texts, strict=True)
            ]
        records = iter(
            passes.score(
                model,
                [answer for i in rows for answer in source.answers[i]],
                [text for i in rows for text in source.texts[i]],
                pad_id=tokenizer.pad_token_id,
                end_id=self.chat.end_id,
                **common,
            )
        )
        grouped: list[list[Scored]] = [[next(records) for _ in source.answers[i]] for i in rows]
        return grouped if source.several else [group[0] for group in grouped]

    def _num_rows(self, kind: str, rows: list[int], name: str) -> int:
        if kind == "generate":
            return len(rows)
        return sum(len(self.sources[name].answers[i]) for i in rows)

    def _num_cut(self, request: Request, chosen: Mapping[str, list[int]]) -> int:
        """How many examples of the data that the request asks about were cut."""
        asked = {name for _, name in questions([request])} - set(self.missing)
        return sum(self.sources[name].num_cut(chosen[name]) for name in asked)

    def _missing_columns(self) -> dict[str, str]:
        """Data sets that lack a column which others have -> why they cannot be used.

        Raises:
            InputError: no data set has the column, so its name is wrong; or a metric that wants
                one answer is given a column of lists, or the other way round.
        """
        missing = {}
        for name, source in self.sources.items():
            for column in source.absent:
                others = [s for s in self.sources.values() if column in s.columns]
                if all(column in other.absent for other in others):
                    raise InputError(
                        f"eval.{self.name}: data set {name}: "
                        + unknown("column", column, source.rows[0])
                    )
                missing[name] = f"the data set {name} has no column {column!r}"
        for request in self.requests:
            for kind, name in request.sources():
                if kind in ("score", "score_each") and name not in missing:
                    if self.sources[name].several != (kind == "score_each"):
                        raise InputError(
                            f"eval.{self.name}: metric {request.name}: {request.handler} wants "
                            f"{'several answers' if kind == 'score_each' else 'one answer'} per "
                            f"row, and the data set {name} has "
                            f"{'one' if kind == 'score_each' else 'several'}."
                        )
        return missing

    def _check_rows(self) -> None:
        """Refuse a retain log that was made on other data, as far as the row counts tell.

        Raises:
            InputError: the counts differ.
        """
        for request in self.requests:
            for kind, name in request.sources():
                rows = self.retain.value(name).per_example if kind == "reference" else None
                if isinstance(rows, Mapping):
                    rows = rows.get("forget")
                if not rows:
                    continue
                below = needed(self.requests, [request.name])
                sizes = {len(self.sources[s]) for _, s in questions(below)}
                if len(rows) not in sizes:
                    raise InputError(
                        f"eval.{self.name}: the retain log {self.retain.file} has {len(rows)} rows "
                        f"for {name}, this evaluation {max(sizes)}: it was made on other data. "
                        "Give a log of the same forget_split."
                    )

    def _check_overwrite(self, folder: Path) -> None:
        log = folder / f"{self.kind}_EVAL.json"
        if not self.config.get("overwrite", True) and log.exists():
            raise InputError(
                f"{log} is there already. Set eval.{self.name}.overwrite=true to replace it, or "
                f"another eval.{self.name}.output_dir."
            )


def _spread(size: int, limit: int | None) -> list[int]:
    """All indices, or ``limit`` of them at even distances."""
    if limit is None or limit >= size:
        return list(range(size))
    return [i * size // limit for i in range(limit)]


def _cut(text: str | None, stop: Iterable[str]) -> str | None:
    if text is None:
        return None
    for string in stop:
        text = text.split(string)[0]
    return text.strip()
