"""Short trainings by one of several processes: ``fault_training.py FOLDER CASES``.

``CASES`` is JSON, name -> settings: ``method`` of ``small_trainer``, ``rows`` of the forget part,
``deepspeed`` or other TrainingArguments. Each leaves its adapter in ``FOLDER/name``, and for every
process the rows of each step, in ``rows-<rank>.json``, and the steps that it left out. In a test it
is a function.
"""

import json
import os
import sys
from pathlib import Path

SEEN = "rows-{}.json"
LEFT_OUT = "left-out-{}.json"


def train(folder: Path, method="NPO", rows=11, double=False, infinite=0, **args):
    """Train in this process, alone or with others; returns the trainer.

    At the step ``infinite`` the first process has losses that are, and every process skips it.
    """
    import tiny
    from small_trainer import LENGTHS, small_trainer

    from unlora.data.pairs import Parts
    from unlora.trainer import Divergence

    lengths = {"forget": LENGTHS["forget"][:rows], "retain": LENGTHS["retain"][: rows + 3]}
    if method == "DPO":
        lengths["alternate"] = LENGTHS["retain"][:rows]
    data = {part: tiny.rows(ns, seed=i) for i, (part, ns) in enumerate(lengths.items())}
    args = {"max_steps": 5, "learning_rate": 1e-3, **args}
    divergence = Divergence("skip" if infinite else "stop")
    parts = Parts(data, "forget")
    trainer = small_trainer(folder, method, parts=parts, divergence=divergence, **args)
    if double:
        trainer.model.double()
    samples, losses, seen = trainer.get_batch_samples, trainer.context.losses.compute, []

    def noted(*args):
        batches, totals = samples(*args)
        seen.append(
            {
                part: [n for batch in batches for n in batch[part]["number"].tolist() if n >= 0]
                for part in batches[0]
            }
        )
        return batches, totals

    def spoilt(*args, **kwargs):
        found = losses(*args, **kwargs)
        here = trainer.args.process_index == 0 and trainer.state.global_step + 1 == infinite
        # the gradient stays finite
        return {name: loss + float("inf") for name, loss in found.items()} if here else found

    trainer.get_batch_samples, trainer.context.losses.compute = noted, spoilt
    trainer.train()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    rank = trainer.args.process_index
    (folder / SEEN.format(rank)).write_text(json.dumps(seen))
    (folder / LEFT_OUT.format(rank)).write_text(json.dumps(divergence.left_out))
    return trainer


def fsdp_on_cpus() -> None:
    """Have accelerate shard a model over CPUs, where it would choose DDP without a word."""
    from accelerate.state import AcceleratorState, DistributedType

    made, plugins = AcceleratorState.__init__, []

    def make(self, *args, fsdp_plugin=None, **kwargs):
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        plugins.extend([fsdp_plugin] if fsdp_plugin else [])
        if plugins:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[-1]

    AcceleratorState.__init__ = make


def main(folder: str, cases: str) -> None:
    import torch
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if fsdp:
        fsdp_on_cpus()
    for name, settings in json.loads(cases).items():
        trainer = train(Path(folder) / name, **settings)
        assert all(isinstance(p, DTensor) == fsdp for p in trainer.model.parameters())
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))
    main(*sys.argv[1:])
