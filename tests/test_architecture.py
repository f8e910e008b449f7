"""The import direction that the folders promise."""

import ast
import functools
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from unlora.errors import InputError
from unlora.registry import Registry

SRC = Path(__file__).parents[1] / "src"
BASICS = {"errors", "registry"}
# each folder imports only what stands above it here
MAY_IMPORT = {
    "errors": set(),
    "registry": {"errors"},
    "runs": {"errors"},
    "results": BASICS | {"runs"},
    "config": BASICS | {"runs"},
    "forward": {"errors"},
    "objectives": BASICS | {"forward"},
    "data": BASICS | {"forward"},
    "model": BASICS | {"config", "data", "forward", "runs"},
    "trainer": BASICS | {"config", "data", "forward", "model", "objectives", "runs"},
    "evals": BASICS | {"config", "data", "forward", "model", "results", "runs"},
    "audits": BASICS | {"data", "evals", "forward", "model", "results", "runs"},
    "report": BASICS | {"results", "runs"},
    "cli": BASICS | {"config", "data", "model", "report", "runs", "trainer"},
    "recipes": BASICS
    | {"audits", "config", "data", "evals", "model", "report", "results", "runs", "trainer"},
    "studies": BASICS
    | {
        "cli",
        "config",
        "data",
        "evals",
        "model",
        "recipes",
        "report",
        "results",
        "runs",
        "trainer",
    },
    "deletion": BASICS
    | {
        "audits",
        "cli",
        "config",
        "data",
        "evals",
        "model",
        "recipes",
        "report",
        "results",
        "runs",
        "studies",
        "trainer",
    },
    "api": BASICS
    | {"cli", "config", "data", "evals", "model", "recipes", "results", "runs", "trainer"},
    "train": {"cli", "recipes"},
    "eval": {"cli", "recipes"},
    "alternates": {"cli", "recipes"},
    "study": {"cli", "studies"},
    "__main__": {"cli"},
    "__init__": {"api", "results"},
}
CONFIG_LIBRARY = {"config", "cli", "recipes", "studies", "deletion", "api"}  # they know OmegaConf
# users know both: the command, and the recipe of that name, in its log lines or the documentation
SAME_NAME = {"audit.py", "train.py", "who_saw.py"}
FILES = sorted(SRC.rglob("*.py"))


@functools.cache
def imports(path: Path, *, at_import: bool = False) -> list[str]:
    """The modules a file imports, inside functions too unless ``at_import``."""
    names = []
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if name in MODULES else str(node.module) for name in inner]
    return names


def module_of(path: Path) -> str:
    parts = ("unlora", *path.relative_to(SRC).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(path: Path) -> str:
    return path.relative_to(SRC).with_suffix("").parts[0]


MODULES = {module_of(path) for path in FILES}


def test_imports_point_one_way():
    for path in FILES:
        here = part_of(path)
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("unlora.")}
        wrong = ours - {here, "configs"} - MAY_IMPORT[here]
        assert not wrong, f"{path.relative_to(SRC)} must not import {', '.join(sorted(wrong))}"


def test_no_folder_imports_one_that_stands_below_it():
    order = list(MAY_IMPORT)
    for folder, others in MAY_IMPORT.items():
        assert all(order.index(other) < order.index(folder) for other in others), folder


def test_no_module_imports_itself_through_others():
    graph = {
        module_of(path): {name for name in imports(path) if name in MODULES} - {module_of(path)}
        for path in FILES
    }
    TopologicalSorter(graph).prepare()


def test_few_modules_lie_loose():
    loose = {path.name for path in SRC.glob("*.py")}
    assert loose == {
        "__init__.py", "__main__.py", "alternates.py", "api.py", "errors.py", "eval.py",
        "registry.py", "study.py", "train.py",
    }  # fmt: skip


def test_a_file_name_stands_once():
    files = Counter(path.name for path in FILES if path.name != "__init__.py")
    assert {name for name, count in files.items() if count > 1} <= SAME_NAME
    assert len(SAME_NAME) <= 4


def test_only_the_edge_knows_the_config_library():
    for path in FILES:
        if any(name.split(".")[0] in ("omegaconf", "hydra") for name in imports(path)):
            assert part_of(path) in CONFIG_LIBRARY, path


def test_optional_packages_are_not_imported_with_a_module():
    for path in FILES:
        for name in imports(path, at_import=True):
            assert name.split(".")[0] not in ("lm_eval", "bitsandbytes", "deepspeed", "datasets")


def test_a_module_of_the_users_that_imports_what_was_moved_is_told_so(tmp_path, monkeypatch):
    package = tmp_path / "own_objectives"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "mine.py").write_text("from unlora.outputs import Outputs\n")
    monkeypatch.syspath_prepend(tmp_path)
    objectives = Registry("objective", "own_objectives")
    with pytest.raises(InputError, match="own_objectives.mine imports unlora.outputs, which does"):
        sorted(objectives)
