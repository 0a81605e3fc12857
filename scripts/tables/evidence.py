"""The primary tests of all settings, from evidence/*/compare.json."""

import json
import math
from pathlib import Path
from typing import Any

from fedex_lora.experiments.compare._tests import holm

RECORDS = Path(__file__).parents[2] / "evidence"
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


def tables() -> dict[str, list[str]]:
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
    return {"primary": lines}
