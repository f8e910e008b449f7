"""Handle what a terminal sees: words typed, help, messages, commands that are no runs."""
