"""Measured output errors by precision, from benchmarks/results/precision.json."""

import json
from pathlib import Path

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "precision.json"
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


def tables() -> dict[str, list[str]]:
    lines = [f"| model | method | base | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 3) + "|"]
    for row in json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]:
        base = row["dtype"] if row["quantization"] == "none" else f"{row['quantization']}, {row['dtype']}"
        lines.append(f"| {row['model']} | {row['method']} | {base} | {' | '.join(f'{row[key]:.1e}' for key in COLUMNS.values())} |")
    return {"precision": lines}
