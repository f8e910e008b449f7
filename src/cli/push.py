"""Run the command ``unlora push``: upload an exported model, and nothing else, to the hub."""

import argparse
import json
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from unlora.cli.argument_parsing import parse
from unlora.errors import InputError, shortened

FORMS = ("adapter", "merged", "gguf")
# all that a model needs; no log, config of a run, answer or row has one of these names
UPLOADED = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
    "adapter_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "chat_template.jinja", "README.md", "*.gguf", "Modelfile",
)  # fmt: skip
OF_A_RUN = ("lineage.json", "run_config.json", "trainer_state.json")
UNIT = 1 << 20


def main(argv: Sequence[str]) -> None:
    """Upload what ``unlora export`` wrote, or list what would go.

    Raises:
        InputError: nothing is exported, a word is wrong, or the hub refuses it.
    """
    args = _arguments(argv)
    folder = exported(Path(args.run), args.form)
    files, left = _sorted_files(folder)
    _refuse_local_base(folder)
    print(f"{folder} -> {args.repository}{' (private)' if args.private else ''}")
    for file in files:
        print(f"  {file}  {(folder / file).stat().st_size / UNIT:.1f} MiB")
    for file in left:
        print(f"  {file} stays here")
    if args.dry_run:
        print("Nothing was uploaded.")
    else:
        print(_upload(folder, args.repository, files, private=args.private))


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="unlora push", add_help=False, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("run", nargs="?")
    parser.add_argument("repository", nargs="?")
    parser.add_argument("--form", choices=FORMS)
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    args = parse(parser, argv)
    if not args.run or not args.repository:
        raise InputError("What, and where to? Type: unlora push saves/unlearn/NAME owner/name")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(args.repository)
    except HFValidationError as error:
        why = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(
            f"{args.repository!r} is no repository: {why}. Give owner/name."
        ) from error
    return args


def exported(run: Path, form: str | None) -> Path:
    """The export that is meant: a folder of one, or of a run, those of ``--serve`` first.

    Raises:
        InputError: there is none, or several and no form is named.
    """
    if not run.is_dir():
        raise InputError(f"There is no folder {str(run)!r}. Give a run, or an export of one.")
    bases = (run, run / "exported" / "serve", run / "exported")
    forms = {
        name: base / name
        for base in reversed(bases)
        for name in FORMS
        if (base / name).is_dir() and any((base / name).iterdir())
    }
    if not forms and not form and _is_export(run):
        return run
    wanted = [form] if form else list(forms)
    if len(wanted) == 1 and wanted[0] in forms:
        return forms[wanted[0]]
    if not forms or form:
        raise InputError(
            f"{shortened(run)!r} holds no export{f' {form}' if form else ''}. Type: unlora export "
            f"{run} --serve"
        )
    raise InputError(f"{shortened(run)!r} holds {', '.join(forms)}. Say which: --form {wanted[0]}")


def _is_export(folder: Path) -> bool:
    weights = any(folder.glob("*.safetensors")) or any(folder.glob("*.gguf"))
    return weights and not any((folder / name).exists() for name in OF_A_RUN)


def _sorted_files(folder: Path) -> tuple[list[str], list[str]]:
    """The files that are uploaded, and those that stay; links and folders stay, too."""
    uploaded: list[str] = []
    left: list[str] = []
    for file in sorted(folder.iterdir()):
        plain = file.is_file() and not file.is_symlink()
        goes = plain and any(fnmatch(file.name, pattern) for pattern in UPLOADED)
        (uploaded if goes else left).append(file.name)
    return uploaded, left


def _refuse_local_base(folder: Path) -> None:
    """Raises InputError where an adapter names a folder of this machine as its root model."""
    settings = folder / "adapter_config.json"
    if not settings.is_file():
        return
    base = str(json.loads(settings.read_text("utf-8")).get("base_model_name_or_path") or "")
    if os.path.isabs(base):
        raise InputError(
            f"The adapter in {str(folder)!r} is on the folder {base!r}, which nobody else has. "
            "Write the repository of that model as base_model_name_or_path into "
            f"{str(settings)!r}, or push --form merged."
        )


def _upload(folder: Path, repository: str, files: Sequence[str], *, private: bool) -> str:
    """Make the repository where there is none, and upload; returns its address.

    Raises:
        InputError: there is no token, no network, or no right to write there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=list(files),
            commit_message="An unlearned model, exported by unlora",
        )  # fmt: skip
    except LocalTokenNotFoundError as error:
        raise InputError("There is no token of the hub. Run: hf auth login") from error
    except (HfHubHTTPError, OSError) as error:
        why = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(
            f"{repository} cannot be written: {why}. Log in with `hf auth login`, and see that the "
            "token may write there."
        ) from error
    return str(address)
