"""What a report says: sections of charts, tables and numbers, from runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from fedex_lora import analysis
from fedex_lora.analysis import Run
from fedex_lora.display import size
from fedex_lora.errors import StorageError
from fedex_lora.report._charts import CELLS, Chart, heat, lines, timeline
from fedex_lora.report._tables import Format, Table, duration, fixed, percent, scientific, significant, table

VALUES = {
    "relative": "relative to the ideal update",
    "scaled": "root mean square over the weight's entries",
    "effective_rank": "effective rank of what is lost",
}
SPECTRA: dict[Literal["residual", "base delta"], str] = {
    "residual": "Singular values of R after the last kept round.",
    "base delta": "Singular values of all that the frozen base has gained by then.",
}
REFUSALS, LINES, MODULES = 200, 12, 6  # rows of a table, lines of a chart, modules whose spectra are drawn


@dataclass(frozen=True)
class Part:
    """Charts and tables under a heading; `folded` parts are closed until someone opens them."""

    title: str
    note: str = ""
    items: Sequence[Chart | Table] = ()
    folded: bool = False
    inner: Sequence["Part"] = field(default_factory=tuple)


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seed only, with `analysis.rounds` and `analysis.modules` of each."""

    label: str
    runs: Sequence[Run]
    rounds: Sequence[pd.DataFrame]
    modules: Sequence[pd.DataFrame]

    @property
    def first(self) -> Run:
        return self.runs[0]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs by label, in their order."""
    names = analysis.labels(runs)
    groups = []
    for label in dict.fromkeys(names):
        members = [run for run, name in zip(runs, names, strict=True) if name == label]
        frames = [analysis.rounds(run.events) for run in members]
        groups.append(Group(label, members, frames, [analysis.modules(run) for run in members]))
    return groups


def curve(groups: Sequence[Group], column: str) -> pd.DataFrame:
    """A column over the rounds: `round`, `label`, and over the seeds the mean `value`, `low` and `high`."""
    parts = []
    for group in groups:
        seeds = [frame.set_index("round")[column] for frame in group.rounds if column in frame]
        if seeds:
            together = pd.concat(seeds, axis=1).astype(float)
            means = {"value": together.mean(axis=1), "low": together.min(axis=1), "high": together.max(axis=1)}
            parts.append(pd.DataFrame(means).assign(label=group.label).rename_axis("round").reset_index())
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["round", "label", "value", "low", "high"])


def final(group: Group, column: str) -> list[float]:
    """A column's last value in every run of a group."""
    ends = [frame[column].dropna() for frame in group.rounds if column in frame]
    return [float(end.iloc[-1]) for end in ends if len(end)]


def tiles(group: Group) -> list[tuple[str, str, str]]:
    """The headline numbers: what, how much, and of what."""
    run, frame, headline = group.first, group.rounds[0], group.first.headline
    shown = headline if headline in frame else f"held_out_{headline}"
    found = []
    if ends := final(group, shown):
        where = "evaluation rows" if shown == headline else "the clients' own rows"
        before = frame[shown].dropna()
        base = f", {before.iloc[0]:.4f} before training" if len(before) and frame["round"].iloc[before.index[0]] == 0 else ""
        found.append((headline, f"{np.mean(ends):.4f}", f"{where}, round {frame['round'].max()}{base}"))
    if "exactness_error" in frame:
        found.append(("exactness error", scientific(frame["exactness_error"].max()), "worst round and module, from the factors"))
    if "deviation" in frame:
        note = f"what it would lose of the update: most in one round; {percent(frame['deviation'].iloc[-1])} in the last"
        found.append(("plain averaging", percent(frame["deviation"].max()), note))
    down, up = frame["bytes_down"].sum(), frame["bytes_up"].sum()
    found.append(("travelled", size(down + up), f"{size(down)} down, {size(up)} up, all clients and rounds"))
    asked, refused = (int(frame[column].sum()) if column in frame else 0 for column in ("participants", "refused"))
    found.append(
        ("answers refused", str(refused), f"of {asked} in {int(frame['round'].max())} rounds, {len(run.started['clients'])} clients")
    )
    if "seconds" in frame:
        found.append(("time", duration(frame["seconds"].sum()), f"{duration(frame['seconds'].mean())} a round"))
    return found


def comparison(groups: Sequence[Group]) -> Table:
    """One line a label."""
    rows = []
    for group in groups:
        headline = group.first.headline
        shown = headline if any(headline in frame for frame in group.rounds) else f"held_out_{headline}"
        ends, frame = final(group, shown), pd.concat(group.rounds)
        row: dict[str, Any] = {"run": group.label, "seeds": len(group.runs), "rounds": int(frame["round"].max())}
        row |= {
            headline: float(np.mean(ends)) if ends else np.nan,
            "lowest": min(ends, default=np.nan),
            "highest": max(ends, default=np.nan),
        }
        for column in ("exactness_error", "deviation"):
            row[column] = frame[column].max() if column in frame else np.nan
        row |= {name: frame[name].sum() / len(group.runs) for name in ("bytes_down", "bytes_up")}
        row |= {"seconds": frame["seconds"].sum() / len(group.runs) if "seconds" in frame else np.nan}
        row |= {"refused": int(frame["refused"].sum()) if "refused" in frame else 0}
        rows.append(row)
    made = pd.DataFrame(rows)
    if (made["seeds"] == 1).all():
        made = made.drop(columns=["lowest", "highest", "seeds"])
    formats: dict[str, Format] = {
        groups[0].first.headline: fixed,
        "lowest": fixed,
        "highest": fixed,
        "exactness_error": scientific,
        "deviation": percent,
    }
    formats |= {"bytes_down": size, "bytes_up": size, "seconds": duration}
    names = {
        "exactness_error": "exactness error",
        "deviation": "averaging alone",
        "bytes_down": "sent down",
        "bytes_up": "sent up",
        "seconds": "time",
    }
    caption = f"{groups[0].first.headline} after the last round; the errors are of the worst round"
    return table(caption, made, formats, names)


def curves(groups: Sequence[Group]) -> Part:
    """How good the model was."""
    headline = groups[0].first.headline
    wanted = {headline: "the global model on the task's evaluation rows", "loss": "the same model's loss there"}
    wanted |= {f"held_out_{headline}": "on the clients' own held-out rows, the mean by rows", "held_out_loss": "the loss there"}
    charts = []
    for column, note in wanted.items():
        name = column.removeprefix("held_out_")
        title = name if column == name else f"{name} on the clients' rows"
        charts.append(lines(title[:1].upper() + title[1:], f"{note[:1].upper()}{note[1:]}, after each round.", curve(groups, column), name))
    several = any(len(group.runs) > 1 for group in groups)
    note = "Lines are means over the seeds, bands reach from the lowest to the highest." if several else ""
    return Part("How good the model was", note, [chart for chart in charts if chart])


def deviations(groups: Sequence[Group]) -> Part:
    """How far averaging the factors is from the ideal."""
    parts, absolute, layers = [], [], []
    for group in groups:
        modules = pd.concat(group.modules)
        if not modules.empty:
            for column, curves_of in (("relative", parts), ("scaled", absolute)):
                means = modules.groupby("round")[column].agg(value="mean", low="mean", high="mean").reset_index()
                curves_of.append(means.assign(label=group.label))
            first = modules[(modules["round"] == modules["round"].min()) & (modules["layer"] >= 0)]
            by = first.groupby(["projection", "layer"])["relative"].mean().reset_index(name="value")
            layers.append(by.assign(label=[f"{group.label}: {name}" if len(groups) > 1 else name for name in by["projection"]]))
    if not parts:
        return Part("")
    count = sum(one["label"].nunique() for one in layers)
    both = [
        lines(
            "Across rounds",
            "|R| / |M|, the mean over all modules: the share of the ideal update M that averaging the factors alone loses.",
            pd.concat(parts, ignore_index=True),
            "|R| / |M|",
            format=".1%",
        ),
        lines(
            "Across rounds, in absolute numbers",
            "|R| / sqrt(out in), the mean over all modules: it falls as the clients' updates get smaller or come to agree.",
            pd.concat(absolute, ignore_index=True),
            "root mean square of R",
            format=".2~e",
        ),
        lines(
            "By layer, first round",
            "|R| / |M| of each projection after the first round (the paper's figure 2).",
            pd.concat(layers, ignore_index=True),
            "|R| / |M|",
            x="layer",
            format=".1%",
        )
        if count <= LINES
        else None,
    ]
    note = (
        "Averaging the factors A and B, as most tools do, gives R less than the mean M of the clients' updates. What is drawn is what that "
        "would lose, whichever method ran: an exact method puts R into the frozen base."
    )
    return Part("What plain averaging would lose", note, [chart for chart in both if chart])


def communication(groups: Sequence[Group]) -> Part:
    """What travelled."""
    total = lines("Bytes so far", "Down and up, all clients together.", curve(groups, "bytes_total"), "bytes", format=".3~s")
    frame = analysis.communication({group.label: group.first.events for group in groups})
    formats = {name: size for name in ("bytes_down", "bytes_up", "bytes_total", "base_bytes")}
    names = {"bytes_down": "down", "bytes_up": "up", "bytes_total": "both", "base_bytes": "the base, once"}
    names |= {"relative": "relative", "relative_with_base": "relative, with the base"}
    caption = (
        "Bytes of all clients and rounds. Relative to fedex, or the first; with the base: as if each client had also downloaded it once."
    )
    return Part("What travelled", "", [item for item in (total, table(caption, frame.drop(columns="method"), formats, names)) if item])


def details(group: Group, budget: int, folded: bool) -> Part:
    """One run of a group, in detail."""
    run = group.first
    inner = [_heat_maps(group.modules[0], budget), _spectra(run), _exactness(group), _participation(run), _clients(run)]
    title = "Round by round" if not folded else f"{group.label}, round by round"
    seed = f"The run with seed {run.config.get('seed')}." if len(group.runs) > 1 else ""
    return Part(title, seed, folded=folded, inner=[part for part in inner if part and part.items])


def _heat_maps(modules: pd.DataFrame, budget: int) -> Part:
    if modules.empty:
        return Part("")
    projections = list(dict.fromkeys(modules.sort_values("layer")["projection"]))
    limit = int(np.clip(budget // max(1, modules["module"].nunique()), 5, 60))
    domains = {key: (0.0, float(f"{modules[key].quantile(0.99):.3g}") or 1.0) for key in VALUES}
    note = "Darker is less. Rounds are averaged in spans where there are many."
    charts = [heat(name, "", modules[modules["projection"] == name], VALUES, domains, limit) for name in projections]
    return Part("Deviation of plain averaging, by layer and projection", note, charts)


def _spectra(run: Run) -> Part:
    """Of the last round that is kept; nothing where its folder is gone, or the base gained nothing."""
    items = []
    for of, what in SPECTRA.items():
        try:
            frame = analysis.spectrum(run.folder, of, MODULES)
        except (StorageError, OSError):
            continue
        if not frame.empty:
            frame = frame[frame["value"] > 1e-7 * frame.groupby("module")["value"].transform("max")]  # what the factors' fp32 can hold
            shown = pd.DataFrame({"index": frame["index"], "value": frame["value"]})
            names = [f"{layer} {kind}" if layer >= 0 else kind for layer, kind in zip(frame["layer"], frame["projection"], strict=True)]
            ranks = frame.groupby("module")["effective_rank"].first()
            note = f"{what} Effective rank: {significant(ranks.min())} to {significant(ranks.max())}."
            chart = lines(f"Spectrum of the {of}", note, shown.assign(label=names), "singular value", x="index", log=True)
            items += [chart] if chart else []
    return Part("What the lost part is made of", "", items)


def _exactness(group: Group) -> Part:
    frame = group.rounds[0]
    names = {"exactness_error": "from the factors", "realised_error": "from the model's layers", "floor": "floor of their precision"}
    parts = [
        pd.DataFrame({"round": frame["round"], "value": frame[column].astype(float), "label": name})
        for column, name in names.items()
        if column in frame
    ]
    if not parts:
        return Part("")
    note = "Worst module: |model − mean of the participants' models| / |ideal update|, in 64 bits."
    chart = lines("Exactness error", note, pd.concat(parts, ignore_index=True), "relative error", log=True)
    return Part("How exact it was", "", [chart] if chart else [])


def _participation(run: Run) -> Part:
    frame, refused = analysis.participation(run.events), analysis.refusals(run.events)
    if frame.empty:
        return Part("")
    items: list[Chart | Table] = [timeline("Participation", "Whose update is part of each round's mean.", frame)]
    if len(refused):
        reasons = refused.groupby("reason").agg(times=("round", "size"), clients=("client", "nunique"), last=("round", "max")).reset_index()
        reasons = reasons.sort_values("times", ascending=False)
        note = f", the last {REFUSALS} of {len(refused)}" if len(refused) > REFUSALS else ""
        items += [
            table("Why answers were refused", reasons.head(REFUSALS), names={"last": "last round"}),
            table(f"Refused answers{note}", refused.tail(REFUSALS)),
        ]
    if len(told := analysis.messages(run.events)):
        items.append(table("Warnings and interruptions", told.tail(REFUSALS)))
    return Part("Who took part", "", items)


def _clients(run: Run) -> Part:
    frame = analysis.clients(run.events)
    if frame.empty:
        return Part("")
    items: list[Chart | Table] = []
    if frame["drift"].notna().any():
        by = (
            frame.astype({"drift": float})
            .groupby("round")["drift"]
            .agg(value="mean", low="min", high="max")
            .reset_index()
            .assign(label="clients")
        )
        note = "|client's update − mean| / |mean|: the mean over the clients, and from the nearest to the farthest."
        drift = lines("Drift", note, by, "drift", format=".2f")
        items += [drift] if drift else []
    headline = f"held_out_{run.headline}"
    columns = {"rounds": ("round", "nunique"), "rows": ("num_examples", "last")}
    columns |= {"loss": ("train_loss", "last")} if "train_loss" in frame else {}
    columns |= {headline: (headline, "last")} if headline in frame else {}
    columns |= {"drift": ("drift", "mean"), "sent up": ("bytes_up", "sum"), "seconds a round": ("seconds", "mean")}
    kept = {name: spec for name, spec in columns.items() if spec[0] in frame}
    by_client = frame.astype({"drift": float}).groupby("client").agg(**kept).reset_index()
    formats = {"loss": fixed, headline: fixed, "drift": significant, "sent up": size, "seconds a round": significant}
    names = {"rows": "training rows", "loss": "last training loss", headline: f"{run.headline} on own rows", "drift": "mean drift"}
    items.append(table("Clients, over the rounds that they answered", by_client, formats, names))
    return Part("The clients", "", items)


def cells_each(groups: Sequence[Group]) -> int:
    """How many cells of heat maps one group may have."""
    return 2 * CELLS // max(1, len(groups))
