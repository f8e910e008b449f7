"""A report that is killed while it is written is the old or the new one, whole."""

import json
import random

import pytest
from faults_runs import RUN, check_whole, command, prepared, said

FILES = ("report.html", "report.md", "table.csv")


@pytest.fixture(scope="module")
def runs(zygote, tmp_path_factory):
    """A folder with one finished run, with a report of an earlier state, and the new report."""
    folder = prepared(tmp_path_factory.mktemp("reported") / "runs")
    assert zygote.run(folder, command("RMU")) == 0, said(folder)[-2000:]
    report = ["report", RUN, "--output", "old"]
    assert zygote.run(folder, report) == 0, said(folder)[-2000:]
    report = ["report", RUN, "--title", "new", "--output", "new"]
    moments = folder / "moments.json"
    assert zygote.run(folder, report, {"save": str(moments)}) == 0, said(folder)[-2000:]
    return folder, moments


@pytest.mark.parametrize("number", range(5))
def test_killed_while_reporting(zygote, runs, number):
    folder, moments = runs
    old, new = ({f: (folder / d / f).read_bytes() for f in FILES} for d in ("old", "new"))
    files = [what for kind, what in json.loads(moments.read_text()) if kind == "file"]
    first = next(i for i, what in enumerate(files) if "report.md" in what)
    fault = {"kind": "file", "number": random.Random(number).randint(first, len(files))}
    for name, content in old.items():
        (folder / "killed").mkdir(exist_ok=True)
        (folder / "killed" / name).write_bytes(content)
    report = ["report", RUN, "--title", "new", "--output", "killed"]
    assert zygote.run(folder, report, fault) == -9, said(folder)[-2000:]
    check_whole(folder)
    for name in FILES:
        assert (folder / "killed" / name).read_bytes() in (old[name], new[name]), name
    assert zygote.run(folder, report) == 0
    assert {f: (folder / "killed" / f).read_bytes() for f in FILES} == new
