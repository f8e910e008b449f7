"""Load, unlearn, evaluate and export models from a notebook.

Each function composes the config that the command line would, and runs what the command line runs:
the same trainer, guards, lineage and manifest. ``docs/api.md`` has an example of each.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unlora.cli.command_words import as_command, checked_overrides, model_words, word
from unlora.cli.compose import composed
from unlora.cli.notebook_arguments import check_arguments
from unlora.errors import GuardError, InputError, system_in_words
from unlora.recipes.notebook_rows import checked_rows, write_rows
from unlora.runs.run import alone, new_run_folder

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from unlora.model.probe import Probe

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Model:
    """A model that can be asked: its network, its tokenizer, and how it is spoken to.

    Attributes:
        path: where it is from; :func:`unlearn` and :func:`evaluate` read it from there.
        template_args: what is put around a question, as it was in training.
    """

    path: str
    network: "nn.Module" = field(repr=False)
    tokenizer: "PreTrainedTokenizerBase" = field(repr=False)
    template_args: Mapping[str, Any] = field(repr=False)
    model_args: Mapping[str, Any] = field(repr=False)
    probe: "Probe" = field(repr=False)

    def ask(self, question: str, max_new_tokens: int = 200) -> str:
        """The likeliest answer, at most so many tokens of it.

        Raises:
            GuardError: the model is broken: its logits are not finite.
        """
        from unlora.data.chat_encoding import Chat
        from unlora.evals.passes import generate

        check_arguments(question=question, max_new_tokens=max_new_tokens)
        chat = Chat(self.tokenizer, self.template_args)
        ends = sorted({chat.end_id, self.tokenizer.eos_token_id} - {None})
        [answer] = generate(
            self.network, [chat.prompt(question)], self.tokenizer, end_ids=ends,
            max_new_tokens=max_new_tokens, answer_of=chat.without_thought,
        )  # fmt: skip
        if answer is None:
            raise GuardError(
                f"{self.path} has given no answer: its logits are not finite, or it was still "
                f"thinking after {max_new_tokens} tokens. Set max_new_tokens higher."
            )
        return answer.strip()


@dataclass(frozen=True)
class Unlearned:
    """A finished run.

    Attributes:
        folder: the run folder, which is a model.
        summary: metric -> value, of the evaluation after training.
        command: what does the same from a shell.
    """

    folder: Path
    summary: Mapping[str, float]
    command: str

    @property
    def manifest(self) -> dict[str, Any]:
        """What ran and what the guards found: ``manifest.json``."""
        content: dict[str, Any] = json.loads((self.folder / "manifest.json").read_text("utf-8"))
        return content


@dataclass(frozen=True)
class Evaluation(Mapping[str, float]):
    """The figures of a model: metric -> value, and what they are made of.

    Attributes:
        folder: the log as the command line writes it, ``OWN_EVAL.json``.
        intervals: metric -> lower and upper bound, 95 %.
        examples: metric -> what was found for each row, in the order of the rows.
        not_computed: metric -> why it has no value.
    """

    folder: Path
    figures: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    examples: Mapping[str, Sequence[Any]] = field(repr=False)
    not_computed: Mapping[str, str] = field(repr=False)

    def __getitem__(self, metric: str) -> float:
        return self.figures[metric]

    def __iter__(self) -> Iterator[str]:
        return iter(self.figures)

    def __len__(self) -> int:
        return len(self.figures)

    def __str__(self) -> str:
        from unlora.recipes.evaluate import figures

        return "\n".join(filter(None, figures(self.figures, [(self.folder, "OWN")])))


AnyModel = str | Path | Model | Unlearned


@system_in_words()
def load(path_or_name: "str | Path | Unlearned", **model_args: Any) -> Model:
    """A model to be asked.

    Args:
        path_or_name: a run folder, an adapter, a model folder, or a repository of the hub.
        model_args: for ``from_pretrained``: ``torch_dtype``, ``device_map``, ``revision``, ...; and
            ``base``, the model that an adapter is on where the one it names is not there, and
            ``quantisation="nf4"`` or ``"int8"``.

    Raises:
        InputError: there is no such model, or no such argument.
    """
    from unlora.model import get_model, resolve_model
    from unlora.model.probe import Probe

    path = _path(path_or_name)
    if "pretrained_model_name_or_path" in model_args:
        raise InputError("pretrained_model_name_or_path is the first argument. Leave it out.")
    cfg = composed("model/any", model_words(path, model_args))
    resolved = resolve_model(cfg.model)
    network, tokenizer = get_model(resolved, trainable=False)
    template_args = dict(resolved.section.template_args)
    return Model(path, network, tokenizer, template_args, model_args, Probe.take(network))


@system_in_words()
def unlearn(
    model: AnyModel,
    forget: "Pairs | str | Path",
    retain: "Pairs | str | Path | None" = None,
    method: str = "NPO",
    output_dir: str | Path = "saves/unlearn/mine",
    *,
    lora: bool | Mapping[str, Any] = True,
    epochs: float | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    overrides: Sequence[str] = (),
    **method_args: Any,
) -> Unlearned:
    """Make a model forget questions and answers; what ``unlora unlearn`` does.

    The model itself is not changed: the result is a run folder. What that folder held before is
    kept as ``<output_dir>.previous-<n>``.

    Args:
        forget: (question, answer) pairs, or a file of them.
        retain: pairs that the model shall go on knowing.
        method: as ``trainer=``; ``docs/methods.md`` compares them.
        lora: False trains all weights; keys of ``model.lora_config`` change the adapter.
        batch_size: rows of one optimiser step.
        overrides: further words of the command line, such as ``"trainer.args.seed=1"``.
        method_args: parameters of the method, such as ``beta=0.1``.

    Raises:
        InputError: something that was given can be put right.
        GuardError: the run would have been silently wrong.
    """
    from unlora.model.lineage import Lineage
    from unlora.model.load import resolve
    from unlora.recipes import train
    from unlora.trainer import refuse_own_model

    check_arguments(
        method=method, output_dir=output_dir, lora=lora, epochs=epochs,
        learning_rate=learning_rate, batch_size=batch_size, overrides=overrides,
    )  # fmt: skip
    folder, path = Path(output_dir), _path(model)
    args: dict[str, Any] = {"num_train_epochs": epochs, "learning_rate": learning_rate}
    if batch_size is not None:
        args |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 1}
    settings = {f"trainer.args.{key}": value for key, value in args.items() if value is not None}
    settings |= {f"trainer.method_args.{key}": value for key, value in method_args.items()}
    if isinstance(lora, Mapping):
        settings |= {f"model.lora_config.{key}": value for key, value in lora.items()}
    data = checked_rows({"forget": forget, "retain": retain})
    refuse_own_model(str(folder), Lineage.read(resolve(path)))
    words = [
        f"experiment=unlearn/own/{'default' if lora is False else 'lora'}",
        *model_words(path, model.model_args if isinstance(model, Model) else {}),
        word("trainer", method),
        word("task_name", folder.name),
        word("paths.output_dir", folder),
        *(word(key, value) for key, value in settings.items()),
    ]
    with alone(folder), new_run_folder(folder):
        words += _data_words(data, folder / "data")
        words += checked_overrides(overrides, words)
        cfg = composed("unlearn", words)
        with as_command(["unlora", "unlearn", *words]) as command:
            summary = train.run(cfg)
    return Unlearned(folder, summary, command)


@system_in_words()
def evaluate(
    model: AnyModel,
    forget: "Pairs | str | Path",
    retain: "Pairs | str | Path | None" = None,
    holdout: "Pairs | str | Path | None" = None,
    *,
    target: AnyModel | None = None,
    gold: AnyModel | None = None,
    output_dir: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Evaluation:
    """The figures of a model on questions and answers; what ``unlora eval`` does.

    Args:
        forget: (question, answer) pairs that the model shall not know, or a file of them.
        retain: pairs that it shall know.
        holdout: pairs like those of ``forget`` that no model ever saw.
        target: the model before it was made to forget, or its log.
        gold: a model that never saw the forget data, or its log.
        output_dir: where the log goes; ``saves/eval/eval_<model>`` if not given.
        overrides: further words of the command line, such as ``"eval.own.max_new_tokens=50"``.

    Raises:
        InputError: something that was given can be put right.
    """
    from unlora.cli.overrides import named_after
    from unlora.recipes import evaluate as evaluation

    check_arguments(
        overrides=overrides, **({} if output_dir is None else {"output_dir": output_dir})
    )
    path = _path(model)
    if isinstance(model, Model):
        _refuse_changed(model)
    data = checked_rows({"forget": forget, "retain": retain, "holdout": holdout})
    folder = Path(output_dir or f"saves/eval/{named_after(path)}")
    words = [
        "experiment=eval/own/default",
        *model_words(path, model.model_args if isinstance(model, Model) else {}),
        word("task_name", folder.name),
        word("paths.output_dir", folder),
        *([word("eval.own.target_logs_path", _path(target))] if target is not None else ()),
        *([word("retain_logs_path", _path(gold))] if gold is not None else ()),
        *_data_words(data, folder / "eval_data"),
    ]
    words += checked_overrides(overrides, words)
    level = logging.getLogger().level
    try:
        with as_command(["unlora", "eval", *words]):
            values = evaluation.run(composed("eval", [*words, "--quiet"]))
    finally:
        logging.getLogger().setLevel(level)
    return _read(folder, values)


@system_in_words()
def export(
    run: "str | Path | Model | Unlearned",
    merged: bool = True,
    output: str | Path | None = None,
    dtype: str = "auto",
) -> Path:
    """Write the model of a run so that it stands alone; what ``unlora export`` does.

    Args:
        merged: full weights for plain transformers; else one adapter for plain peft.
        output: a new folder; ``RUN/exported/merged`` (or ``adapter``) if not given.
        dtype: of merged weights, such as ``float32``; that of the root model if not given.

    Raises:
        InputError: there is no adapter to export, or the folder is not empty.
        GuardError: what was written answers differently.
    """
    from unlora.model.standalone import export as write

    check_arguments(merged=merged, **({} if output is None else {"output": output}))
    form = "merged" if merged else "adapter"
    return write(_path(run), form, str(output) if output else None, dtype=dtype)


def _path(model: AnyModel) -> str:
    """Where a model is.

    Raises:
        InputError: it is none.
    """
    if isinstance(model, Unlearned):
        return str(model.folder)
    if isinstance(model, Model):
        return model.path
    if isinstance(model, (str, Path)) and str(model):
        return os.path.expanduser(model)
    raise InputError(
        f"The model is {model!r}; it must be a path, a repository of the hub, or what load or "
        "unlearn returned."
    )


def _refuse_changed(model: Model) -> None:
    """Raises InputError where a loaded model is no longer what its folder holds."""
    from unlora.model.probe import tolerance

    if not model.probe.difference(model.network)[1] <= tolerance(model.network):
        raise InputError(
            f"The network of {model.path} has been changed since it was loaded, and what is "
            "evaluated is its folder. Save it to a folder of its own, and give that."
        )


def _data_words(data: Mapping[str, Any], folder: Path) -> list[str]:
    return [word(f"data.{name}", file) for name, file in write_rows(data, folder).items()]


def _read(folder: Path, values: Mapping[str, float]) -> Evaluation:
    from unlora.results.eval_log import read_written

    log, _ = read_written(folder, "OWN")
    intervals = {name: e.written_interval for name, e in log.items() if e.written_interval}
    examples = {name: entry.rows for name, entry in log.items() if entry.rows}
    reasons = {n: r for n, e in log.items() if (r := e.content.get("not_computed"))}
    return Evaluation(folder, dict(values), intervals, examples, reasons)
