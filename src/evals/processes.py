"""Share one evaluation among the processes that torchrun has started."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes of this run, if there are several and nobody has done so."""
    several = int(os.environ.get("WORLD_SIZE") or 1) > 1
    if not several or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        dist.barrier()  # nobody leaves before the log is written
    finally:
        dist.destroy_process_group()
