"""Makes the pictures of docs/reproducing.md from a finished run: ``python -m tools.docs.pictures RUN``.

The page shows those of ``scan-fast run digits``.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from scan_fast.cli import main as scan_fast
from scan_fast.runs.artifacts import CONFUSION_FIGURE
from scan_fast.runs.folder import RunFolder

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "reproducing"


def draw(run: Path, folder: Path) -> list[Path]:
    """Write confusion.png and prototypes.png of a run into a folder and return their paths."""
    finished = RunFolder.existing(run)
    finished.require(CONFUSION_FIGURE)
    folder.mkdir(parents=True, exist_ok=True)
    confusion = Path(shutil.copyfile(finished.path_of(CONFUSION_FIGURE), folder / CONFUSION_FIGURE.name))
    prototypes = folder / "prototypes.png"
    with tempfile.TemporaryDirectory() as temporary:  # a table comes with the picture, which the page does not show
        made = Path(temporary) / prototypes.name
        code = scan_fast(["evaluate", str(run), "--prototypes", str(made)])
        if code:
            raise SystemExit(code)
        shutil.copyfile(made, prototypes)
    return [confusion, prototypes]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.docs.pictures", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run folder with labels")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the pictures go")
    options = parser.parse_args()
    print(f"wrote {', '.join(str(path) for path in draw(options.run, options.folder))}")


if __name__ == "__main__":
    main()
