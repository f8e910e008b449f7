"""Write the page of a request: one file for people who are no engineers."""

from collections.abc import Mapping
from importlib import resources
from typing import Any

from unlora.report.markdown import harmless

IN_WORDS = {
    "exact": "The model never saw these rows.",
    "held": "The rows are gone, as far as the attacks below can tell.",
    "hidden": "Asked, the model does not tell the rows; but a part of them can be brought back.",
    "known": "The model still tells the rows.",
    "over-forgotten": "The rows are gone, but it shows that something was taken out.",
    "broken": "The model was damaged.",
    "too few to say": "These are too few rows to say whether they are gone.",
    "cannot be told": "Whether the rows are gone cannot be told.",
}


def as_html(facts: Mapping[str, Any]) -> str:
    """The page; kind of entry -> content."""
    import jinja2

    source = resources.files("unlora.deletion").joinpath("templates", "evidence.html")
    environment = jinja2.Environment(
        autoescape=True,
        finalize=lambda value: harmless(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    environment.filters["figure"] = lambda value: "" if value is None else f"{value:.3g}"
    page = environment.from_string(source.read_text("utf-8"))
    in_words = IN_WORDS[facts["audit"]["verdict"]["name"]]
    content = {**facts, "rolled_back": facts.get("rolled back"), "in_words": in_words}
    return page.render(content).encode("utf-8", "replace").decode("utf-8") + "\n"


def percent(value: float | None, interval: Any = None) -> str:
    """``8 % [3, 14]``."""
    if value is None:
        return "not known"
    bounds = f" [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]" if interval else ""
    return f"{100 * value:.0f} %{bounds}"
