"""A run folder on disk: its files, what may be shown in it, what is safe to load."""
