"""Texts of models, data and names in every field of a report: they are shown, and do nothing."""

import csv
import re
from html.parser import HTMLParser

import pytest
from report_runs import log, make, write_json

from unlora.cli import main
from unlora.report import Entry, write

HOSTILE = {
    "script": "</script><script>window.hit=1</script>",
    "attribute": "\" onmouseover=\"hit=1\" x='",
    "image": "<img src=x onerror=hit=1>",
    "svg": "</svg><svg onload=hit=1><style>*{display:none}</style>",
    "comment": "<!-- --!> ]]> {{7*7}} {% raw %}",
    "markdown": "| a | b |\n\n# hit\n- [x](javascript:hit) ![i](http://h/i) `c` **b** ~~~",
    "entity": "&lt;script&gt; &#60;b&#62; &amp;",
    "formula": "=HYPERLINK(\"http://h\",\"hit\")",
    "formula2": "@SUM(1)|cmd' /C hit'!A0",
    "terminal": "\x1b]0;hit\x07\x1b[2J\x9b31m\x08\r",
    "direction": "\u202ehit\u2066\u2069\u200f",
    "lines": "a\u2028b\u2029c\x0bd\x0ce\x85f",
    "half": "x \ud800 \x00 y",
}  # fmt: skip
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class Page(HTMLParser):
    """The kinds of elements and attributes in a page, and how many of those that do something."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.kinds, self.acting = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.kinds |= {tag, *(name for name, _ in attrs)}
        urls = [value for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag in ("script", "style", "link", "meta") or any(u[:1] != "#" for u in urls):
            self.acting.append((tag, *urls))


def report(folder, bad):
    """A report with this text in every field that a model, a data set or a name may fill."""
    entries = []
    for role, kind in (("target", "target"), ("gold", "gold"), ("method", "good")):
        config = {
            "mode": "unlearn", "task_name": bad, "model": {"model_args": {bad: bad}, "x": [bad]},
            "trainer": {"handler": bad, "method_args": {bad: bad, "beta": kind}, "args": {bad: 1}},
            "data": {bad: {bad: {"args": {"hf_args": {"path": bad}}}}},
        }  # fmt: skip
        run = make(folder / role, kind, config=config, curves=True)
        said = log(kind) | {bad: {"agg_value": 0.5}, f"{bad}/acc": {"agg_value": 0.1}}
        said["privleak"] = {"agg_value": None, "not_computed": bad}
        for row in said["forget_Q_A_ROUGE"]["value_by_index"].values():
            row |= {"generation": bad + kind, "ground_truth": bad, "input": bad + row["input"]}
        write_json(run / "evals" / "TOFU_EVAL.json", said)
        write_json(run / "manifest.json", {
            "command": bad, "git_commit": bad, "python": bad, "seconds": 1.0, "lineage": bad,
            "versions": {"torch": bad, bad: bad}, "hardware": {"machine": bad, "gpus": [bad]},
            "guards": {bad: bad}, "size": bad, "data": {bad: bad}, "effective_batch": 16,
            "training": [{"step": 1, "loss": 3.0, bad: bad}, {"step": 2, "loss": 1.0, bad: 2.0}],
        })  # fmt: skip
        write_json(run / "lineage.json", {"root": {"path": bad, "local": False}, "links": []})
        entries.append(Entry(f"{role} {bad}", role, run))
    trial = {"method": bad, "number": 1, "params": {bad: bad, "x": 1e-3}, "distance": 0.1,
             "utility": 0.2, "feasible": True, "state": bad}  # fmt: skip
    write(
        folder / "out", entries, title=bad, trials=[trial], budget=bad, missing=[f"{bad} is gone"]
    )
    return folder / "out"


@pytest.fixture(scope="module")
def tame(tmp_path_factory):
    return report(tmp_path_factory.mktemp("tame"), "plain text")


def bars(text):
    """How many cells each line has."""
    return [len(re.findall(r"(?<!\\)\|", line)) for line in text.split("\n")]


@pytest.mark.default_cases(1)
@pytest.mark.parametrize("name", HOSTILE)
def test_a_report_shows_any_text_in_any_field_and_obeys_none(name, tame, tmp_path):
    out = report(tmp_path, HOSTILE[name])
    page = (out / "report.html").read_text("utf-8")
    shown, usual = Page(page), Page((tame / "report.html").read_text("utf-8"))
    assert shown.acting == usual.acting
    assert shown.kinds <= usual.kinds | {"title", "details", "summary"}
    text = (out / "report.md").read_text("utf-8")
    plain = (tame / "report.md").read_text("utf-8")
    outside_of_code = re.sub(r"`[^`\n]*`|^    .*$", "", text, flags=re.MULTILINE)
    assert bars(outside_of_code) == bars(re.sub(r"^    .*$", "", plain, flags=re.MULTILINE))
    assert not re.search(r"<|(?<!\\)\[|(?<!\\)!\[", outside_of_code)
    for file in ("report.html", "report.md", "table.csv"):
        assert not OBEYED.search((out / file).read_text("utf-8").replace("\n", "")), file
    with open(out / "table.csv", encoding="utf-8", newline="") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert not [c for c in cells if c.lstrip()[:1] in tuple("=@+") or re.match(r"\s*-[^\d]", c)]


def test_the_command_says_nothing_that_a_terminal_obeys(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "\x1b[2Jrun", "good")
    main.main(["report", "\x1b[2Jrun", "--output", "\x1b]0;hit\x07out"])
    said = "".join(capsys.readouterr())
    assert "\\x1b[2Jrun" in said and not OBEYED.search(said.replace("\n", ""))
    with pytest.raises(SystemExit):
        main.main(["report", "\x1b[2Jgone"])
    assert not OBEYED.search(capsys.readouterr().err.replace("\n", ""))
