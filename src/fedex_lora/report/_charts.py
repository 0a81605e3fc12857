"""Charts of a report: Vega-Lite specifications, each with the table of what it shows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fedex_lora.report._tables import Sortable, sortable

POINTS = 200  # of a line
CELLS = 6000  # of a heat map
TOLD = 15  # classes, at most, of which a confusion matrix tells its numbers
PALETTE = ["#2B83C6", "#D9662B", "#0F9D76", "#C774A5", "#C08A00", "#7A6FC0", "#8A8F98"]  # Okabe and Ito's, between light and dark
DASHES = [[1, 0], [7, 3], [2, 2], [8, 3, 2, 3]]
OUTCOMES = {"accepted": "#5FA8D9", "refused": "#D9662B", "skipped": "#C08A00", "not asked": "#9AA0A650"}
SHOWN_FIRST = ["refused", "skipped", "accepted"]
Spec = dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        title: what it shows.
        note: how to read it.
        spec: Vega-Lite, without data.
        values: the data, a row a mark.
        tables: the same numbers for those who cannot see it: one, or for heat maps one for each of the choices.
        choices: for heat maps: what the colour may show (field -> title, domain).
    """

    title: str
    note: str
    spec: Spec
    values: Sequence[Mapping[str, Any]]
    tables: Sequence[Sortable]
    choices: Mapping[str, tuple[str, tuple[float, float]]] | None = None

    def embedded(self) -> Spec:
        """The specification with its data."""
        return {
            "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
            "description": self.title,
            "data": {"values": list(self.values)},
            "autosize": {"type": "fit-x", "contains": "padding"},
            **self.spec,
        }


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows for a chart: five significant digits, null for what is not a number."""
    return [{str(name): _short(value) for name, value in row.items()} for row in frame.to_dict("records")]


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def thinned(rounds: Sequence[int], limit: int = POINTS) -> list[int]:
    """At most so many of the rounds, evenly spread, the first and the last among them."""
    if len(rounds) <= limit:
        return list(rounds)
    return [rounds[index] for index in np.unique(np.linspace(0, len(rounds) - 1, limit).round().astype(int))]


def binned(rounds: Sequence[int], limit: int) -> dict[int, str]:
    """Round -> the name of the span of rounds that it is drawn in: itself, or `1-20`, at most `limit` of them."""
    if len(rounds) <= limit:
        return {number: str(number) for number in rounds}
    spans = np.array_split(np.asarray(rounds), limit)
    return {int(number): f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans for number in span}


def lines(title: str, note: str, frame: pd.DataFrame, y: str, x: str = "round", log: bool = False, format: str = ".4~g") -> Chart | None:
    """Lines over rounds (or layers).

    Args:
        title, note: see `Chart`.
        frame: columns x, `label`, `value`, and `low`, `high` where several seeds make a band.
        y: the axis' title.
        x: the column of the horizontal axis.
        log: a logarithmic vertical axis.
        format: of the values (d3).
    """
    frame = frame.dropna(subset=["value"])
    frame = frame[frame["value"] > 0] if log else frame
    if frame.empty:
        return None
    keep = thinned(sorted(int(number) for number in frame[x].unique()))
    shown = frame[frame[x].isin(keep)]
    labels = list(dict.fromkeys(shown["label"]))
    legend = {"symbolType": "stroke", "symbolStrokeWidth": 2, "symbolSize": 300, "symbolOpacity": 1} if len(labels) > 1 else None
    by_label = {"field": "label", "type": "nominal", "title": None, "legend": legend}
    colour = {**by_label, "scale": {"domain": labels, "range": [PALETTE[index % len(PALETTE)] for index in range(len(labels))]}}
    dashes = {**by_label, "scale": {"domain": labels, "range": [DASHES[index % len(DASHES)] for index in range(len(labels))]}}
    axis = {"title": x, "values": thinned(keep, 9), "format": "d"}
    horizontal = {"field": x, "type": "quantitative", "axis": axis, "scale": {"nice": False, "zero": False, "padding": 6}}
    vertical: Spec = {"field": "value", "type": "quantitative", "title": y, "axis": {"format": format}, "scale": {"zero": False}}
    if log:
        ends = np.log10([shown["value"].min(), shown["value"].max()])
        tens = [float(f"1e{power}") for power in range(int(np.floor(ends[0])), int(np.ceil(ends[1])) + 1)]
        vertical |= {"scale": {"type": "log", "domain": [tens[0], tens[-1]]}, "axis": {"format": ".0e", "values": tens}}
    tips = [{"field": x}, {"field": "label", "title": " "}, {"field": "value", "title": y, "format": ".2e" if log else format}]
    near = {"name": "near", "select": {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"}}
    layers: list[Spec] = [{"mark": {"type": "line", "strokeWidth": 2}, "encoding": {"y": vertical, "color": colour, "strokeDash": dashes}}]
    if "low" in shown and (shown["high"] > shown["low"]).any():
        limits = {"y": {"field": "low", "type": "quantitative", "title": y}, "y2": {"field": "high"}}
        layers.insert(0, {"mark": {"type": "area", "opacity": 0.18}, "encoding": {**limits, "color": colour}})
    hidden = {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0}
    points = {"y": vertical, "color": colour, "opacity": hidden, "tooltip": tips}
    layers.append({"params": [near], "mark": {"type": "point", "filled": True, "size": 60}, "encoding": points})
    spec = {"width": "container", "height": 240, "encoding": {"x": horizontal}, "layer": layers}
    names = {"value": "", "low": " lowest", "high": " highest"} if len(layers) > 2 else {"value": ""}
    wide = shown.rename(columns=names).pivot_table(index=x, columns="label", values=list(names.values()), sort=False)
    wide.columns = [f"{label}{name}" for name, label in wide.columns]
    wide = wide[[f"{label}{name}" for label in labels for name in names.values()]].sort_index().reset_index()
    return Chart(title, note, spec, records(shown), [sortable(f"{title}: {y}", wide)])


def heat(
    title: str, note: str, frame: pd.DataFrame, choices: Mapping[str, str], domains: Mapping[str, tuple[float, float]], limit: int
) -> Chart:
    """One projection's modules over the rounds, coloured by the first of `choices`.

    Args:
        title, note: see `Chart`.
        frame: `analysis.modules` of one projection.
        choices: column -> title.
        domains: column -> the range of its colours, shared by all projections.
        limit: at most so many spans of rounds.
    """
    spans = binned(sorted(frame["round"].unique()), limit)
    means = frame.assign(span=frame["round"].map(spans)).groupby(["layer", "span"], sort=False)[list(choices)].mean().reset_index()
    order = list(dict.fromkeys(spans.values()))
    first = next(iter(choices))
    colour = {
        "field": first,
        "type": "quantitative",
        "scale": {"scheme": "cividis", "domain": list(domains[first]), "clamp": True},
        "legend": {"title": choices[first], "orient": "top", "gradientThickness": 10, "titleAnchor": "start", "format": ".2~g"},
    }
    layers = means["layer"].nunique()
    spec = {
        "width": "container",
        "height": layers * (20 if layers <= 12 else 14 if layers <= 32 else 8),
        "mark": {"type": "rect", "stroke": None},
        "encoding": {
            "x": {"field": "span", "type": "ordinal", "sort": order, "title": "round", "axis": {"labelAngle": 0, "labelOverlap": True}},
            "y": {"field": "layer", "type": "ordinal", "title": "layer", "axis": {"labelOverlap": True}},
            "color": colour,
            "tooltip": [
                {"field": "layer"},
                {"field": "span", "title": "round"},
                *({"field": key, "title": name, "format": ".3~g"} for key, name in choices.items()),
            ],
        },
    }
    tables = [
        sortable(f"{title}: {name}, by layer and round", means.pivot(index="layer", columns="span", values=key)[order].reset_index())
        for key, name in choices.items()
    ]
    return Chart(title, note, spec, records(means), tables, {key: (name, domains[key]) for key, name in choices.items()})


def timeline(title: str, note: str, frame: pd.DataFrame) -> Chart:
    """Who took part when: `analysis.participation`, in at most `CELLS` cells; a span with a refusal is shown as refused."""
    refused = frame[frame["outcome"] == "refused"]["client"].value_counts()
    everyone = sorted(frame["client"].unique(), key=lambda client: (-refused.get(client, 0), client))
    shown = sorted(everyone[:100])
    spans = binned(sorted(frame["round"].unique()), max(10, min(100, CELLS // len(shown))))
    part = frame[frame["client"].isin(shown)]
    part = part.assign(span=part["round"].map(spans))
    counts = (
        part.groupby(["client", "span", "outcome"], sort=False).size().unstack(fill_value=0).reindex(columns=list(OUTCOMES), fill_value=0)
    )
    reasons = part[part["reason"] != ""].groupby(["client", "span"])["reason"].first()
    cells = counts.assign(reason=reasons.reindex(counts.index).fillna("")).reset_index()
    cells["outcome"] = np.select([cells[name] > 0 for name in SHOWN_FIRST], SHOWN_FIRST, "not asked")
    order, whole = list(dict.fromkeys(spans.values())), len(spans) == len(set(spans.values()))
    tips = (
        ["client", {"field": "span", "title": "round"}, "outcome", "reason"]
        if whole
        else ["client", {"field": "span", "title": "rounds"}, *OUTCOMES, "reason"]
    )
    spec = {
        "width": "container",
        "height": len(shown) * (20 if len(shown) <= 12 else 12 if len(shown) <= 40 else 6),
        "mark": {"type": "rect"},
        "encoding": {
            "x": {"field": "span", "type": "ordinal", "sort": order, "title": "round", "axis": {"labelAngle": 0, "labelOverlap": True}},
            "y": {"field": "client", "type": "nominal", "sort": shown, "title": None, "axis": {"labelOverlap": True, "labelLimit": 110}},
            "color": {
                "field": "outcome",
                "type": "nominal",
                "title": None,
                "scale": {"domain": list(OUTCOMES), "range": list(OUTCOMES.values())},
            },
            "tooltip": [tip if isinstance(tip, dict) else {"field": tip} for tip in tips],
        },
    }
    if not whole:
        note += " A cell is a span of rounds: refused if any answer in it was."
    if len(shown) < len(everyone):
        note += f" {len(everyone)} clients: these are the {len(shown)} with the most refusals, then by name."
    totals = frame.groupby(["client", "outcome"]).size().unstack(fill_value=0).reindex(columns=list(OUTCOMES), fill_value=0).reset_index()
    if whole:
        cells = cells.drop(columns=list(OUTCOMES))
    return Chart(title, note, spec, records(cells), [sortable(f"{title}: how many rounds, by client and outcome", totals)])


def confusion(title: str, names: Sequence[str], counts: Sequence[Sequence[int]]) -> Chart:
    """Rows by label and by what was predicted: a cell's number is of rows, its colour the share of the label's rows.

    Args:
        title: see `Chart`.
        names: of the classes.
        counts: `counts[label][predicted]`.
    """
    values = [
        {"was": name, "predicted": other, "rows": rows, "share": rows / max(1, sum(row))}
        for name, row in zip(names, counts, strict=True)
        for other, rows in zip(names, row, strict=True)
    ]
    axis = {"labelOverlap": True, "labelLimit": 130}
    colour = {
        "field": "share",
        "type": "quantitative",
        "scale": {"scheme": "cividis", "domain": [0, 1]},
        "legend": {"title": "share of the label's rows", "orient": "top", "gradientThickness": 10, "titleAnchor": "start", "format": ".0%"},
    }
    tips = [{"field": "was", "title": "label"}, {"field": "predicted"}, {"field": "rows"}, {"field": "share", "format": ".1%"}]
    layers: list[Spec] = [{"mark": {"type": "rect"}, "encoding": {"color": colour, "tooltip": tips}}]
    if len(names) <= TOLD:
        ink = {"condition": {"test": "datum.share > 0.55", "value": "#000000"}, "value": "#FFFFFF"}
        layers.append({"mark": {"type": "text", "fontSize": 13}, "encoding": {"text": {"field": "rows"}, "color": ink}})
    spec = {
        "width": "container",
        "height": len(names) * (34 if len(names) <= TOLD else 16 if len(names) <= 40 else 8),
        "encoding": {
            "x": {"field": "predicted", "type": "nominal", "sort": list(names), "title": "predicted", "axis": {**axis, "labelAngle": -30}},
            "y": {"field": "was", "type": "nominal", "sort": list(names), "title": "label", "axis": axis},
        },
        "layer": layers,
    }
    table = pd.DataFrame(counts, columns=list(names))
    table.insert(0, "label", list(names), allow_duplicates=True)
    note = "Rows of each label (down), by what was predicted of them (across); the diagonal is right."
    return Chart(title, note, spec, values, [sortable(f"{title}: rows by label and prediction", table)])
