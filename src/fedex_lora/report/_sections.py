"""What a report says: sections of charts, tables and numbers, from runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from fedex_lora.errors import StorageError
from fedex_lora.report import analysis
from fedex_lora.report._charts import Chart, heat, lines, timeline
from fedex_lora.report._groups import VALUES, Group, banded, final_metrics, group_sent, series, worst_error
from fedex_lora.report._tables import Formatter, Sortable, duration, fixed, percent, scientific, significant, size, sortable
from fedex_lora.report.analysis import Run
from fedex_lora.report.analysis._frames import relative, traffic
from fedex_lora.storage.events import Event

SPECTRA: dict[Literal["residual", "base delta"], str] = {
    "residual": "Singular values of R after the last kept round.",
    "base delta": "The same of all that the base gained.",
}
ERRORS = {"exactness_error": "exactness error", "deviation": "averaging alone"}
REFUSALS, LINES, MODULES = 200, 12, 6  # rows of a table, lines of a chart, modules whose spectra are drawn


@dataclass(frozen=True)
class Section:
    """Charts and tables under a heading; `folded` parts are closed until someone opens them."""

    title: str
    note: str = ""
    items: Sequence[Chart | Sortable] = ()
    folded: bool = False
    inner: Sequence["Section"] = field(default_factory=tuple)


def comparison(groups: Sequence[Group]) -> Sortable:
    """One line a label."""
    rows, judged = [], headlines(groups)
    for group in groups:
        ends, frame = final_metrics(group), pd.concat(group.rounds)
        there = {column: frame[column].sum() if column in frame else np.nan for column in ("seconds", "refused")}
        row: dict[str, Any] = {"run": group.label, "seeds": len(group.runs), "rounds": group.last_round} | dict.fromkeys(judged, np.nan)
        row[group.first.started.headline] = float(np.mean(ends)) if ends else np.nan
        row |= {"lowest": np.min(ends), "highest": np.max(ends)} if ends else {"lowest": np.nan, "highest": np.nan}
        row |= {name: worst_error(frame, column) for column, name in ERRORS.items()}
        row |= dict(zip(("sent down", "sent up"), group_sent(group), strict=True))
        row |= {"time": there["seconds"] / len(group.runs), "refused": int(np.nan_to_num(there["refused"]))}
        rows.append(row)
    made = pd.DataFrame(rows)
    several = bool((made["seeds"] > 1).any())
    if not several:
        made = made.drop(columns=["lowest", "highest", "seeds"])
    formats: dict[str, Formatter] = dict.fromkeys([*judged, "lowest", "highest"], fixed)
    formats |= dict(zip(ERRORS.values(), (scientific, percent), strict=True))
    formats |= {"sent down": size, "sent up": size, "time": duration}
    caption = (
        f"{' or '.join(judged)} after the last round; the errors are of the worst round: exactness error of its worst module, averaging "
        "alone of the whole model"
    )
    return sortable(caption + "; means over the seeds, errors of the worst seed, refused in all seeds" * several, made, formats)


def headlines(groups: Sequence[Group]) -> list[str]:
    """The metrics that the runs' tasks are judged by."""
    return list(dict.fromkeys(group.first.started.headline for group in groups))


def curves(groups: Sequence[Group]) -> Section:
    """How good the model was."""
    judged = headlines(groups)
    wanted = dict.fromkeys(judged, "the global model on the task's evaluation rows") | {"loss": "the same model's loss there"}
    wanted |= dict.fromkeys([f"held_out_{name}" for name in judged], "on the clients' own held-out rows, the mean by rows")
    wanted |= {"held_out_loss": "the loss there"}
    charts = []
    for column, note in wanted.items():
        name = column.removeprefix("held_out_")
        title = name if column == name else f"{name} on the clients' rows"
        charts.append(
            lines(title[:1].upper() + title[1:], f"{note[:1].upper()}{note[1:]}, after each round.", series(groups, column), name)
        )
    several = any(len(group.runs) > 1 for group in groups)
    note = "Lines are means over the seeds, bands reach from the lowest to the highest." if several else ""
    return Section("How good the model was", note, [chart for chart in charts if chart])


def deviation_section(groups: Sequence[Group]) -> Section:
    """How far averaging the factors is from the ideal."""
    parts, absolute, layers = [], [], []
    for group in groups:
        frames = [frame for frame in group.modules if not frame.empty]
        if frames:
            parts.append(banded(frames, ["round"], "relative").assign(label=group.label))
            absolute.append(banded(frames, ["round"], "scaled").assign(label=group.label))
            firsts = [frame[(frame["round"] == frame["round"].min()) & (frame["layer"] >= 0)] for frame in frames]
            by = banded(firsts, ["projection", "layer"], "relative")
            layers.append(by.assign(label=[f"{group.label}: {name}" if len(groups) > 1 else name for name in by["projection"]]))
    if not parts:
        return Section("")
    count = sum(one["label"].nunique() for one in layers)
    both = [
        lines(
            "Across rounds",
            "|R| / |M|, the mean over all modules, small ones and large ones alike: the share of the ideal update M that averaging the "
            "factors alone loses. (The headline number is that of the whole model.)",
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
    if count > LINES:
        note += f" By layer these would be {count} lines: see the heat maps."
    return Section("What plain averaging would lose", note, [chart for chart in both if chart])


def communication_section(groups: Sequence[Group]) -> Section:
    """What travelled."""
    total = lines("Bytes so far", "All clients together, after each round.", series(groups, "bytes_total"), "bytes", format=".3~s")
    means = []
    for group in groups:
        seeds = pd.DataFrame([traffic(run.events) for run in group.runs])
        means.append({"run": group.label, **seeds.iloc[0], **seeds.drop(columns="method").mean()})
    frame = relative(pd.DataFrame(means))
    formats = {name: size for name in ("bytes_down", "bytes_up", "bytes_total", "base_bytes")}
    names = {"bytes_down": "down", "bytes_up": "up", "bytes_total": "both", "base_bytes": "the base, once"}
    names |= {"relative": "relative", "relative_with_base": "relative, with the base"}
    over = ", means over the seeds" if any(len(group.runs) > 1 for group in groups) else ""
    caption = (
        f"Bytes of all clients and rounds, and of the message that brings the final model to all{over}. Relative to fedex, or the first; "
        "with the base: as if each client had also downloaded it once."
    )
    table = sortable(caption, frame.drop(columns="method"), formats, names)
    return Section("What travelled", "", [item for item in (total, table) if item])


def details(group: Group, budget: int, folded: bool) -> Section:
    """One run of a group, in detail."""
    run = group.first
    inner = [_heat_maps(group.modules[0], budget), _spectra(run), _exactness(group), _participation(group), _clients(run)]
    title = "Round by round" if not folded else f"{group.label}, round by round"
    note = f"Of the run with seed {run.config.get('seed')}; refusals and warnings are those of all seeds." if len(group.runs) > 1 else ""
    return Section(title, note, folded=folded, inner=[part for part in inner if part and part.items])


def _heat_maps(modules: pd.DataFrame, budget: int) -> Section:
    if modules.empty:
        return Section("")
    projections = list(dict.fromkeys(modules.sort_values("layer")["projection"]))
    limit = int(np.clip(budget // max(1, modules["module"].nunique()), 5, 60))
    highest = {key: float(f"{modules[key].quantile(0.99):.3g}") for key in VALUES}
    domains = {key: (0.0, top if top > 0 else 1.0) for key, top in highest.items()}
    note = (
        "Darker is less; the brightest colour is the 99th percentile and all above it. Rounds are averaged in spans where there are many."
    )
    charts = [heat(name, "", modules[modules["projection"] == name], VALUES, domains, limit) for name in projections]
    return Section("Deviation of plain averaging, by layer and projection", note, charts)


def _spectra(run: Run) -> Section:
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
    return Section("What the lost part is made of", "", items)


def _exactness(group: Group) -> Section:
    frame = group.rounds[0]
    names = {"exactness_error": "from the factors", "realised_error": "from the model's layers", "floor": "floor of their precision"}
    parts = [
        pd.DataFrame({"round": frame["round"], "value": frame[column].astype(float), "label": name})
        for column, name in names.items()
        if column in frame
    ]
    if not parts:
        return Section("")
    note = "Worst module: |model − mean of the participants' models| / |ideal update|, in 64 bits."
    chart = lines("Exactness error", note, pd.concat(parts, ignore_index=True), "relative error", log=True)
    return Section("How exact it was", "", [chart] if chart else [])


def _all_seeds(group: Group, frame_of: Callable[[Sequence[Event]], pd.DataFrame]) -> pd.DataFrame:
    """One frame of all runs' events, with the seed where there are several."""
    frames = [frame_of(run.events) for run in group.runs]
    if len(frames) > 1:
        frames = [frame.assign(seed=str(run.config.get("seed"))) for frame, run in zip(frames, group.runs, strict=True)]
    return pd.concat(frames, ignore_index=True)


def _participation(group: Group) -> Section:
    frame, refused = analysis.participation(group.first.events), _all_seeds(group, analysis.refusals)
    items: list[Chart | Sortable] = [timeline("Participation", "Whose update is part of each round's mean.", frame)] if len(frame) else []
    if len(refused):
        reasons = refused.groupby("reason").agg(times=("round", "size"), clients=("client", "nunique"), last=("round", "max")).reset_index()
        reasons = reasons.sort_values("times", ascending=False)
        note = f", the last {REFUSALS} of {len(refused)}" if len(refused) > REFUSALS else ""
        items.append(sortable("Why answers were refused", reasons.head(REFUSALS), names={"last": "last round"}))
        items.append(sortable(f"Refused answers{note}", refused.tail(REFUSALS)))
    if len(told := _all_seeds(group, analysis.messages)):
        items.append(sortable("Warnings and interruptions", told.tail(REFUSALS)))
    return Section("Who took part", "", items)


def _clients(run: Run) -> Section:
    frame = analysis.clients(run.events)
    if frame.empty:
        return Section("")
    items: list[Chart | Sortable] = []
    if frame["drift"].notna().any():
        by = frame.astype({"drift": float}).groupby("round")["drift"].agg(value="mean", low="min", high="max").reset_index()
        note = "|client's update − mean| / |mean|: the mean over the clients, and from the nearest to the farthest."
        drift = lines("Drift", note, by.assign(label="clients"), "drift", format=".2f")
        items += [drift] if drift else []
    headline = f"held_out_{run.started.headline}"
    columns = {"rounds": ("round", "nunique"), "rows": ("num_examples", "last")}
    columns |= {"loss": ("train_loss", "last")} if "train_loss" in frame else {}
    columns |= {headline: (headline, "last")} if headline in frame else {}
    columns |= {"drift": ("drift", "mean"), "sent up": ("bytes_up", "sum"), "seconds a round": ("seconds", "mean")}
    kept = {name: spec for name, spec in columns.items() if spec[0] in frame}
    by_client = frame.astype({"drift": float}).groupby("client").agg(**kept).reset_index()
    formats = {"loss": fixed, headline: fixed, "drift": significant, "sent up": size, "seconds a round": significant}
    names = {"rows": "training rows", "loss": "last training loss", headline: f"{run.started.headline} on own rows", "drift": "mean drift"}
    items.append(sortable("Clients, over the rounds that they answered", by_client, formats, names))
    return Section("The clients", "", items)
