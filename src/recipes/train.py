"""Fine-tune or unlearn.

python src/train.py --config-name=unlearn experiment=unlearn/tofu/lora
"""

import logging
import math
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

logger = logging.getLogger("unlora.recipes.train")


def run(cfg: Any, *, evaluate: bool = True) -> dict[str, float]:
    """Train as the config says and evaluate the result.

    Args:
        evaluate: False leaves out the evaluation at the end.

    Returns:
        The summary of every evaluation suite: metric -> value.

    Raises:
        InputError: something in the config, the data or the model can be put right by its writer.
    """
    with ExitStack() as held:
        return _run(cfg, evaluate, held)


def _run(cfg: Any, evaluate: bool, held: ExitStack) -> dict[str, float]:
    from unlora.config import read
    from unlora.config.resolve import plain

    config = read(cfg)

    import torch
    from peft import PeftModel
    from transformers import set_seed

    from unlora.data import fingerprint, load_parts
    from unlora.data.chat import Chat
    from unlora.errors import InputError
    from unlora.evals import build_suites, evaluate_all
    from unlora.evals.passes.batching import halvings
    from unlora.evals.target import TargetCheck, retain_probability
    from unlora.model import as_trained, check_model, get_model, load_args, load_tokenizer
    from unlora.model.fingerprints import content_of
    from unlora.model.guards import evaluation_is_pure, saved_equals_trained
    from unlora.model.load import root_config
    from unlora.model.lora import describe_size
    from unlora.recipes import baselines
    from unlora.recipes.evaluate import figures
    from unlora.runs.run import Run, alone, full_disk_in_words
    from unlora.trainer import (
        TASK_VECTORS,
        Divergence,
        Guards,
        Plugins,
        Preemption,
        TaskVector,
        Trackers,
        UnlearningLoss,
        UnlearningTrainer,
        check_optimiser,
        checkpoint_to_resume,
        choose_best_by,
        refuse_own_model,
        resumption,
        run_settings,
        set_checkpointing,
        set_warmup,
        start_adapter,
        training_arguments,
    )
    from unlora.trainer.checkpointing import available_memory, decided, is_auto
    from unlora.trainer.memory_estimate import estimate, largest, size_of

    # everything that can be wrong without weights is found before they are loaded
    config = config.model_copy(update={"model": as_trained(config.model)})
    folder, datasets_dir = config.paths.output_dir, config.paths.datasets_dir
    template_args = config.model.template_args
    loss = UnlearningLoss.build(config.trainer.handler, **config.trainer.method_args)
    plugins = Plugins.build(config.trainer.plugins, loss, use_lora=config.model.use_lora)
    dtype = load_args(config.model)["dtype"]
    args = training_arguments(
        config.trainer.args, output_dir=folder, dtype=dtype, run_name=config.task_name
    )
    # they outlast the trainer, which would close them before the evaluation
    trackers, args.report_to = args.report_to, []
    if not evaluate and args.eval_strategy == "no" and not args.eval_on_start:
        config = config.model_copy(update={"eval": {}})
    found = baselines.find(config)
    lineage = check_model(config.model, by=(loss.handler, *config.trainer.plugins))
    if config.plan:
        return _show_first_rows(config, loss.parts, seed=args.seed)
    unchecked = config.trainer.on_change == "resume"
    resume = checkpoint_to_resume(args, lineage, unchecked=unchecked)
    held.enter_context(full_disk_in_words(folder))
    halved = held.enter_context(halvings())
    held.enter_context(alone(folder))
    record = Run(folder, plain(cfg) | {"model": dict(config.model), "data": dict(config.data)})
    refuse_own_model(folder, lineage)
    tokenizer = load_tokenizer(config.model)
    if config.trainer.needs_alternates and not config.data.get("alternate"):
        raise InputError(
            "This trainer learns other plausible answers, but data.alternate is not set. Make them "
            "with `unlora alternates`, which says how to use them. For refusals set "
            "trainer=IdkDPO or trainer=IdkNLL."
        )
    if loss.handler in TASK_VECTORS and args.load_best_model_at_end:
        raise InputError(
            f"{loss.handler} forgets when training is over; no checkpoint is the best. Leave out "
            "trainer.args.load_best_model_at_end."
        )
    needed = loss.parts
    if "retain" not in needed and (plugins.start is not None or loss.handler == "PerTA"):
        needed += ("retain",)  # they look at it once
    parts = load_parts(
        config.data,
        Chat(tokenizer, template_args),
        needed,
        seed=args.seed,
        datasets_dir=datasets_dir,
    )
    set_warmup(args, config.trainer.args, rows=len(parts))
    check_optimiser(args, rows=len(parts))
    if is_auto(config.trainer.args) and not (args.deepspeed or args.fsdp):
        rows = args.train_batch_size
        batches = {k: largest([*map(size_of, v)], rows) for k, v in parts.rows.items()}
        on, why = decided(
            batches, root_config(lineage, load_args(config.model)),
            partial(estimate, config, batches), available_memory(args.device),
        )  # fmt: skip
        set_checkpointing(args, on)
        logger.info("gradient checkpointing is %s", why)
    suites = build_suites(
        baselines.evaluated(config, found),
        tokenizer=tokenizer,
        template_args=template_args,
        datasets_dir=datasets_dir,
    )
    panels = choose_best_by(args, config.trainer.args, suites)
    settings = run_settings(
        config.model_dump(include={"model", "trainer", "eval"}), args, parts,
        content_of(load_args(config.model), lineage),
    )  # fmt: skip
    resumed = resumption(resume, settings, config.trainer.on_change)

    if not config.model.use_lora and dtype in (torch.bfloat16, torch.float16):
        logger.warning(
            "All weights are trained in %s: steps of a small learning rate are lost in rounding. "
            "Set model.model_args.torch_dtype=float32.",
            dtype,
        )
    layout = {
        "rows": args.train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "processes": args.world_size,
    }
    logger.info(
        "a step has %d rows: %d at once, in %d micro-batches, by %d processes",
        math.prod(layout.values()), *layout.values(),
    )  # fmt: skip
    set_seed(args.seed)
    model, tokenizer = get_model(config.model)
    penalty, vector = None, None
    if loss.forget is not None and loss.handler in TASK_VECTORS:
        vector = TaskVector(model, loss.forget)
    if plugins.start is not None:
        penalty = start_adapter(
            model, plugins.start, parts, pad_id=tokenizer.pad_token_id,
            batch_size=args.train_batch_size, seed=args.seed,
        )  # fmt: skip
    checks = []
    if config.mode == "unlearn" and "forget" in parts.rows:
        forget, ids = parts.rows["forget"], (tokenizer.pad_token_id, tokenizer.eos_token_id)
        checks.append(TargetCheck(forget, *ids, retain_probability(suites)))
    divergence = Divergence(config.trainer.on_divergence)
    guards = Guards(divergence)
    tracking = closing(Trackers(trackers, folder, guards))
    with Preemption(folder, resume) as preemption, tracking as tracked:
        trainer = UnlearningTrainer(
            model=model,
            args=args,
            loss=loss,
            parts=parts,
            panels=panels,
            plugins=plugins,
            penalty=penalty,
            divergence=divergence,
            resumption=resumed,
            processing_class=tokenizer,
            callbacks=[guards, tracked, preemption, *checks],
        )
        record.begin(fresh=resume is None)
        args.eval_on_start &= resume is None
        trainer.train(resume_from_checkpoint=resume)
        arithmetic = None
        if vector is not None:
            arithmetic = vector.subtract(
                parts, pad_id=tokenizer.pad_token_id, batch_size=args.train_batch_size,
                seed=args.seed,
            )  # fmt: skip
            logger.info("%s", arithmetic)
        trainer.save_model()
        trainer.save_state()
        trainer.accelerator.wait_for_everyone()  # until the first process has written the model
        preemption.saved()
        if isinstance(model, PeftModel) and args.should_save:
            guards.found("saved equals trained", saved_equals_trained(model, Path(folder)))
        size = describe_size(model, Path(folder))
        logger.info("%s", size)

        summary: dict[str, float] = {}
        if evaluate:
            with evaluation_is_pure(model):
                summary = evaluate_all(suites, model, Path(folder) / "evals")
            if suites:
                guards.found("evaluation is pure", "weights, modes and random state unchanged")
            tracked.evaluated(summary)
    ran_out = {"training": trainer.pieces.facts, "evaluation": halved}
    record.finish(
        guards=guards.findings,
        **divergence.facts,
        **({"memory_ran_out": ran_out} if any(ran_out.values()) else {}),
        **({"arithmetic": arithmetic} if arithmetic else {}),
        **({"resumed": resumed.resumed} if resumed.resumed else {}),
        seconds=round(resumed.seconds, 1),
        lineage=str(model.lineage),
        size=size,
        seed=args.seed,
        data={part: fingerprint(rows) for part, rows in parts.rows.items()},
        effective_batch=math.prod(layout.values()),
        batch_layout=layout,
        optimiser_steps=trainer.state.global_step,
        training=trainer.state.log_history,
        summary=summary,
    )
    if summary:
        note, text = figures(summary, [(Path(folder) / "evals", suite.kind) for suite in suites])
        if note:
            logger.warning("%s", note)
        logger.info("%s", text)
    logger.info("finished: %s", folder)
    if evaluate:
        logger.info("next: %s", next_command(config.mode, folder))
    return summary


def next_command(mode: str, folder: str) -> str:
    """What one would do with a run that is finished."""
    if mode == "finetune":
        own = "experiment=unlearn/own/lora data.forget=FILE data.retain=FILE trainer=NPO"
        return f"unlora chat {folder}, or: unlora unlearn model={folder} {own}"
    return f"unlora report {folder}, unlora chat {folder}, or: unlora export {folder} --merged"


def _show_first_rows(config: Any, needed: tuple[str, ...], *, seed: int) -> dict[str, float]:
    """Print how many rows each part of the data has, and the first of them as tokens."""
    from unlora.data import load_parts
    from unlora.data.chat import Chat
    from unlora.data.first_row import as_lines, pieces
    from unlora.model import load_tokenizer
    from unlora.runs.run import is_main_process

    tokenizer = load_tokenizer(config.model)
    chat, folder = Chat(tokenizer, config.model.template_args), config.paths.datasets_dir
    parts = load_parts(config.data, chat, needed, seed=seed, datasets_dir=folder)
    for name, rows in parts.rows.items():
        named = "train" if name == "retain" and not config.data.get("retain") else name
        if is_main_process():
            print(as_lines(f"data.{named} ({len(rows)} rows)", pieces(tokenizer, rows[0])))
    return {}
