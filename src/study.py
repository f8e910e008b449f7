"""Run a study: ``python src/study.py --config-name=study experiment=study/pocket/lora``."""

try:
    from unlora.cli.main import launch
    from unlora.studies.run_study import run
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error}. Use the environment that `make demo` made: . .venv/bin/activate "
        "(or install this program: pip install -e .)"
    ) from error

if __name__ == "__main__":
    launch(run, "study")
