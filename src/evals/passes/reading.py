"""What a classifier thinks of texts: a second, small model that only reads."""

from collections.abc import Sequence

import torch

from unlora.errors import InputError
from unlora.evals.passes.batches import Progress
from unlora.evals.records import Legible

CLEAN = ("clean", "LABEL_0")  # what classifiers of gibberish call text that is none
AT_ONCE = 32


@torch.no_grad()
def legible(
    classifier: str,
    texts: Sequence[str | None],
    *,
    label: str | None = None,
    progress: Progress = lambda done: None,
) -> Legible:
    """Probability that each text is clean, by a text classifier; NaN where nothing was written.

    Args:
        classifier: folder or hub repository of a model for sequence classification.
        label: the class of clean text; ``clean``, or the first one, if not given.

    Raises:
        InputError: the classifier cannot be loaded, or has no such class.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(classifier)
        model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    except (OSError, ValueError) as error:
        raise InputError(
            f"fluency_classifier {classifier!r} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    known = model.config.label2id
    wanted = label or next((name for name in CLEAN if name in known), None)
    if wanted not in known:
        raise InputError(
            f"fluency_classifier {classifier!r} has no class {wanted or 'clean'!r}. Set "
            f"fluency_label to one of: {', '.join(known)}."
        )
    found = [float("nan")] * len(texts)
    written = [i for i, text in enumerate(texts) if text and text.strip()]
    for begin in range(0, len(written), AT_ONCE):
        batch = written[begin : begin + AT_ONCE]
        inputs = tokenizer(
            [texts[i] for i in batch], padding=True, truncation=True, return_tensors="pt"
        )
        p = model(**inputs).logits.float().softmax(-1)[:, known[wanted]].tolist()
        for i, probability in zip(batch, p, strict=True):
            found[i] = probability
    progress(len(texts))
    return Legible(found)
