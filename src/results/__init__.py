"""What an evaluation found: logs, and when a model is called collapsed."""
