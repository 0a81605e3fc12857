"""`fedex-lora reproduce`: a table or figure of the paper by one command. Recipes name runs, runs leave records, records make tables."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fedex_lora.experiments import Progress, silent
from fedex_lora.experiments.reproduce._deviations import deviation_figures, pictures
from fedex_lora.experiments.reproduce._filled import Filled, score
from fedex_lora.experiments.reproduce._recipe import Cell, CellPlace, Only, Recipe, Scale, cells, read_recipe, targets
from fedex_lora.experiments.reproduce._records import Paths, Record, find_record, make_record
from fedex_lora.experiments.reproduce._scores import scores, traffic_tables
from fedex_lora.experiments.reproduce._tiny import write_tiny_data
from fedex_lora.experiments.tables import TextTable
from fedex_lora.storage.files import finite_json, write_text

__all__ = ["Only", "Recipe", "about", "cells", "find_record", "read_recipe", "reproduce", "score", "targets", "write_tiny_data"]

LAYOUTS: dict[str, Callable[[Filled], tuple[list[dict[str, Any]], list[TextTable]]]] = {
    "scores": scores,
    "layers": deviation_figures,
    "rounds": deviation_figures,
    "bytes": traffic_tables,
}
EVERYTHING = Only()


def reproduce(
    target: str,
    scale: str,
    out: Path,
    data: Path | None = None,
    model: Path | None = None,
    overrides: Sequence[str] = (),
    only: Only = EVERYTHING,
    run: bool = True,
    tell: Progress = silent,
) -> tuple[dict[str, Any], list[TextTable]]:
    """Run what is not there yet of a table or figure, and make it.

    Args:
        target: table1 .. table11, figure2 .. figure9 and so on (`targets()`), or a recipe's file.
        scale: "smoke", "small" or "full".
        out: gets `runs/`, a record for each run, which targets share; and `SCALE/TARGET.md`, `.tex` and `.json`.
        data: the folder of all data in their published layouts; None: the hub.
        model: a local folder of the base that the recipe names, or of folders named like the bases; None: the hub.
        overrides: `a.b=v`, of every run.
        only: the part that is run where it is missing. Tables always show all records that are there.
        run: False: nothing is run.
        tell: told of every run that ends.

    Returns:
        The numbers, as they are written to `SCALE/TARGET.json`, and the tables. Figures are drawn too, where Matplotlib is installed.

    Raises:
        UsageError: an unknown target, scale or label.
        FedexLoraError: what stops a run. The records of earlier ones are there.
    """
    recipe = read_recipe(target)
    wanted = list(cells(recipe, scale, overrides))
    only.require_known(wanted, f"{target} at scale {scale}")
    asked = [cell for cell in wanted if run and only.holds(cell)]
    with tempfile.TemporaryDirectory(prefix="fedex-lora-") if recipe.scaled(scale).tiny else nullcontext() as folder:
        if folder is not None:
            write_tiny_data(Path(folder))
        records = _records(wanted, asked, Paths(out, Path(folder) if folder else data, model), recipe.scaled(scale), tell)
    filled = Filled.of(recipe, scale, records)
    numbers, grids = LAYOUTS[recipe.layout](filled)
    result = {
        "target": recipe.target,
        "scale": scale,
        "title": recipe.title,
        "source": recipe.source,
        "note": recipe.scaled(scale).note,
        "choices": recipe.choices,
        "not_at_this_scale": [panel.label for panel in recipe.panels if panel not in filled.panels],
        "runs": len({cell.key for cell in wanted}),
        "runs_done": len({cell.key for cell in wanted if cell.place in records}),
        "numbers": numbers,
    }
    result["pictures"] = [path.name for path in pictures(filled, out / scale)]
    text = about(result) + "\n\n" + "\n".join(grid.markdown() for grid in grids)
    write_text(out / scale / f"{recipe.target}.md", text)
    write_text(out / scale / f"{recipe.target}.tex", "\n".join(grid.latex() for grid in grids))
    write_text(out / scale / f"{recipe.target}.json", finite_json(result) + "\n")
    return result, grids


def about(result: dict[str, Any]) -> str:
    """What stands above the tables."""
    done, runs = result["runs_done"], result["runs"]
    lines = [f"{result['title']} ({result['source']}), scale `{result['scale']}`: {result['note']}"]
    lines.append(f"{done} of {runs} runs are there." if done < runs else f"All {runs} runs are there.")
    if result["not_at_this_scale"]:
        lines.append(f"Not at this scale: {'; '.join(result['not_at_this_scale'])}.")
    if result["choices"]:
        lines.append(f"Chosen here, because the paper does not say: {'; '.join(result['choices'])}.")
    return " ".join(lines)


def _records(wanted: Sequence[Cell], asked: Sequence[Cell], place: Paths, scale: Scale, tell: Progress) -> dict[CellPlace, Record]:
    """The record of every cell that has one; cells may share a run. What is asked for and missing is run first."""
    known = {cell.key: record for cell in wanted if (record := find_record(place.out, cell)) is not None}
    missing: dict[str, Cell] = {}
    for cell in asked:
        if cell.key not in known:
            missing.setdefault(cell.key, cell)
    for done, cell in enumerate(missing.values(), 1):
        tests = sorted({one.test for one in wanted if one.key == cell.key and one.test})
        known[cell.key] = record = find_record(place.out, cell) or make_record(place, cell, tests, scale.generation)
        end = record.failed or _shown(record)
        tell(f"{cell.panel}  {cell.row}  {cell.column}  seed {cell.seed}: {end}", done, len(missing))
    return {cell.place: known[cell.key] for cell in wanted if cell.key in known}


def _shown(record: Record) -> str:
    last, headline, seconds = record.rounds[-1].metrics, record.facts.headline, record.seconds
    return f"{headline} {last[headline]:.4f} in {seconds:.0f} s" if headline in last else f"{seconds:.0f} s"
