"""Write the table of primary tests into docs/when-exactness-matters.md, from evidence/*/compare.json.

python scripts/evidence_table.py [--check]
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from fedex_lora.experiments.compare._tests import holm

ROOT = Path(__file__).parent.parent
PAGE, RECORDS = ROOT / "docs" / "when-exactness-matters.md", ROOT / "evidence"
SETTINGS = {"notes": "the notes", "topics": "topics", "places": "places", "sentiment": "sentiment"}
HEAD = ["setting", "centralised", "FedIT", "primary test", "difference", "seeds", "p", "p, Holm", ""]


def found(name: str) -> dict[str, Any] | None:
    """A setting's result; None: it has not ended."""
    path = RECORDS / name / "compare.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def primary(result: dict[str, Any]) -> dict[str, Any]:
    return next(test for test in result["tests"] if test["primary"])


def answer(test: dict[str, Any], p: float, greater: bool) -> str:
    """What a corrected p says."""
    if not p < 0.05:
        return "not shown"
    if test["kind"] == "equivalence":
        return "holds"
    return "holds" if (test["mean"] > 0) == greater else "refuted"


def table() -> str:
    """A row a setting. One that has not ended counts in Holm's correction as a test that failed."""
    results = {name: found(name) for name in SETTINGS}
    ps = {name: primary(result)["p"] if result else math.nan for name, result in results.items()}
    corrected = dict(zip(ps, holm(list(ps.values())), strict=True))
    lines = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    for name, result in results.items():
        if result is None:
            lines.append(f"| {SETTINGS[name]} | not run" + " |" * (len(HEAD) - 1))
            continue
        test, ends = primary(result), {method["name"]: method["mean"] for method in result["methods"]}
        cells = [
            SETTINGS[name],
            f"{ends['centralised']:.3f}",
            f"{ends[result['reference']]:.3f}",
            test["name"],
            f"{test['mean']:+.3f} ± {test['half_width']:.3f}",
            str(test["n"]),
            f"{test['p']:.2g}",
            f"{corrected[name]:.2g}",
            answer(test, corrected[name], result["greater_is_better"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is what this would write")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    wanted = re.sub(r"(<!-- primary -->\n).*(<!-- /primary -->)", lambda match: f"{match[1]}{table()}\n{match[2]}", page, flags=re.S)
    if not check:
        PAGE.write_text(wanted, encoding="utf-8")
    elif page != wanted:
        sys.exit("docs/when-exactness-matters.md does not fit evidence/*/compare.json: run python scripts/evidence_table.py")


if __name__ == "__main__":
    main()
