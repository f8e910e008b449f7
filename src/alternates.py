"""Write other answers to the forget questions: ``python src/alternates.py experiment=...``."""

try:
    from unlora.cli.main import launch
    from unlora.recipes.alternate_answers import run
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error}. Use the environment that `make demo` made: . .venv/bin/activate "
        "(or install this program: pip install -e .)"
    ) from error

if __name__ == "__main__":
    launch(run, "alternates")
