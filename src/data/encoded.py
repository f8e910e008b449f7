"""Hold one example as token ids, truncated to what a model reads."""

from dataclasses import dataclass, replace

from unlora.forward import IGNORE_INDEX


@dataclass(frozen=True)
class Encoded:
    """One example as token ids.

    Attributes:
        labels: the ids again where a token is scored, ``IGNORE_INDEX`` elsewhere.
        cut: number of tokens that were dropped to keep within the maximal length.
        number: which row of its data set it is, from 0.
    """

    input_ids: list[int]
    labels: list[int]
    cut: int = 0
    number: int = 0

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first scored one."""
        return next(i for i, label in enumerate(self.labels) if label != IGNORE_INDEX)


def cut_prompt(prompt: list[int], room: int, bos: int | None) -> Encoded:
    """The end of a prompt, after its begin token: models are lost without that."""
    begin = prompt[:1] if prompt[:1] == [bos] else []
    cut = max(0, len(prompt) - room)
    tokens = [*begin, *prompt[cut + len(begin) :]] if cut else prompt
    return Encoded(tokens, [IGNORE_INDEX] * len(tokens), cut)


def fit(prompt: list[int], answer: list[int], max_length: int, bos: int | None) -> Encoded:
    """Join prompt and answer within ``max_length`` tokens; see :meth:`Chat.encode`."""
    before = cut_prompt(prompt, max_length - min(len(answer), max_length // 2), bos)
    fitting = answer[: max_length - len(before.input_ids)]
    cut = before.cut + len(answer) - len(fitting)
    return Encoded([*before.input_ids, *fitting], [*before.labels, *fitting], cut)


def without_end(row: Encoded, end_id: int) -> Encoded:
    """Leave the end token in the row, unscored; a row that was cut before it stays as it is."""
    if row.labels[-1] != end_id:
        return row
    return replace(row, labels=[*row.labels[:-1], IGNORE_INDEX])
