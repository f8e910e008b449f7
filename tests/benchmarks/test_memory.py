"""The benchmark of peak memory: what it compares with what, and what it counts."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "memory.py"


def loaded():
    spec = importlib.util.spec_from_file_location("memory_benchmark", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


memory = loaded()


def taken(before, *, distributions=False, **peaks):
    return {
        "before": before,
        "peaks": peaks,
        "distributions": distributions,
        "declared": 1,
        "with_gradient": 1.0,
        "without_gradient": 0.0,
    }


def test_ratios_leave_out_what_the_process_had_before():
    rows = memory.compare(
        {
            "GradAscent": taken(400, start=500, steps=600),
            "Lean": taken(420, start=500, steps=650),
            "Wasteful": taken(400, start=640, steps=640),
        }
    )
    # (650 - 420) / (600 - 400) and 650 / 600; (640 - 400) / (600 - 400)
    assert [row.ratio for row in rows] == pytest.approx([1.0, 1.15, 1.2])
    assert rows[1].raw_ratio == pytest.approx(650 / 600)
    assert [row.phase for row in rows] == ["steps", "steps", "start"]
    assert [row.ok for row in rows] == [True, True, False]


def test_distributions_of_the_reference_have_a_limit_of_their_own():
    plain = taken(0, steps=100)
    for peak, numbers, distributions in (
        (115, True, True),
        (120, False, True),
        (131, False, False),
    ):
        rows = memory.compare(
            {
                "GradAscent": plain,
                "numbers": taken(0, steps=peak),
                "distributions": taken(0, steps=peak, distributions=True),
            }
        )
        assert [row.ok for row in rows[1:]] == [numbers, distributions]


def test_a_method_that_does_not_run_is_listed_with_its_reason():
    found = {
        "GradAscent": taken(0, steps=2_000_000),
        "Huge": taken(0, steps=9_000_000, distributions=True),
        "Odd": {"reason": "needs a GPU"},
    }
    text = memory.table(memory.compare(found), {"Odd": "needs a GPU"})
    _, plain, huge, odd = text.splitlines()
    assert plain.split() == ["GradAscent", "1", "2", "steps", "1.000", "1.000", "1.15", "ok"]
    assert huge.split()[-2:] == ["1.30", "ABOVE"] and "distributions" in huge
    assert odd == "not run: Odd: needs a GPU"


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(SystemExit, match="No trainer is called SimPNO. Known: .*SimNPO"):
        memory.main(["--only", "SimPNO"])


@pytest.mark.slow
def test_the_command_writes_what_it_prints(tmp_path):
    output = tmp_path / "memory.json"
    arguments = ["--size", "small", "--only", "NPO,finetune", "--output", str(output)]
    done = subprocess.run([sys.executable, FILE, *arguments], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr  # on a small model, noise may be above the limit
    report = json.loads(output.read_text("utf-8"))
    assert list(report["methods"]) == ["GradAscent", "GradAscent, again", "NPO"]
    assert report["methods"]["NPO"]["with_gradient"] == 2
    assert "mode is unlearn" in report["not_run"]["finetune"]
    assert all(word in done.stdout for word in ("NPO", "not run: finetune", "1.15"))
