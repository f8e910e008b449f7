"""Run a model with little work: forward passes, row packing, the LM head, dropout."""

IGNORE_INDEX = -100  # the label of a token that is not scored, as transformers has it
