"""What the reference says in one number for each row: asked once, then kept.

NPO, DPO and AltPO need log p(answer | question) under the reference and nothing else of it, and the
reference never changes. So it is asked before the first step, and no step runs a reference pass.
The numbers are kept on disk under a key of the model and the data, for the next run of a sweep.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from unlora.data import fingerprint
from unlora.data.cache import cache_folder
from unlora.data.chat import Encoded
from unlora.data.collate import collate
from unlora.forward.outputs import SequenceLogps, TokenLogps, ask_all
from unlora.model.guards import Probe
from unlora.model.reference import as_reference
from unlora.runs.run import write_bytes

if TYPE_CHECKING:
    from unlora.trainer.trainer import UnlearningTrainer

logger = logging.getLogger(__name__)


def known_logps(trainer: "UnlearningTrainer") -> dict[str, Tensor]:
    """Part of the data -> float32 [rows], log p of each row's answer under the reference, in nats.

    Only of the parts that the loss asks the reference for nothing else about.
    """
    views = trainer.loss.asked_of_reference(SequenceLogps)
    if not views:
        return {}
    model = trainer.accelerator.unwrap_model(trainer.model)
    found = {}
    with as_reference(model, trainer.frozen or model) as reference, trainer.accelerator.autocast():
        probe = Probe.take(reference)
        for view in views:
            part = view.split("_")[1]
            rows = trainer.parts.rows[part]
            file = _file(probe, rows, trainer)
            with trainer.accelerator.main_process_first():  # the others read what it wrote
                logps = _read(file, len(rows))
                if logps is None:
                    logps = _asked(reference, rows, part, trainer)
                    _write(file, logps, trainer)
            found[part] = logps.to(trainer.args.device)
    return found


def _asked(
    reference: nn.Module, rows: Sequence[Encoded], part: str, trainer: "UnlearningTrainer"
) -> Tensor:
    logps = torch.zeros(len(rows))
    pad_id, size = trainer.processing_class.pad_token_id, trainer.args.train_batch_size
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    training = {module: module.training for module in reference.modules()}
    reference.eval()
    bar = tqdm(
        total=len(rows),
        desc=f"reference: {part}",
        unit="row",
        disable=trainer.args.disable_tqdm or not trainer.accelerator.is_main_process,
    )
    with bar, torch.no_grad():
        for first in range(0, len(rows), size):
            chosen = order[first : first + size]
            batch = collate([rows[i] for i in chosen], pad_id)
            moved = {name: tensor.to(trainer.args.device) for name, tensor in batch.items()}
            (answer,) = ask_all(reference, [(TokenLogps, moved)], way=trainer.way)
            assert isinstance(answer, TokenLogps)
            logps[chosen] = answer.sequence_logps.float().cpu()
            bar.update(len(chosen))
    for module, mode in training.items():
        module.training = mode
    return logps


def _file(probe: Probe, rows: Sequence[Encoded], trainer: "UnlearningTrainer") -> Path:
    model = trainer.model
    lineage = getattr(model, "lineage", None)
    made_of = [
        str(fingerprint(rows)),
        # of the model: what it is made from, how it is computed, and what it answers
        str(
            lineage
            and [lineage.fingerprint, *(link.sha256 + link.config_sha256 for link in lineage.links)]
        ),
        str([p.dtype for p in model.parameters()][:1]),
        str((trainer.args.bf16, trainer.args.fp16, trainer.args.device.type, torch.__version__)),
        hashlib.sha256(probe.logits.contiguous().numpy().tobytes()).hexdigest(),
    ]
    key = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:32]
    return cache_folder() / "reference" / f"{key}.safetensors"


def _read(file: Path, rows: int) -> Tensor | None:
    """The numbers in the file, unless it is absent, broken or of another length."""
    try:
        logps = load_file(file)["logps"]
    except (OSError, SafetensorError, KeyError):
        return None
    if logps.shape != (rows,) or not logps.isfinite().all():
        return None
    logger.info("reference: %d numbers read from %s", rows, file)
    return logps


def _write(file: Path, logps: Tensor, trainer: "UnlearningTrainer") -> None:
    if not trainer.accelerator.is_main_process:
        return
    try:
        write_bytes(file, save({"logps": logps}))
    except OSError as error:
        logger.warning("reference: the numbers are not kept: %s", error)
