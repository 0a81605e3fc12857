"""The layouts of tables: scores, differences and what the runs measured of themselves; and bytes of the messages that were sent."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedex_lora.exactness.algebra import worst
from fedex_lora.experiments.compare import interval
from fedex_lora.experiments.reproduce._filled import Filled
from fedex_lora.experiments.reproduce._recipe import NOT_PUBLISHED, Panel, Row
from fedex_lora.experiments.reproduce._records import Record
from fedex_lora.experiments.tables import NOT_RUN, TextTable, plus_minus
from fedex_lora.storage.events import Evaluated, RoundDone

Cells = Mapping[str, Mapping[str, Mapping[str, float]]]
"""row -> column -> seed -> score."""


def scores(filled: Filled) -> tuple[list[dict[str, Any]], list[TextTable]]:
    """For each panel: the scores, the differences that the recipe asks for, and an account of the runs."""
    numbers, grids = [], []
    for panel in filled.shown:
        cells = {row.label: _row(filled, panel, row) for row in filled.recipe.rows}
        differences = {f"{one} minus {other}": _contrast(cells[one], cells[other]) for one, other in filled.recipe.contrasts}
        accounts = {row.label: _account(filled, panel, row) for row in filled.recipe.rows}
        about = {"panel": panel.label, "source": panel.source, "paper": panel.paper}
        numbers.append(about | {"cells": cells, "differences": differences, "runs": accounts})
        grids.append(_score_grid(filled, panel, cells))
        grids += _difference_grid(filled, panel, differences) + _account_grid(panel, accounts)
    return numbers, grids


def _row(filled: Filled, panel: Panel, row: Row) -> dict[str, dict[str, float]]:
    """Column -> seed -> score; the average of the columns that are run at this scale, for seeds that all of them have."""
    cells = {column.label: filled.scores(panel, row, column) for column in filled.recipe.columns}
    if filled.recipe.average:
        ran = [cells[column.label] for column in filled.columns]
        seeds = [seed for seed in filled.seeds if all(seed in found for found in ran)]
        cells[filled.recipe.average] = {seed: float(np.mean([found[seed] for found in ran])) for seed in seeds}
    return {label: {str(seed): value for seed, value in found.items()} for label, found in cells.items()}


def _heads(filled: Filled) -> list[str]:
    return [column.label for column in filled.recipe.columns] + ([filled.recipe.average] if filled.recipe.average else [])


def _score_grid(filled: Filled, panel: Panel, cells: Cells) -> TextTable:
    recipe, heads = filled.recipe, _heads(filled)
    digits = {column.label: column.digits for column in recipe.columns}
    metrics = {column.label: panel.metrics.get(column.label, column.metric).rpartition(".")[2] for column in recipe.columns}
    rows = []
    for row in recipe.rows:
        ours = [mean_and_deviation(list(cells[row.label][head].values()), len(filled.seeds), digits.get(head, 2)) for head in heads]
        rows.append([row.label, filled.label, *ours])
        if panel.paper and not row.added:
            rows.append(["", "paper", *map(_known, panel.paper.get(row.label, [math.nan] * len(heads)))])
    notes = [f"Paper: {panel.source}." if panel.paper else f"The paper's numbers: {NOT_PUBLISHED}."]
    notes.append("Ours: mean ± standard deviation over the seeds, after the last round.")
    notes += filled.unanswered(panel)
    missing = [column.label for column in recipe.columns if column not in filled.columns]
    if missing and recipe.average and panel in filled.panels:
        notes.append(f"The average of ours is without {', '.join(missing)}.")
    if added := [row.label for row in recipe.rows if row.added]:
        notes.append(f"Not in the paper: {', '.join(added)}.")
    names = [f"{head} ({metrics[head]})" if metrics.get(head, head).lower() not in head.lower() else head for head in heads]
    return TextTable(f"{recipe.title}: {panel.label}", ["Method", "", *names], rows, [*notes, *filled.failures(panel)])


def _known(number: float) -> str:
    return NOT_PUBLISHED if math.isnan(number) else f"{number:g}"


def mean_and_deviation(values: Sequence[float], wanted: int, digits: int) -> str:
    """Over seeds; and how many of the wanted seeds there are, where it is not all of them.

    Example:
        >>> mean_and_deviation([60.0, 62.0], 3, 1)
        '61.0 ± 1.4 (2 of 3 seeds)'
    """
    if not values:
        return NOT_RUN
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return plus_minus(float(np.mean(values)), spread, digits) + (f" ({len(values)} of {wanted} seeds)" if len(values) < wanted else "")


def _contrast(one: Mapping[str, Mapping[str, float]], other: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Column -> mean difference of the seeds that both have, and the half-width of its 95 % interval (None for one seed)."""
    result = {}
    for label in one:
        both = [one[label][seed] - other[label][seed] for seed in one[label] if seed in other[label]]
        if both:
            mean, half = interval(both)
            result[label] = {"mean": mean, "half_width": half, "seeds": len(both)}
    return result


def _difference_grid(filled: Filled, panel: Panel, differences: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[TextTable]:
    """Nothing where no pair of runs is there."""
    if not any(differences.values()):
        return []
    heads = [head for head in _heads(filled) if any(head in found for found in differences.values())]
    digits = {column.label: column.digits for column in filled.columns}
    rows = [[name, *(_difference(found.get(head), digits.get(head, 2)) for head in heads)] for name, found in differences.items()]
    notes = ["Paired by seed; ± is half of Student's 95 % confidence interval of the mean over the seeds; without it there is one seed."]
    return [TextTable(f"Differences: {panel.label}", ["", *heads], rows, notes)]


def _difference(found: Mapping[str, Any] | None, digits: int) -> str:
    return NOT_RUN if found is None else plus_minus(found["mean"], found["half_width"], digits, "+")


def _account(filled: Filled, panel: Panel, row: Row) -> dict[str, Any]:
    """What the runs of a row measured about themselves, over all columns and seeds."""
    records = list({id(record): record for column in filled.columns for record in filled.runs(panel, row, column).values()}.values())
    rounds = [one for record in records for one in record.rounds]
    rates = {record.config.get("training", {}).get("learning_rate") for record in records}
    errors = {name: [found for one in rounds if (found := getattr(one, name)) is not None] for name in ("exactness_error", "deviation")}
    return {
        "runs": len(records),
        "learning_rates": sorted(rate for rate in rates if rate is not None),
        "trainable_parameters": sorted({record.facts.trainable_parameters for record in records}),
        **{name: worst(found) if found else None for name, found in errors.items()},
        "seconds": math.fsum(record.seconds for record in records),
    }


def _account_grid(panel: Panel, accounts: Mapping[str, Mapping[str, Any]]) -> list[TextTable]:
    heads = ["Method", "runs", "learning rate", "trained parameters", "exactness error", "plain averaging off by", "seconds a run"]
    rows = [
        [
            label,
            str(found["runs"]),
            " ".join(f"{rate:g}" for rate in found["learning_rates"]),
            " ".join(f"{count:,}" for count in found["trainable_parameters"]),
            "" if found["exactness_error"] is None else f"{found['exactness_error']:.1e}",
            "" if found["deviation"] is None else f"{found['deviation']:.1%}",
            f"{found['seconds'] / found['runs']:.0f}",
        ]
        for label, found in accounts.items()
        if found["runs"]
    ]
    notes = [
        "Errors of the worst round, relative to the ideal update: the method's in its worst module, averaged factors' in all together."
    ]
    return [TextTable(f"Runs: {panel.label}", heads, rows, notes)] if rows else []


def traffic_tables(filled: Filled) -> tuple[list[dict[str, Any]], list[TextTable]]:
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
        rows.append([panel.label, "paper", *(known.get(label, NOT_PUBLISHED) for label in labels)])
    notes = [
        "Counted from the messages that were sent, both ways: all clients, all rounds, and the message after the last round, which brings "
        f"the final model to all clients; relative to {reference}.",
        "'With the base once' adds one download of the frozen base for each client.",
        *(f"{panel.label}: {panel.source}." for panel in filled.shown if panel.paper),
    ]
    return numbers, [TextTable(filled.recipe.title, ["Model", "", *labels], rows, notes)]


def _share(totals: Mapping[str, float], label: str, reference: str) -> str:
    if label not in totals or reference not in totals:
        return NOT_RUN
    return f"{totals[label] / totals[reference]:.3f} ({totals[label] / 1e6:,.1f} MB)"


def _sums(runs: Mapping[int, Record]) -> dict[str, float] | None:
    """Bytes of the first seed of which all messages were recorded."""
    for record in runs.values():
        if record.final:
            sent: list[RoundDone | Evaluated] = [*record.rounds, record.final]
            down, up = sum(one.bytes_down for one in sent), sum(one.bytes_up for one in sent)
            base = record.facts.base_bytes * len(record.facts.train_rows)
            return {"down": float(down), "up": float(up), "base": float(base), "rounds": len(record.rounds)}
    return None
