"""unlora: LoRA-first unlearning for language models."""
