"""Launch stages through Hydra's launchers: this process, joblib, submitit (Slurm), Ray."""

import copy
import gc
import json
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

from omegaconf import OmegaConf, open_dict

from unlora.cli.command_words import as_command
from unlora.cli.overrides import quoted
from unlora.errors import InputError
from unlora.studies.stage_run import Record, do
from unlora.studies.stages import Stage

Launch = Callable[[Sequence[tuple[Stage, Record]]], list[str | None]]


def launcher(cfg: Any, workers: int) -> Launch:
    """A function that does stages side by side and returns what went wrong in each.

    Args:
        cfg: the composed config of the study, under Hydra.
        workers: how many processes, where the launcher can be told.
    """
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext

    hydra: Any = GlobalHydra.instance().hydra
    context = HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks())
    master = copy.deepcopy(cfg)
    with open_dict(master):
        master.hydra = copy.deepcopy(HydraConfig.get())
        OmegaConf.set_readonly(master.hydra, False)
    logging.getLogger("hydra_plugins").setLevel(logging.WARNING)  # they tell every job
    typed = list(master.hydra.overrides.task)
    started = 0

    def launch(stages: Sequence[tuple[Stage, Record]]) -> list[str | None]:
        nonlocal started
        overrides = []
        for stage, record in stages:
            record.write(stage, state="waiting", key=record.read().get("key"))
            overrides.append([*typed, f"++stage={quoted(str(record.file.resolve()))}"])
        if "n_jobs" in master.hydra.launcher:  # of joblib; one job needs no other process
            master.hydra.launcher.n_jobs = min(workers, len(stages))
        plugin = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=job, config=master
        )
        results = plugin.launch(overrides, initial_job_idx=started)
        started += len(stages)
        return [result.return_value for result in results]

    return launch


def job(cfg: Any) -> str | None:
    """Do the stage whose record the config names; what a launcher runs, wherever that is.

    Returns:
        What went wrong, in words.
    """
    _end_with_study()
    _limit_threads(int(cfg.workers))
    record = Record(Path(cfg.stage))
    try:
        stage = Stage.from_dict(json.loads(record.file.read_text("utf-8"))["stage"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"stage is {cfg.stage!r}, which is no record of a stage.") from error
    try:
        with as_command(["unlora", "study", *_asked()]):
            return do(stage, record)
    finally:
        _free_memory()


@cache
def _end_with_study() -> None:
    """End this process, where joblib has started it, soon after the one that has.

    A study that is killed cannot tell its workers, which would keep their memory and wait for ever.
    It may be gone while a worker still imports what its first stage needs: which process it was is
    what the worker was told, not who its parent is by now.
    """
    study = multiprocessing.parent_process()
    if study is not None:
        Thread(target=_watch, args=(study.pid,), daemon=True).start()


def _watch(study: int | None) -> None:
    while os.getppid() == study:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)  # a training writes a checkpoint before it ends
    while callable(signal.getsignal(signal.SIGTERM)):  # as long as it writes; some ignore it
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _asked() -> list[str]:
    """The overrides that the study was started with."""
    from hydra.core.hydra_config import HydraConfig

    return [word for word in HydraConfig.get().overrides.task if not word.startswith("++stage=")]


def _free_memory() -> None:
    """The process may do another stage."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _limit_threads(workers: int) -> None:
    import torch

    share = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(min(share, torch.get_num_threads()))  # OMP_NUM_THREADS may say fewer
