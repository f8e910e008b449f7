"""What fails here fails in real processes: `make faults`."""

import json
from pathlib import Path

import pytest
from faults_runs import command, prepared, processes, result


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session):
    """The last line is ``N passed, N failed``; what was skipped says why above it."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(session.config, "workerinput"):
        found = {kind: len(reporter.stats.get(kind, ())) for kind in ("passed", "failed", "error")}
        print(f"{found['passed']} passed, {found['failed'] + found['error']} failed")


@pytest.fixture(scope="session")
def zygote():
    with processes() as found:
        yield found


@pytest.fixture(scope="session")
def uninterrupted(zygote, tmp_path_factory):
    """A function: method -> the result of a run that nothing has stopped, and its moments."""
    known = {}

    def of(method):
        if method not in known:
            folder = prepared(tmp_path_factory.mktemp("whole") / method)
            moments = folder / "moments.json"
            code = zygote.run(folder, command(method), {"save": str(moments)})
            assert code == 0, (folder / "said.txt").read_text()[-3000:]
            known[method] = result(folder), json.loads(moments.read_text())
        return known[method]

    return of
