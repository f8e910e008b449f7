"""Put the attacks to the models, each question once: answers are kept as those of evaluations."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

from unlora.audits.attack import (
    ATTACKS,
    Attack,
    Questions,
    Scores,
    ShortTraining,
    TrainingData,
    mean_logps,
)
from unlora.audits.patching import answer_states, patched_logps
from unlora.audits.relearning import Relearning
from unlora.audits.residual import Comparison
from unlora.audits.subject import AuditedModel, release, side_by_side
from unlora.errors import InputError
from unlora.evals.dataset_checks import check_source
from unlora.evals.datasets import Source
from unlora.evals.eval_model import LazyModel
from unlora.evals.passes.declaration import Settings
from unlora.evals.records import Scored
from unlora.evals.result_cache import ResultCache
from unlora.evals.runner import PassRunner
from unlora.runs.hashes import digest

ROWS_AT_ONCE = 16  # whose inner states are in memory
SAMPLING = {"samples": "samples", "temperature": "temperature", "top_p": "top_p",
            "seed": "sample_seed"}  # fmt: skip


@dataclass(frozen=True)
class AuditData:
    """The rows of an audit.

    Attributes:
        forget, retain, holdout: tokenised; None where there are none.
        declared: the section of each data set.
        load: ``hf_args`` -> rows.
    """

    forget: Source
    retain: Source | None
    holdout: Source | None
    declared: Mapping[str, Mapping[str, Any]]
    load: Callable[..., list[dict[str, Any]]]

    def asked(self, changes: Mapping[str, Any]) -> Source:
        """The forget rows, asked otherwise.

        Args:
            changes: of the data set's config; ``num_examples`` retain rows are shown before.

        Raises:
            InputError: the rows cannot be asked so.
        """
        changes = dict(changes)
        shown = changes.pop("num_examples", 0)
        declared = {**self.declared["forget"], **changes}
        check_source(declared, "data", "forget")
        # a row whose question is empty so, has nothing to ask
        source = Source("forget", {"optional": {}, **declared}, self.forget.chat, self.load)
        if shown and self.retain is not None:
            source.shown = self._shown(shown, source.columns)
        return source

    def _shown(self, number: int, columns: Sequence[str]) -> list[dict[str, Any]]:
        """The first retain rows that have an answer, in the columns of the forget rows."""
        assert self.retain is not None
        pairs = ([row[column] for column in self.retain.columns] for row in self.retain.rows)
        told = (pair for pair in pairs if all(str(cell).strip() for cell in pair))
        return [dict(zip(columns, pair, strict=True)) for pair in islice(told, number)]


class AttackRunner:
    """Ask a model under an attack.

    Args:
        target: whose reading of inner states counts, for attacks that patch them.
        limits: of a batch, see :class:`unlora.evals.passes.declaration.Settings`.
    """

    def __init__(
        self, data: AuditData, target: AuditedModel, cache: ResultCache, limits: Settings
    ) -> None:
        self.data, self.target, self.cache, self.limits = data, target, cache, limits

    def compare(
        self,
        name: str,
        attack: Attack,
        settings: Mapping[str, Any],
        models: Sequence[AuditedModel],
        *,
        counts: bool,
        done: Callable[[AuditedModel], Any] = lambda model: None,
    ) -> list[Comparison]:
        """Every form of one attack, on unlearned model, target and retain model."""
        of_models: list[dict[str, Scores]] = []
        for model in models:
            plainly = attack.of_adapters and model.role != "unlearned"
            chosen, changes = (ATTACKS["plain"], {}) if plainly else (attack, settings)
            of_models.append(dict(self.scores(chosen, changes, model)))
            release()
            done(model)
        unlearned, target, retain = of_models
        nothing = np.full(len(self.data.forget), np.nan)
        return [
            Comparison(
                f"{name}: {form}" if form else name,
                name,
                scores,
                target.get(form, target.get("", nothing)),
                retain.get(form, retain.get("", nothing)),
                counts,
            )
            for form, scores in unlearned.items()
        ]

    def scores(
        self, attack: Attack, settings: Mapping[str, Any], model: AuditedModel
    ) -> Iterator[tuple[str, Scores]]:
        """Name of a form, empty where there is one alone -> scores of the forget rows."""
        how = getattr(self, f"_{attack.kind}")
        yield from how(attack, settings, model)

    def records(self, model: LazyModel, source: Source) -> list[Scored]:
        """The answers of a data set under a model."""
        answers: list[Scored] = self._ask("score", model, source, self.limits)
        return answers

    def _ask(self, name: str, model: LazyModel, source: Source, settings: Settings) -> Any:
        rows = {source.name: range(len(source))}
        runner = PassRunner(model, {source.name: source}, rows, settings, self.cache)
        return runner.answer([(name, source.name)])[name, source.name]

    def _logps(self, model: LazyModel, source: Source | None = None) -> Scores:
        return mean_logps(self.records(model, source or self.data.forget))

    def _score(
        self, attack: Attack, settings: Mapping[str, Any], model: AuditedModel
    ) -> Iterator[tuple[str, Scores]]:
        yield from _named(attack.fn(self.records(model.plain(), self.data.forget), **settings))

    def _sample(
        self, attack: Attack, settings: Mapping[str, Any], model: AuditedModel
    ) -> Iterator[tuple[str, Scores]]:
        drawn = {ours: settings[key] for key, ours in SAMPLING.items() if key in settings}
        limits = replace(self.limits, **drawn)
        # an adapter beside the weights would be asked at every token
        sampled = (
            model.plain() if model.resolved.quantised else model.changed(model.merged, "merged")
        )
        answers = self._ask("sample", sampled, self.data.forget, limits)
        yield from _named(attack.fn(answers, **settings))

    def _merged(
        self, attack: Attack, settings: Mapping[str, Any], model: AuditedModel
    ) -> Iterator[tuple[str, Scores]]:
        changed = self.weights_changed(attack, settings, model)
        if attack.kind == "merged" and model.role == "unlearned" and self.data.retain is not None:
            self.records(changed, self.data.retain)  # for `retain_records`, while weights are here
        yield "", self._logps(changed)

    _adapted = _merged

    def retain_records(
        self, attack: Attack, settings: Mapping[str, Any], model: AuditedModel
    ) -> list[Scored]:
        """What a model says of the retain rows after an attack on its merged weights."""
        assert self.data.retain is not None
        return self.records(self.weights_changed(attack, settings, model), self.data.retain)

    def weights_changed(
        self, attack: Attack, settings: Mapping[str, Any], model: AuditedModel
    ) -> LazyModel:
        """A model after an attack on its weights."""

        def changed() -> torch.nn.Module:
            network = model.merged() if attack.kind == "merged" else model.load()
            with torch.no_grad():
                attack.fn(network, **settings)
            return network

        return model.changed(changed, attack.name, attack.version, settings)

    def _questions(
        self, attack: Attack, settings: Mapping[str, Any], model: AuditedModel
    ) -> Iterator[tuple[str, Scores]]:
        forget, retain = self.data.forget, self.data.retain
        examples = len(retain) if retain and retain.is_qa else 0
        told = Questions(tuple(forget.rows[0]), forget.config, examples)
        ways = attack.fn(told, **settings)
        plain = model.plain()  # loaded once for all of them
        worded = [self._logps(plain, self.data.asked(changes)) for changes in ways.values()]
        if worded:
            yield "", np.fmax.reduce(np.stack(worded))

    def _training(
        self, attack: Attack, settings: Mapping[str, Any], model: AuditedModel
    ) -> Iterator[tuple[str, Scores]]:
        sources = {"forget": self.data.forget, "retain": self.data.retain}
        sizes = {name: len(source) if source else 0 for name, source in sources.items()}
        for plan in attack.fn(TrainingData(**sizes), **settings):
            source = sources[plan.data]
            assert source is not None  # an attack on no rows is refused
            yield from self._trained(attack, plan, source, model)

    def _trained(
        self, attack: Attack, plan: ShortTraining, source: Source, model: AuditedModel
    ) -> Iterator[tuple[str, Scores]]:
        rows = [row for n in plan.rows for row in source.answers[n]]
        content = source.fingerprint(plan.rows)
        texts = {tuple(row.input_ids) for row in rows}
        prompts = (answers[0] for answers in self.data.forget.answers)
        taught = [tuple(row.input_ids) in texts for row in prompts]  # a copy of a row, too
        training: list[Relearning] = []

        def trained(step: int) -> torch.nn.Module:
            if not training:
                pad_id = source.chat.tokenizer.pad_token_id
                training.append(Relearning(model.merged(), rows, plan, pad_id))
            return training[0].at(step)

        for step in plan.steps:
            versions = (attack.version, Relearning.VERSION)
            parts = (attack.name, versions, replace(plan, steps=()), content, step)
            lazy = model.changed(partial(trained, step), *map(str, parts))
            scores = self._logps(lazy)
            scores[taught] = np.nan
            yield f"learning rate {plan.learning_rate:g}, step {step}", scores

    def _patched(
        self, attack: Attack, settings: Mapping[str, Any], model: AuditedModel
    ) -> Iterator[tuple[str, Scores]]:
        yield from _named(attack.fn(self._patched_logps(model), **settings))

    def _patched_logps(self, model: AuditedModel) -> np.ndarray:
        """[layers rows]: what the target says with the inner states of a model."""
        source = self.data.forget
        whole = source.fingerprint(range(len(source)))
        keys = (model.key, self.target.key)
        key = None if None in keys else digest("patched", 1, *keys, whole)
        if (arrays := self.cache.read(key)) is not None:
            return arrays["logps"]
        rows = [answers[0] for answers in source.answers]
        pad_id = source.chat.tokenizer.pad_token_id
        scored = [n for n, row in enumerate(rows) if row.input_ids]
        if not scored:
            raise InputError("No forget row has an answer. Leave the attack out.")
        parts = []
        with side_by_side(model, self.target) as (own, target):
            for at in range(0, len(scored), ROWS_AT_ONCE):
                some = [rows[n] for n in scored[at : at + ROWS_AT_ONCE]]
                with own() as network:
                    states = answer_states(network, some, pad_id)
                with target() as network:
                    parts.append(patched_logps(network, some, states, pad_id))
        logps = np.full((len(parts[0]), len(rows)), np.nan)
        logps[:, scored] = np.concatenate(parts, axis=1)
        self.cache.write(key, {"logps": logps})
        return logps


def _named(scores: Any) -> Iterator[tuple[str, Scores]]:
    """One score per row, or several kinds of them by name."""
    yield from scores.items() if isinstance(scores, Mapping) else [("", scores)]
