"""A picture of a report's page, for the docs: ``python benchmarks/picture.py STUDY FILE.png``.

Takes the study's own ``report.html``; without one a page is made of the runs in ``STUDY/seed*/``.
"""

import sys
import tempfile
from pathlib import Path

# which drives Chromium
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
import browser

from unlora.report import Entry, write

WIDTH, HEIGHT = 1100, 1480


def page_of(study: Path, folder: Path) -> Path:
    """The page of a study that was written before it had one."""
    if (study / "report.html").is_file():
        return study / "report.html"
    entries = []
    for run in sorted(study.glob("seed*/*/manifest.json")):
        name, seed = run.parent.name, int(run.parts[-3].removeprefix("seed"))
        role = name if name in ("target", "gold") else "method"
        entries.append(Entry(name, role, run.parent, seed))
    return write(folder, entries, title=study.name)


def main(study: str, file: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        page = page_of(Path(study), Path(home) / "page")
        with browser.Browser(Path(home) / "profile") as chromium:
            chromium.size(WIDTH, HEIGHT)
            chromium.open(page)
            chromium.picture(Path(file))
    print(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
