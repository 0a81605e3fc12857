"""Write the tables and figures in results/SCALE from the records in results/runs.

python scripts/reproduction_tables.py [--check]

Nothing is run. A target is written at every scale for which `results/SCALE/TARGET.md` is there already.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from fedex_lora.experiments.reproduce import reproduce

RESULTS = Path(__file__).parent.parent / "results"


def targets() -> list[tuple[str, str]]:
    """(target, scale) of every table that is kept."""
    return [(path.stem, path.parent.name) for path in sorted(RESULTS.glob("*/*.md"))]


def stale(copy: Path) -> list[str]:
    """Tables that are not what the records say; `copy` is an empty folder to make them in."""
    shutil.copytree(RESULTS / "runs", copy / "runs")
    found = []
    for target, scale in targets():
        reproduce(target, scale, copy, run=False)
        for name in (f"{scale}/{target}.md", f"{scale}/{target}.tex"):
            if (copy / name).read_text(encoding="utf-8") != (RESULTS / name).read_text(encoding="utf-8"):
                found.append(name)
    return found


def main() -> None:
    """Write the tables, or check that they are what the records say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        for target, scale in targets():
            reproduce(target, scale, RESULTS, run=False)
        return
    with tempfile.TemporaryDirectory() as copy:
        if names := stale(Path(copy)):
            sys.exit(f"results/{names[0]} does not fit the records: run python scripts/reproduction_tables.py")


if __name__ == "__main__":
    main()
