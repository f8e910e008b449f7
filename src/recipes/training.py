"""Run one training: train, save, evaluate, and describe it for the manifest."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback

from unlora.data import fingerprint
from unlora.evals import evaluate_all
from unlora.evals.target import TargetCheck, retain_probability
from unlora.model.guards import evaluation_is_pure, saved_equals_trained
from unlora.model.lora import describe_size
from unlora.recipes.evaluate import figures
from unlora.recipes.training_plan import StartingModel, TrainingData, TrainingPlan
from unlora.trainer import Divergence, Guards, Preemption, Trackers, UnlearningTrainer

logger = logging.getLogger("unlora.recipes.train")


@dataclass(frozen=True)
class Training:
    """A trainer with what watches over it; signals and trackers are ours while it is open."""

    plan: TrainingPlan
    data: TrainingData
    model: StartingModel
    trainer: UnlearningTrainer
    guards: Guards
    divergence: Divergence
    trackers: Trackers
    preemption: Preemption

    @classmethod
    @contextmanager
    def opened(
        cls, plan: TrainingPlan, data: TrainingData, model: StartingModel
    ) -> Iterator["Training"]:
        """Build the trainer; signals and trackers are given back at the end."""
        folder, divergence = plan.folder, Divergence(plan.config.trainer.on_divergence)
        guards = Guards(divergence)
        tracking = closing(Trackers(plan.trackers, folder, guards))
        with Preemption(str(folder), plan.resume) as preemption, tracking as trackers:
            plan.args.eval_on_start &= plan.resume is None
            trainer = UnlearningTrainer(
                model=model.network,
                args=plan.args,
                loss=plan.loss,
                parts=data.parts,
                panels=data.panels,
                plugins=plan.plugins,
                penalty=model.penalty,
                divergence=divergence,
                resumption=data.resumption,
                processing_class=model.tokenizer,
                callbacks=[guards, trackers, preemption, *_target_checks(plan, data, model)],
            )
            yield cls(plan, data, model, trainer, guards, divergence, trackers, preemption)

    def train(self) -> str | None:
        """Take all steps, and subtract the task vector where there is one; returns how."""
        self.trainer.train(resume_from_checkpoint=self.plan.resume)
        if self.model.vector is None:
            return None
        args, pad_id = self.plan.args, self.model.tokenizer.pad_token_id
        arithmetic = self.model.vector.subtract(
            self.data.parts, pad_id=pad_id, batch_size=args.train_batch_size, seed=args.seed
        )
        logger.info("%s", arithmetic)
        return arithmetic

    def save(self) -> str:
        """Write the model, and compare what is written with what was trained; returns its size."""
        network, folder = self.model.network, self.plan.folder
        self.trainer.save_model()
        self.trainer.save_state()
        self.trainer.accelerator.wait_for_everyone()  # the first process writes the model
        self.preemption.saved()
        if isinstance(network, PeftModel) and self.plan.args.should_save:
            self.guards.found("saved equals trained", saved_equals_trained(network, folder))
        size = describe_size(network, folder)
        logger.info("%s", size)
        return size

    def evaluate(self) -> dict[str, float]:
        """Evaluate the result with every suite: metric -> value."""
        with evaluation_is_pure(self.model.network):
            summary = evaluate_all(self.data.suites, self.model.network, self.plan.folder / "evals")
        if self.data.suites:
            self.guards.found("evaluation is pure", "weights, modes and random state unchanged")
        self.trackers.evaluated(summary)
        return summary

    def facts(self, arithmetic: str | None, halved: Sequence[str]) -> dict[str, Any]:
        """What the manifest says of the training.

        Args:
            arithmetic: what was done with the task vector.
            halved: where memory ran out in an evaluation.
        """
        plan, resumed = self.plan, self.data.resumption
        ran_out = {"training": self.trainer.splitter.facts, "evaluation": halved}
        return {
            "guards": self.guards.findings,
            **self.divergence.facts,
            **({"memory_ran_out": ran_out} if any(ran_out.values()) else {}),
            **({"arithmetic": arithmetic} if arithmetic else {}),
            **({"resumed": resumed.resumed} if resumed.resumed else {}),
            "seconds": round(resumed.seconds, 1),
            "lineage": str(self.model.network.lineage),
            "seed": plan.args.seed,
            "data": {part: fingerprint(rows) for part, rows in self.data.parts.rows.items()},
            "effective_batch": plan.effective_batch,
            "batch_layout": plan.batch_layout,
            "optimiser_steps": self.trainer.state.global_step,
            "training": self.trainer.state.log_history,
        }


def _target_checks(
    plan: TrainingPlan, data: TrainingData, model: StartingModel
) -> list[TrainerCallback]:
    """The check that the model knows what it is to forget, where it unlearns."""
    if plan.config.mode != "unlearn" or "forget" not in data.parts.rows:
        return []
    ids = (model.tokenizer.pad_token_id, model.tokenizer.eos_token_id)
    return [TargetCheck(data.parts.rows["forget"], *ids, retain_probability(data.suites))]


def log_summary(summary: Mapping[str, float], plan: TrainingPlan, data: TrainingData) -> None:
    """Log the figures of an evaluation, after what is wrong with them."""
    if not summary:
        return
    note, text = figures(summary, [(plan.folder / "evals", suite.kind) for suite in data.suites])
    if note:
        logger.warning("%s", note)
    logger.info("%s", text)
