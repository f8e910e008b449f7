"""Ask a model with little work: what it said of a batch, row packing, the vocabulary projection."""
