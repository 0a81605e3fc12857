"""Write the tables of the pages in docs, from the code and from what was measured.

python -m scripts.tables [--check]

A page has a place for each, between `<!-- table NAME -->` and `<!-- /table -->`.
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path

from scripts.tables import configuration, evidence, methods, precision, scale_out, smollm2

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {
    "configuration.md": configuration.tables,
    "evidence-notes.md": partial(evidence.tables, "notes"),
    "evidence-tables.md": partial(evidence.tables, "places", "sentiment", "lost", "hours"),
    "evidence-topics.md": partial(evidence.tables, "topics"),
    "methods.md": methods.tables,
    "precision.md": precision.tables,
    "reproduction-results.md": smollm2.tables,
    "scale-out.md": scale_out.tables,
    "when-exactness-matters.md": evidence.summary,
}


def written(page: str, name: str, lines: list[str]) -> str:
    """The page with a table in its place."""
    head, table, tail = f"<!-- table {name} -->\n\n", "\n".join(lines), "\n\n<!-- /table -->"
    found, count = re.subn(rf"{head}.*?<!-- /table -->", lambda match: f"{head}{table}{tail}", page, flags=re.S)
    if count != 1:
        sys.exit(f"there are {count} places {head.strip()} ... <!-- /table -->, there must be one")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the pages are what this would write")
    check = parser.parse_args().check
    for name, tables in PAGES.items():
        page = wanted = (DOCS / name).read_text(encoding="utf-8")
        for place, lines in tables().items():
            wanted = written(wanted, place, lines)
        if not check:
            (DOCS / name).write_text(wanted, encoding="utf-8")
        elif page != wanted:
            sys.exit(f"docs/{name} does not fit the code or what was measured: run python -m scripts.tables")


if __name__ == "__main__":
    main()
