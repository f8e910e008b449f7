"""The import direction that the folders promise."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src"
BASICS = {"errors", "registry"}
MAY_IMPORT = {
    "errors": set(),
    "registry": {"errors"},
    "collapse": set(),
    "dropout": set(),
    "target_check": set(),
    "head": set(),
    "shown": set(),
    "trust": {"errors"},
    "packing": set(),
    "outputs": {"dropout", "errors", "head", "packing"},
    "run": {"errors", "shown"},
    "config": BASICS | {"shown", "unused_keys"},
    "unused_keys": {"errors"},
    "objectives": BASICS | {"outputs"},
    "data": BASICS | {"outputs"},
    "model": BASICS | {"config", "data", "head", "objectives", "outputs", "run", "trust"},
    "trainer": BASICS
    | {
        "data",
        "dropout",
        "head",
        "model",
        "objectives",
        "outputs",
        "packing",
        "run",
        "shown",
        "trust",
    },
    "evals": BASICS
    | {"collapse", "data", "head", "model", "outputs", "run", "target_check", "trust"},
    "report": BASICS | {"collapse", "run", "shown", "target_check", "trust"},
    "commandline": {"errors"},
    "mistakes": BASICS | {"commandline", "config", "shown"},
    "usage": {"commandline"},
    "cli": {
        "commandline",
        "config",
        "errors",
        "hydra_checks",
        "mistakes",
        "run",
        "shown",
        "unused_keys",
        "usage",
    },
    "compose": {"commandline", "config", "errors", "hydra_checks", "mistakes"},
    "hydra_checks": {"errors", "shown"},
    "__main__": {"cli"},
    "completion": {"commandline", "errors", "usage"},
    "exporting": {"errors", "model", "run"},
    "doctor": {"cli", "commandline", "config", "errors", "model", "run", "trainer"},
    "chat": BASICS | {"config", "data", "model", "shown"},
}
EDGE = {"config", "cli", "compose", "hydra_checks", "unused_keys"}  # they know OmegaConf
# they join the parts
ENTRY_POINTS = {"train", "eval", "study", "alternates", "references", "api", "stages"}
FILES = [path for path in SRC.rglob("*.py") if path != SRC / "__init__.py"]


def imports(path: Path, *, at_import: bool = False) -> Iterator[str]:
    """The modules a file imports, inside functions too unless ``at_import``."""
    tree = ast.parse(path.read_text("utf-8"))
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "unlora":
                yield from (f"unlora.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def part_of(path: Path) -> str:
    return path.relative_to(SRC).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SRC).as_posix())
def test_imports_point_one_way(path):
    here = part_of(path)
    if here in ENTRY_POINTS:
        return
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("unlora.")}
    wrong = ours - {here, "configs"} - MAY_IMPORT[here]
    assert not wrong, f"{here} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SRC).as_posix())
def test_only_the_edge_knows_the_config_library(path):
    if any(name.split(".")[0] in ("omegaconf", "hydra") for name in imports(path)):
        assert part_of(path) in ENTRY_POINTS | {
            "config",
            "cli",
            "compose",
            "hydra_checks",
            "unused_keys",
        }


def test_optional_packages_are_not_imported_with_a_module():
    for path in FILES:
        for name in imports(path, at_import=True):
            assert name.split(".")[0] not in ("lm_eval", "bitsandbytes", "deepspeed", "datasets")
