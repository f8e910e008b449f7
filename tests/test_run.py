import json

import pytest

from unlora.errors import InputError
from unlora.run import Run, write_json


def test_a_finished_run_is_kept_when_its_name_is_used_again(tmp_path):
    for number in range(3):
        run = Run(str(tmp_path / "mine"), {"number": number})
        (run.folder / "adapter").write_text(str(number))
        run.finish()
    found = {f.name: (f / "adapter").read_text() for f in tmp_path.iterdir()}
    assert found == {"mine": "2", "mine.previous-1": "0", "mine.previous-2": "1"}


def test_an_unfinished_or_resumed_run_goes_on_in_its_folder(tmp_path):
    folder = tmp_path / "mine"
    Run(str(folder), {})
    Run(str(folder), {}).finish()
    Run(str(folder), {}, resumes=True)
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]


def test_the_manifest_says_what_ran(tmp_path):
    run = Run(str(tmp_path), {"args": {"seed": 1, "hub_token": "s3cret"}, "token": "s3cret"})
    run.finish(seed=1)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert {"command", "git_commit", "versions", "hardware", "seconds", "seed"} <= set(manifest)
    assert manifest["peak_memory_bytes"]["cpu"] > 1e6
    assert manifest["versions"]["torch"] != "not installed"
    assert "s3cret" not in (tmp_path / "run_config.json").read_text()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made.*paths.output_dir"):
        Run(str(tmp_path / "file" / "run"), {})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError):
        circular = {}
        circular["self"] = circular
        write_json(file, circular)
    assert json.loads(file.read_text()) == {"a": 1}
