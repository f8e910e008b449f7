"""Plan the approximate route: unlearn the rows on top of the model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf

from unlora.cli.compose import composed
from unlora.config.resolve import plain
from unlora.deletion.check_price import checking_rows
from unlora.deletion.history import LEARNT, PastRun, SeenBy, peak_memory
from unlora.deletion.order import Order
from unlora.deletion.request_rows import DataSet, read_request
from unlora.errors import InputError
from unlora.studies.dry_run import num_steps
from unlora.trainer import Plugins, UnlearningLoss

EXPERIMENT = "experiment=unlearn/request/lora"
LAYOUT = ("per_device_train_batch_size", "gradient_accumulation_steps")
FORWARD = 1 / 3  # of a forward and backward pass
RETAIN_ROWS = 200  # by which an audit tells what is left of the rest


@dataclass(frozen=True)
class ApproximateRoute:
    """Unlearn the rows on top of the model.

    Attributes:
        overrides: of the config ``unlearn``, as a user types them.
        params: key of that config -> value, beneath the user's.
        like: the run whose settings it takes over.
        retain: what is to be kept, as it was trained on.
        training_seconds: None where the run does not say how long it took.
    """

    method: str
    overrides: tuple[str, ...]
    params: Mapping[str, Any]
    like: PastRun
    retain: tuple[DataSet, ...]
    steps: int
    training_seconds: float | None
    checking_seconds: float | None

    @property
    def seconds(self) -> float | None:
        """Of training, dial and audit."""
        if self.training_seconds is None or self.checking_seconds is None:
            return None
        return self.training_seconds + self.checking_seconds

    @property
    def memory(self) -> int | None:
        """Bytes at the peak of the run whose settings it takes over."""
        return peak_memory([self.like])


def approximate_route(
    order: Order,
    request: DataSet,
    num_rows: int,
    seen: Sequence[SeenBy],
    earlier: Sequence[Sequence[SeenBy]],
) -> ApproximateRoute:
    """What would be unlearned on top.

    Args:
        seen: of every run of the lineage, the rows of this request.
        earlier: the same for each earlier request.

    Raises:
        InputError: there is no such method, nothing is left to retain, or a word is wrong.
    """
    like = _like(seen)
    retain = tuple(_retain(order, like, seen, earlier))
    overrides = (EXPERIMENT, f"trainer={order.method}", *order.training_words)
    cfg = composed("unlearn", overrides)
    typed = {word.lstrip("+").partition("=")[0] for word in order.training_words}
    taken_over = {key: value for key, value in _as_trained(like).items() if key not in typed}
    params = {**_data(request, retain, like), **taken_over}
    args = {**cfg.trainer.args, **_args_of(params)}
    loss = UnlearningLoss.build(cfg.trainer.handler, **plain(cfg.trainer.method_args))
    Plugins.build(plain(cfg.trainer.get("plugins") or {}), loss, use_lora=cfg.model.use_lora)
    if "retain" in loss.parts and not retain:
        raise InputError(
            "No retain rows are left: the request holds all that the model was trained on. Give "
            "rows that must stay: --retain FILE"
        )
    steps, price = num_steps(args, num_rows), like.seconds_per_row
    attacks: Any = OmegaConf.to_container(composed("audit", order.audit_words).audit)
    checking = checking_rows(attacks, order.dial, num_rows, RETAIN_ROWS if retain else 0)
    rows = _trained_rows(loss, args, steps, num_rows)
    return ApproximateRoute(
        order.method, overrides, params, like, retain, steps,
        price and price * rows, price and price * checking,
    )  # fmt: skip


def _data(request: DataSet, retain: Sequence[DataSet], like: PastRun) -> dict[str, Any]:
    """The parts of the config's section ``data``."""
    args = like.sets[0].declared["args"] if like.sets else {}
    limit = {key: value for key, value in args.items() if key == "max_length"}
    forget = {**request.declared, "args": {**limit, **request.declared["args"]}}
    sets = {f"retain{number or ''}": data_set.declared for number, data_set in enumerate(retain)}
    return {"data.forget": {"request": forget}, "data.retain": sets or None}


def _trained_rows(loss: UnlearningLoss, args: Mapping[str, Any], steps: int, rows: int) -> float:
    """So many passes of a row, forward and backward."""
    epochs = float(args.get("num_train_epochs", 3))
    if args.get("max_steps", -1) > 0:
        one_epoch = {**args, "max_steps": -1, "num_train_epochs": 1}
        epochs = steps / max(1, num_steps(one_epoch, rows))
    policy = len([view for view in loss.views if view.startswith("policy_")])
    return rows * (policy * epochs + len(loss.asked_of_reference()) * FORWARD)


def _like(seen: Sequence[SeenBy]) -> PastRun:
    """The last fine-tuning that saw the rows; without one, the last fine-tuning, or training."""
    tuned = [rows for rows in seen if rows.run.config.get("mode") == "finetune"]
    of_rows = [rows for rows in tuned if rows.learnt]
    return (of_rows or tuned or list(seen))[-1].run


def _retain(
    order: Order, run: PastRun, seen: Sequence[SeenBy], earlier: Sequence[Sequence[SeenBy]]
) -> Iterator[DataSet]:
    """The rows of a file, or what a run was taught, without the rows of all requests.

    Raises:
        InputError: they cannot be read.
    """
    if order.retain:
        yield replace(read_request(order.retain, {})[0], part="retain", name="retain")
        return
    number = [rows.run for rows in seen].index(run)
    away = [seen[number], *(others[number] for others in earlier)]
    if unreadable := seen[number].unreadable:
        raise InputError(
            f"The data of {str(run.folder)!r} cannot be read: {unreadable} So what is to be kept "
            "is not known. Put the data back, or give rows that must stay: --retain FILE"
        )
    for data_set in run.sets:
        if data_set.part in LEARNT and data_set.part != "alternate":
            kinds = [kind for rows in away for kind in (rows.exact, rows.near)]
            numbers = {n for kind in kinds for n in kind.get((data_set.part, data_set.name), ())}
            if len(numbers) < len(data_set.numbered()):
                yield replace(data_set.without_rows(sorted(numbers)), part="retain")


def _as_trained(run: PastRun) -> dict[str, Any]:
    """What an unlearning takes over of the run that saw the rows."""
    args, model = run.config["trainer"]["args"], run.config["model"]
    params = {f"trainer.args.{key}": args[key] for key in LAYOUT if key in args}
    if run.config.get("global_batch_size"):
        params["global_batch_size"] = run.config["global_batch_size"]
    if model.get("use_lora"):
        params |= {f"model.lora_config.{key}": v for key, v in model["lora_config"].items()}
        if "learning_rate" in args:
            params["trainer.args.learning_rate"] = args["learning_rate"] / 2
    if folder := (run.config.get("paths") or {}).get("datasets_dir"):
        params["paths.datasets_dir"] = folder
    for key in ("gradient_checkpointing", "weight_decay"):
        if key in args:
            params[f"trainer.args.{key}"] = args[key]
    return params


def _args_of(params: Mapping[str, Any]) -> dict[str, Any]:
    start = "trainer.args."
    return {key.removeprefix(start): v for key, v in params.items() if key.startswith(start)}
