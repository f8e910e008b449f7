"""Evaluate a model: ``python src/eval.py experiment=eval/tofu/default task_name=mine``."""

try:
    from unlora.cli.main import launch
    from unlora.recipes.evaluate import run
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error}. Use the environment that `make demo` made: . .venv/bin/activate "
        "(or install this program: pip install -e .)"
    ) from error

if __name__ == "__main__":
    launch(run, "eval")
