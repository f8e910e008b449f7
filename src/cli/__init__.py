"""The command ``unlora``: what is typed, composed, said and shown in a terminal."""
