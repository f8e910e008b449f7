"""Write the model card of an exported model, with huggingface_hub's own classes."""

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from unlora.model.lineage import Lineage
from unlora.recipes.serve_guard import Figures
from unlora.results.audit_log import AuditLog

RELATIONS = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}
LIBRARIES = {"adapter": "peft", "merged": "transformers", "gguf": "llama.cpp"}
TEXT = """
# {title}

{what} It was {made}, with unlora.

| | |
|---|---|
{figures}
| lost in this form | {lost} |

## Does it hold?

{verdict}

## Limits

- What was measured are probabilities of known answers, under the attacks that are named above. It
  is no proof that nothing is left.
- Rounding to fewer bits, or training on, can bring back what was to be forgotten: ask the model as
  it will be served.
- What the root model knew before it was fine-tuned was touched only where the rows say it, too.
"""


def model_card(
    lineage: Lineage, form: str, lost: str, figures: Figures, audit: AuditLog | None
) -> str:
    """The text of a model card, its metadata first; nothing of the rows is in it.

    Args:
        form: ``adapter``, ``merged`` or ``gguf``.
        lost: by the form, for people.
    """
    numbers = _numbers(figures, audit)
    rows = "the run's own rows (not published)"
    results = [
        EvalResult(
            task_type="text-generation", dataset_type="private", dataset_name=rows,
            metric_type=name.lower().replace(" ", "_"), metric_name=name, metric_value=value,
        )
        for name, value in numbers.items()
    ]  # fmt: skip
    forgot = figures.forget is not None
    title = f"{'An unlearned' if forgot else 'A fine-tuned'} model ({form})"
    data = ModelCardData(
        base_model=None if lineage.local_root else lineage.root,
        base_model_relation=None if lineage.local_root else RELATIONS[form],
        library_name=LIBRARIES[form],
        pipeline_tag="text-generation",
        tags=[*(["unlearning"] if forgot else []), "unlora", "lora"],
        model_name=title if results else None,
        eval_results=results or None,
    )
    root = "a local model" if lineage.local_root else f"`{lineage.root}`"
    content = TEXT.format(
        title=title,
        made="made to forget rows that are not shown here" if forgot else "fine-tuned",
        what=f"One LoRA adapter on {root}." if form == "adapter" else
        f"{root[0].upper()}{root[1:]} with LoRA adapters in its weights, in bfloat16.",
        figures="\n".join(f"| {name} | {value:.3f} |" for name, value in numbers.items()),
        lost=lost,
        verdict=audit.sentence if audit else "It was not audited: nobody attacked it.",
    )  # fmt: skip
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{content}"))


def _numbers(figures: Figures, audit: AuditLog | None) -> dict[str, float]:
    plain, held = ((audit.plain or {}), (audit.held or {})) if audit else ({}, {})
    numbers: dict[str, float | None] = {
        "forget probability": figures.forget,
        "retain probability": figures.retain,
        "plain residual": plain.get("residual"),
        "residual under the worst attack": held.get("value"),
    }
    return {name: round(value, 4) for name, value in numbers.items() if value is not None}
