"""Report what several runs came to, side by side, as a page, a text and a table.

``results`` reads run folders, ``findings`` compares them, ``words`` says what happened; ``page``
and ``text`` write it down. ``command`` is ``unlora report``. What draws and renders is imported
when something is written, not with this package.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlora.report.findings import Comparison, compare
from unlora.report.runs import Entry

__all__ = ["Comparison", "Entry", "compare", "write"]


def write(
    folder: Path,
    entries: Sequence[Entry] | Comparison,
    *,
    title: str,
    trials: Sequence[Mapping[str, Any]] = (),
    budget: str | None = None,
    missing: Sequence[str] = (),
) -> Path:
    """Write ``report.html``, ``report.md`` and ``table.csv``; see :func:`html_page.write`."""
    from unlora.report import html_page

    return html_page.write(
        folder, entries, title=title, trials=trials, budget=budget, missing=missing
    )
