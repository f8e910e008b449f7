"""Steps of a tiny model on random rows, made without a Trainer, by plain gradient descent."""

from itertools import islice

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from small_trainer import LENGTHS
from tiny import LORA, llama, rows, tokenizer
from transformers import TrainerState

from unlora.data.collate import collate_parts
from unlora.data.pairs import KeyedSampler, Parts
from unlora.model.lineage import Lineage
from unlora.trainer import Plugins, UnlearningLoss, training_arguments
from unlora.trainer.composed_step import ComposedStep, is_composed
from unlora.trainer.microbatches import MicrobatchSplitter
from unlora.trainer.step_context import make_context

PAD = tokenizer().pad_token_id


def lora_model(**config):
    model = get_peft_model(llama(), LoraConfig(**{**LORA, **config}, task_type="CAUSAL_LM"))
    model.lineage = Lineage("tiny")
    return model


def parts_for(loss):
    lengths = {**LENGTHS, "alternate": [4] * len(LENGTHS["forget"])}
    data = {part: rows(lengths[part], seed=i) for i, part in enumerate(loss.parts)}
    return Parts(data, "forget" if "forget" in data else "retain")


def draw(parts, layout, seed=42):
    """Yield the micro-batches of every step, over as many epochs as there are asked for."""
    sampler, (size, count) = KeyedSampler(parts, seed), layout
    while True:
        numbers = iter(sampler)
        while chosen := list(islice(numbers, size * count)):
            items = [parts[index] for index in chosen]
            yield [collate_parts(items[i : i + size], PAD) for i in range(0, len(items), size)]
        sampler.set_epoch(sampler.epoch + 1)


class Stepper:
    """A run without a Trainer.

    Args:
        layout: rows of a micro-batch, and micro-batches of a step.

    Attributes:
        gradients, weights: of every step, before the weights were moved.
        log: of every step, what a Trainer would log.
    """

    def __init__(
        self, handler, method_args=None, plugins=None, *, model=None, parts=None, layout=(16, 1),
        learning_rate=1e-2, penalty=None, folder="unused", **args,
    ):  # fmt: skip
        self.loss = UnlearningLoss.build(handler, **(method_args or {}))
        self.plugins = Plugins.build(plugins or {}, self.loss, use_lora=True)
        self.parts = parts or parts_for(self.loss)
        self.model = lora_model(init_lora_weights=False) if model is None else model
        self.layout, self.learning_rate, self.penalty = layout, learning_rate, penalty
        args = training_arguments(
            {"report_to": "none", "disable_tqdm": True, "max_grad_norm": 0.0,
             "per_device_train_batch_size": layout[0], **args}, output_dir=str(folder),
        )  # fmt: skip
        self.state = TrainerState(epoch=0.0)
        args.device  # noqa: B018 - sets accelerate up
        self.context = make_context(
            self.model, self.loss, self.parts, pad_id=PAD, args=args, accelerator=Accelerator(),
            trainer_state=lambda: self.state,
        )  # fmt: skip
        self.context.losses.precompute_reference(self.model, self.parts.rows, PAD)
        self.splitter, self.composed = MicrobatchSplitter(self.context), None
        if is_composed(self.loss, self.plugins):
            self.composed = ComposedStep(self.context, self.plugins, penalty)
        self.gradients, self.weights, self.log = [], [], []
        self._steps = draw(self.parts, layout, args.seed)

    def run(self, steps=1):
        for _ in range(steps):
            batches = next(self._steps)
            loss = self.compute_gradients(batches)
            learnt = self.context.trained.values()
            self.gradients.append([None if p.grad is None else p.grad.clone() for p in learnt])
            self.weights.append([p.detach().clone() for p in learnt])
            with torch.no_grad():
                for p in learnt:
                    if p.grad is not None:
                        p.sub_(self.learning_rate * p.grad)
            self.model.zero_grad()
            self.log.append({"loss": float(loss), **self.context.means.pop()})
            self.state.global_step += 1
            self.state.epoch = self.state.global_step / self.steps_of_an_epoch
        return self

    @property
    def steps_of_an_epoch(self):
        return -(-len(self.parts) // (self.layout[0] * self.layout[1]))

    def batches(self, steps=1):
        """All micro-batches of the next steps, in order."""
        return [batch for _ in range(steps) for batch in next(self._steps)]

    def compute_gradients(self, batches):
        """As ``UnlearningTrainer.training_step`` does for all of them."""
        totals = self.context.losses.totals(batches)
        self.splitter.start_step(batches)
        self.model.train()
        if self.composed is not None:
            step, undo = self.composed.compute_gradients, self.composed.undo
            return self.splitter.run_step(lambda pieces: step(self.model, pieces, totals), undo)

        def one(piece):
            losses = self.context.losses.compute(self.model, piece, totals)
            for name, loss in losses.items():
                self.context.means.add(f"{name}_loss", float(loss.detach()) * len(batches))
            total = sum(self.loss.weights[name] * loss for name, loss in losses.items())
            if self.penalty is not None:
                share = len(batches) * self.splitter.pieces_now
                total = total + self.penalty(self.model) / share
            total.backward()
            return total.detach()

        return sum(self.splitter.run(one) for _ in batches)
