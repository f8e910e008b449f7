"""``unlora forget`` as a user types it, on a model that is trained in a second."""

import json
import shutil
from pathlib import Path

import pytest
from deletion_runs import MODEL, QUICK, ROWS, facts, forget, train, weights, write_rows

from unlora.cli.main import main


@pytest.fixture
def home(trained, tmp_path, monkeypatch):
    """A copy of the model and its rows, in which a user types."""
    folder = shutil.copytree(trained, tmp_path / "home")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.budget(2)
def test_the_exact_route_gives_the_very_model_that_never_saw_the_rows(home, capsys):
    asked = [{"question": row["question"], "answer": row["answer"]} for row in ROWS[3:9]]
    write_rows("rows.jsonl", asked)
    forget("rows.jsonl", "--model", MODEL, "--route", "exact", "--id", "mine")
    said = capsys.readouterr().out
    assert "6 were in its data" in said and "(18 rows)" in said
    train("without", write_rows("without.jsonl", ROWS[:3] + ROWS[9:]))
    assert weights("saves/forget/mine/exact") == weights("saves/finetune/without")
    assert weights("saves/forget/mine/exact") != weights(MODEL)
    known = facts("mine")
    assert known["audit"]["verdict"]["name"] == "exact"
    assert known["request"]["rows"] == len(known["request"]["hashes"]) == 6
    assert known["seen"][0]["parts"] == {"train": 6}
    page = Path("saves/requests/mine/evidence.html").read_text()
    texts = "".join(file.read_text() for file in Path("saves/requests/mine").iterdir())
    assert "6 rows of training data must go" in page and asked[0]["question"] not in texts
    main(["verify", "saves/requests/mine"])


@pytest.mark.slow
@pytest.mark.budget(2)
def test_rows_are_unlearned_on_top_of_the_model(home, capsys):
    forget("--where", "customer=2", "--model", MODEL, "--route", "approximate", *QUICK,
           "--keep-rows", "--id", "two")  # fmt: skip
    known = facts("two")
    assert known["model"]["path"] == "saves/forget/two/NPO"
    assert known["audit"]["verdict"]["name"] == "too few to say" and known["request"]["rows"] == 4
    lineage = json.loads(Path("saves/forget/two/NPO/lineage.json").read_text())
    assert len(lineage["links"]) == 2
    rows = Path("saves/requests/two/rows.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == [row for row in ROWS if row["customer"] == 2]
    trained = json.loads(Path("saves/forget/two/NPO/manifest.json").read_text())["data"]
    assert trained["forget"]["rows"] == 4 and trained["retain"]["rows"] == 20
    config = json.loads(Path("saves/forget/two/NPO/run_config.json").read_text())
    assert config["trainer"]["args"]["learning_rate"] == 5e-3
    capsys.readouterr()
    main(["verify", "saves/requests/two", "--with-model"])
    assert "The models give the same answers" in capsys.readouterr().out


def test_a_dry_run_says_what_each_route_costs_and_trains_nothing(home, capsys):
    write_rows("rows.jsonl", ROWS[:6])
    forget("rows.jsonl", "--model", MODEL, "--dry-run")
    said = capsys.readouterr().out
    assert "-> exact        about" in said and "of memory: train again" in said
    assert "unlearn with NPO in 20 steps" in said
    assert not Path("saves/forget").exists() and not Path("saves/requests").exists()


@pytest.mark.slow
@pytest.mark.budget(3)
def test_a_second_request_asks_the_rows_of_the_first_again_and_can_be_taken_back(home, capsys):
    forget("--where", "customer=1", "--model", MODEL, "--route", "approximate", *QUICK,
           "--id", "first")  # fmt: skip
    model = facts("first")["model"]["path"]
    forget("--where", "customer=2", "--model", model, "--route", "approximate", *QUICK,
           "--id", "second")  # fmt: skip
    known = facts("second")
    assert known["model"]["earlier"] == ["first"]
    [again] = known["earlier"]
    assert again["id"] == "first" and again["residual"] is not None
    trained = json.loads(Path("saves/forget/second/NPO/manifest.json").read_text())["data"]
    assert trained["retain"]["rows"] == 16  # neither these rows nor those of before
    assert "first" in Path("saves/requests/second/evidence.html").read_text()
    main(["verify", "saves/requests/second"])
    # what is exact now is so for the first request, too, and needs no unlearning of it
    capsys.readouterr()
    forget("--where", "customer=3", "--model", known["model"]["path"], "--route", "exact",
           "--id", "third")  # fmt: skip
    assert "(12 rows)" in capsys.readouterr().out
    train("without", write_rows("rows.jsonl", [r for r in ROWS if r["customer"] not in (1, 2, 3)]))
    assert weights("saves/forget/third/exact") == weights("saves/finetune/without")
    assert facts("third")["model"]["earlier"] == ["first", "second"]
    with pytest.raises(SystemExit):
        main(["rollback", "first"])
    assert "'saves/forget/second/NPO' stands on the model of first" in capsys.readouterr().err
    main(["rollback", "second"])
    assert f"Serve {model}." in capsys.readouterr().out
    assert not Path("saves/forget/second").exists() and Path(model).is_dir()
    assert "Rolled back on" in Path("saves/requests/second/evidence.html").read_text()
    main(["verify", "saves/requests/second"])
