"""What is written: safe, whole, the same each time."""

import csv
import html
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_runs import HOSTILE, QUESTIONS, entries, log, make, write_json

from unlora.errors import InputError
from unlora.report import Entry, write
from unlora.report.markdown import inline, plain

REAL = Path(os.environ.get("UNLORA_REALDATA", "")) / "eval_logs"
TRIALS = [
    {"method": "good", "number": 0, "params": {"trainer.method_args.beta": 0.1}, "distance": 0.2,
     "utility": 0.9, "feasible": True, "state": "COMPLETE"},
    {"method": "good", "number": 1, "params": {}, "distance": None, "utility": None,
     "feasible": False, "state": "FAIL"},
]  # fmt: skip


class Elements(HTMLParser):
    """The elements of a page, and the text of its scripts by type."""

    def __init__(self, page: str):
        super().__init__()
        self.names: dict[str, int] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.data: list[str] = []
        self._json = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names[tag] = self.names.get(tag, 0) + 1
        self.attributes += attrs
        self._json = tag == "script" and ("type", "application/json") in attrs

    def handle_data(self, data):
        if self._json:
            self.data.append(data)


def hostile_answers() -> dict[str, str]:
    asked = [question for rows in QUESTIONS.values() for question, _ in rows]
    return dict(zip(asked, HOSTILE.values(), strict=False))


def page_of(tmp_path, *methods, **of_log):
    made = entries(tmp_path / "runs", *methods, **of_log)
    return write(tmp_path / "out", made, title="A title").read_text("utf-8")


def test_the_page_has_every_part_in_its_order(tmp_path):
    made = entries(tmp_path / "runs", "good", "broken", curves=True)
    page = write(tmp_path, made, title="T", trials=TRIALS, budget="20 trials each.").read_text()
    places = [page.index(f'data-part="{part}"')
              for part in ("headline", "scatter", "table", "browser", "search")]  # fmt: skip
    assert places == sorted(places) and page.index('id="training"') > places[3]
    for text in ("good forgot what it was asked to and kept 94 % of its utility", "20 trials each.",
                 "trainer.method_args.beta=0.1", "unlora train task_name=good", "f" * 64,
                 "1 min 1 s", "cpu 0.70 GB", "2.13.0"):  # fmt: skip
        assert text in page, text


def test_the_page_asks_no_host_for_anything(tmp_path):
    page = page_of(tmp_path, "good")
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in page
    found = Elements(page)
    assert not {"link", "img", "iframe"} & (found.names.keys() - {"link"})
    assert not [v for k, v in found.attributes if k.startswith("on")]


def test_scripts_are_the_ones_the_policy_names(tmp_path):
    import base64
    import hashlib

    page = page_of(tmp_path, "good")
    page = html.unescape(page)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in page


def test_a_hostile_generation_changes_nothing(tmp_path):
    tame, wild = (
        page_of(tmp_path / name, "good", answers=answers)
        for name, answers in (("tame", None), ("wild", hostile_answers()))
    )
    assert Elements(wild).names == Elements(tame).names
    assert "window.hit = 1</script>" not in wild and "\u2028" not in wild
    texts = json.loads(Elements(wild).data[0])["texts"]
    assert HOSTILE["script"] in texts and HOSTILE["rtl"] in texts
    assert ["A" * 2000, 100_000] in texts, "cut for display, with its whole length"
    assert len(wild) < len(tame) + 20_000


def test_names_and_titles_are_escaped_everywhere(tmp_path):
    name = '<b onclick="x">=1|2</b>'
    made = entries(tmp_path, "good")
    made = [*made[:2], Entry(name, "method", made[2].folder)]
    page = write(tmp_path / "out", made, title="<i>T</i>").read_text()
    assert "<b onclick" not in page and "<i>T" not in page
    written = (tmp_path / "out" / "report.md").read_text()
    assert "<b" not in written and "\\=1" not in written
    assert "=1\\|2" in written
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert {row["method"] for row in rows} == {"target", "gold", name}


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(tmp_path):
    made = entries(tmp_path / "runs", "good", curves=True)
    first, second = (write(tmp_path / out, made, title="T").parent for out in ("a", "b"))
    for name in ("report.html", "report.md", "table.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert sorted(path.name for path in first.iterdir()) == [
        "report.html", "report.md", "table.csv"
    ]  # fmt: skip


def test_the_csv_has_a_line_for_each_method_and_metric(tmp_path):
    write(tmp_path, entries(tmp_path / "runs", "good", "broken"), title="T")
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert len(rows) == 4 * len(log("good"))
    (found,) = [r for r in rows if (r["method"], r["metric"]) == ("good", "forget_Q_A_Prob")]
    assert float(found["mean"]) == 0.2 and float(found["seed_1"]) == 0.2
    assert math.isclose(float(found["low95"]), 0.15) and found["better"] == "nearest gold is best"
    assert {r["collapsed"] for r in rows if r["method"] == "broken"} == {"1"}


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", " =1", "\t=1"])
def test_no_cell_of_text_is_a_formula(text):
    assert plain(text) == "'" + text
    assert plain("NPO=1") == "NPO=1"


def test_markdown_of_a_model_has_no_effect():
    assert inline("a|b\n# c `d` <e> *f*") == "a\\|b \\# c \\`d\\` &lt;e&gt; \\*f\\*"
    assert "\u202e" not in inline(HOSTILE["rtl"])


def test_rows_are_matched_by_question_whatever_template_and_order(tmp_path):
    made = entries(tmp_path, "good")
    turned = log("good")
    rows = turned["forget_Q_A_ROUGE"]["value_by_index"]
    for row in rows.values():
        row["input"] = f"system\n\nBe kind.user\n\n{row['input']}assistant\n\n"
    turned["forget_Q_A_ROUGE"]["value_by_index"] = {
        str(i): row for i, row in enumerate(reversed(rows.values()))
    }
    write_json(made[2].folder / "evals" / "TOFU_EVAL.json", turned)
    content = json.loads(Elements(write(tmp_path, made, title="T").read_text()).data[0])
    split = content["splits"][0]
    assert split["label"] == "forget" and len(split["rows"]) == 3
    assert [content["texts"][row[0]] for row in split["rows"]] == [
        q for q, _ in QUESTIONS["forget"]
    ]
    assert all(len(row) == 5 and None not in row for row in split["rows"])


def test_logs_of_two_kinds_have_a_section_each(tmp_path):
    made = entries(tmp_path, "good")
    other = {"forget_knowmem_ROUGE": {"agg_value": 0.3}, "retain_knowmem_ROUGE": {"agg_value": 0.5}}
    write_json(tmp_path / "m" / "MUSE_EVAL.json", other)
    page = write(tmp_path, [*made, Entry("m", "method", tmp_path / "m")], title="T").read_text()
    assert 'id="table-TOFU"' in page and 'id="table-MUSE"' in page
    assert "How much m forgot cannot be said without the target" in page


@pytest.mark.slow
def test_a_seed_more_is_a_row_less(tmp_path):
    made = [Entry("x", "method", make(tmp_path / str(s), "good", shift=s / 10), s) for s in (0, 1)]
    page = write(tmp_path, made, title="T").read_text()
    assert "Each seed" in page and "0.250" in page


def test_importing_the_package_is_light():
    heavy = "{'matplotlib', 'jinja2', 'numpy', 'torch', 'yaml'}"
    code = f"import sys, unlora.cli.report; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_nothing_is_left_where_a_log_is_broken(tmp_path):
    made = entries(tmp_path / "runs", "good")
    (made[2].folder / "evals" / "TOFU_EVAL.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        write(tmp_path / "out", made, title="T")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not REAL.is_dir(), reason="UNLORA_REALDATA has no eval_logs")
@pytest.mark.parametrize(
    "target, gold, rows",
    [("tofu_Llama-3.2-1B-Instruct_full", "tofu_Llama-3.2-1B-Instruct_retain90", 400),
     ("muse_Llama-2-7b-hf_News_target", "muse_Llama-2-7b-hf_News_retrain", 100)],
)  # fmt: skip
def test_published_logs_are_read(target, gold, rows, tmp_path):
    made = [Entry("target", "target", REAL / target), Entry("gold", "gold", REAL / gold),
            Entry("again", "method", REAL / gold)]  # fmt: skip
    page = write(tmp_path, made, title="T").read_text("utf-8")
    assert "again forgot what it was asked to" in page
    content = json.loads(Elements(page).data[0])
    assert len(content["splits"][0]["rows"]) == rows
    questions = [content["texts"][row[0]] for row in content["splits"][0]["rows"]]
    assert not any("Cutting Knowledge" in str(question) for question in questions)
