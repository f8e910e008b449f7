"""Hold what a user orders with ``unlora forget``."""

from dataclasses import dataclass

EXACT_UP_TO = 1.5
COLUMNS, OF_AUDIT = ("question_key", "answer_key", "text_key"), ("audit", "thresholds")


@dataclass(frozen=True)
class Order:
    """What a user asks for.

    Attributes:
        rows: a file; None with ``where``.
        words: ``key=value``: columns of the file, settings of the training and of the audit.
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
    words: tuple[str, ...] = ()

    @property
    def columns(self) -> dict[str, str]:
        """Names of the columns of the file, where they are not the usual ones."""
        return dict(word.split("=", 1) for word in self._words_of(*COLUMNS))

    @property
    def audit_words(self) -> tuple[str, ...]:
        """Overrides of the audit."""
        return self._words_of(*OF_AUDIT)

    @property
    def training_words(self) -> tuple[str, ...]:
        """Overrides of the unlearning."""
        others = self._words_of(*COLUMNS, *OF_AUDIT)
        return tuple(word for word in self.words if word not in others)

    def _words_of(self, *sections: str) -> tuple[str, ...]:
        """Those words that begin with one of these names, with ``~`` and ``+`` before it or not."""
        return tuple(
            word
            for word in self.words
            if word.lstrip("~+").partition("=")[0].partition(".")[0] in sections
        )
