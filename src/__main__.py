"""``python -m unlora`` is the command ``unlora``."""

from unlora.cli.main import main

if __name__ == "__main__":
    main()
