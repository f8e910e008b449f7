"""Subtract the learned task vector from the weights after training (Negation, PerTA).

Checkpoints and evaluations during training are those of the model that still learns; the model that
is saved at the end, and its evaluation, are after the turn.
"""

import logging
from collections.abc import Mapping

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from unlora.data.pairs import Parts
from unlora.errors import InputError
from unlora.model.adapter_init import has_start, lora_layers, low_rank
from unlora.model.reference import POLICY, REFERENCE
from unlora.objectives import Term
from unlora.trainer.data_driven_init import as_batches, few_at_a_time, fisher

logger = logging.getLogger(__name__)


class TaskVector:
    """What a model learns from now on, to be subtracted when it has.

    Args:
        term: Negation or PerTA, configured.

    Raises:
        InputError: what will be learnt could not be told from what is there, or PerTA has no rows
            to estimate its shares from.
    """

    def __init__(self, model: nn.Module, term: Term):
        self.model, self.term = model, term
        self.scale = float(str(term.hyper["scale"]))
        self.num_rows = int(str(term.hyper.get("num_rows", 1)))
        self.before: Mapping[str, Tensor] = {}
        if not isinstance(model, PeftModel):
            self.before = {n: p.detach().clone() for n, p in model.named_parameters()}
        elif REFERENCE in model.peft_config or has_start(model):
            raise InputError(
                f"{term.name} subtracts what a new adapter learns from nothing. Leave out "
                "model.lineage=continue, and start the adapter as usual."
            )
        elif model.peft_config[POLICY].use_dora:
            raise InputError(
                f"{term.name} turns a product of matrices round, and DoRA learns a length beside "
                "it. Set model.lora_config.use_dora=false."
            )

    def subtract(self, parts: Parts, *, pad_id: int, batch_size: int, seed: int) -> str:
        """Change the model to what it was, minus the task vector; returns what was done."""
        if self.term.name == "Negation":
            return self._negate()
        batches = {}
        for part in ("forget", "retain"):
            rows, draw = parts.rows[part], np.random.default_rng(seed)
            chosen = draw.permutation(len(rows))[: self.num_rows]
            batches[part] = as_batches([rows[i] for i in chosen], pad_id, batch_size, self.model)
        weights = self._targets()
        if not isinstance(self.model, PeftModel):
            self._per_weight_in_full(weights, batches)
            return f"subtracted {self.scale} of the task vector, weight by weight"
        missing = self._per_weight(self.model, weights, batches)
        return (
            f"subtracted {self.scale} of the task vector, weight by weight; as an adapter of the "
            f"same rank that is exact but for {sum(missing) / len(missing):.1%} of its norm"
        )

    def _per_weight(
        self, model: PeftModel, weights: Mapping[str, nn.Parameter], batches: Mapping[str, list]
    ) -> list[float]:
        """Returns the norm of what the adapter on each weight cannot hold, as a share."""
        layers = lora_layers(model)
        learnt = {
            name: layer.lora_B[POLICY].weight.detach().clone() for name, layer in layers.items()
        }
        factors, missing = {}, []
        with torch.no_grad():
            for layer in layers.values():
                layer.lora_B[POLICY].weight.zero_()  # shares are those of the target
        for group in few_at_a_time(weights):
            shares = self._shares(group, batches)
            for name in group:
                layer, scaling = layers[name], layers[name].scaling[POLICY]
                product = scaling * learnt[name] @ layer.lora_A[POLICY].weight.detach()
                share = shares[name].T if layer.fan_in_fan_out else shares[name]
                change = -self.scale * share.to(product) * product
                factors[name] = low_rank(change.float(), layer.r[POLICY], scaling)
                left = change - scaling * factors[name].b @ factors[name].a
                missing.append(float(left.norm() / change.norm().clamp(min=1e-30)))
        with torch.no_grad():
            for name, layer in layers.items():
                layer.lora_A[POLICY].weight.copy_(factors[name].a)
                layer.lora_B[POLICY].weight.copy_(factors[name].b)
        return missing

    @torch.no_grad()
    def _per_weight_in_full(
        self, weights: Mapping[str, nn.Parameter], batches: Mapping[str, list]
    ) -> None:
        for name, weight in weights.items():  # the model becomes the target, before what it learnt
            learnt = weight - self.before[name].to(weight)
            weight.copy_(self.before[name])
            self.before[name].copy_(learnt)
        for group in few_at_a_time(weights):
            with torch.enable_grad():
                shares = self._shares(group, batches)
            for name in group:
                self.before[name].mul_(-self.scale * shares[name].to(self.before[name]))
        for name, weight in weights.items():
            weight.add_(self.before[name].to(weight))

    def _shares(
        self, weights: Mapping[str, nn.Parameter], batches: Mapping[str, list]
    ) -> dict[str, Tensor]:
        """F_forget / (F_forget + F_retain) of every weight, 0 where both are."""
        forget, retain = (fisher(self.model, batches[x], weights) for x in ("forget", "retain"))
        shares = {}
        for name in weights:
            both = forget[name] + retain[name]
            least = torch.finfo(both.dtype).tiny
            shares[name] = torch.where(both > 0, forget[name] / both.clamp(min=least), 0)
        return shares

    def _negate(self) -> str:
        with torch.no_grad():
            if isinstance(self.model, PeftModel):
                for layer in lora_layers(self.model).values():
                    layer.lora_B[POLICY].weight.mul_(-self.scale)
            else:
                for name, parameter in self.model.named_parameters():
                    old = self.before[name].to(parameter)
                    parameter.copy_(old - self.scale * (parameter - old))
        return f"subtracted {self.scale} of the task vector"

    def _targets(self) -> dict[str, nn.Parameter]:
        """The weights that were changed, directly or by an adapter on them."""
        if not isinstance(self.model, PeftModel):
            return {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return {n: x.get_base_layer().weight for n, x in lora_layers(self.model).items()}
