"""The configs that Hydra composes; see the entry points in the package root."""
