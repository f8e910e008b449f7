"""Say of each of Hugging Face's TrainingArguments what it does here.

Names of several versions of transformers stand beside each other.
"""

from collections.abc import Mapping
from typing import Any

# the result of a training depends on them: they must not change where a run is resumed
DECIDES = (
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "tf32", "seed", "data_seed",
    "dataloader_drop_last", "load_best_model_at_end", "use_liger_kernel", "liger_kernel_config",
    "adafactor", "fp16_opt_level", "half_precision_backend", "fp16_backend",
)  # fmt: skip
# what is kept, shown or in memory, where and how fast
FREE = (
    "per_device_train_batch_size", "gradient_accumulation_steps",  # their product counts
    "per_gpu_train_batch_size", "per_device_eval_batch_size", "per_gpu_eval_batch_size",
    "activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "torch_empty_cache_steps", "use_cpu", "no_cuda",
    "use_mps_device", "full_determinism", "dataloader_pin_memory", "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout",
    "local_rank", "log_level", "log_level_replica", "log_on_each_node", "logging_first_step",
    "logging_steps", "logging_strategy", "disable_tqdm", "report_to", "run_name", "project",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "skip_memory_metrics",
    "debug", "torch_compile", "torch_compile_backend", "torch_compile_mode", "torchdynamo",
    "save_strategy", "save_steps", "save_total_limit", "save_only_model",
    "save_on_each_node", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id",
    "hub_strategy", "hub_always_push", "hub_revision", "push_to_hub_model_id",
    "push_to_hub_organization", "push_to_hub_token", "resume_from_checkpoint",
    # they count where the best checkpoint is kept
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "metric_for_best_model",
    "greater_is_better",
    # the launcher's, as a rule; what they split is checked by itself
    "fsdp", "fsdp_config", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap", "deepspeed",
    "accelerator_config", "ray_scope", "tpu_num_cores", "tpu_metrics_debug", "mp_parameters",
)  # fmt: skip
# accepted, as configs of others set them, and without effect
IGNORED = (
    "logging_dir", "overwrite_output_dir", "save_safetensors", "do_train", "do_eval", "do_predict",
    # rows are encoded before; a worker would end with a SIGTERM to all, ahead of the checkpoint
    "dataloader_num_workers", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order",
    "enable_jit_checkpoint",  # SIGTERM has a checkpoint written in any case
    "auto_find_batch_size",  # micro-batches are halved where memory runs out
    "ignore_data_skip",  # rows are known by their step: nothing is read to get there
    "restore_callback_states_from_checkpoint", "average_tokens_across_devices", "use_cache",
    "logging_nan_inf_filter", "include_num_input_tokens_seen",
    "include_tokens_per_second",
    # of an evaluation that Trainer would make; ours goes by the suites
    "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object",
    "eval_accumulation_steps", "include_for_metrics", "include_inputs_for_metrics",
    "batch_eval_metrics", "label_names", "length_column_name", "past_index", "jit_mode_eval",
    "use_legacy_prediction_loop",
)  # fmt: skip
OURS = ("output_dir", "warmup_epochs", "warmup_ratio", "remove_unused_columns")
# what would train something else than was asked for: the only values that are accepted, and why
ONLY: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0,), "it has no effect on these objectives"),
    "neftune_noise_alpha": ((None, 0), "its noise depends on how rows are batched"),
    "train_sampling_strategy": (
        ("random",), "which forget row meets which retain row is fixed by seed and epoch"
    ),
    "group_by_length": ((False,), "which forget row meets which retain row is fixed by seed"),
    "bf16_full_eval": ((False,), "models are evaluated in the dtype of their weights"),
    "fp16_full_eval": ((False,), "models are evaluated in the dtype of their weights"),
    "parallelism_config": ((None,), "it is an object of accelerate, which no config can hold"),
}  # fmt: skip
