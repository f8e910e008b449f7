"""Train an audited model for a few steps, as an attacker would who has some rows."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unlora.audits.attack import ShortTraining
from unlora.data.collate import collate
from unlora.data.encoded import Encoded
from unlora.errors import InputError
from unlora.evals.random_state import RandomStateApart
from unlora.forward.forward_pass import ask, scored_tokens
from unlora.forward.modes import device_of


class Relearning:
    """A short training, to be looked at after some of its steps.

    LoRA on every linear layer but the output embedding, alpha twice the rank; AdamW with a
    constant learning rate and no weight decay; the mean cross-entropy of a batch's scored tokens.
    Nothing is dropped out, so that only the seed draws: the start of the adapter, and the order of
    the rows. A batch may reach from one epoch into the next.

    Args:
        network: the plain network, which gets the adapter.
        rows: to be trained on; those without a scored token are left out.

    Raises:
        InputError: no row has a scored token.
    """

    VERSION = 1  # raise it when a training comes to end otherwise: its answers are asked again

    def __init__(
        self, network: nn.Module, rows: Sequence[Encoded], plan: ShortTraining, pad_id: int
    ) -> None:
        self.rows = [row for row in rows if len(scored_tokens(collate([row], pad_id)).labels)]
        if not self.rows:
            raise InputError("No row to train on has an answer. Leave the attack out.")
        self.plan, self.pad_id, self.step = plan, pad_id, 0
        linear = [m for m in network.modules() if isinstance(m, (nn.Linear, Conv1D))]
        lora = LoraConfig(
            r=plan.rank,
            lora_alpha=2 * plan.rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in linear),
            task_type="CAUSAL_LM",
        )
        with RandomStateApart():
            torch.manual_seed(plan.seed)
            self.network = get_peft_model(network, lora).eval()
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=0.0)
        self.batches = self._batches()

    def at(self, step: int) -> nn.Module:
        """The network after so many steps, in evaluation mode; it is the same one every time.

        Raises:
            ValueError: it has come further than that.
        """
        if step < self.step:
            raise ValueError(f"step {step} has passed: the training is at step {self.step}")
        with torch.enable_grad():
            while self.step < step:
                loss = -ask(self.network, next(self.batches)).token_logps.mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.step += 1
        self.optimizer.zero_grad()  # gradients would only take memory
        return self.network

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        generator, waiting = np.random.default_rng(self.plan.seed), []
        size = min(self.plan.batch_size, len(self.rows))
        while True:
            waiting += generator.permutation(len(self.rows)).tolist()
            while len(waiting) >= size:
                batch = collate([self.rows[n] for n in waiting[:size]], self.pad_id)
                waiting = waiting[size:]
                yield {key: part.to(device_of(self.network)) for key, part in batch.items()}
