"""What a comparison says of runs that were attacked."""

import csv
import re

import pytest
from report_runs import audit, dial, entries, form, make

from unlora.cli import main
from unlora.report import Entry, audits, compare, summary, write
from unlora.report.runs import read_rows
from unlora.report.table import text_table

NO_ATTACKS = '{"verdict": {"name": "held", "sentence": "Held."}}'
FILES = ("report.html", "report.md", "table.csv")


def seeds(home, *verdicts):
    """One run of some seeds with these verdicts; None is not audited. Residuals .1, .2, ..."""
    made = []
    for seed, verdict in enumerate(verdicts):
        made.append(Entry("NPO", "method", make(home / str(seed), "good"), seed))
        if verdict:
            value = (seed + 1) / 10
            audit(made[-1].folder, verdict, form("plain", value), form("wordings", 2 * value))
    return made


def test_figures_are_means_over_seeds(tmp_path):
    [row] = read_rows(seeds(tmp_path, "held", "held", "hidden"))
    cells = audits.cells(row)
    assert cells["residual"].mean == pytest.approx(0.2) and cells["residual"].note is None
    assert cells["residual"].interval == pytest.approx((0.15, 0.25))
    assert cells["HELD"].mean == pytest.approx(0.4)
    assert cells["HELD"].seeds == pytest.approx((0.2, 0.4, 0.6))
    assert audits.shown_verdict(row) == "held 2 of 3, hidden 1 of 3"


def test_programs_read_the_figures_of_every_seed(tmp_path):
    [row] = read_rows(seeds(tmp_path / "audited", "held", None))
    assert audits.figures(row) == {
        "audit_residual": {"mean": pytest.approx(0.1), "seeds": [pytest.approx(0.1), None]},
        "audit_held": {"mean": pytest.approx(0.2), "seeds": [pytest.approx(0.2), None]},
        "audit_verdict": {"mean": None, "seeds": ["held", None]},
    }
    [row] = read_rows(seeds(tmp_path / "not", None))
    assert audits.figures(row) == {}


def test_seeds_that_were_not_audited_are_counted(tmp_path):
    [row] = read_rows(seeds(tmp_path, "held", None, "held"))
    cell = audits.cells(row)["residual"]
    assert cell.mean == pytest.approx(0.2) and cell.seeds == (0.1, None, pytest.approx(0.3))
    assert cell.note == "2 of 3 seeds audited"
    assert audits.shown_verdict(row) == "held (2 of 3 seeds audited)"


def test_an_audit_that_can_tell_nothing_has_no_figures(tmp_path):
    [made] = seeds(tmp_path, "cannot be told")
    audit(made.folder, "cannot be told", form("plain", None), form("wordings", 0.1), held=None)
    [row] = read_rows([made])
    cells = audits.cells(row)
    assert cells["residual"].mean is None and cells["HELD"].mean is None
    assert "cannot be told" in cells["HELD"].note
    assert "left out: no row has a score" in write(tmp_path / "out", [made], title="T").read_text()


def test_a_bar_is_the_form_that_brings_back_most_of_those_that_count(tmp_path):
    [made] = seeds(tmp_path, "held")
    audit(
        made.folder, "held", form("plain", 0.0), form("sample: span@1", 0.1),
        form("sample: span@16", 0.2), form("sample: rouge@16", 0.9, left_out="too wide"),
        form("depth", 0.5, left_out="too wide"), form("half", 0.7, counts=False),
        not_run={"mine": "the model has no adapter"},
    )  # fmt: skip
    bars = {bar.attack: bar for bar in audits.bars(*read_rows([made]))}
    assert (bars["sample"].form, bars["sample"].value) == ("sample: span@16", 0.2)
    assert {name: bar.why_not for name, bar in bars.items() if bar.why_not} == {
        "depth": "left out: too wide", "half": audits.OF_ADAPTERS,
        "mine": "not run: the model has no adapter",
    }  # fmt: skip
    page = write(tmp_path / "out", [made], title="T").read_text()
    for text in ("left out: too wide", "not run: the model has no adapter", audits.OF_ADAPTERS,
                 "inner states read", "0: a model that never saw it", "1: as before"):  # fmt: skip
        assert text in page, text


def test_the_zero_line_is_the_model_that_was_compared_with(tmp_path):
    [made] = seeds(tmp_path, "held")
    audit(made.folder, "held", baseline="the root model")
    page = write(tmp_path / "out", [made], title="T").read_text()
    assert "0: the root model</text>" in page and "less likely than to the root model" in page


def test_a_bar_is_a_mean_over_the_seeds_in_which_the_attack_counts(tmp_path):
    made = seeds(tmp_path, "held", "held", "held")
    audit(made[2].folder, "held", form("plain", 0.3), form("wordings", 9.0, left_out="too wide"))
    plain, wordings = audits.bars(*read_rows(made))
    assert plain.value == pytest.approx(0.2) and wordings.value == pytest.approx(0.3)
    assert wordings.interval == pytest.approx((0.25, 0.35))


def test_relearning_is_shown_at_the_learning_rate_that_brings_back_most(tmp_path):
    made = seeds(tmp_path, "held", "held")
    for seed, run in enumerate(made):
        audit(run.folder, "held", form("plain", 0.0), *(
            form(f"relearn: learning rate {rate}, step {step}", back, unlearned=-step - seed)
            for rate, step, back in (("2e-05", 20, 0.1), ("0.001", 60, 0.3), ("0.001", 5, 0.0))
        ))  # fmt: skip
    found = audits.relearning(*read_rows(made))
    assert found.rate == 0.001 and found.attack == "relearn"
    assert found.means["unlearned"] == [(5, -5.5), (60, -60.5)]
    assert found.means["target"] == [(5, -0.1), (60, -0.1)]
    page = write(tmp_path / "out", made, title="T").read_text()
    assert "How fast it comes back" in page and "learning rate 0.001</figcaption>" in page


def test_the_headline_ends_with_the_verdict_on_the_best_method_that_has_one(tmp_path):
    made = entries(tmp_path, "halfway", "good", "lazy")
    audit(made[2].folder, "hidden")
    audit(made[4].folder, "known")
    head = summary.headline(*compare(made).findings)
    assert head.endswith("; halfway: hidden (an attack brings back 10 % of what was known)")
    audit(made[3].folder, "over-forgotten")
    head = summary.headline(*compare(made).findings)
    assert head.endswith("; good: over-forgotten (that leaves a mark of what was deleted)")


def test_every_form_of_the_report_has_residual_held_and_verdict(tmp_path):
    made = entries(tmp_path / "runs", "good", "lazy")
    audit(made[2].folder, "held")
    page = write(tmp_path, made, title="T").read_text()
    assert re.findall(r">(residual|HELD|verdict)[<&]", page) == ["verdict", "residual", "HELD"]
    assert ">held</td>" in page and "The worst is wordings. held." in page
    text = text_table(compare(made)).splitlines()
    assert text[0].split()[-3:] == ["residual", "HELD", "verdict"]
    good = next(line for line in text if line.startswith("good"))
    assert "0.02 [-0.03, 0.07]  0.10 [0.05, 0.15]     held" in good
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert {row["method"]: row["verdict"] for row in rows}["good"] == "held"
    [held] = [row for row in rows if row["metric"] == "HELD"]
    assert (held["mean"], held["better"]) == ("0.1", "nearest 0 is best")
    assert float(held["low95"]) == pytest.approx(0.05)
    written = (tmp_path / "report.md").read_text()
    assert "| residual | HELD | verdict |" in written and "## Does it hold?" in written


@pytest.mark.slow
def test_a_report_without_an_audit_says_nothing_of_one(tmp_path):
    made = entries(tmp_path / "runs", "good")
    before = {name: (write(tmp_path, made, title="T").parent / name).read_bytes() for name in FILES}
    table = text_table(compare(made))
    audit(made[2].folder)
    dial(made[2].folder)
    write(tmp_path, made, title="T")
    for name in FILES[:2]:
        text = before[name].decode()
        for word in ("residual", "HELD", "Does it hold", "verdict<", "More or less of it"):
            assert word not in text, word
    assert before["table.csv"].splitlines()[0].endswith(b"seed_1,note") and "HELD" not in table
    assert all((tmp_path / name).read_bytes() != before[name] for name in FILES)
    for file in (made[2].folder / "audit").iterdir():
        file.unlink()
    write(tmp_path, made, title="T")
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == before


def test_a_dial_is_a_line_with_the_scale_that_was_chosen(tmp_path):
    made = entries(tmp_path / "runs", "good", "lazy")
    dial(made[2].folder, verdict={"name": "held", "sentence": "It held."})
    dial(made[3].folder, None)
    page = write(tmp_path, made, title="T").read_text()
    assert 'data-part="dial"' in page and 'data-part="audit"' not in page
    assert "scale 0.75, the least change that holds under attack: 0.00 is left" in page
    assert "answers to keep at 0.900. It held." in page
    assert "no scale does what was asked for: the least change that holds under attack." in page
    plot = page[page.index('data-part="dial"') :]
    assert plot.count("var(--good)") >= 1 and "probability of answers to keep" in plot


def test_a_scale_that_was_taken_though_none_does_it_is_told_so(tmp_path):
    made = entries(tmp_path / "runs", "good")
    dial(made[2].folder, reached=False, verdict={"name": "hidden", "sentence": "Of another."})
    page = write(tmp_path, made, title="T").read_text()
    assert (
        "scale 0.75, though no scale does what was asked for: the least change that holds" in page
    )
    assert "Of another." not in page


def test_a_dial_without_retain_rows_has_no_line(tmp_path):
    made = entries(tmp_path / "runs", "good")
    dial(made[2].folder, curve=[{"scale": 0.5, "residual": 0.1, "retain": None}])
    page = write(tmp_path, made, title="T").read_text()
    assert (
        "scale 0.75, the least change that holds under attack." in page
        and "answers to keep</text>" not in page
    )


@pytest.mark.parametrize(
    "content, said", [("{", "is not JSON"), (NO_ATTACKS, "a verdict and no attacks")]
)
def test_a_damaged_audit_ends_the_report_with_one_sentence(content, said, tmp_path, capsys):
    made = entries(tmp_path / "runs", "good")
    (made[2].folder / "audit").mkdir()
    (made[2].folder / "audit" / "AUDIT.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        main.main(["report", str(made[2].folder), "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert said in err and "unlora audit RUN" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_texts_of_an_audit_are_shown_and_do_nothing(tmp_path):
    made = entries(tmp_path / "runs", "good")
    bad = "</script><script>hit=1</script> =1|2"
    audit(made[2].folder, bad, form("plain", 0.1), form(f"{bad}: {bad}", 0.2, left_out=bad),
          not_run={bad: bad}, thresholds={bad: 1})  # fmt: skip
    dial(made[2].folder, to=bad, verdict={"name": bad, "sentence": bad})
    page = write(tmp_path, made, title="T").read_text()
    assert "<script>hit" not in page
    assert "<script" not in (tmp_path / "report.md").read_text()
