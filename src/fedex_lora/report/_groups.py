"""Runs that differ in their seed only, as one group, and their curves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from fedex_lora.report import analysis
from fedex_lora.report.analysis import Run

VALUES = {
    "relative": "relative to the ideal update",
    "scaled": "root mean square over the weight's entries",
    "effective_rank": "effective rank of what is lost",
}


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in their seed only (`seeds` of them), with `analysis.rounds` and `analysis.modules` of each."""

    label: str
    runs: Sequence[Run]
    rounds: Sequence[pd.DataFrame]
    modules: Sequence[pd.DataFrame]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def last_round(self) -> int:
        return max((int(frame["round"].max()) for frame in self.rounds if len(frame)), default=0)

    def over(self, word: str) -> str:
        """What a number of all seeds is; nothing where there is one."""
        return f", {word} of {len(self.runs)} seeds" if len(self.runs) > 1 else ""


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs by label, in their order."""
    names = analysis.labels(runs)
    groups = []
    for label in dict.fromkeys(names):
        members = [run for run, name in zip(runs, names, strict=True) if name == label]
        frames = [analysis.rounds(run.events) for run in members]
        groups.append(Group(label, members, frames, [analysis.modules(run) for run in members]))
    return groups


def series(groups: Sequence[Group], column: str) -> pd.DataFrame:
    """A column over the rounds: `round`, `label`, and over the seeds the mean `value`, `low` and `high`."""
    frames = {group.label: [frame.astype({column: float}) for frame in group.rounds if column in frame] for group in groups}
    parts = [banded(seeds, ["round"], column).assign(label=label) for label, seeds in frames.items() if seeds]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["round", "label", "value", "low", "high"])


def banded(frames: Sequence[pd.DataFrame], by: list[str], column: str) -> pd.DataFrame:
    """The mean over the rows of each seed's frame, and of that over the seeds the mean `value`, `low` and `high`: NaN if a seed's is."""
    seeds = pd.concat([frame.groupby(by)[column].mean().reset_index() for frame in frames]).groupby(by)[column]
    whole = seeds.count() == seeds.size()
    return seeds.agg(value="mean", low="min", high="max").where(whole, axis=0).reset_index()


def final(group: Group, column: str) -> list[float]:
    """A column's last number in every run of a group."""
    ends = [frame[column].dropna() for frame in group.rounds if column in frame]
    return [float(end.iloc[-1]) for end in ends if len(end)]


def final_metrics(group: Group) -> list[float]:
    """What every run of a group is judged by, after its last round; NaN where that is no finite number."""
    column = judged_column(group)
    return [float(frame[column].iloc[-1]) if column in frame else math.nan for frame in group.rounds if len(frame)]


def worst_error(frame: pd.DataFrame, column: str) -> float:
    """The largest of a column; infinity where one could not be computed."""
    if "not_finite" in frame and frame["not_finite"].fillna("").str.split(", ").map(lambda names: column in names).any():
        return math.inf
    return float(frame[column].max()) if column in frame else math.nan


def group_sent(group: Group) -> tuple[float, float]:
    """Bytes down and up of a run, the mean over the seeds."""
    down, up = zip(*(analysis.sent(run.events) for run in group.runs), strict=True)
    return sum(down) / len(down), sum(up) / len(up)


def judged_column(group: Group) -> str:
    """The column that a group is judged by: the headline on the evaluation rows, or where there is no global model on the clients'."""
    headline = group.first.started.headline
    return headline if any(headline in frame for frame in group.rounds) else f"held_out_{headline}"
