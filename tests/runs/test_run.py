import errno
import fcntl
import json
import os
from pathlib import Path

import pytest

from unlora.errors import InputError
from unlora.runs.atomic_files import write_json
from unlora.runs.run import Run, alone, set_aside


def test_an_earlier_run_is_kept_when_its_name_is_used_again(tmp_path):
    for number in range(3):
        run = Run(str(tmp_path / "mine"), {"number": number})
        run.begin(fresh=True)
        (run.folder / "adapter").write_text(str(number))
        (run.folder / "lineage.json").write_text("{}")
        if number:  # the first one was interrupted
            run.finish()
    found = {f.name: (f / "adapter").read_text() for f in tmp_path.iterdir()}
    assert found == {"mine": "2", "mine.previous-1": "0", "mine.previous-2": "1"}


def test_on_a_disk_without_locks_a_run_is_warned_and_never_waits(tmp_path, monkeypatch, caplog):
    def flock(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with alone(tmp_path / "mine"), alone(tmp_path / "mine"):
        pass
    assert caplog.text.count("mine is not locked against other processes: ") == 2
    monkeypatch.undo()
    with alone(tmp_path / "mine"):  # the file that is left holds nobody up
        pass


def test_a_run_that_never_begins_leaves_the_earlier_one_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter").write_text("0")
    Run(str(tmp_path / "mine"), {})
    assert (tmp_path / "mine" / "adapter").read_text() == "0"


def test_a_folder_that_holds_no_run_is_never_moved(tmp_path):
    (tmp_path / "saves" / "finetune").mkdir(parents=True)
    Run(str(tmp_path / "saves"), {}).begin(fresh=True)
    assert [f.name for f in tmp_path.iterdir()] == ["saves"]


def test_a_resumed_run_goes_on_in_its_folder(tmp_path):
    folder = tmp_path / "mine"
    Run(str(folder), {}).begin(fresh=True)
    Run(str(folder), {}).begin(fresh=False)
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]


def test_an_evaluation_keeps_the_record_of_the_training(tmp_path):
    for kind in ("", "eval"):
        run = Run(str(tmp_path), {}, kind=kind)
        run.begin(fresh=False)
        run.finish()
    assert {f.name for f in tmp_path.iterdir()} == {
        "manifest.json", "run_config.json", "eval_manifest.json", "eval_config.json",
    }  # fmt: skip


def test_the_manifest_says_what_ran_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "model.model_args.token=s3cret"])
    run = Run(str(tmp_path), {"args": {"seed": 1, "hub_token": "s3cret"}, "token": "s3cret"})
    run.begin(fresh=True)
    run.finish(seed=1)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert {"command", "git_commit", "versions", "hardware", "seconds", "seed"} <= set(manifest)
    assert manifest["peak_memory_bytes"]["cpu"] > 1e6
    assert manifest["versions"]["torch"] != "not installed"
    for file in tmp_path.iterdir():
        assert "s3cret" not in file.read_text(), file.name


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made or written.*paths.output_dir"):
        Run(str(tmp_path / "file" / "run"), {})


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})

    class Unwritable:
        def __str__(self):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_json(file, {"a": 2, "b": Unwritable()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")
def test_the_peak_of_a_run_is_its_own(tmp_path):
    large = bytearray(300_000_000)
    large[::4096] = b"x" * len(large[::4096])
    del large
    Run(str(tmp_path / "small"), {}).finish()
    small = json.loads((tmp_path / "small" / "manifest.json").read_text())["peak_memory_bytes"]
    run = Run(str(tmp_path / "large"), {})
    large = bytearray(300_000_000)
    large[::4096] = b"x" * len(large[::4096])
    del large
    run.finish()
    peak = json.loads((tmp_path / "large" / "manifest.json").read_text())["peak_memory_bytes"]
    assert peak["cpu"] > small["cpu"] + 250_000_000


def test_a_start_that_came_to_no_checkpoint_is_not_kept(tmp_path):
    """As one that is killed again and again leaves it."""
    folder = tmp_path / "mine"
    for _ in range(3):
        Run(str(folder), {}).begin(fresh=True)
        (folder / "checkpoint-2").mkdir()  # not written to its end
        (folder / "checkpoint-2" / "adapter_model.safetensors").write_text("")
        (folder / "logs").mkdir(exist_ok=True)
        (folder / "logs" / "events.out").write_text("")
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]
    (folder / "checkpoint-2" / "trainer_state.json").write_text("{}")
    Run(str(folder), {}).begin(fresh=True)
    assert (tmp_path / "mine.previous-1" / "checkpoint-2").is_dir()
    assert not (folder / "checkpoint-2").exists()


def test_a_run_that_is_refused_leaves_nothing(tmp_path):
    folder = tmp_path / "saves" / "unlearn" / "mine"
    with pytest.raises(InputError, match="refused"), alone(folder):
        Run(str(folder), {})
        raise InputError("refused")
    assert list(tmp_path.iterdir()) == []
    with alone(folder):  # and one that is not keeps its folder
        Run(str(folder), {}).begin(fresh=True)
    assert (folder / "run_config.json").is_file()
    with pytest.raises(InputError, match="refused"), alone(folder):
        raise InputError("refused")
    assert (folder / "run_config.json").is_file()


def test_a_folder_that_was_empty_before_stays_the_users(tmp_path):
    (tmp_path / "saves").mkdir()
    with pytest.raises(InputError), alone(tmp_path / "saves" / "mine"):
        Run(str(tmp_path / "saves" / "mine"), {})
        raise InputError("refused")
    assert [path.name for path in tmp_path.iterdir()] == ["saves"]


@pytest.mark.parametrize(
    "argv, command",
    [
        (["/env/bin/unlora", "unlearn", "a=[1,2]"], "unlora unlearn 'a=[1,2]'"),
        (["/src/__main__.py", "eval", "a=b"], "unlora eval a=b"),
        (["src/train.py", "--config-name=unlearn"], "python src/train.py --config-name=unlearn"),
        (["unlora", "train", "hub_token=12345678"], "unlora train 'hub_token=(hidden)'"),
    ],
)
def test_the_command_is_whole_and_can_be_typed_again(tmp_path, monkeypatch, argv, command):
    monkeypatch.setattr("sys.argv", argv)
    Run(str(tmp_path), {}).finish()
    assert json.loads((tmp_path / "manifest.json").read_text())["command"] == command


def test_a_clock_that_is_set_back_makes_no_run_shorter(tmp_path, monkeypatch):
    run = Run(str(tmp_path), {})
    monkeypatch.setattr("time.time", lambda: 0.0)
    run.finish()
    assert json.loads((tmp_path / "manifest.json").read_text())["seconds"] >= 0


def test_a_link_to_a_run_folder_leads_to_the_new_run(tmp_path):
    disk = tmp_path / "disk"
    (disk / "run" / "checkpoint-2").mkdir(parents=True)
    (disk / "run" / "adapter_model.safetensors").touch()
    link = tmp_path / "saves"
    link.symlink_to(disk / "run")
    assert set_aside(link) == disk / "run.previous-1"
    assert link.is_symlink() and link.samefile(disk / "run") and not any(link.iterdir())
    assert (disk / "run.previous-1" / "checkpoint-2").is_dir()
