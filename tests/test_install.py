"""What docs/install.md says works, from nothing: a wheel, a container, a tag."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIPX = "pipx==1.18.4"
# a demo that is as small as it can be: gold, target, one method, nothing of them attacked
DEMO = [
    "demo",
    "seeds=[0]",
    "~audit",
    "dial=null",
    "~methods.GradAscent",
    "~methods.GradDiff",
    "~methods.SimNPO",
]
install = [pytest.mark.slow, pytest.mark.timeout(3600)]


def instructions() -> list[tuple[str, str]]:
    """The lines of the Containerfile, as (instruction, the rest of the line)."""
    text = (ROOT / "Containerfile").read_text("utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, rest in (line.split(" ", 1) for line in lines)]


def lines_of(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def environment(folder: Path) -> dict[str, str]:
    """Variables under which nothing of this environment is seen, but where packages come from."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "UNLORA_CACHE", "COVERAGE_PROCESS_START")
    path = f"{folder / 'env' / 'bin'}:/usr/bin:/bin"
    return {k: v for k, v in os.environ.items() if k not in ours} | {
        "PATH": path, "PIPX_HOME": str(folder / "pipx"), "XDG_CACHE_HOME": str(folder / "cache"),
        "PIP_CONSTRAINT": str(ROOT / "requirements" / "torch.txt"),
    }  # fmt: skip


def run(words: list[str], folder: Path, where: Path) -> str:
    done = subprocess.run(words, cwd=where, env=environment(folder), capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


def assert_is_the_demo(printed: str, folder: Path):
    assert re.search(r"^NPO +0\.\d+ ", printed, re.MULTILINE), printed
    summary = json.loads((folder / "saves/study/pocket/summary.json").read_text("utf-8"))
    assert list(summary) == ["target", "gold", "NPO"]
    assert (folder / "saves/study/pocket/report.html").is_file()


def test_the_container_has_what_is_copied_and_nothing_else():
    ignored = (ROOT / ".dockerignore").read_text("utf-8").split()
    assert ignored[0] == "*"
    admitted = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    copied = {word for line in lines_of("COPY") for word in line.split()[:-1]}
    assert {Path(word).parts[0] for word in copied} == admitted
    for word in copied:
        assert (ROOT / word).exists(), word


def test_the_container_installs_as_make_does():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert "--require-hashes --no-deps" in makefile
    lock, torch, ours = lines_of("RUN")
    assert "--require-hashes --no-deps -r requirements/lock.txt" in lock
    assert torch.endswith("-r requirements/torch.txt")
    assert ours.endswith("--no-build-isolation --no-deps .")


def test_the_container_names_no_registry_and_a_python_that_is_supported():
    from packaging.specifiers import SpecifierSet

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    [image] = lines_of("FROM")
    name, _, tag = image.partition(":")
    assert name == "python"  # no host, no owner
    assert SpecifierSet(declared["requires-python"]).contains(tag.removesuffix("-slim"))
    assert "://" not in (ROOT / "Containerfile").read_text("utf-8")


@pytest.mark.parametrize("tag, code", [("v1.2.3", 0), ("v1.2.4", 2), ("unrelated", 0)])
def test_a_tag_of_another_version_makes_no_wheel(tmp_path, tag, code):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"], ["tag", tag]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    made = subprocess.run(["make", "version-of-tag"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == code
    assert ("The tag is v1.2.4, and pyproject.toml has version 1.2.3" in made.stdout) == bool(code)


def test_the_changelog_has_a_heading_for_the_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert f"\n## {version} (" in (ROOT / "CHANGELOG.md").read_text("utf-8")


class TestFromNothing:
    pytestmark = install

    @pytest.fixture
    def folder(self, tmp_path):
        subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
        return tmp_path

    def test_the_commands_of_the_container_run_as_written(self, folder):
        """In a folder for its root, and an environment for its Python."""
        root = where = folder / "root"
        for word, rest in instructions():
            if word == "WORKDIR":
                where = root / rest.lstrip("/")
                where.mkdir(parents=True)
            elif word == "COPY":
                *sources, target = rest.split()
                for source in (ROOT / source for source in sources):
                    inside = where / target
                    if source.is_dir():
                        shutil.copytree(source, inside)
                    else:
                        inside.mkdir(parents=True, exist_ok=True)
                        shutil.copy(source, inside)
            elif word == "RUN":
                run(["sh", "-c", rest], folder, where)
            else:
                assert word in ("FROM", "ARG", "ENTRYPOINT", "CMD"), word
        [entry], [arguments] = lines_of("ENTRYPOINT"), lines_of("CMD")
        assert "usage: unlora COMMAND" in run(
            json.loads(entry) + json.loads(arguments), folder, where
        )
        shutil.rmtree(root / "opt")  # it needs nothing of what it was made from
        assert "seed0-NPO" in run([*json.loads(entry), *DEMO, "--dry-run"], folder, where)

    def test_pipx_runs_the_demo_from_a_wheel(self, folder):
        run(["python", "-m", "pip", "install", "--quiet", PIPX], folder, folder)
        shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(
            ".venv*", ".git", "saves", "build", "dist", "tests", "docs", "*_cache"))  # fmt: skip
        run(["python", "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", "dist", "./source"],
            folder, folder)  # fmt: skip
        shutil.rmtree(folder / "source")
        [wheel] = (folder / "dist").glob("unlora-*.whl")
        command = ["pipx", "run", "--spec", str(wheel), "unlora", *DEMO]
        assert_is_the_demo(run(command, folder, folder), folder)
