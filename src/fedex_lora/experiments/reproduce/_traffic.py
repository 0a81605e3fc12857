"""The layout of the table of communication: bytes of the messages that were sent."""

import math
from collections.abc import Mapping
from typing import Any

from fedex_lora.experiments.reproduce._filled import Filled, Record
from fedex_lora.experiments.reproduce._grids import NOT_RUN, Grid
from fedex_lora.experiments.reproduce._recipe import UNKNOWN
from fedex_lora.experiments.reproduce._records import SENT


def traffic(filled: Filled) -> tuple[list[dict[str, Any]], list[Grid]]:
    """Models by methods, as a share of the reference (first contrast or row): messages, and with the base once for each client."""
    labels = [row.label for row in filled.recipe.rows]
    reference = filled.recipe.contrasts[0][0] if filled.recipe.contrasts else labels[0]
    numbers, rows = [], []
    for panel in filled.shown:
        sums = {row.label: _sums(filled.runs(panel, row, filled.columns[0])) for row in filled.recipe.rows}
        numbers.append({"panel": panel.label, "bytes": sums, "paper": panel.paper, "source": panel.source})
        for name, parts in (("messages", ["down", "up"]), ("with the base once", ["down", "up", "base"])):
            totals = {label: math.fsum(found[part] for part in parts) for label, found in sums.items() if found}
            rows.append([panel.label, name, *(_share(totals, label, reference) for label in labels)])
        known = {label: f"{panel.paper[label][0]:g}" for label in panel.paper}
        rows.append([panel.label, "paper", *(known.get(label, UNKNOWN) for label in labels)])
    notes = [
        "Counted from the messages that were sent, both ways: all clients, all rounds, and the message after the last round, which brings "
        f"the final model to all clients; relative to {reference}.",
        "'With the base once' adds one download of the frozen base for each client.",
        *(f"{panel.label}: {panel.source}." for panel in filled.shown if panel.paper),
    ]
    return numbers, [Grid(filled.recipe.title, ["Model", "", *labels], rows, notes)]


def _share(totals: Mapping[str, float], label: str, reference: str) -> str:
    if label not in totals or reference not in totals:
        return NOT_RUN
    return f"{totals[label] / totals[reference]:.3f} ({totals[label] / 1e6:,.1f} MB)"


def _sums(runs: Mapping[int, Record]) -> dict[str, float] | None:
    """Bytes of the first seed of which all messages were recorded."""
    for record in runs.values():
        if final := record.get("final"):
            down, up = (math.fsum(one[name] for one in (*record["rounds"], final)) for name in SENT)
            clients = len(record["facts"]["train_rows"])
            return {"down": down, "up": up, "base": float(record["facts"]["base_bytes"] * clients), "rounds": len(record["rounds"])}
    return None
