"""Read and write what an evaluation found, and judge when a model is collapsed."""
