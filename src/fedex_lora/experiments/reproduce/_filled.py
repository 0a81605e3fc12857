"""A recipe with the records that are there: what layouts read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from fedex_lora.experiments.compare import later_half
from fedex_lora.experiments.reproduce._recipe import CellPlace, Column, Panel, Recipe, Row, chosen
from fedex_lora.experiments.reproduce._records import Record

HELD_OUT = "held_out."


@dataclass(frozen=True)
class Filled:
    """A recipe at a scale, with records.

    Attributes:
        label: what the rows of our numbers are called.
        found: of runs that have ended, failed ones among them.
        panels, rows, columns: those that this scale runs.
    """

    recipe: Recipe
    label: str
    found: Mapping[CellPlace, Record]
    seeds: Sequence[int]
    panels: Sequence[Panel]
    rows: Sequence[Row]
    columns: Sequence[Column]

    @classmethod
    def of(cls, recipe: Recipe, scale_name: str, found: Mapping[CellPlace, Record]) -> "Filled":
        scale = recipe.scaled(scale_name)
        parts = ((recipe.panels, scale.panels), (recipe.rows, scale.rows), (recipe.columns, scale.columns))
        panels, rows, columns = (chosen(every, wanted) for every, wanted in parts)
        return cls(recipe, scale.label, found, scale.seeds, panels, rows, columns)

    @property
    def shown(self) -> list[Panel]:
        """The panels that this scale runs, and those with numbers of the paper."""
        return [panel for panel in self.recipe.panels if panel in self.panels or panel.paper]

    def runs(self, panel: Panel, row: Row, column: Column) -> dict[int, Record]:
        """Seed -> record, of runs that did not fail."""
        keys = {seed: (panel.label, row.label, column.label, seed) for seed in self.seeds}
        return {seed: self.found[key] for seed, key in keys.items() if key in self.found and not self.found[key].failed}

    def failures(self, panel: Panel) -> list[str]:
        """What to say of runs that failed."""
        return [
            f"{row} on {column}, seed {seed}: {record.failed}."
            for (label, row, column, seed), record in self.found.items()
            if label == panel.label and record.failed
        ]

    def unanswered(self, panel: Panel) -> list[str]:
        """How many answers in writing could not be read; they count as wrong."""
        notes = []
        for row, column in product(self.rows, self.columns):
            tests = [record.tests.get(column.test, {}) for record in self.runs(panel, row, column).values() if column.test]
            if odd := sum(test.get("unanswered", 0) for test in tests):
                notes.append(f"{row.label} on {column.label}: {odd:.0f} of {sum(test['rows'] for test in tests):.0f} without an answer.")
        return notes

    def scores(self, panel: Panel, row: Row, column: Column) -> dict[int, float]:
        """Seed -> the metric, times the column's factor."""
        metric = panel.metrics.get(column.label, column.metric)
        runs = {seed: score(record, metric, column.test) for seed, record in self.runs(panel, row, column).items()}
        return {seed: column.factor * value for seed, value in runs.items() if value is not None}


def score(record: Record, metric: str, test: str | None = None) -> float | None:
    """A metric after the last round, on the evaluation rows, or on a test in writing.

    NaN where it was not finite; None where it was not measured.

    `held_out.METRIC`: on the clients' own rows, the mean over the later half of the rounds, as `compare` chooses learning rates.
    """
    if metric.startswith(HELD_OUT):
        later = later_half(record.held_out, len(record.rounds))
        return float(np.mean([metrics[metric.removeprefix(HELD_OUT)] for metrics in later])) if later else None
    metrics = record.tests.get(test, {}) if test else record.rounds[-1].metrics
    return metrics.get(metric)
