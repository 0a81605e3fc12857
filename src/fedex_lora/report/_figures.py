"""The paper's figures from any runs (Matplotlib): the deviation by layer, and across rounds."""

import os
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from fedex_lora.errors import UsageError, require_extra
from fedex_lora.report import analysis
from fedex_lora.report._charts import PALETTE
from fedex_lora.report._groups import Group, grouped
from fedex_lora.storage.files import replacing

LAYERS, ROUNDS = (2, 4, 5), (3, 6, 7, 8, 9)
FORMATS = (".pdf", ".svg", ".png")
Value = Literal["scaled", "relative"]
Placing = Literal["layers", "rounds"]
KEYS: dict[Placing, list[str]] = {"layers": ["projection", "layer"], "rounds": ["panel", "module", "round"]}
AXES = {"scaled": r"$\|R\|_F / \sqrt{mn}$", "relative": r"$\|R\|_F / \|M\|_F$"}
STYLE: Any = {
    "font.family": "serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedex-lora",
    "pdf.fonttype": 42,
}


def write_figure(number: int, paths: Sequence[Path], out: Path, value: Value = "relative") -> dict[str, Any]:
    """Draw one of the paper's figures of the deviation of plain averaging from the ideal update.

    Args:
        number: 2, 4, 5: by layer, for each projection, after the first round (a panel a kind of run, such as local epochs);
            3, 6, 7, 8, 9: across rounds (a line a kind of run), (a) of the first layer's first projection, its query, (b) the mean over all
            modules. Figures of one kind differ in the runs only.
        paths: run folders, or folders that hold runs; those that differ in their seed only are one line and a band from lowest to highest.
        out: .pdf, .svg or .png.
        value: "relative", divided by |M|; or "scaled", divided by sqrt(out in). The paper scales, and its text does not say by what.

    Returns:
        `out`; `data`, the numbers that are drawn; `observations`, which of the paper's hold (for each kind of run).

    Raises:
        UsageError: no such figure or value, an unknown kind of file, a file that exists or cannot be written, or runs without LoRA updates.
    """
    if number not in LAYERS + ROUNDS:
        raise UsageError(f"figure {number}: this draws 2, 4, 5 (by layer) and 3, 6, 7, 8, 9 (across rounds)")
    if out.suffix not in FORMATS:
        raise UsageError(f"{out}: give a name that ends in {', '.join(FORMATS)}")
    if os.path.lexists(out):
        raise UsageError(f"{out} exists, and is not overwritten: remove it, or give another name after -o")
    if value not in AXES:
        raise UsageError(f"--value {value}: give {' or '.join(AXES)}")
    groups = [group for group in grouped(analysis.find_runs(paths)) if not pd.concat(group.modules).empty]
    if not groups:
        raise UsageError("these runs have no LoRA updates that were averaged: nothing to draw")
    try:
        data = draw("layers" if number in LAYERS else "rounds", groups, out, value)
    except OSError as error:
        raise UsageError(f"cannot write {out}: {error.strerror}: give another name after -o") from None
    return {"out": str(out), "data": data.to_dict("records"), "observations": observed(groups, value).to_dict("records")}


def draw(layout: Placing, groups: Sequence[Group], out: Path, value: Value = "relative") -> pd.DataFrame:
    """Draw the deviation of groups of runs, by layer after the first round or across rounds.

    Returns:
        What is drawn: see `over_seeds`.

    Raises:
        UsageError: Matplotlib is not installed; or by layer, and there are no numbered ones.
        OSError: the file cannot be written.
    """
    require_extra("matplotlib", "report", "figures")
    from matplotlib import rc_context

    data = over_seeds(layout, per_seed(layout, groups, value))
    if data.empty:
        raise UsageError("these modules are in no stack of layers: draw a figure across rounds, such as 3")
    out.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        _draw(layout, data, out, value)
    return data


def per_seed(layout: Placing, groups: Sequence[Group], value: Value) -> pd.DataFrame:
    """The deviation that a figure draws, a row a point of each seed.

    Returns:
        `run`, `seed` (counted), `value`; and for layers, after the first round, `projection` and `layer`; for rounds `round`, `panel`
        ("first": the first layer's query or what it has for one, named in `module`; "all": the mean over modules).
    """
    parts = [pd.DataFrame(columns=["run", "seed", "value", *KEYS[layout]])]
    for group in groups:
        for seed, frame in enumerate(frame for frame in group.modules if not frame.empty):
            if layout == "layers":
                first = frame[(frame["round"] == frame["round"].min()) & (frame["layer"] >= 0)].sort_values(["projection", "layer"])
                found = [first[["projection", "layer"]].assign(value=first[value])]
            else:
                over = analysis.across_rounds(frame, value)
                names = {"first": ("first", over.attrs["first"]), "all": ("mean", "")}
                found = [
                    pd.DataFrame({"panel": panel, "module": module, "round": over["round"], "value": over[column]})
                    for panel, (column, module) in names.items()
                ]
            parts += [part.assign(run=group.label, seed=seed) for part in found]
    return pd.concat(parts[1:] or parts, ignore_index=True)


def over_seeds(layout: Placing, points: pd.DataFrame) -> pd.DataFrame:
    """The `mean`, `low` and `high` of a figure's points over the seeds."""
    means = points.groupby(["run", *KEYS[layout]], sort=False)["value"].agg(mean="mean", low="min", high="max")
    return means.reset_index()


def observed(groups: Sequence[Group], value: Value) -> pd.DataFrame:
    """`analysis.observations` of each kind of run, from the means over its seeds; local epochs against the run with the fewest, from the
    seeds that both have."""
    epochs = {group.label: group.first.config.get("training", {}).get("num_train_epochs") for group in groups}
    parts = []
    for group in groups:
        mine = epochs[group.label]
        found = analysis.observations(_over_seeds(group, _seeds(group)), value)
        fewer = [other for other in groups if mine and (epochs[other.label] or mine) < mine and _alike(group.first, other.first)]
        least = min(fewer, key=lambda other: epochs[other.label], default=None)
        if least is not None and (both := _seeds(least) & _seeds(group)):
            more = analysis.observations(_over_seeds(least, both), value, _over_seeds(group, both))
            found = pd.concat([found, more[more["observation"] == "grows with local epochs"]], ignore_index=True)
        parts.append(found.assign(run=group.label))
    return pd.concat(parts, ignore_index=True)


def _seeds(group: Group) -> set[int]:
    return {run.config.get("seed", 0) for run in group.runs}


def _over_seeds(group: Group, seeds: Set[int]) -> pd.DataFrame:
    frame = pd.concat([part for run, part in zip(group.runs, group.modules, strict=True) if run.config.get("seed", 0) in seeds])
    return frame.groupby(["round", "module", "layer", "projection"])[["scaled", "relative"]].mean().reset_index()


def _alike(run: analysis.Run, other: analysis.Run) -> bool:
    """Do two runs differ in their local epochs and seeds only?"""

    def rest(run: analysis.Run) -> dict[str, Any]:
        training = {key: item for key, item in run.config.get("training", {}).items() if key != "num_train_epochs"}
        return {**run.config, "training": training, "seed": 0}

    return rest(run) == rest(other)


def _draw(layout: Placing, data: pd.DataFrame, out: Path, value: Value) -> None:
    """A panel a run, with a line a projection; or across rounds two panels, with a line a run."""
    from matplotlib.figure import Figure

    panel, line, x = ("run", "projection", "layer") if layout == "layers" else ("panel", "run", "round")
    titles, lines = {run: run for run in data["run"].unique()}, list(data[line].unique())
    if layout == "rounds":
        firsts = [name for name in data["module"].unique() if name]
        first = firsts[0] if len(firsts) == 1 else "first layer"
        titles = {"first": f"(a) {first if len(first) <= 34 else f'…{first[-34:]}'}", "all": "(b) mean over all modules"}
    figure = Figure(figsize=(3.1 * len(titles), 2.7), layout="constrained")
    axes: Any = figure.subplots(1, len(titles), sharey=layout == "layers", squeeze=False)[0]
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for index, label in enumerate(lines):
            rows, colour = data[(data[panel] == name) & (data[line] == label)], PALETTE[index % len(PALETTE)]
            axis.plot(rows[x], rows["mean"], marker="os^Dvx"[index % 6], markersize=3.5, linewidth=1.3, color=colour, label=label)
            if (rows["high"] > rows["low"]).any():
                axis.fill_between(rows[x], rows["low"], rows["high"], color=colour, alpha=0.18, linewidth=0)
        axis.set_title(title, fontsize=9, y=1.0, pad=11)
        axis.set_xlabel("layer" if layout == "layers" else "aggregation round")
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[:1] if layout == "layers" else axes:
        axis.set_ylabel(AXES[value])
    for axis in axes:  # after all lines: axes may be shared
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(names)))
    figure.draw_without_rendering()  # the axes' powers of ten take room
    undated = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(out.suffix)
    with replacing(out) as whole:
        figure.savefig(whole, dpi=200, format=out.suffix[1:], metadata=undated)
