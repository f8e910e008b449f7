"""Run a benchmark as its config declares it: data, metrics on them, and where the log goes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from unlora.data.cache import cache_folder
from unlora.data.chat_encoding import Chat
from unlora.data.rows import ReadRows
from unlora.errors import InputError
from unlora.evals.dataset_checks import check_apart
from unlora.evals.datasets import Source
from unlora.evals.eval_model import LazyModel
from unlora.evals.log_checks import check_logs
from unlora.evals.pass_plan import (
    LOGS,
    Question,
    Request,
    evaluate,
    needed,
    not_computable,
    questions,
)
from unlora.evals.passes.declaration import PASSES, Settings, pass_of
from unlora.evals.progress import Bar
from unlora.evals.result_cache import ResultCache
from unlora.evals.runner import PassRunner
from unlora.evals.suite_checks import KINDS, check_suite
from unlora.evals.target import doubt
from unlora.registry import unknown
from unlora.results.baseline_log import BaselineLog
from unlora.results.eval_log import write_log
from unlora.results.value import Value
from unlora.runs.atomic_files import is_main_process

MISSED_FIRST = ("collapsed", "forget_quality", "privleak")
NAMED = 3  # metrics without a value that are named in a line
logger = logging.getLogger(__name__)


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
        self.logs = {which: BaselineLog.of(which, config, self.kind) for which in LOGS}
        self.settings = Settings(
            **{
                field: config[key]
                for field, key in (
                    ("max_new_tokens", "max_new_tokens"),
                    ("batch_size", "batch_size"),
                    ("tokens", "token_budget"),
                    ("gradient_modules", "gradient_modules"),
                    ("classifier", "fluency_classifier"),
                    ("label", "fluency_label"),
                )
                if config.get(key) is not None
            }
        )
        wanted = questions(self.requests)
        self.sources = {}
        load = ReadRows(datasets_dir)
        for source in sorted({source for _, source in wanted}):
            try:
                declared = {"max_new_tokens": self.settings.max_new_tokens}
                declared |= {k: v for k, v in config["data"][source].items() if v is not None}
                self.sources[source] = Source(source, declared, self.chat, load)
            except InputError as error:
                raise InputError(f"eval.{name}: data set {source}: {error}") from error
        self.missing = self._missing_columns()
        self._check_apart()
        try:
            check_logs(self.requests, self.logs, self.sources, self.missing)
        except InputError as error:
            raise InputError(f"eval.{name}: {error}") from error

    def prepare(self) -> None:
        """Make all data into tokens now, so that what is wrong with them shows before training."""
        for pass_name, name in questions(self.requests):
            if name not in self.missing:
                source = self.sources[name]
                generates = PASSES[pass_name].reads == "prompts" and not PASSES[pass_name].after
                _ = source.cut_prompts if generates else source.answers

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
        return self.not_computable_for(None)

    def not_computable_for(self, subject: LazyModel | None) -> dict[str, str]:
        """The metrics that will have no value for this model, whatever it says -> why."""
        return not_computable(
            self.requests, self._log, lambda name, data: self._why(name, data, subject)
        )

    def plan(self, model: nn.Module | LazyModel) -> list[dict[str, Any]]:
        """What an evaluation would ask the model: pass, data, rows, tokens, whether it is kept.

        Nothing is asked. What a pass reads of another's answers is not known before those are.
        """
        subject = LazyModel.of(model)
        runner = self._runner(subject, self._chosen(None))
        planned = []
        for name, data in self._asked(self.requests, subject):
            ahead = PASSES[name].after is not None
            planned.append(
                {
                    "pass": name,
                    "data": data,
                    "rows": self._num_rows(name, data),
                    "tokens": runner.num_tokens(name, data),
                    "kept": not ahead and runner.cache.has(runner.key(name, data)),
                    "first": self.sources[data].first_row(prompts=PASSES[name].reads == "prompts"),
                }
            )
        return planned

    def evaluate(
        self,
        model: nn.Module | LazyModel,
        output_dir: str | Path | None = None,
        *,
        panel: bool = False,
        also: Sequence[str] = (),
        bar: Bar | None = None,
    ) -> dict[str, float]:
        """Every metric's value; NaN where there was nothing to score.

        What cannot be computed is left out here; the log says why in words, and so does a
        warning.

        Args:
            output_dir: where the log goes; no log is written without it.
            panel: only the metrics of ``panel`` on ``panel_rows`` examples of each data set.
            also: further metrics for the panel.
            bar: shows how far it is; one of its own without it.

        Raises:
            InputError: ``also`` names no metric, or there is a log already and ``overwrite`` is
                false.
        """
        if output_dir is not None:
            self._check_overwrite(Path(output_dir))
        requests, limit = self.requests, None
        if panel:
            known = {request.name for request in requests}
            cheap = [name for name in self.config.get("panel") or () if name in known]
            requests = needed(self.requests, [*cheap, *also])
            limit = self.config["panel_rows"]
        subject, chosen = LazyModel.of(model), self._chosen(limit)
        wanted = self._asked(requests, subject)
        with bar or Bar() as shown:
            runner = self._runner(subject, chosen, shown)
            shown.expect(self.kind, sum(runner.num_tokens(*q) for q in runner.new(wanted)))
            answers = runner.answer(wanted)

        def why(name: str, data: str) -> str | None:
            return self._why(name, data, subject)

        values = evaluate(requests, answers, self._log, why)
        for request in requests:
            cut = runner.num_cut(questions([request]))
            values[request.name] = replace(values[request.name], cut=cut)
        self._warn(values, output_dir)
        if output_dir is not None and is_main_process():
            target = values if subject.is_target else self.logs["target"].values()
            write_log(
                Path(output_dir),
                self.kind,
                values,
                doubt(self.kind, target, self.logs["reference"]),
            )
        return {name: value.value for name, value in values.items() if not value.not_computed}

    def _warn(self, values: Mapping[str, Value], output_dir: str | Path | None) -> None:
        """Say in a line which metrics are not computed, and once each why others lack rows."""
        reasons: dict[str, list[str]] = {}
        for name, value in values.items():
            if value.not_scored:
                reasons.setdefault(value.not_scored, []).append(name)
            elif value.unscored:
                logger.warning("%s: %s: %d rows not scored", self.name, name, value.unscored)
        for why, names in reasons.items():
            logger.warning("%s: no value: %s: %s", self.name, ", ".join(names), why)
        expected = {log.advice for log in self.logs.values() if not log.missed}
        left = [
            name
            for name, value in values.items()
            if value.not_computed and not any(str(why) in value.not_computed for why in expected)
        ]
        if left:
            left.sort(key=lambda name: (name not in MISSED_FIRST, name))
            more = f" and {len(left) - NAMED} more" if len(left) > NAMED else ""
            where = Path(output_dir or "") / f"{self.kind}_SUMMARY.json"
            logger.warning(
                "%s: not computed: %s%s. Why, and what to give: %s",
                self.name, ", ".join(left[:NAMED]), more,
                where if output_dir is not None else "unlora eval ... --plan",
            )  # fmt: skip

    def _runner(
        self, subject: LazyModel, chosen: Mapping[str, Sequence[int]], bar: Bar | None = None
    ) -> PassRunner:
        folder = cache_folder() / "answers" if self.config.get("cache", True) else None
        told = bar.done if bar else lambda name, done: None
        return PassRunner(subject, self.sources, chosen, self.settings, ResultCache(folder), told)

    def _chosen(self, limit: int | None) -> dict[str, list[int]]:
        return {name: _spread(len(source), limit) for name, source in self.sources.items()}

    def _asked(self, requests: Sequence[Request], subject: LazyModel) -> list[Question]:
        """The questions that can be asked, and that something is computed from."""
        hopeless = not_computable(
            requests, self._log, lambda name, data: self._why(name, data, subject)
        )
        useful = [request for request in requests if request.name not in hopeless]
        return [q for q in questions(useful) if not self._why(*q, subject)]

    def _why(self, name: str, data: str, subject: LazyModel | None = None) -> str | None:
        """Why a question cannot be asked, where that is so."""
        if data in self.missing:
            return self.missing[data]
        pass_ = PASSES[name]
        if pass_.model == "root" and subject is not None and subject.no_root:
            return subject.no_root
        return pass_.why_not(self.name, self.settings, subject)

    def _log(self, which: str, name: str) -> Value:
        return self.logs[which].value(name)

    def _num_rows(self, name: str, data: str) -> int:
        source = self.sources[data]
        if PASSES[name].reads == "prompts":
            return len(source)
        return source.answers.num_rows

    def _missing_columns(self) -> dict[str, str]:
        """Data sets that lack a column which others have -> why they cannot be used.

        Raises:
            InputError: no data set has the column, so its name is wrong; or a metric that wants
                one answer is given a column of lists, or the other way round.
        """
        missing = {name: s.missing for name, s in self.sources.items() if s.missing}
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
                pass_ = pass_of(kind)
                if pass_ and name not in missing:
                    several = kind != pass_.name
                    if self.sources[name].several != several:
                        raise InputError(
                            f"eval.{self.name}: metric {request.name}: {request.handler} wants "
                            f"{'several answers' if several else 'one answer'} per row, and the "
                            f"data set {name} has {'one' if several else 'several'}."
                        )
        return missing

    def _check_apart(self) -> None:
        """Refuse the same rows as forget and as holdout or retain data.

        Raises:
            InputError: all rows of one are in the other.
        """
        why = "no attack could tell who was a member"
        pairs = {(r.inputs.get("forget"), r.inputs.get("holdout")): why for r in self.requests}
        if self.kind == "OWN":
            pairs["forget", "retain"] = "the same would be to be kept and forgotten"
        for names, why in pairs.items():
            first, other = (self.sources.get(str(name)) for name in names)
            if first and other and not (first.missing or other.missing):
                try:
                    check_apart(first, other, why)
                except InputError as error:
                    raise InputError(f"eval.{self.name}: {error}") from error

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
