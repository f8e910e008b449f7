"""Convert exported models and adapters to GGUF, by llama.cpp's own converters."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from unlora.errors import InputError

MODEL, ADAPTER = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
OF_CONVERTERS = ("gguf", "sentencepiece")  # what unlora[gguf] has
LINES = 3  # of what a converter says when it fails


def converters(folder: str | None) -> dict[str, Path]:
    """The converters of a checkout of llama.cpp, or those on PATH; what is not there is left out.

    Raises:
        InputError: a folder is named that has none.
    """
    if folder is None:
        paths = {name: shutil.which(name) for name in (MODEL, ADAPTER)}
        return {name: Path(path) for name, path in paths.items() if path}
    scripts = {name: Path(folder, name) for name in (MODEL, ADAPTER)}
    scripts = {name: file for name, file in scripts.items() if file.is_file()}
    if not scripts:
        raise InputError(f"--llama-cpp {folder!r} holds no {MODEL}. Give a checkout of llama.cpp.")
    return scripts


def convert(script: Path, source: Path, file: Path, *, base: str | None = None) -> None:
    """Write a GGUF file.

    Args:
        base: the folder of the model that an adapter is on.

    Raises:
        InputError: the converter failed; the message has its last lines.
    """
    command = [sys.executable, str(script), str(source), "--outfile", str(file)]
    command += ["--base", base] if base else ["--outtype", "bf16"]
    answer = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    if answer.returncode or not file.is_file():
        last = [line for line in answer.stderr.splitlines() if line.strip()][-LINES:]
        what = " ".join(last) or "it wrote nothing"
        if lacks := re.search(r"ModuleNotFoundError: No module named '(\w+)[\w.]*'", what):
            ours = lacks[1] in OF_CONVERTERS
            where = "Type: pip install 'unlora[gguf]'" if ours else "Install it beside unlora."
            what = f"{lacks[0]}. {where}"
        raise InputError(f"{script.name} failed: {what}")
