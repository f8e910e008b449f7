"""Hold what a user orders with ``unlora forget``."""

from collections.abc import Mapping
from dataclasses import dataclass, field

EXACT_UP_TO = 1.5
OF_AUDIT = ("audit", "thresholds")


@dataclass(frozen=True)
class Order:
    """What a user asks for.

    Attributes:
        rows: a file; None with ``where``.
        columns: ``question_key``, ``answer_key`` and ``text_key`` of the file.
        words: ``key=value``: settings of the training and of the audit.
    """

    model: str
    rows: str | None = None
    where: str | None = None
    retain: str | None = None
    route: str = "auto"
    method: str = "NPO"
    dial: str = "audit"
    exact_up_to: float = EXACT_UP_TO
    name: str | None = None
    keep_rows: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    words: tuple[str, ...] = ()

    @property
    def audit_words(self) -> tuple[str, ...]:
        """Overrides of the audit."""
        return self._words_of(*OF_AUDIT)

    @property
    def training_words(self) -> tuple[str, ...]:
        """Overrides of the unlearning."""
        return tuple(word for word in self.words if word not in self.audit_words)

    def _words_of(self, *sections: str) -> tuple[str, ...]:
        """Those words that begin with one of these names, with ``~`` and ``+`` before it or not."""
        return tuple(
            word
            for word in self.words
            if word.lstrip("~+").partition("=")[0].partition(".")[0] in sections
        )
