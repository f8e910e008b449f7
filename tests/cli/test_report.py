import pytest
from report_runs import entries, log, make, write_json

from unlora.cli.report import main
from unlora.errors import InputError
from unlora.report.run_roles import entries_of, read_study


def unlearned(root, name="npo", **config):
    """A run that says where it comes from."""
    said = {
        "mode": "unlearn",
        "model": {"model_args": {"pretrained_model_name_or_path": str(root / "full")}},
        "retain_logs_path": str(root / "retain90" / "evals" / "TOFU_EVAL.json"),
        **config,
    }
    return make(root / name, "good", config=said)


def roles(found):
    return {entry.name: entry.role for entry in found}


def test_target_and_gold_come_along_as_the_run_names_them(tmp_path):
    run = unlearned(tmp_path)
    for name, kind in (("full", "target"), ("retain90", "gold")):
        make(tmp_path / name, kind)
    assert roles(entries_of([run])) == {"npo": "method", "full": "target", "retain90": "gold"}


def test_what_is_given_wins_over_what_is_said(tmp_path):
    run = unlearned(tmp_path)
    for name, kind in (("full", "target"), ("retain90", "gold"), ("other", "target")):
        make(tmp_path / name, kind)
    found = entries_of([run, tmp_path / "full"], target=tmp_path / "other")
    assert roles(found) == {"npo": "method", "full": "method", "other": "target",
                            "retain90": "gold"}  # fmt: skip


def test_a_repository_on_the_hub_is_the_folder_of_that_name(tmp_path):
    model = {"model_args": {"pretrained_model_name_or_path": "open-unlearning/tofu_x_full"}}
    run = unlearned(tmp_path, model=model, retain_logs_path="saves/eval/none/TOFU_EVAL.json")
    write_json(tmp_path / "tofu_x_full" / "evals_forget10" / "TOFU_EVAL.json", log("target"))
    found = entries_of([run, tmp_path / "tofu_x_full" / "evals_forget10"])
    assert roles(found) == {"npo": "method", "tofu_x_full": "target"}


def test_bare_logs_are_told_by_their_names(tmp_path):
    for name, kind in (("tofu_full", "target"), ("tofu_retain90", "gold"), ("npo", "good")):
        write_json(tmp_path / name / "TOFU_EVAL.json", log(kind))
    found = entries_of([tmp_path / "npo", tmp_path / "tofu_full", tmp_path / "tofu_retain90"])
    assert roles(found) == {"npo": "method", "tofu_full": "target", "tofu_retain90": "gold"}


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    runs = [make(tmp_path / home / "NPO", "good") for home in ("seed0", "seed1")]
    other = make(tmp_path / "GradDiff", "good")
    assert [e.name for e in entries_of([*runs, other])] == ["seed0/NPO", "seed1/NPO", "GradDiff"]


def study(root):
    made = entries(root, "good", "broken")
    runs = [{"run": e.name, "role": e.role, "seed": 0, "folder": e.folder.name} for e in made]
    trials = [{"method": "good", "number": 3, "params": {"a": 1}, "distance": 0.1, "utility": 0.9,
               "feasible": True, "state": "COMPLETE"}]  # fmt: skip
    content = {"name": "mine", "runs": runs, "trials": trials, "budget": "Four trials."}
    write_json(root / "study.json", content)
    return root


@pytest.mark.slow
def test_a_study_means_all_its_runs_and_trials(tmp_path, capsys):
    main([str(study(tmp_path / "study")), "--output", str(tmp_path / "out")])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "broken collapsed" in page and "Four trials." in page and "a=1" in page
    assert "mine" in page
    assert str(tmp_path / "out" / "report.html") in capsys.readouterr().out


def test_runs_are_added_to_a_study(tmp_path):
    home = study(tmp_path / "study")
    more = make(tmp_path / "halfway", "halfway")
    main([str(home), str(more), "--output", str(tmp_path / "out"), "--title", "Both"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "halfway (99 %) forgot most of what it was asked to" in page and "Both" in page


def test_a_missing_role_is_said_with_the_flag_that_gives_it(tmp_path, capsys):
    main([str(make(tmp_path / "npo", "good")), "--output", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "There is no target and no gold" in out and "--target RUN --gold RUN" in out


@pytest.mark.parametrize(
    "content, message",
    [({"runs": [{"run": "x"}]}, "each needs run, role, seed and folder"), ({}, "no list of runs")],
)
def test_a_broken_study_is_named(content, message, tmp_path):
    write_json(tmp_path / "study.json", content)
    with pytest.raises(InputError, match=message):
        read_study(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="There is no folder"):
        main([str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")])
