"""Write the forms in which a run is served, each beside what the run says.

    RUN/exported/serve/adapter   LoRA of a low rank without the output head, for vLLM and peft
                       merged    full weights in bfloat16, for vLLM, transformers, llama.cpp
                       gguf      of both, where llama.cpp's converters are
                       serve.json, commands.txt

A form that says of the forget or retain rows what the run does not is refused, and not written.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from unlora.config.audit_config import AuditConfig
from unlora.errors import GuardError, InputError
from unlora.evals.progress import without_library_bars
from unlora.model.attach import load_model
from unlora.model.gguf_export import ADAPTER, MODEL, convert, converters
from unlora.model.lineage import Lineage
from unlora.model.load import load_root
from unlora.model.low_rank import low_rank
from unlora.model.merge import share_lost_by_rounding
from unlora.model.probe import Comparison, Probe
from unlora.model.standalone import (
    concatenated,
    export,
    export_folder,
    root_name,
    tokenizer_home,
    write_adapter,
)
from unlora.model.targets import patterns_are_checked
from unlora.model.tokenizer import get_tokenizer
from unlora.recipes.model_card import model_card
from unlora.recipes.serve_guard import Figures, ServeGuard
from unlora.runs.atomic_files import write_json, write_text

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes
HEAD = (
    ". An adapter on {0} is what serving programs do not read: serve the merged weights, or train "
    "without {0} among model.lora_config.target_modules"
)
logger = logging.getLogger("unlora.recipes.serve")


@dataclass(frozen=True)
class Form:
    """One form of a model beside the run that it stands for.

    Attributes:
        lost: what was left out for it, for people.
        refused: why it was not written.
    """

    name: str
    lost: str
    compared: Comparison | None
    figures: Figures
    refused: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        difference = None if self.compared is None else self.compared.difference
        return {
            "lost": self.lost, "largest_difference_of_logits": difference,
            "probability": self.figures.as_dict(), "refused": self.refused,
        }  # fmt: skip


class Serving:
    """A run on its way to the forms in which it is served."""

    def __init__(self, run: str, config: AuditConfig, rank: int, base: str | None) -> None:
        self.run, self.rank, self.base = run, rank, base
        self.lineage = Lineage.read(run, base)
        if not self.lineage.links:
            raise InputError(f"{run!r} has no adapter to export; it is a full model already.")
        self.guard = ServeGuard(run, config)
        self.network: Any
        self.network, self.lineage = load_model(self.lineage, {"dtype": "auto"})
        self.probe, self.before = Probe.of(self.network), self.guard.measure(self.network)
        self.root = root_name(self.lineage)

    def adapter(self, folder: Path) -> Form:
        """Write one adapter of a low rank, without the output head."""
        config, tensors = concatenated(self.network)
        head = self._head()
        joined = min(self.rank, config.r)
        small = low_rank(config, tensors, joined, without=head)
        folder.mkdir()
        write_adapter(small, self.root, folder)
        home = tokenizer_home(self.run, self.lineage)
        get_tokenizer(home, {"pretrained_model_name_or_path": home}).save_pretrained(str(folder))
        base = load_root(self.lineage, {"dtype": "auto"})[0]
        with patterns_are_checked():
            reloaded = PeftModel.from_pretrained(base, str(folder))
        left_out = " and the output head" if head else ""
        lost = f"rank {config.r} -> {joined}{left_out}: {1 - small.share:.1%} of the change"
        form = self._form("adapter", lost, reloaded)
        if form.refused and head:
            return replace(form, refused=f"{form.refused}{HEAD.format(head)}")
        return form

    def merged(self, folder: Path) -> Form:
        """Write full weights in bfloat16."""
        share = share_lost_by_rounding(self.network, torch.bfloat16)
        lost = f"bfloat16 rounds {share:.1%} of the changed weights back to what they were"
        try:
            export(self.run, "merged", str(folder), dtype="bfloat16", base=self.base)
        except GuardError as error:
            return Form("merged", lost, None, Figures(), str(error))
        network = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, trust_remote_code=False, use_safetensors=True
        )
        return self._form("merged", lost, network)

    def _form(self, name: str, lost: str, network: nn.Module) -> Form:
        """Compare a form with the run."""
        compared, figures = self.probe.compared(network), self.guard.measure(network)
        refused = self.guard.why_refused(self.before, figures)
        if not self.before.is_known and not (compared.kept() or compared.same(1e-3)):
            share = compared.share or 0
            refused = f"{share:.0%} of what the adapters do to the probe rows is left"
        return Form(name, lost, compared, figures, refused)

    def _head(self) -> str | None:
        """The name of the output head, where an adapter is on it."""
        plain, head = self.network.get_base_model(), self.network.get_output_embeddings()
        name = next((name for name, module in plain.named_modules() if module is head), None)
        return name if hasattr(head, "lora_A") else None


def serve(
    run: str,
    config: AuditConfig,
    *,
    rank: int = 64,
    output: str | None = None,
    base: str | None = None,
    llama_cpp: str | None = None,
) -> str:
    """Write every form that says what the run says, and how to serve it.

    Args:
        config: of an audit of the run, which says where its rows are.
        rank: the largest of the adapter.
        llama_cpp: a checkout of llama.cpp; its converters on PATH if not given.

    Returns:
        What was written and refused, and the commands.

    Raises:
        InputError: nothing to export, or the target exists or cannot be written.
        GuardError: every form was refused.
    """
    folder = Path(output or Path(run, "exported", "serve"))
    scripts = converters(llama_cpp)
    with export_folder(folder) as temporary:
        with without_library_bars():
            serving = Serving(run, config, rank, base)
            forms = [_tried(serving.adapter, temporary / "adapter"),
                     _tried(serving.merged, temporary / "merged")]  # fmt: skip
        _refuse_where_all_are(forms, run)
        files = _to_gguf(scripts, serving, temporary)
        return _finish(serving, forms, files, temporary, folder)


def _refuse_where_all_are(forms: list[Form], run: str) -> None:
    if all(form.refused for form in forms):
        reasons = "; ".join(f"{form.name} ({form.lost}): {form.refused}" for form in forms)
        raise GuardError(
            f"{run!r} is served in no form: {reasons}. Nothing was written. Give a larger --rank, "
            "or --merged --dtype float32."
        )


def _tried(write: Callable[[Path], Form], folder: Path) -> Form:
    """A form; nothing of it stays where it is refused."""
    form = write(folder)
    if form.refused:
        shutil.rmtree(folder, ignore_errors=True)
    return form


def _to_gguf(scripts: dict[str, Path], serving: Serving, folder: Path) -> dict[str, str]:
    """Convert what was written; name of a file -> why there is none, or nothing."""
    files: dict[str, str] = {}
    for script, form, name in ((MODEL, "merged", "model.gguf"), (ADAPTER, "adapter", "lora.gguf")):
        if not (folder / form).is_dir():
            continue
        if script not in scripts:
            files[name] = f"there is no {script} on PATH; give --llama-cpp FOLDER"
            continue
        base = serving.root if form == "adapter" else None
        if base and not serving.lineage.local_root:
            files[name] = f"the root model {base} is no folder; download it and give --base FOLDER"
            continue
        (folder / "gguf").mkdir(exist_ok=True)
        try:
            convert(scripts[script], folder / form, folder / "gguf" / name, base=base)
            files[name] = ""
        except InputError as error:
            files[name] = str(error)
    if "" not in files.values():
        shutil.rmtree(folder / "gguf", ignore_errors=True)
    if files.get("model.gguf") == "":
        write_text(folder / "gguf" / "Modelfile", "FROM ./model.gguf\nPARAMETER temperature 0\n")
    return files


def _finish(
    serving: Serving, forms: list[Form], files: dict[str, str], temporary: Path, folder: Path
) -> str:
    """Write cards, figures and commands; returns what is printed."""
    cards = {form.name: form for form in forms if not form.refused}
    if (temporary / "gguf").is_dir():
        cards["gguf"] = cards.get("merged") or cards["adapter"]
    for name, form in cards.items():
        card = model_card(serving.lineage, name, form.lost, form.figures, serving.guard.audit)
        write_text(temporary / name / "README.md", card)
    content = {
        "run": serving.run, "before": serving.before.as_dict(), "gguf": files,
        "forms": {form.name: form.as_dict() for form in forms},
    }  # fmt: skip
    write_json(temporary / "serve.json", content)
    commands = _commands(serving, forms, files, folder)
    write_text(temporary / "commands.txt", "\n".join(commands) + "\n")
    missing = [f"{name}: not written: {why}" for name, why in files.items() if why]
    return "\n".join(
        [*_table(serving, forms), *missing, "", *commands, "", f"Everything is in {folder}"]
    )


def _table(serving: Serving, forms: list[Form]) -> list[str]:
    show = "{:10} {:>8} {:>8} {:>8}  {}".format
    lines = [show("", "logits", "forget", "retain", "lost")]
    lines.append(show("the run", "", *_numbers(serving.before), "").rstrip())
    for form in forms:
        difference = "" if form.compared is None else f"{form.compared.difference:.1e}"
        lines.append(show(form.name, difference, *_numbers(form.figures), form.lost))
    lines += [
        f"{form.name}: REFUSED, not written: {form.refused}" for form in forms if form.refused
    ]
    if why := serving.guard.why_no_rows:
        lines.append(f"No rows to compare by, so logits alone decide: {why}")
    return lines


def _numbers(figures: Figures) -> list[str]:
    return ["" if x is None else f"{x:.3f}" for x in (figures.forget, figures.retain)]


def _commands(
    serving: Serving, forms: list[Form], files: dict[str, str], folder: Path
) -> list[str]:
    """How each form that was written is served."""
    name = quote(Path(serving.run).resolve().name)
    adapter, merged, gguf = (quote(str(folder / form)) for form in ("adapter", "merged", "gguf"))
    written = {form.name for form in forms if not form.refused}
    lines = []
    if "adapter" in written:
        rank = next((rank for rank in RANKS if rank >= serving.rank), serving.rank)
        lines += [
            f"vllm serve {quote(serving.root)} --enable-lora --max-lora-rank {rank} "
            f"--lora-modules {name}={adapter}",
            f"python -c 'from peft import AutoPeftModelForCausalLM as M; "
            f'M.from_pretrained("{folder / "adapter"}")\'',
        ]  # fmt: skip
    if "merged" in written:
        lines += [
            f"vllm serve {merged} --served-model-name {name}",
            f"python -c 'from transformers import pipeline; "
            f'print(pipeline(model="{folder / "merged"}")("..."))\'',
        ]  # fmt: skip
    if files.get("model.gguf") == "":
        lines += [
            f"llama-server --model {gguf}/model.gguf",
            f"ollama create {name} -f {gguf}/Modelfile && ollama run {name}",
        ]
    if files.get("lora.gguf") == "":
        lines.append(f"llama-server --model ROOT.gguf --lora {gguf}/lora.gguf")
    return lines
