"""What cannot be answered is one sentence with exit code 2, and nothing is lost."""

import json
import shutil
from pathlib import Path

import pytest
from deletion_runs import MODEL, QUICK, ROWS, train, write_rows

from unlora.cli.main import main


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("made") / "home")
    write_rows(folder / "rows.jsonl", ROWS[:6])
    write_rows(folder / "all.jsonl", ROWS)
    write_rows(folder / "others.jsonl", [{"question": "Who is Zed?", "answer": "Nobody."}])
    write_rows(folder / "columns.jsonl", [{"prompt": "Who keeps owl 1?", "reply": "Ivo 7."}])
    (folder / "empty.jsonl").touch()
    (folder / "broken.jsonl").write_text('{"question": "Who')
    (folder / "unfinished").mkdir()
    shutil.copy(folder / MODEL / "run_config.json", folder / "unfinished")
    answered = folder / "saves/requests/old"
    answered.mkdir(parents=True)
    contents = {"request": {}, "route": {"name": "approximate"}, "audit": {},
                "model": {"sha256": [], "earlier": []}}  # fmt: skip
    entries = [{"kind": kind, "content": content} for kind, content in contents.items()]
    (answered / "evidence.json").write_text(json.dumps({"entries": entries}))
    return folder


@pytest.fixture
def home(made, monkeypatch):
    """Nothing that is refused leaves anything, so that all may share a folder."""
    monkeypatch.chdir(made)
    before = {file: file.stat().st_mtime_ns for file in made.rglob("*") if file.is_file()}
    yield made
    assert before == {f: f.stat().st_mtime_ns for f in made.rglob("*") if f.is_file()}


def refused(capsys, *words):
    """The one sentence with which a command ends."""
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    said = capsys.readouterr()
    assert stop.value.code == 2 and not said.out and "Traceback" not in said.err
    lines = [line for line in said.err.splitlines() if "template" not in line and line.strip()]
    assert len(lines) == 1
    return lines[0]


OF = ("--model", MODEL)


@pytest.mark.parametrize(
    "words, expected",
    [
        (OF, "Neither a file of rows nor --where: which rows must go?"),
        (("rows.jsonl", "--where", "customer=1", *OF), "Both a file of rows and --where"),
        (("rows.jsonl", "all.jsonl", *OF), "One file at a time"),
        (("none.jsonl", *OF), "There is no file 'none.jsonl'. Give the rows that must go."),
        (("empty.jsonl", *OF), "empty.jsonl holds no rows. Give a file with at least one."),
        (("broken.jsonl", *OF), "broken.jsonl, line 1: Unterminated string"),
        (("columns.jsonl", *OF), "has neither questions and answers nor text"),
        (("rows.jsonl",), "Which model? Give its run folder: --model saves/finetune/NAME"),
        (("rows.jsonl", "--model", "saves/none"), "There is no run folder 'saves/none'."),
        (("rows.jsonl", "--model", "root"), "is no run folder of this program, so nothing tells"),
        (("rows.jsonl", "--model", "unfinished"), "its training goes on, or was stopped"),
        (("others.jsonl", *OF), "No training of this model saw these rows"),
        (("others.jsonl", *OF, "--route", "exact"), "No training of this model saw these rows"),
        (("all.jsonl", *OF, "--route", "exact"), "nothing is left to train it on"),
        (("all.jsonl", *OF, "--route", "approximate"), "No retain rows are left: the request"),
        (("all.jsonl", *OF), "nothing is left to train it on"),
        (("rows.jsonl", *OF, "--id", "old"), "The request old is answered: saves/requests/old"),
        (("rows.jsonl", *OF, "--id", "../old"), "--id is '../old'; it names folders"),
        (("rows.jsonl", *OF, "--route", "fast"), "--route is 'fast'; it must be one of auto"),
        (("rows.jsonl", *OF, "--dial", "up"), "--dial is 'up'; it must be one of audit"),
        (("rows.jsonl", *OF, "--exact-up-to", "x"), "invalid float value: 'x'"),
        (("rows.jsonl", *OF, "--exact-up-to", "nan"), "it must be a number from 0 on"),
        (("rows.jsonl", *OF, "--retain", "none.csv"), "and there is no such file."),
        (("rows.jsonl", *OF, "--rout", "exact"), "unlora forget cannot use '--rout'"),
        (("--where", "customer", *OF), "it must be COLUMN=VALUE: --where customer=17"),
        (("--where", "customr=1", *OF), "Did you mean 'customer'?"),
        (("--where", "customer=77", *OF), "no row of the model's own data has that value"),
        (("rows.jsonl", *OF, "--route", "approximate", "--method", "NPOO"), "'NPO'"),
        (
            (
                "rows.jsonl",
                *OF,
                "--route",
                "approximate",
                "plugin=[Orthogonal]",
                "trainer.plugins.Orthogonal.weight=-1",
            ),
            "it must be above 0",
        ),
        (("rows.jsonl", *OF, "--route", "approximate", "audit=quik"), "quik"),
        (
            ("rows.jsonl", *OF, "--route", "approximate", "trainer.args.learning_rat=1"),
            "Did you mean 'learning_rate'?",
        ),
    ],
)
def test_what_cannot_be_answered_is_one_sentence(home, capsys, words, expected):
    assert expected in refused(capsys, "forget", *words)


def test_changed_or_absent_data_cannot_be_trained_on_again(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "home"))
    write_rows("train.jsonl", [*ROWS[:-1], {"question": "Who keeps owl 9?", "answer": "Me."}])
    said = refused(capsys, "forget", "rows.jsonl", *OF, "--route", "exact")
    assert "are not those that it was trained on: its part retain had 24 rows of other" in said
    Path("train.jsonl").unlink()
    said = refused(capsys, "forget", "rows.jsonl", *OF, "--route", "exact")
    assert said.startswith(f"The data of '{MODEL}' cannot be read: There is no file or folder")
    main(["forget", "rows.jsonl", *OF, "--retain", "others.jsonl", "--dry-run"])
    said = capsys.readouterr().out  # the run knows the rows by their hashes
    assert "6 were in its data, by the hashes that it kept" in said and "-> approximate" in said
    write_rows("train.jsonl", ROWS)
    train("more", "others.jsonl", MODEL)  # it stands on the model
    capsys.readouterr()
    config = Path(MODEL, "adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 5}))
    said = refused(capsys, "forget", "rows.jsonl", "--model", "saves/finetune/more")
    assert "its sha256 has changed" in said


def test_only_what_was_answered_is_verified_and_rolled_back(home, capsys):
    assert "Which folder?" in refused(capsys, "verify")
    assert "There is no folder 'none'." in refused(capsys, "verify", "none")
    assert "has no evidence.json" in refused(capsys, "verify", MODEL)
    assert "cannot use '--deep'" in refused(capsys, "verify", "saves/requests/old", "--deep")
    assert "Which request?" in refused(capsys, "rollback")
    assert "There is no request 'new'" in refused(capsys, "rollback", "new")


def test_a_stage_that_fails_says_why_and_where(made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "home"))
    words = ("rows.jsonl", *OF, "--route", "approximate", *QUICK, "--id", "new")
    with pytest.raises(SystemExit) as stop:
        main(["forget", *words, "model.lora_config.target_modules=[nothing]"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "seed42-NPO-train: " in said and "goes on from here" in said
    assert not Path("saves/requests/new").exists()
