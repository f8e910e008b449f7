"""Run a model with little work: forward passes, row packing, the LM head, dropout."""
