"""The layouts of figures: how far averaging the factors is from the ideal, by layer after round 1, or round by round; and drawn."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from fedex_lora.errors import counted
from fedex_lora.experiments.reproduce._filled import Filled
from fedex_lora.experiments.reproduce._recipe import NOT_PUBLISHED, Column
from fedex_lora.experiments.reproduce._scores import mean_and_deviation
from fedex_lora.experiments.tables import NOT_RUN, TextTable
from fedex_lora.report import Group, Placing, Value, draw, observed, per_seed
from fedex_lora.report.analysis import Run, module_frame, parse_module_paths

MEASURES: dict[Value, tuple[float, str]] = {
    "relative": (100.0, "|difference| / |ideal|, in %"),
    "scaled": (1e6, "|difference| / sqrt(out in), times 1e6"),
}
WHEN: dict[Placing, str] = {"layers": "after the first round", "rounds": "round by round"}
OF_ROUNDS = "falls with the rounds"
Series: TypeAlias = dict[tuple[str, str], dict[int, list[float]]]
"""(panel, name) -> place (layer or round) -> a value a seed."""


def pictures(filled: Filled, folder: Path) -> list[Path]:
    """Draw every data set of a figure that has runs, in both measures; nothing without Matplotlib."""
    layout = filled.recipe.layout
    if layout not in WHEN or find_spec("matplotlib") is None:
        return []
    drawn = []
    for column in filled.columns:
        if groups := _groups(filled, column):
            for measure in MEASURES:
                drawn.append(folder / f"{filled.recipe.target}-{column.label}-{measure}.png")
                draw(
                    layout,
                    [replace(group, label=f"{group.label}, {counted(len(group.runs), 'seed')}") for group in groups],
                    drawn[-1],
                    measure,
                )
    return drawn


def _groups(filled: Filled, column: Column) -> list[Group]:
    """The runs of each panel that has any, seed by seed."""
    found = []
    for panel in filled.panels:
        records = [record for row in filled.rows for record in filled.runs(panel, row, column).values()]
        frames = [module_frame({one.round: one.modules for one in record.rounds}) for record in records]
        averaged = [(record, frame) for record, frame in zip(records, frames, strict=True) if not frame.empty]
        runs = [Run(Path(), panel.label, (), record.config) for record, _ in averaged]
        found += [Group(panel.label, runs, (), [frame for _, frame in averaged])] if runs else []
    return found


def deviation_figures(filled: Filled) -> tuple[list[dict[str, Any]], list[TextTable]]:
    """For each data set a table a measure, with a line for each panel and series (mean and deviation over the seeds): every projection in
    each layer after the first round; or the first layer's query, and the mean over all adapted modules, after each round. And which of the
    paper's observations hold."""
    numbers: list[dict[str, Any]] = []
    tables, layout = [], filled.recipe.layout
    assert layout in WHEN
    unit = layout.removesuffix("s")
    for column in filled.columns:
        groups, title = _groups(filled, column), f"{filled.recipe.title}: {column.label}"
        for measure, (factor, what) in MEASURES.items():
            series = _series(layout, groups, measure)
            of = {"column": column.label, "measure": measure}
            numbers += [of | {"panel": panel, "series": name, unit: places} for (panel, name), places in series.items()]
            tables.append(_table(f"{title}, {WHEN[layout]}, {what}", unit, series, factor, len(filled.seeds)))
        tables += _observations(f"{title}, the paper's observations", groups, unit)
    return numbers, tables


def _series(layout: Placing, groups: Sequence[Group], measure: Value) -> Series:
    found: Series = {}
    points = per_seed(layout, groups, measure)
    if layout == "rounds":
        places = parse_module_paths({module for group in groups for frame in group.modules for module in frame["module"]})
        names = {module: f"{places[module][1]} of the first layer" if module else "mean over all modules" for module in {*points["module"]}}
        points = points.assign(projection=points["module"].map(names))
    for (run, name, place), part in points.groupby(["run", "projection", layout.removesuffix("s")], sort=False):
        found.setdefault((run, name), {})[int(place)] = part["value"].tolist()
    return found


def _table(title: str, unit: str, series: Series, factor: float, seeds: int) -> TextTable:
    places = sorted({place for line in series.values() for place in line})
    rows = [
        [f"{panel}, {name}"]
        + [mean_and_deviation([factor * value for value in line[place]], seeds, 2) if place in line else NOT_RUN for place in places]
        for (panel, name), line in series.items()
    ]
    return TextTable(title, [unit, *map(str, places)], rows or [[NOT_RUN]], [f"The paper's numbers: {NOT_PUBLISHED} (a plot)."])


def _observations(title: str, groups: Sequence[Group], unit: str) -> list[TextTable]:
    """Which of the paper's observations hold in these runs, in both measures, from the means over the seeds."""
    if not groups:
        return []
    tables = {measure: observed(groups, measure) for measure in MEASURES}
    rows = []
    for one, other in zip(*(table.to_dict("records") for table in tables.values()), strict=True):
        if one["observation"].startswith(OF_ROUNDS) == (unit == "round"):
            held = [f"{'yes' if found['holds'] else 'no'}, {found['number']:.2f}" for found in (one, other)]
            rows.append([one["run"], one["observation"], *held, one["of"].partition(";")[0]])
    notes = ["From the means over the seeds that are there. Yes: the number points that way, however little."]
    return [TextTable(title, ["", "observation", *tables, "the number is"], rows, notes)] if rows else []
