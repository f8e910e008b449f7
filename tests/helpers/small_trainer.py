"""A trainer of a tiny model on random rows, for tests of what a run does when something fails."""

from peft import LoraConfig, get_peft_model
from tiny import LORA, llama, rows, tokenizer

from unlora.data.pairs import Parts
from unlora.model.lineage import Lineage
from unlora.trainer import Plugins, UnlearningLoss, UnlearningTrainer, training_arguments

LENGTHS = {"forget": [3, 9, 1, 5, 2, 8, 4, 6] * 2, "retain": [2, 7, 5, 1, 6, 4, 8] * 3}
RETAIN = {"retain_loss_type": "NLL"}
METHODS = {
    "NPO": ("NPO", RETAIN, {}),
    "RMU": ("RMU", {"layer": 0, "retain_loss_type": "EMBED_DIFF"}, {}),
    "PDU": ("PDU", RETAIN | {"dual_warmup_epochs": 0, "dual_step_size": 0.5}, {}),
    "BLADE": ("BLADE", RETAIN | {"inner_lr": 1e-2}, {}),
    "GRU+SAM": ("NPO", RETAIN, {"GRU": {}, "SAM": {}}),
}
MORE = {
    "GradDiff": ("GradDiff", RETAIN, {}),
    "DPO": ("DPO", RETAIN, {}),
    "BalDRO": ("NPO", RETAIN, {"BalDRO": {}}),
    "Negation": ("Negation", {"alpha": 0}, {}),
}

LOSSES = {
    "finetune": ("FinetuneTrainer", {}),
    "GradAscent": ("GradAscent", {}),
    "GradDiff": ("GradDiff", {"retain_loss_type": "NLL"}),
    "GradDiff-KL": ("GradDiff", {"retain_loss_type": "KL", "alpha": 0.5}),
    "NPO": ("NPO", {"retain_loss_type": "NLL"}),
    "SimNPO": ("SimNPO", {"retain_loss_type": "NLL", "gamma": 0.125}),
    "DPO": ("DPO", {"retain_loss_type": "NLL"}),
    "IdkNLL": ("IdkNLL", {"retain_loss_type": "NLL"}),
    "UNDIAL": ("UNDIAL", {"retain_loss_type": "NLL"}),
    "CEU": ("CEU", {"ignore_first_n_answer_tokens": 1}),
    "BST": ("BST", {}),
    "JensUn": ("JensUn", {"retain_loss_type": "JSD"}),
    "FLAT": ("FLAT", {}),
}
# methods whose step is more than a sum over micro-batches, with plug-ins
SKIPS = {"ignore_first_n_answer_tokens": 1, "gamma": 100.0}  # its gradient is small
LAYOUTS = {
    "SAM": ("NPO", {"SAM": {"rho": 0.3}}, RETAIN),
    "SAM by token": ("GradDiff", {"SAM": {"rho": 0.3}}, RETAIN),
    "GRU": ("GradDiff", {"GRU": {}}, RETAIN),
    "BalDRO": ("NPO", {"BalDRO": {}}, RETAIN),
    "BalDRO by token": ("GradDiff", {"BalDRO": {}}, RETAIN),
    "BalDRO with skips": ("CEU", {"BalDRO": {}}, SKIPS),
    "BalDRO G": ("SimNPO", {"BalDRO": {"variant": "G"}}, RETAIN),
    "LoRA+": ("NPO", {"LoRAPlus": {"ratio": 4.0}}, RETAIN),
    "all three": ("UNDIAL", {"SAM": {"rho": 0.3}, "GRU": {}, "BalDRO": {}}, RETAIN),
    "PDU": ("PDU", {}, RETAIN | {"dual_warmup_epochs": 0.0, "dual_step_size": 0.5}),
    "BLADE": ("BLADE", {}, RETAIN | {"inner_lr": 0.01}),
    "BLADE and all three": ("BLADE", {"SAM": {}, "GRU": {}, "BalDRO": {}}, RETAIN),
}


def small_trainer(folder, method="NPO", *, callbacks=(), dropout=0.0, penalty=None,
                  divergence=None, parts=None, **args):  # fmt: skip
    """A trainer of one of METHODS or MORE; ``args`` are TrainingArguments."""
    handler, method_args, plugins = (METHODS | MORE)[method]
    loss = UnlearningLoss.build(handler, **method_args)
    model = get_peft_model(
        llama(), LoraConfig(**{**LORA, "lora_dropout": dropout}, task_type="CAUSAL_LM")
    )
    model.lineage = Lineage("tiny")
    if parts is None:
        data = {part: rows(LENGTHS[part], seed=i) for i, part in enumerate(loss.parts)}
        parts = Parts(data, "forget")
    defaults = {
        "learning_rate": 1e-2, "max_steps": 4, "optim": "adamw_torch", "logging_steps": 1,
        "lr_scheduler_type": "linear", "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "per_device_train_batch_size": 4,
    }  # fmt: skip
    return UnlearningTrainer(
        model=model,
        args=training_arguments(defaults | args, output_dir=str(folder)),
        loss=loss,
        parts=parts,
        plugins=Plugins.build(plugins, loss, use_lora=True),
        penalty=penalty,
        divergence=divergence,
        processing_class=tokenizer(),
        callbacks=list(callbacks),
    )


def trained(trainer):
    """The trained weights: name -> a copy."""
    named = trainer.model.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad}
