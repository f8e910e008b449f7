"""``src/train.py`` under FSDP2 on CPUs."""

import runpy
from pathlib import Path

from fault_training import fsdp_on_cpus

if __name__ == "__main__":
    fsdp_on_cpus()
    runpy.run_path(str(Path(__file__).parents[2] / "src" / "train.py"), run_name="__main__")
