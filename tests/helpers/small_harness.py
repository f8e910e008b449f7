"""Two tasks of lm-evaluation-harness in the shape of WMDP, with a text of our own."""

import json
from pathlib import Path

QUESTIONS = {
    "rivers": [
        (
            f"The {n}th bridge of the town crosses",
            ["a lake", "the Varn", "a road", "nothing"],
            n % 4,
        )
        for n in range(14)
    ],
    "bakers": [(f"Loaf {n} is baked", ["at dawn", "at noon", "never"], n % 3) for n in range(5)],
}
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {rows}}}
test_split: train
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
GROUP = """group: town
task: [rivers, bakers]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


def task(name: str, rows: Path) -> str:
    return TASK.format(name=name, rows=rows)


def write_tasks(folder: Path, **other) -> Path:
    """Both tasks as YAML and JSON Lines, with other questions where they are given."""
    folder.mkdir(exist_ok=True)
    for name, questions in (QUESTIONS | other).items():
        rows = folder / f"{name}.jsonl"
        keys = ("question", "choices", "answer")
        rows.write_text("\n".join(json.dumps(dict(zip(keys, q, strict=True))) for q in questions))
        (folder / f"{name}.yaml").write_text(task(name, rows))
    return folder
