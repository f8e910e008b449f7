"""Estimate the memory of a training from its config; no weights are read.

The architecture is built on torch's meta device, where a tensor has a shape and no memory, and the
adapter on it, so parameters are counted and not computed by rules.

``docs/architecture.md`` has how far estimates are from peaks that were measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from unlora.config.schema import Config, TrainerArgs
from unlora.forward.architecture import decoder_layers
from unlora.forward.outputs import Hidden, Outputs, Padded, TokenLogps
from unlora.model import ResolvedModel, resolve_model
from unlora.model.quantised import check_training
from unlora.model.reference import rest_above
from unlora.trainer.activation_memory import activation_bytes, logit_bytes
from unlora.trainer.largest_batch import Batch, largest_batches
from unlora.trainer.loss import UnlearningLoss
from unlora.trainer.model_size import MetaModel
from unlora.trainer.plugins import Plugins

# numbers of its own that an optimiser keeps of each trained one, in the dtype of the weights
STATES = {"adamw": 2.0, "adafactor": 0.0, "sgd": 0.0, "adagrad": 1.0, "rmsprop": 1.0, "lion": 1.0}


@dataclass(frozen=True)
class Estimate:
    """What a training needs. Memory is in bytes, on one device, at the largest batch.

    Attributes:
        parameters: of the model, its adapters included, each counted once.
        trained: those that the optimiser changes.
        file: bytes on disk of what is saved: the adapter, or all weights.
        weights: of the model as it is loaded.
        adapter: the weights of adapters, that of the reference included.
        gradients: as many as are held at once.
        optimiser: its state.
        reference: a copy of the whole model, where an objective asks one and there is no adapter to
            switch off.
        activations: as the config sets ``gradient_checkpointing``.
        other_activations: as if it were set the other way.
        logits: of the scored tokens, and what the loss makes of them.
        checkpointing: whether gradient checkpointing is on.
        batches: part of the data -> its largest micro-batch.
        lengths: in words, where the lengths of rows are from.
    """

    parameters: int
    trained: int
    file: int
    weights: int
    adapter: int
    gradients: int
    optimiser: int
    reference: int
    activations: int
    other_activations: int
    logits: int
    checkpointing: bool
    batches: Mapping[str, Batch]
    lengths: str

    @property
    def parts(self) -> dict[str, int]:
        """What the memory is for -> bytes."""
        names = ("weights", "adapter", "gradients", "optimiser", "reference", "activations")
        return {name: getattr(self, name) for name in (*names, "logits")}

    def switched(self, checkpointing: bool) -> "Estimate":
        """The same with gradient checkpointing on or off."""
        if checkpointing == self.checkpointing:
            return self
        return replace(
            self,
            activations=self.other_activations,
            other_activations=self.activations,
            checkpointing=checkpointing,
        )

    @property
    def total_bytes(self) -> int:
        """The peak while it trains, without what Python and its libraries take."""
        return sum(self.parts.values())


def estimate(
    config: Config,
    batches: Mapping[str, Batch] | None = None,
    *,
    model: ResolvedModel | None = None,
) -> Estimate:
    """What the training of a config needs, before anything is loaded.

    Args:
        batches: the largest micro-batch of each part, where the data are read already.
        model: that of the config, where it is resolved already.

    Raises:
        InputError: the architecture is out of reach, or settings do not go with it.
    """
    resolved = model or resolve_model(config.model)
    section, trainer = resolved.section, config.trainer
    by = (trainer.handler, *trainer.plugins)
    check_training(resolved.quantised, section, merges=bool(resolved.lineage.links), by=by)
    loss = UnlearningLoss.build(trainer.handler, **trainer.method_args)
    plugins = Plugins.build(trainer.plugins, loss, use_lora=section.use_lora)
    lengths = "the longest rows of the data"
    if batches is None:
        parts = sorted({view.split("_")[1] for view in loss.views})
        batches, lengths = largest_batches(config, section, parts)
    network = MetaModel.of(resolved, plugins)
    depth = _freeze_above(network.model, loss)
    sets, on = _gradient_sets(loss, plugins), _checkpoints(trainer.args)
    plain, checkpointed = _activations(network.model, depth, loss, batches, at_once=sets == 1)
    trained = [p for p in network.model.parameters() if p.requires_grad]
    # a model that is trained in full needs a copy of itself, where it is asked in every step
    live = loss.asked_of_reference(TokenLogps, Outputs, Hidden, Padded)
    return Estimate(
        parameters=network.parameters,
        trained=sum(p.numel() for p in trained),
        file=network.file,
        weights=network.weights,
        adapter=network.adapter.bytes + network.frozen.bytes,
        gradients=sum(p.nbytes for p in trained) * sets,
        optimiser=_optimiser(trainer.args, trained),
        reference=network.weights if live and not section.use_lora else 0,
        activations=checkpointed if on else plain,
        other_activations=plain if on else checkpointed,
        logits=logit_bytes(loss.views, batches, network.base),
        checkpointing=on,
        batches=batches,
        lengths=lengths,
    )


def _freeze_above(model: nn.Module, loss: UnlearningLoss) -> int:
    """Freeze what no gradient reaches; returns how many decoder layers are trained."""
    depth = len(decoder_layers(model))
    if loss.layer is not None and loss.ends_at_layer:
        depth = min(loss.layer, depth - 1) + 1
        rest_above(model, depth - 1)
    return depth


def _activations(
    model: nn.Module,
    depth: int,
    loss: UnlearningLoss,
    batches: Mapping[str, Batch],
    *,
    at_once: bool,
) -> tuple[int, int]:
    """Bytes that the policy's passes keep: without gradient checkpointing, and with it.

    Args:
        at_once: one backward pass for all; a composed step lets go of one graph before the next.
    """
    views = [view for view in loss.views if view.startswith("policy_")]
    sizes = [activation_bytes(model, depth, batches[view.split("_")[1]]) for view in views]
    plain, checkpointed = zip(*sizes, strict=True)
    return (sum(plain), sum(checkpointed)) if at_once else (max(plain), max(checkpointed))


def _gradient_sets(loss: UnlearningLoss, plugins: Plugins) -> int:
    composes = plugins.compose_gradients or loss.constraint is not None
    return 1 + composes + (plugins.gru is not None)


def _checkpoints(args: Mapping[str, Any]) -> bool:
    named = args.get("activation_checkpointing")  # as transformers 5.23 calls it
    return bool(args.get("gradient_checkpointing") if named is None else named)


def _optimiser(args: TrainerArgs, trained: Sequence[torch.Tensor]) -> int:
    name = str(args.get("optim") or "adamw_torch")
    states = next((n for start, n in STATES.items() if start in name), STATES["adamw"])
    if name.startswith("paged"):
        return 0  # in the memory of the host
    small = "8bit" in name or "4bit" in name
    return int(states * sum(p.numel() * (1 if small else p.element_size()) for p in trained))
