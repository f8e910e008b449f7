"""Precompute and cache the reference's log p(answer | question), one float32 per row.

NPO, DPO and AltPO need this number of the reference and nothing else, and the reference never
changes. So it is computed before the first step, and no step runs a reference pass. The numbers are
kept on disk under a key of the model and the data, for the next run of a sweep.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainingArguments

from unlora.data import fingerprint
from unlora.data.cache import cache_folder
from unlora.data.chat_encoding import Encoded
from unlora.data.collate import collate
from unlora.forward.forward_pass import Way, ask_all
from unlora.forward.outputs import TokenLogps
from unlora.model.probe import Probe
from unlora.model.reference import as_reference
from unlora.runs.atomic_files import write_bytes

logger = logging.getLogger(__name__)
TOKENS = 1024  # of a pass, or as many rows as a micro-batch has


def precompute(
    model: nn.Module,
    rows: Mapping[str, Sequence[Encoded]],
    *,
    frozen: nn.Module | None,
    way: Way,
    args: TrainingArguments,
    accelerator: Accelerator,
    pad_id: int,
) -> dict[str, Tensor]:
    """Compute log p of each row's answer under the reference, in nats, or read it from disk.

    Args:
        model: the policy, not wrapped.
        rows: part of the data -> its rows.
        frozen: stands for the reference where another term asks a copy of the model.
        way: how the model is asked.

    Returns:
        Part -> float32 [rows].
    """
    if not rows:
        return {}
    logps = {}
    with as_reference(model, frozen or model) as reference, accelerator.autocast():
        probe = Probe.take(reference)
        for part, of_part in rows.items():
            file = _file(probe, of_part, model, args)
            with accelerator.main_process_first():  # the others read what it wrote
                known = _read(file, len(of_part))
                if known is None:
                    silent = args.disable_tqdm or not accelerator.is_main_process
                    known = _compute(part, of_part, reference, way, args, pad_id, silent)
                    if accelerator.is_main_process:
                        _write(file, known)
            logps[part] = known.to(args.device)
    return logps


def _compute(
    part: str,
    rows: Sequence[Encoded],
    reference: nn.Module,
    way: Way,
    args: TrainingArguments,
    pad_id: int,
    silent: bool,
) -> Tensor:
    logps = torch.zeros(len(rows))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    # without gradients this is less than a step needs
    size = max(args.train_batch_size, TOKENS // max(len(rows[order[0]].input_ids), 1))
    modes = {module: module.training for module in reference.modules()}
    reference.eval()
    bar = tqdm(total=len(rows), desc=f"reference: {part}", unit="row", disable=silent)
    with bar, torch.no_grad():
        for first in range(0, len(rows), size):
            chosen = order[first : first + size]
            batch = collate([rows[i] for i in chosen], pad_id)
            moved = {name: tensor.to(args.device) for name, tensor in batch.items()}
            (output,) = ask_all(reference, [(TokenLogps, moved)], way=way)
            assert isinstance(output, TokenLogps)
            logps[chosen] = output.sequence_logps.float().cpu()
            bar.update(len(chosen))
    for module, training in modes.items():
        module.training = training
    return logps


def _file(probe: Probe, rows: Sequence[Encoded], model: nn.Module, args: TrainingArguments) -> Path:
    lineage = getattr(model, "lineage", None)
    made_of = [
        str(fingerprint(rows)),
        # of the model: what it is made from, how it is computed, and what it answers
        str(
            lineage
            and [lineage.fingerprint, *(link.sha256 + link.config_sha256 for link in lineage.links)]
        ),
        str([p.dtype for p in model.parameters()][:1]),
        str((args.bf16, args.fp16, args.device.type, torch.__version__)),
        hashlib.sha256(probe.logits.contiguous().numpy().tobytes()).hexdigest(),
    ]
    key = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:32]
    return cache_folder() / "reference" / f"{key}.safetensors"


def _read(file: Path, rows: int) -> Tensor | None:
    """Read the numbers in the file, unless it is absent, broken or of another length."""
    try:
        logps = load_file(file)["logps"]
    except (OSError, SafetensorError, KeyError):
        return None
    if logps.shape != (rows,) or not logps.isfinite().all():
        return None
    logger.info("reference: %d numbers read from %s", rows, file)
    return logps


def _write(file: Path, logps: Tensor) -> None:
    try:
        write_bytes(file, save({"logps": logps}))
    except OSError as error:
        logger.warning("reference: the numbers are not kept: %s", error)
