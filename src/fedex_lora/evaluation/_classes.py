"""What a model predicted of each row: a file of it, and how well each class is told from the others (scikit-learn, the extra `tasks`)."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import EvalPrediction

from fedex_lora.storage.files import finite_json
from fedex_lora.tasks import Task


class ClassScore(NamedTuple):
    """One class: `support` rows have it as their label."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


class ClassScores(NamedTuple):
    """Every class, and `confusion[label][predicted]`: how many rows, in the classes' order."""

    classes: list[ClassScore]
    confusion: list[list[int]]

    def most_confused(self, pairs: int) -> list[tuple[str, str, int]]:
        """(label, predicted, rows) of rows that are wrong, the most frequent first."""
        names = [one.name for one in self.classes]
        wrong = [
            (names[label], names[other], rows)
            for label, row in enumerate(self.confusion)
            for other, rows in enumerate(row)
            if rows and label != other
        ]
        return sorted(wrong, key=lambda one: -one[2])[:pairs]


def class_names_of(task: Task, classes: int) -> list[str]:
    """As the task calls its classes, else their numbers."""
    names: Mapping[int, str] = task.model_config.get("id2label", {})
    return [str(names.get(index, index)) for index in range(classes)]


def class_scores(task: Task, prediction: EvalPrediction) -> ClassScores | None:
    """Precision, recall and F1 of each class, and the confusion matrix; None where the task has no classes, or an output is no number.

    A class that is never predicted has precision zero, one without rows recall zero.
    """
    labels, outputs = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
    if task.model_config.get("num_labels", 1) < 2 or np.isnan(outputs).any():
        return None
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    known, predicted = range(outputs.shape[-1]), outputs.argmax(axis=-1)
    columns = precision_recall_fscore_support(labels, predicted, labels=known, zero_division=0.0)
    rows = zip(class_names_of(task, outputs.shape[-1]), *(column.tolist() for column in columns), strict=True)
    return ClassScores([ClassScore(*row) for row in rows], confusion_matrix(labels, predicted, labels=known).tolist())


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line a row.

    Args:
        path: ends in .tsv or .jsonl.
        rows: all with the same keys.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix.lower() == ".jsonl":
            file.writelines(finite_json(dict(row)) + "\n" for row in rows)
            return
        torn = any("\r" in str(cell) for row in rows for cell in row.values())  # which csv quotes in Python 3.13 only
        style: Any = {"delimiter": "\t", "lineterminator": "\n", "quoting": csv.QUOTE_ALL if torn else csv.QUOTE_MINIMAL}
        writer = csv.DictWriter(file, list(rows[0]), **style)
        writer.writeheader()
        writer.writerows(rows)


def predicted_rows(task: Task, prediction: EvalPrediction, with_rows: bool) -> list[dict[str, Any]]:
    """Of each row where it stands in its file, its label, what was predicted, and of a class its probability.

    Args:
        task: its `eval` are the rows.
        prediction: logits (`rows x classes`) or scores, and labels.
        with_rows: also the row's own columns of text and numbers, before these; of the same name, these hold.
    """
    own = [{str(name): _text(cell) for name, cell in row.items()} if with_rows else {} for row in task.eval.to_dict(orient="records")]
    return [{**row, **line} for row, line in zip(own, _lines(task, prediction), strict=True)]


def _lines(task: Task, prediction: EvalPrediction) -> Iterator[dict[str, Any]]:
    labels, outputs = np.asarray(prediction.label_ids), np.asarray(prediction.predictions)
    places = task.eval_lines or range(1, len(labels) + 1)
    if task.model_config.get("num_labels", 1) < 2:
        for place, label, score in zip(places, labels.reshape(len(labels)), outputs.reshape(len(labels)), strict=True):
            yield {"line": int(place), "label": float(label), "predicted": float(score)}
        return
    names, shares = class_names_of(task, outputs.shape[-1]), torch.softmax(torch.from_numpy(outputs).double(), dim=-1).numpy()
    for place, label, share in zip(places, labels, shares, strict=True):
        best = int(share.argmax())
        yield {"line": int(place), "label": names[int(label)], "predicted": names[best], "probability": round(float(share[best]), 6)}


def _text(cell: Any) -> Any:
    if cell is None or isinstance(cell, str):
        return cell
    try:
        return json.dumps(cell, ensure_ascii=False)
    except TypeError:
        return f"<{type(cell).__name__}>"
