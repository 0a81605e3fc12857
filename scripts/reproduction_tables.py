"""Write the tables in docs/reproduction.md from the records in docs/results/runs, and the tables of each target beside them.

python scripts/reproduction_tables.py [--check]

Nothing is run. A table stands between `<!-- TARGET SCALE -->` and `<!-- / -->`.
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

from fedex_lora.experiments.reproduce import reproduce

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "reproduction.md", ROOT / "docs" / "results"
MARKED = re.compile(r"(<!-- (\w+) (\w+) -->\n).*?(<!-- / -->)", flags=re.S)


def filled(page: str, results: Path) -> str:
    """The page with its tables made from the records in `results`."""

    def table(match: re.Match[str]) -> str:
        reproduce(match[2], match[3], results, run=False)
        return f"{match[1]}\n{(results / match[3] / f'{match[2]}.md').read_text(encoding='utf-8')}\n{match[4]}"

    return MARKED.sub(table, page)


def main() -> None:
    """Write the page, or check that it is what the records say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    page = PAGE.read_text(encoding="utf-8")
    if not parser.parse_args().check:
        PAGE.write_text(filled(page, RESULTS), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as copy:
        shutil.copytree(RESULTS / "runs", Path(copy) / "runs")
        if filled(page, Path(copy)) != page:
            sys.exit("docs/reproduction.md does not fit the records: run python scripts/reproduction_tables.py")


if __name__ == "__main__":
    main()
