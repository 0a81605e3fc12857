"""The layouts of figures: how far averaging the factors is from the ideal, by layer after round 1, or round by round."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedex_lora.reproduce._filled import Filled, Record
from fedex_lora.reproduce._grids import NOT_RUN, Grid
from fedex_lora.reproduce._recipe import UNKNOWN
from fedex_lora.reproduce._scores import mean_and_deviation

MEASURES = {"relative": (100.0, "|difference| / |ideal|, in %"), "scaled": (1e6, "|difference| / sqrt(out in), times 1e6")}
Series = Mapping[str, Mapping[int, float]]
"""name -> place (layer or round) -> value."""


def by_layer(filled: Filled) -> tuple[list[dict[str, Any]], list[Grid]]:
    """Q and V in each layer, after the first round."""
    return _deviations(filled, layers, "layer", "after the first round")


def by_round(filled: Filled) -> tuple[list[dict[str, Any]], list[Grid]]:
    """Q of the first layer, and the mean over all adapted modules, after each round."""
    return _deviations(filled, rounds, "round", "round by round")


def _deviations(filled: Filled, series: Callable[[Record, str], Series], unit: str, when: str) -> tuple[list[dict[str, Any]], list[Grid]]:
    """Two grids for each data set, one a measure, with a line for each panel and series: mean and deviation over the seeds."""
    numbers: list[dict[str, Any]] = []
    grids = []
    for column in filled.columns:
        for measure, (factor, what) in MEASURES.items():
            lines: dict[str, dict[int, list[float]]] = {}
            for panel in filled.panels:
                found = [series(record, measure) for row in filled.rows for record in filled.runs(panel, row, column).values()]
                for name in dict.fromkeys(name for one in found for name in one):
                    places = sorted({place for one in found for place in one.get(name, {})})
                    line = {place: [one[name][place] for one in found if place in one.get(name, {})] for place in places}
                    lines[f"{panel.label}, {name}"] = line
                    numbers.append({"column": column.label, "panel": panel.label, "series": name, "measure": measure, unit: line})
            places = sorted({place for line in lines.values() for place in line})
            rows = [
                [label, *(mean_and_deviation([factor * value for value in line.get(place, [])], len(filled.seeds), 2) for place in places)]
                for label, line in lines.items()
            ]
            title = f"{filled.recipe.title}: {column.label}, {when}, {what}"
            grids.append(Grid(title, [unit, *map(str, places)], rows or [[NOT_RUN]], [f"The paper's numbers: {UNKNOWN} (a plot)."]))
    return numbers, grids


def layers(record: Record, measure: str) -> dict[str, dict[int, float]]:
    """Projection -> layer -> deviation after the first round."""
    series: dict[str, dict[int, float]] = {}
    for module, value in _values(record["rounds"][0], measure).items():
        series.setdefault(projection_of(module), {})[layer_of(module)] = value
    return dict(sorted(series.items()))


def rounds(record: Record, measure: str) -> dict[str, dict[int, float]]:
    """Q of the first layer, and the mean over all adapted modules -> round -> deviation."""
    by_number = {one["round"]: _values(one, measure) for one in record["rounds"] if one["modules"]}
    modules = sorted({module for values in by_number.values() for module in values}, key=lambda module: (layer_of(module), module))
    query = next((module for module in modules if projection_of(module) == "Q"), modules[0])
    return {
        f"{projection_of(query)} of the first layer": {number: values[query] for number, values in by_number.items()},
        "mean over all modules": {number: float(np.mean(list(values.values()))) for number, values in by_number.items()},
    }


def layer_of(module: str) -> int:
    """The first number in a module's path; 0 without one."""
    found = re.search(r"\d+", module)
    return int(found[0]) if found else 0


def projection_of(module: str) -> str:
    """Q or V, as the paper names the matrices; the module's own name where it is neither.

    Example:
        >>> projection_of("encoder.layer.3.attention.self.query")
        'Q'
    """
    last = module.rsplit(".", 1)[-1]
    return {"q": "Q", "v": "V"}.get(last[0], last)


def _values(one: Mapping[str, Any], measure: str) -> dict[str, float]:
    """Module -> deviation: relative to the ideal, or divided by sqrt(out in)."""
    columns = one["modules"]
    if not columns:
        return {}
    relative = [apart / ideal if ideal else 0.0 for apart, ideal in zip(columns["deviation"], columns["ideal"], strict=True)]
    return dict(zip(columns["module"], columns["scaled"] if measure == "scaled" else relative, strict=True))
