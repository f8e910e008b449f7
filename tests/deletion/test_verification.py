"""An evidence folder is believed as it was written, and no other."""

import json
import random
import shutil
import time
from pathlib import Path

import pytest
from deletion_runs import MODEL, QUICK, ROWS, write_rows

from unlora.cli.main import main
from unlora.deletion.evidence_chain import as_text, entry
from unlora.deletion.verification import run
from unlora.errors import GuardError


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    """The evidence of a request with attacks, far from its models."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("made") / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("UNLORA_CACHE", str(folder / "cache"))
        write_rows("rows.jsonl", ROWS[:8])
        main(["forget", "rows.jsonl", "--model", MODEL, "--route", "approximate", "--id", "mine",
              *QUICK, "+audit.half={handler: scale, scale: 0.5}"])  # fmt: skip
    return folder / "saves" / "requests" / "mine"


@pytest.fixture
def evidence(written, tmp_path):
    return shutil.copytree(written, tmp_path / "handed on")


def test_it_holds_elsewhere_and_in_another_time_zone(evidence, monkeypatch, capsys):
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    time.tzset()
    main(["verify", str(evidence)])
    said = capsys.readouterr().out
    assert "9 entries and 3 files are as they were written" in said
    monkeypatch.undo()
    time.tzset()


@pytest.mark.budget(5)
def test_any_byte_that_is_changed_is_named_by_its_file(evidence):
    draw, files = random.Random(0), sorted(evidence.iterdir())
    assert len(files) == 4
    for number in range(50):
        file = files[number % 4]
        before = file.read_bytes()
        at = draw.randrange(len(before))
        other = draw.choice([byte for byte in range(256) if byte != before[at]])
        file.write_bytes(before[:at] + bytes([other]) + before[at + 1 :])
        with pytest.raises(GuardError) as raised:
            run(str(evidence))
        assert str(raised.value).startswith(f"{file.name}: "), (file.name, at, other)
        file.write_bytes(before)
    run(str(evidence))


def test_a_file_that_is_missing_or_new_is_named(evidence):
    (evidence / "note.txt").write_text("all is well")
    with pytest.raises(GuardError, match="^note.txt: it is not part of the evidence$"):
        run(str(evidence))
    (evidence / "note.txt").unlink()
    (evidence / "evidence.html").unlink()
    with pytest.raises(GuardError, match="^evidence.html: it is missing$"):
        run(str(evidence))


def test_a_figure_that_does_not_follow_from_the_scores_is_found_behind_a_new_chain(evidence):
    file = evidence / "evidence.json"
    entries = json.loads(file.read_text())["entries"]
    chained = []
    for one in entries:
        if one["kind"] == "audit":
            one["content"]["attacks"][0]["residual"] = 0.01
        chained.append(
            entry(one["kind"], one["content"], chained[-1]["sha256"] if chained else None)
        )
    file.write_text(as_text(chained))
    with pytest.raises(GuardError, match="^check-scores.json: attacks does not follow from it$"):
        run(str(evidence))
    assert Path(file).read_text() != as_text(entries)
