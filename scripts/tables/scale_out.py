"""Bytes, server time and memory by clients, from benchmarks/results/scale_out.json."""

import json
from pathlib import Path
from typing import Any

MEASURED = Path(__file__).parents[2] / "benchmarks" / "results" / "scale_out.json"
UNITS = {"years": 365 * 86400, "days": 86400, "h": 3600, "min": 60}


def size(count: float) -> str:
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def duration(seconds: float) -> str:
    """Two digits, in the largest unit of which there are two."""
    unit, length = next(((unit, length) for unit, length in UNITS.items() if seconds >= 2 * length), ("s", 1))
    return f"{float(f'{seconds / length:.2g}'):,g} {unit}"


def wire(report: dict[str, Any]) -> list[str]:
    lines = ["| messages | clients | to a client | from a client | headers of both | over the floor | over the paper's |", "|---" * 7 + "|"]
    for name in ("fedex", "fedit"):
        for clients, row in report["wire"][name].items():
            k, unit = int(clients), row["up"]  # r N
            floor = unit * {"fedex": k, "fedit": 1}[name]
            cells = [f"{row['down']:,.0f}", f"{row['up']:,.0f}", f"{row['headers']:,.0f}", f"{row['down'] / floor:.3f}"]
            lines.append(f"| {name} | {k} | {' | '.join(cells)} | {row['down'] / (unit * (k + 1)):.3f} |")
    return lines


def methods(model: dict[str, Any]) -> list[str]:
    clients = [row["clients"] for row in model["methods"]["fedex"]]
    lines = [f"| method | up | {' | '.join(f'{k:,} clients' for k in clients)} | check |", "|---" * (len(clients) + 3) + "|"]
    for name, rows in model["methods"].items():
        cells = [
            f"{size(row['down_bytes'])}, {duration(row['decoding_seconds'] + row['aggregation_seconds'])}, {size(row['memory_bytes'])}"
            for row in rows
        ]
        lines.append(f"| {name} | {size(rows[0]['up_bytes'])} | {' | '.join(cells)} | {model['fits'][name]['check']:.2f} |")
    return lines


def trees(report: dict[str, Any]) -> list[str]:
    parts = {"into the root": "in_bytes", "out of the root": "out_bytes", "time": "seconds", "memory of the root": "memory_bytes"}
    lines = [f"| model | clients | servers (levels) | {' | '.join(parts)} |", "|---" * (len(parts) + 3) + "|"]
    for title, model in report["models"].items():
        for row in model["trees"][1:]:
            cells = [
                " → ".join((duration if key == "seconds" else size)(row[which][key]) for which in ("flat", "tree"))
                for key in parts.values()
            ]
            lines.append(f"| {title} | {row['clients']:,} | {row['servers']:,} ({row['levels']}) | {' | '.join(cells)} |")
    return lines


def tables() -> dict[str, list[str]]:
    report = json.loads(MEASURED.read_text(encoding="utf-8"))
    found = {"wire": wire(report), "tree": trees(report)}
    return found | {title.split("-")[0].lower(): methods(model) for title, model in report["models"].items()}
