"""Compute the terms' losses on a micro-batch, in the forward passes that the terms declare."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments

from unlora.data.chat_encoding import Encoded
from unlora.data.pairs import BLANK
from unlora.forward.architecture import check_layer
from unlora.forward.capabilities import found_way
from unlora.forward.forward_pass import PLAIN, ask_all, ask_padded, scored_tokens
from unlora.forward.fused_lora import fuse_lora
from unlora.forward.keyed_dropout import row_keys
from unlora.forward.outputs import Hidden, Outputs, Padded, ScoredTokens, SequenceLogps, TokenLogps
from unlora.model.reference import POLICY, as_reference, frozen_copy, rest_above
from unlora.objectives import View
from unlora.trainer.dropout_keys import key_dropout
from unlora.trainer.loss import Totals, UnlearningLoss
from unlora.trainer.method_state import MethodState
from unlora.trainer.reference_logps import precompute

Batch = Mapping[str, Mapping[str, Tensor]]  # part -> its padded rows, see collate_parts


class TermLosses:
    """Ask the models what the terms declare, and return the terms' losses.

    Args:
        model: the policy, not wrapped; layers that no term reaches are frozen.
        state: holds what terms have drawn.
        anchor: the part of the data of which a row comes once in a step.
        trainer_state: returns the current one.
        split: weights are spread over processes, and whole in a forward pass only.
        common: number of tokens with which every row of the data begins.

    Attributes:
        reference_logps: part -> log p of each of its rows under the reference, where it is known.
        inner_step: which inner step of a constraint this is; dropout differs between them.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: UnlearningLoss,
        state: MethodState,
        *,
        anchor: str,
        args: TrainingArguments,
        accelerator: Accelerator,
        trainer_state: Callable[[], TrainerState],
        split: bool = False,
        common: int = 0,
    ):
        self.loss, self.state, self.anchor = loss, state, anchor
        self.args, self.accelerator, self.trainer_state = args, accelerator, trainer_state
        self.reference_logps: Mapping[str, Tensor] = {}
        self.inner_step = 0
        way = PLAIN if split else found_way(model, args.device)
        # a compiled model cannot attend to rows that are others at every step
        self.way = replace(way, common=common, flat=way.flat and not args.torch_compile)
        live = loss.asked_of_reference(TokenLogps, Outputs, Hidden, Padded)
        needs_copy = bool(live) and not isinstance(model, PeftModel)
        self.frozen = frozen_copy(model) if needs_copy else None
        if loss.layer is not None:
            check_layer(model, loss.layer)
            if loss.ends_at_layer:
                rest_above(model, loss.layer)
        self._keyed = key_dropout(model, args.seed)
        if not split and isinstance(model, PeftModel):
            fuse_lora(model, POLICY)

    def compute(
        self,
        model: nn.Module,
        batch: Batch,
        totals: Totals | None = None,
        *,
        terms: Sequence[str] = ("forget", "retain"),
        row_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the losses of these terms; see :meth:`UnlearningLoss.losses`."""
        views = self.views(model, batch, terms)
        losses = self.loss.losses(views, totals, drawn=self.state.drawn, row_weights=row_weights)
        return {name: 0 * x for name, x in losses.items()} if self.is_blank(batch) else losses

    def precompute_reference(
        self, model: nn.Module, rows: Mapping[str, Sequence[Encoded]], pad_id: int
    ) -> None:
        """Compute once what terms ask of the reference in one number a row.

        Args:
            model: the policy, not wrapped, before its first step.
            rows: part of the data -> its rows.
        """
        parts = [view.split("_")[1] for view in self.loss.asked_of_reference(SequenceLogps)]
        self.reference_logps = self.reference_logps or precompute(
            model, {part: rows[part] for part in parts}, frozen=self.frozen, way=self.way,
            args=self.args, accelerator=self.accelerator, pad_id=pad_id,
        )  # fmt: skip

    def totals(self, batches: Sequence[Batch], terms: Sequence[str] | None = None) -> Totals:
        """Count the losses that each term has on these micro-batches of all processes."""
        counted = {name: t for name, t in self.loss.terms.items() if terms is None or name in terms}
        own = [batch for batch in batches if not self.is_blank(batch)]
        counts = [
            sum(term.count(batch[term.part]["labels"]) for batch in own)
            for term in counted.values()
        ]
        totals = self.accelerator.reduce(torch.tensor(counts, device=self.args.device), "sum")
        return dict(zip(counted, totals, strict=True))

    def is_blank(self, batch: Batch) -> bool:
        """Return whether this process has no row of its own here, at the end of an epoch."""
        several = self.args.world_size > 1  # elsewhere no GPU is waited for
        return several and all(int(rows["number"][0]) == BLANK for rows in batch.values())

    def views(self, model: nn.Module, batch: Batch, terms: Sequence[str]) -> dict[str, View]:
        """Run the forward passes that these terms need, and return the models' outputs."""
        chosen = [term for name, term in self.loss.terms.items() if name in terms]
        needed = {view for term in chosen for view in term.views}
        views: dict[str, View] = {}
        kinds: dict[str, dict[str, type]] = {"policy": {}, "reference": {}}
        for view, kind in self.loss.views.items():
            who, part = view.split("_")
            if view not in needed:
                continue
            if kind is ScoredTokens:
                views[view] = scored_tokens(batch[part])
            elif kind is SequenceLogps and who == "reference" and part in self.reference_logps:
                logps = self.reference_logps[part]
                views[view] = SequenceLogps(logps[batch[part]["number"]])
            else:
                kinds[who][part] = kind
        policy = self._forward(model, kinds["policy"], self._with_keys(batch))
        views |= {f"policy_{part}": outputs for part, outputs in policy.items()}
        if kinds["reference"]:
            with as_reference(self.accelerator.unwrap_model(model), self.frozen) as reference:
                outputs = self._forward(reference, kinds["reference"], batch)
            views |= {f"reference_{part}": output for part, output in outputs.items()}
        return views

    def _with_keys(self, batch: Batch) -> Batch:
        """Add a key for each row, which its dropout goes by.

        A row of the anchor comes once in a step, and the others are known by the one they meet.
        """
        if not self._keyed:
            return batch
        anchor = batch.get(self.anchor)
        step = self.args.seed, self.trainer_state().global_step, self.inner_step
        # what all rows begin with may be one for all of them
        beginning = row_keys(torch.tensor(0, device=self.args.device), *step)
        return {
            part: {
                **rows,
                "key": row_keys((anchor or rows)["number"], *step, zlib.crc32(part.encode())),
                "beginning": beginning,
            }
            for part, rows in batch.items()
        }

    def _forward(
        self, model: nn.Module, kinds: Mapping[str, type], batch: Batch
    ) -> dict[str, View]:
        """Ask one model about each part of a batch, in as few passes as there can be."""
        views: dict[str, View] = {}
        groups: dict[bool, list[str]] = {True: [], False: []}  # a pass for states ends early
        for part, kind in kinds.items():
            if kind is Padded:
                views[part] = ask_padded(model, batch[part], way=self.way)
            else:
                groups[kind is Hidden].append(part)
        for parts in filter(None, groups.values()):
            wants = {p: TokenLogps if kinds[p] is SequenceLogps else kinds[p] for p in parts}
            outputs = ask_all(
                model,
                [(wants[part], batch[part]) for part in parts],
                layer=self.loss.layer,
                way=self.way,
            )
            for part, output in zip(parts, outputs, strict=True):
                if kinds[part] is SequenceLogps:
                    assert isinstance(output, TokenLogps)
                    views[part] = SequenceLogps(output.sequence_logps)
                else:
                    views[part] = output
        return views
