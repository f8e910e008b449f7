"""Classify generated texts by a second, small model that only reads."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AutoConfig

from unlora.errors import InputError
from unlora.evals.passes.batching import Budget, Progress, answer_all
from unlora.evals.passes.declaration import (
    NOT_CACHED,
    Pass,
    PassInput,
    Settings,
    joined,
    register,
    split,
)
from unlora.evals.records import Legible
from unlora.model.hub import commit_of
from unlora.model.lineage import fingerprint
from unlora.model.load import read_whole
from unlora.runs.safe_loading import refuse_pickle

if TYPE_CHECKING:
    from unlora.evals.eval_model import LazyModel

CLEAN = ("clean", "LABEL_0")  # what classifiers of gibberish call text that is none


@torch.no_grad()
def fluency_prob(
    classifier: str,
    texts: Sequence[str | None],
    *,
    label: str | None = None,
    batch_size: int | None = None,
    tokens: int | None = None,
    progress: Progress = lambda done: None,
) -> Legible:
    """Probability that each text is clean, by a text classifier; NaN where nothing was written.

    Args:
        classifier: folder or hub repository of a model for sequence classification; it is put on
            this process's GPU where there is one.
        label: the class of clean text; ``clean``, or the first one, if not given.
        batch_size: at most these texts at a time.
        tokens: at most these tokens at a time; None finds a number.
        progress: told the number of texts done.

    Raises:
        InputError: the classifier cannot be loaded, or has no such class.
    """
    tokenizer, model = _loaded(classifier)
    column = _column(classifier, model.config.label2id, label)
    written = [i for i, text in enumerate(texts) if text and text.strip()]
    read = tokenizer([str(texts[i]) for i in written], truncation=True).input_ids if written else []

    def ask(batch: list[int]) -> list[float]:
        rows = {"input_ids": [read[k] for k in batch]}
        inputs = tokenizer.pad(rows, return_tensors="pt").to(model.device)
        return model(**inputs).logits.float().softmax(-1)[:, column].tolist()

    progress(len(texts) - len(written))
    p = answer_all(
        range(len(written)),
        [len(ids) for ids in read],
        ask,
        model,
        budget=Budget(tokens, batch_size),
        progress=lambda done: progress(len(done)),
    )
    probabilities = dict(zip(written, p, strict=True))
    return Legible([probabilities.get(i, float("nan")) for i in range(len(texts))])


def identity_of(classifier: str) -> str | None:
    """What tells a classifier from all others: its hash, or its name and commit on the hub.

    None where the commit is not known, so that what it says cannot be kept.
    """
    if Path(classifier).is_dir():
        return fingerprint(classifier)
    try:
        AutoConfig.from_pretrained(
            classifier, trust_remote_code=False
        )  # brings it into the local cache
    except (OSError, ValueError):
        return None  # said when it is loaded
    commit = commit_of(classifier, {})
    return f"{classifier}@{commit}" if commit else None


def _loaded(classifier: str) -> tuple[Any, Any]:
    """Tokenizer and model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if Path(classifier).is_dir():
        refuse_pickle(Path(classifier), kind="AutoModelForSequenceClassification")
    try:
        tokenizer = AutoTokenizer.from_pretrained(classifier, trust_remote_code=False)
        with read_whole():
            model = AutoModelForSequenceClassification.from_pretrained(
                classifier, trust_remote_code=False, use_safetensors=True
            ).eval()
    except (OSError, ValueError) as error:
        raise InputError(
            f"fluency_classifier {classifier!r} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    return tokenizer, model.to("cuda" if torch.cuda.is_available() else "cpu")


def _column(classifier: str, known: dict[str, int], label: str | None) -> int:
    """The place of the class of clean text."""
    wanted = label or next((name for name in CLEAN if name in known), None)
    if wanted not in known:
        raise InputError(
            f"fluency_classifier {classifier!r} has no class {wanted or 'clean'!r}. Set "
            f"fluency_label to one of: {', '.join(known)}."
        )
    return known[wanted]


def _run(model: None, inputs: Sequence[PassInput], **limits: Any) -> list[list[float]]:
    settings = inputs[0].settings
    assert settings.classifier is not None  # without one it is not asked
    texts = [[answer.text for answer in data.generated or ()] for data in inputs]
    return split(
        fluency_prob(settings.classifier, joined(texts), label=settings.label, **limits), texts
    )


def _setting(data: PassInput) -> Any:
    identity = identity_of(str(data.settings.classifier))
    return NOT_CACHED if identity is None else [identity, data.settings.label]


def _why_not(suite: str, settings: Settings, model: "LazyModel | None") -> str | None:
    if settings.classifier:
        return None
    return (
        f"no classifier is given. Set eval.{suite}.fluency_classifier to a folder or hub "
        "repository of a text classifier"
    )


register(
    Pass(
        "legible", version=1, order=8, record=Legible, model="none", reads="prompts",
        after="generate", run=_run,
        pack=lambda p, data: {"value": np.array(p), "cut": np.array(0)},
        unpack=lambda arrays, data: Legible(arrays["value"].tolist()),
        setting=_setting, why_not=_why_not,
    )
)  # fmt: skip
