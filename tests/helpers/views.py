"""Views that the tests make, at random for any term or by hand, and what is in them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unlora.forward import IGNORE_INDEX
from unlora.forward.outputs import Hidden, Outputs, Padded, ScoredTokens, SequenceLogps, TokenLogps
from unlora.objectives import EMPTY, TERMS, Term, View

VOCABULARY = 7
PADDED_VOCABULARY = 103  # above 100, where Open-Unlearning's label -100 is a token: |V| - 100
WIDTH = 5  # of hidden states
LONG, SHORT = (3, 5, 1), (2, 1, 4)  # lengths of answers, and of the alternate answers
PROMPT = 2


# --- at random -----------------------------------------------------------------------------------


def random_view(kind: type, seed: int, lengths: tuple[int, ...] = LONG) -> View:
    """A view of this kind in float64; logits are a few units large.

    Args:
        seed: of what the model says; the tokens depend on the lengths alone.
    """
    drawing = torch.Generator().manual_seed(seed)
    labelling = torch.Generator().manual_seed(sum(lengths))

    def normal(*shape: int) -> Tensor:
        return 2 * torch.randn(*shape, generator=drawing, dtype=torch.float64)

    if kind is SequenceLogps:
        return SequenceLogps(-normal(len(lengths)).abs() * torch.tensor(lengths))
    if kind is Padded:
        labels = torch.full((len(lengths), PROMPT + max(lengths) + 1), IGNORE_INDEX)
        for row, length in enumerate(lengths):
            answer = torch.randint(PADDED_VOCABULARY, (length,), generator=labelling)
            labels[row, PROMPT : PROMPT + length] = answer
        return Padded(normal(*labels.shape, PADDED_VOCABULARY), labels)
    labels = torch.randint(VOCABULARY, (sum(lengths),), generator=labelling)
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    tokens = (labels, row, len(lengths))
    if kind is ScoredTokens:
        return ScoredTokens(*tokens)
    if kind is Hidden:
        return Hidden(*tokens, normal(len(row), WIDTH))
    return Outputs(*tokens, normal(len(row), VOCABULARY))


def random_views(term: Term) -> dict[str, View]:
    """What a term asks for; the policy's numbers are leaves that want a gradient."""
    views = {}
    for seed, (name, kind) in enumerate(term.views.items()):
        views[name] = random_view(kind, seed, lengths_of(name))
        if name.startswith("policy"):
            numbers(views[name]).requires_grad_()
    return views


def lengths_of(name: str) -> tuple[int, ...]:
    """The lengths of the rows of a part, or of a view of it."""
    return SHORT if name.endswith("alternate") else LONG


def random_draws(term: Term, width: int = WIDTH) -> dict[str, Tensor]:
    """The tensors a term has drawn once, in float64."""
    return {name: draw(width, 3).double() for name, draw in term.draws.items()}


# --- by hand -------------------------------------------------------------------------------------


def said(*rows: list[list[float]], labels: list[list[int]] | None = None) -> Outputs:
    """Outputs with these token distributions, all labels 0 if not given."""
    probabilities = torch.tensor([token for row in rows for token in row], dtype=torch.float64)
    given = labels or [[0] * len(row) for row in rows]
    flat = torch.tensor([label for row in given for label in row])
    return Outputs(flat, _row_of(rows), len(rows), probabilities.log())


def states(*rows: list[list[float]]) -> Hidden:
    """Hidden states of these tokens, all labels 0."""
    row = _row_of(rows)
    flat = torch.tensor([token for row in rows for token in row], dtype=torch.float64)
    return Hidden(torch.zeros_like(row), row, len(rows), flat)


def padded(
    logits: list[list[list[float]]], labels: list[list[int]], *, vocabulary: int | None = None
) -> Padded:
    """Logits and label of every position; shorter logits are filled up with zeros."""
    given = torch.tensor(logits, dtype=torch.float64)
    missing = (vocabulary or given.shape[-1]) - given.shape[-1]
    return Padded(torch.nn.functional.pad(given, (0, missing)), torch.tensor(labels))


def _row_of(rows: tuple[list[list[float]], ...]) -> Tensor:
    return torch.tensor([i for i, row in enumerate(rows) for _ in row])


def value(
    name: str, *given: View, drawn: Mapping[str, list[float]] = EMPTY, **hyper: object
) -> Any:
    """What a term returns for these views, each narrowed to what it asks for."""
    term = TERMS[name].configure(**hyper)
    tensors = {key: torch.tensor(numbers, dtype=torch.float64) for key, numbers in drawn.items()}
    return term(narrowed_for(term, *given), tensors).tolist()


# --- what is in a view ---------------------------------------------------------------------------


def narrowed(view: View, kind: type) -> View:
    """Of all that is known, what this kind holds; logits may stand for hidden states."""
    if type(view) is kind or (kind is TokenLogps and isinstance(view, TokenLogps)):
        return view
    assert isinstance(view, Outputs), f"a {type(view).__name__} cannot be made a {kind.__name__}"
    tokens = (view.labels, view.row, view.rows)
    if kind is SequenceLogps:
        return SequenceLogps(view.sequence_logps)
    if kind is ScoredTokens:
        return ScoredTokens(*tokens)
    assert kind is Hidden, f"Outputs cannot be made a {kind.__name__}"
    return Hidden(*tokens, view.logits)


def narrowed_for(term: Term, *given: View) -> dict[str, View]:
    """These views, in the order in which a term asks for them."""
    pairs = zip(term.views.items(), given, strict=True)
    return {name: narrowed(view, kind) for (name, kind), view in pairs}


def numbers(view: View) -> Tensor | None:
    """The tensor through which a gradient flows, if the view has one."""
    if isinstance(view, (Outputs, Padded)):
        return view.logits
    if isinstance(view, Hidden):
        return view.states
    return view.sequence_logps if isinstance(view, SequenceLogps) else None


def plain(view: View) -> list:
    """A view as the plain lists that ``papers.py`` is written for."""
    if isinstance(view, SequenceLogps):
        return list(view.sequence_logps)
    if isinstance(view, Padded):
        return [
            [(z, int(y)) for z, y in zip(logits, labels, strict=True)]
            for logits, labels in zip(view.logits, view.labels, strict=True)
        ]
    found: list[list] = [[] for _ in range(view.rows)]
    for i, row in enumerate(view.row.tolist()):
        label = int(view.labels[i])
        if isinstance(view, Outputs):
            found[row].append((view.logits[i], label))
        else:
            found[row].append(view.states[i] if isinstance(view, Hidden) else label)
    return found
