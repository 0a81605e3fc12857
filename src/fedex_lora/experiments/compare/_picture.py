"""A comparison as a picture: the mean after each round, and a band around it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression

from fedex_lora.experiments.compare._tests import interval
from fedex_lora.storage.files import replacing

DASHES = ["-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2))]  # after a turn of the colours
Band = list[tuple[float, float, float]]
"""For rounds 0..T: mean, low, high."""


def bands(result: Mapping[str, Any]) -> dict[str, Band]:
    """Variant -> its mean over the seeds and Student's 95 % interval of it, round by round; the mean alone where there is one seed."""
    made: dict[str, Band] = {}
    for row in result["methods"]:
        rounds = [interval(list(values)) for values in zip(*row["seeds"].values(), strict=True)]
        made[row["name"]] = [(mean, mean - (width or 0.0), mean + (width or 0.0)) for mean, width in rounds]
    return made


def spread(positions: list[float], gap: float) -> list[float]:
    """Where labels go, so that they are at least `gap` apart: in the same order, as a whole where they were.

    Example:
        >>> [round(position, 3) for position in spread([0.50, 0.51, 0.90], 0.1)]
        [0.455, 0.555, 0.9]
    """
    order, steps, placed = np.argsort(positions, kind="stable"), gap * np.arange(len(positions)), np.empty(len(positions))
    placed[order] = isotonic_regression(np.asarray(positions)[order] - steps).x + steps
    return list(map(float, placed))


def draw_curves(result: Mapping[str, Any], out: Path) -> None:
    """Write the picture; what it is called says its format.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from fedex_lora.report import PALETTE, STYLE

    style: Any = {**STYLE, "font.family": "sans-serif"}
    with rc_context(style):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axis: Any = figure.subplots()
        lines, styles = bands(result), {}
        for index, (name, band) in enumerate(lines.items()):
            mean, low, high = zip(*band, strict=True)
            styles[name] = {"color": PALETTE[index % len(PALETTE)], "linestyle": DASHES[index // len(PALETTE) % len(DASHES)]}
            axis.plot(range(len(mean)), mean, **styles[name], linewidth=1.6)
            axis.fill_between(range(len(mean)), low, high, color=styles[name]["color"], alpha=0.13, linewidth=0)
        axis.set_xlim(0, result["rounds"])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("round")
        seeds = len(result["seeds"])
        axis.set_ylabel(f"{result['headline']} (mean of {seeds} seeds, 95 % interval)" if seeds > 1 else result["headline"])
        axis.set_title(result["task"], fontsize=9)
        _name_lines(axis, lines, styles)
        with replacing(out) as whole:
            figure.savefig(whole, dpi=160, format=out.suffix[1:])


def _name_lines(axis: Any, lines: Mapping[str, Band], styles: Mapping[str, Any]) -> None:
    """Each line's name beside its end, in its colour and led to by its dashes; they keep apart."""
    low, high = axis.get_ylim()
    ends = {name: band[-1][0] for name, band in lines.items() if band[-1][0] == band[-1][0]}
    heights = spread(list(ends.values()), (high - low) * 0.05)
    for (name, end), height in zip(ends.items(), heights, strict=True):
        last = len(lines[name]) - 1
        axis.annotate(
            name,
            (last, end),
            xytext=(1.05, (height - low) / (high - low)),
            textcoords="axes fraction",
            color=styles[name]["color"],
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", **styles[name], "linewidth": 1.1, "shrinkA": 2, "shrinkB": 0, "relpos": (0, 0.5)},
        )
