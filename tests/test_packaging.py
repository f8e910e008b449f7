"""What is declared is what is there."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def pins(file: str) -> dict[str, str]:
    """Package -> version of a requirements file, and of torch.txt, which belongs to each."""
    lines = [line for name in (file, "torch.txt") for line in requirements(name)]
    return dict(re.match(r"([\w.-]+)==(\S+)", line).groups() for line in lines)


def requirements(file: str) -> list[str]:
    """The lines of a requirements file, each with its hashes."""
    text = (ROOT / "requirements" / file).read_text("utf-8").replace("\\\n", " ")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_every_folder_with_code_is_a_declared_package():
    folders = {
        ".".join(["unlora", *file.parent.relative_to(ROOT / "src").parts])
        for file in (ROOT / "src").rglob("*.py")
    }
    assert set(DECLARED["tool"]["setuptools"]["packages"]) == folders | {"unlora.configs"}
    for package in folders:
        folder = ROOT / "src" / Path(*package.split(".")[1:])
        assert (folder / "__init__.py").is_file(), f"{folder} has no __init__.py"


def test_every_data_file_is_packaged():
    packaged = DECLARED["tool"]["setuptools"]["package-data"]
    for file in (ROOT / "src").rglob("*"):
        if file.is_file() and file.suffix not in (".py", ".pyc", ".typed"):
            home = next(folder for folder in file.parents if (folder / "__init__.py").is_file())
            package = ".".join(["unlora", *home.relative_to(ROOT / "src").parts])
            assert any(file.match(pattern) for pattern in packaged.get(package, ())), file


def test_every_imported_package_is_declared():
    from packaging.requirements import Requirement

    project = DECLARED["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + extras["lm-eval"] + extras["gguf"]
    declared = {Requirement(line).name for line in lines} | {"unlora"}
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names:
                package = {"sklearn": "scikit-learn", "hydra": "hydra-core", "yaml": "pyyaml"}.get(
                    name, name
                )
                assert package.replace("_", "-") in declared, f"{file} imports {name}"


def test_no_module_hides_an_installed_package():
    # `python src/train.py` puts src/ first on the path
    names = {path.stem for path in (ROOT / "src").iterdir()}
    assert not names & {"datasets", "evaluate", "transformers", "peft", "torch", "tokenizers"}


def test_pinned_versions_are_plain():
    for file in ("lock.txt", "floor.txt", "test.txt"):
        for package, version in pins(file).items():
            assert re.fullmatch(r"[\w.]+", version), f"{file}: {package}=={version}"
    assert pins("lock.txt")["torch"] == pins("floor.txt")["torch"] == "2.13.0"


def test_every_file_that_is_installed_has_a_hash_but_torch():
    for file in (
        "lock.txt",
        "floor.txt",
        "test.txt",
        "qlora.txt",
        "gguf.txt",
        "docs.txt",
        "tools.txt",
    ):
        for line in requirements(file):
            name, *hashes = line.split()
            assert hashes, f"{file}: {name} has no hash. Run: make lock"
            assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes), name
    assert [line.split("==")[0] for line in requirements("torch.txt")] == ["torch"]


def test_floor_is_the_promised_one():
    floor = pins("floor.txt")
    promised = {"peft": "0.17.1", "transformers": "4.57.6", "accelerate": "1.15.0"}
    assert promised.items() <= floor.items()
    extra = dict(x.split("==") for x in DECLARED["project"]["optional-dependencies"]["floor"])
    assert extra.items() <= floor.items()


def test_locks_hold_every_dependency_within_its_range():
    from packaging.requirements import Requirement

    for file in ("lock.txt", "floor.txt"):
        found = pins(file)
        for line in DECLARED["project"]["dependencies"]:
            wanted = Requirement(line)
            assert wanted.specifier.contains(found[wanted.name]), f"{file}: {line}"
