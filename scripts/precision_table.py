"""Write the table of measured output errors into docs/precision.md, from benchmarks/results/precision.json.

python scripts/precision_table.py [--check]
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE, MEASURED = ROOT / "docs" / "precision.md", ROOT / "benchmarks" / "results" / "precision.json"
COLUMNS = {
    "side, own": "side",
    "fold, own": "fold",
    "no D, own": "floor",
    "side, missing": "side_missing",
    "fold, missing": "fold_missing",
    "side, float32": "side_float32",
    "fold, float32": "fold_float32",
    "size of D": "delta_size",
}


def table() -> str:
    lines = [f"| model | method | base | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 3) + "|"]
    for row in json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]:
        base = row["dtype"] if row["quantization"] == "none" else f"{row['quantization']}, {row['dtype']}"
        lines.append(f"| {row['model']} | {row['method']} | {base} | {' | '.join(f'{row[key]:.1e}' for key in COLUMNS.values())} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is what this would write")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    wanted = re.sub(r"(<!-- precision -->\n).*(<!-- /precision -->)", lambda match: f"{match[1]}{table()}\n{match[2]}", page, flags=re.S)
    if not check:
        PAGE.write_text(wanted, encoding="utf-8")
    elif page != wanted:
        sys.exit("docs/precision.md does not fit benchmarks/results/precision.json: run python scripts/precision_table.py")


if __name__ == "__main__":
    main()
