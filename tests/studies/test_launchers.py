"""Workers of a study, apart from the study itself."""

import subprocess
import sys

import pytest

LATE = """
import multiprocessing, os, signal, time

def work():
    while os.getppid() == multiprocessing.parent_process().pid:
        time.sleep(0.01)  # it imports what its first stage needs
    from unlora.studies.launchers import _end_with_study
    print("at work", flush=True)
    _end_with_study()
    time.sleep(10)
    print("still at work", flush=True)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.HANDLER)  # a process inherits what is ignored
    multiprocessing.get_context("spawn").Process(target=work).start()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.budget(5)
@pytest.mark.parametrize("handler", ["SIG_DFL", "SIG_IGN"])
def test_a_worker_whose_study_was_killed_before_its_first_stage_ends_as_well(tmp_path, handler):
    file = tmp_path / "late.py"
    file.write_text(LATE.replace("HANDLER", handler))
    # the worker holds the pipe, too: all is read when both are gone
    said = subprocess.run([sys.executable, file], stdout=subprocess.PIPE, text=True).stdout
    assert said == "at work\n"
