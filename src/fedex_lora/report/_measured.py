"""What `fedex-lora evaluate --json` found, as a section of a report: metrics, each class, and where rows went."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import BaseModel, ValidationError, model_validator

from fedex_lora.errors import UsageError
from fedex_lora.report._charts import Chart, confusion
from fedex_lora.report._sections import Section
from fedex_lora.report._tables import NOT_FINITE, Sortable, fixed, sortable

COUNTS = ("rows", "unanswered", "prompts_cut")


class _Scores(BaseModel):
    """Of a class."""

    name: Any
    precision: float | None
    recall: float | None
    f1: float | None
    support: float


class Evaluation(BaseModel):
    """A model measured: its metrics, and where there are classes each one's scores and `confusion[label][predicted]`; and another's."""

    model: str
    numbers: dict[str, float]
    classes: list[_Scores] = []
    confusion: list[list[int]] = []
    beside: "Evaluation | None" = None

    @model_validator(mode="before")
    @classmethod
    def _metrics_apart(cls, value: Any) -> Any:
        """The command's output has its metrics at the top; null is a number that is not finite."""
        if not isinstance(value, Mapping):
            return value
        cells = {name: cell for name, cell in value.items() if name not in cls.model_fields and isinstance(cell, int | float | None)}
        return {**value, "numbers": {name: math.nan if cell is None else cell for name, cell in cells.items()}}

    @model_validator(mode="after")
    def _all_there(self) -> "Evaluation":
        if not self.numbers or {len(self.confusion), *map(len, self.confusion)} != {len(self.classes)}:
            raise ValueError("numbers are missing")
        return self

    @property
    def names(self) -> list[str]:
        return [str(one.name) for one in self.classes]


def read_evaluation(path: Path) -> Evaluation:
    """The output of `fedex-lora evaluate --json` in a file.

    Raises:
        UsageError: it is something else.
    """
    try:
        return Evaluation.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        raise UsageError(f"{path} is not what `fedex-lora evaluate RUN --json` prints: write that there, and give it again") from None


def evaluation_section(found: Evaluation) -> Section:
    """Metrics, classes and confusions of a model, and of the one beside it."""
    both = [found, *([found.beside] if found.beside else [])]
    items: list[Chart | Sortable] = [_metrics(both)]
    if found.classes:
        items.append(_by_class(both))
        items += [confusion(f"Confusion matrix: {one.model}", one.names, one.confusion) for one in both if one.confusion]
    note = "On the same rows, after the run." if found.beside else "After the run."
    return Section(f"Measured by evaluate: {found.model}", note, items)


def _metrics(both: list[Evaluation]) -> Sortable:
    rows = []
    for metric in both[0].numbers:
        values = [one.numbers.get(metric) for one in both]
        shown = ["" if value is None else _shown(metric, value) for value in values]
        one, other = (*values, None)[:2]
        apart = math.nan if one is None or other is None or metric in COUNTS else one - other
        more = [f"{apart:+.4f}" if math.isfinite(apart) else ""]
        rows.append([metric, *shown, *(more if len(both) > 1 else [])])
    models = [one.model for one in both]
    names = [f"{name} ({number})" if models.count(name) > 1 else name for number, name in enumerate(models, start=1)]
    return sortable("Metrics", pd.DataFrame(rows, columns=["metric", *names, *(["difference"] if len(both) > 1 else [])]))


def _shown(metric: str, value: float) -> str:
    if not math.isfinite(value):
        return NOT_FINITE
    return f"{value:.0f}" if metric in COUNTS else fixed(value)


def _by_class(both: list[Evaluation]) -> Sortable:
    frame = pd.DataFrame([one.model_dump() for one in both[0].classes])
    if len(both) > 1 and both[1].names == both[0].names:
        frame.insert(4, f"F1 of {both[1].model}", [one.f1 for one in both[1].classes])
    formats = {column: fixed for column in frame.columns if column not in ("name", "support")}
    return sortable("By class", frame, formats, {"name": "class", "f1": "F1", "support": "rows"})
