"""The layouts of figures: how far averaging the factors is from the ideal, by layer after round 1, or round by round; and drawn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias

import pandas as pd

from fedex_lora.experiments.reproduce._filled import Filled
from fedex_lora.experiments.reproduce._grids import NOT_RUN, Grid
from fedex_lora.experiments.reproduce._recipe import UNKNOWN, Column
from fedex_lora.experiments.reproduce._scores import mean_and_deviation
from fedex_lora.report import Group, draw, observed
from fedex_lora.report.analysis import Run, across_rounds, module_frame, parse_module_paths

Measure = Literal["relative", "scaled"]
MEASURES: dict[Measure, tuple[float, str]] = {
    "relative": (100.0, "|difference| / |ideal|, in %"),
    "scaled": (1e6, "|difference| / sqrt(out in), times 1e6"),
}
OF_ROUNDS = "falls with the rounds"
Lines: TypeAlias = Mapping[str, Mapping[int, float]]
"""name -> place (layer or round) -> value, of a run."""
Series: TypeAlias = dict[tuple[str, str], dict[int, list[float]]]
"""(panel, name) -> place -> a value a seed."""


def by_layer(filled: Filled) -> tuple[list[dict[str, Any]], list[Grid]]:
    """Every projection in each layer, after the first round; and which of the paper's observations hold there."""
    return _deviations(filled, layers, "layer", "after the first round")


def by_round(filled: Filled) -> tuple[list[dict[str, Any]], list[Grid]]:
    """The first layer's query, and the mean over all adapted modules, after each round; and whether they fall."""
    return _deviations(filled, rounds, "round", "round by round")


def pictures(filled: Filled, folder: Path) -> list[Path]:
    """Draw every data set of a figure that has runs, in both measures; nothing without Matplotlib."""
    if filled.recipe.layout not in ("layers", "rounds") or find_spec("matplotlib") is None:
        return []
    layout: Literal["layers", "rounds"] = "layers" if filled.recipe.layout == "layers" else "rounds"
    drawn = []
    for column in filled.columns:
        if groups := _groups(filled, column):
            for measure in MEASURES:
                drawn.append(folder / f"{filled.recipe.target}-{column.label}-{measure}.png")
                draw(layout, [replace(group, label=_counted(group)) for group in groups], drawn[-1], measure)
    return drawn


def _counted(group: Group) -> str:
    return f"{group.label}, {len(group.runs)} seed{'s' if len(group.runs) > 1 else ''}"


def _groups(filled: Filled, column: Column) -> list[Group]:
    """The runs of each panel that has any, seed by seed."""
    found = []
    for panel in filled.panels:
        records = [record for row in filled.rows for record in filled.runs(panel, row, column).values()]
        frames = [module_frame({one["round"]: one["modules"] for one in record["rounds"]}) for record in records]
        averaged = [(record, frame) for record, frame in zip(records, frames, strict=True) if not frame.empty]
        runs = [Run(Path(), panel.label, (), record["config"]) for record, _ in averaged]
        found += [Group(panel.label, runs, (), [frame for _, frame in averaged])] if runs else []
    return found


def _deviations(
    filled: Filled, lines: Callable[[pd.DataFrame, Measure], Lines], unit: str, when: str
) -> tuple[list[dict[str, Any]], list[Grid]]:
    """For each data set a grid a measure, with a line for each panel and series (mean and deviation over the seeds); the observations."""
    numbers: list[dict[str, Any]] = []
    grids = []
    for column in filled.columns:
        groups, title = _groups(filled, column), f"{filled.recipe.title}: {column.label}"
        for measure, (factor, what) in MEASURES.items():
            series = _series(groups, lines, measure)
            of = {"column": column.label, "measure": measure}
            numbers += [of | {"panel": panel, "series": name, unit: places} for (panel, name), places in series.items()]
            grids.append(_grid(f"{title}, {when}, {what}", unit, series, factor, len(filled.seeds)))
        grids += _observations(f"{title}, the paper's observations", groups, unit)
    return numbers, grids


def _series(groups: Sequence[Group], lines: Callable[[pd.DataFrame, Measure], Lines], measure: Measure) -> Series:
    found: Series = {}
    for group in groups:
        for frame in group.modules:
            for name, line in lines(frame, measure).items():
                places = found.setdefault((group.label, name), {})
                for place, value in line.items():
                    places.setdefault(place, []).append(value)
    return found


def _grid(title: str, unit: str, series: Series, factor: float, seeds: int) -> Grid:
    places = sorted({place for line in series.values() for place in line})
    rows = [
        [f"{panel}, {name}"]
        + [mean_and_deviation([factor * value for value in line[place]], seeds, 2) if place in line else NOT_RUN for place in places]
        for (panel, name), line in series.items()
    ]
    return Grid(title, [unit, *map(str, places)], rows or [[NOT_RUN]], [f"The paper's numbers: {UNKNOWN} (a plot)."])


def _observations(title: str, groups: Sequence[Group], unit: str) -> list[Grid]:
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
    return [Grid(title, ["", "observation", *tables, "the number is"], rows, notes)] if rows else []


def layers(frame: pd.DataFrame, measure: Measure) -> dict[str, dict[int, float]]:
    """Projection -> layer -> deviation after the first round."""
    first = frame[frame["round"] == frame["round"].min()]
    return {str(name): dict(zip(part["layer"], part[measure], strict=True)) for name, part in first.groupby("projection")}


def rounds(frame: pd.DataFrame, measure: Measure) -> dict[str, dict[int, float]]:
    """The first layer's query (or what it has for one), and the mean over all adapted modules -> round -> deviation."""
    found = across_rounds(frame, measure)
    names = {
        "first": f"{parse_module_paths(frame['module'].unique())[found.attrs['first']][1]} of the first layer",
        "mean": "mean over all modules",
    }
    return {name: dict(zip(found["round"], found[column], strict=True)) for column, name in names.items()}
