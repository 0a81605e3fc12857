"""GLUE: CoLA, RTE, MRPC, SST-2, QNLI, STS-B, from the hub or from a folder with the published TSV files.

A row (MRPC, label 1: the sentences say the same)::

    sentence1: Amrozi accused his brother, whom he called "the witness", of deliberately distorting his evidence.
    sentence2: Referring to him as only "the witness", Amrozi accused his brother of deliberately distorting his evidence.

Metrics as on https://gluebenchmark.com/leaderboard, by scikit-learn and scipy. The dev split only measures; nothing is chosen on it.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from fedex_lora import config
from fedex_lora.errors import DataError
from fedex_lora.tasks._files import Rows, read_hub, within
from fedex_lora.tasks._metrics import measuring
from fedex_lora.tasks._rows import require_values
from fedex_lora.tasks._task import Task, label_indices, limit, tokenize_texts

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class Glue:
    """One GLUE task: its folder and columns in the published files, its metrics."""

    folder: str
    text: tuple[str, ...]
    label: str
    metrics: tuple[str, ...]
    classes: tuple[str, ...] = ("0", "1")
    columns: tuple[str, ...] | None = None  # of a file without a header
    hub_text: tuple[str, ...] = ("sentence1", "sentence2")


GLUE = {
    "cola": Glue("CoLA", ("sentence",), "label", ("mcc",), columns=("source", "label", "mark", "sentence"), hub_text=("sentence",)),
    "rte": Glue("RTE", ("sentence1", "sentence2"), "label", ("accuracy",), ("entailment", "not_entailment")),
    "mrpc": Glue("MRPC", ("#1 String", "#2 String"), "Quality", ("accuracy", "f1")),
    "sst2": Glue("SST-2", ("sentence",), "label", ("accuracy",), hub_text=("sentence",)),
    "qnli": Glue(
        "QNLI", ("question", "sentence"), "label", ("accuracy",), ("entailment", "not_entailment"), hub_text=("question", "sentence")
    ),
    "stsb": Glue("STS-B", ("sentence1", "sentence2"), "score", ("pearson", "spearman"), classes=()),
}


def load(name: str, settings: config.TaskSettings) -> Task:
    """The task `glue/NAME`.

    Raises:
        DataError: files or columns are missing, or a label is outside the set.
    """
    glue = GLUE[name]
    names: list[Any]
    if settings.data:
        root = within(settings.data, glue.folder)
        train, held = (_read(root / f"{split}.tsv", glue) for split in ("train", "dev"))
        text, label, names = list(glue.text), glue.label, list(glue.classes)
    else:
        train, held = (read_hub(HUB, name, split) for split in ("train", "validation"))
        text, label, names = list(glue.hub_text), "label", list(range(len(glue.classes)))

    def labels(rows: Rows) -> list[Any]:
        return _scores(rows[label], f"glue/{name}") if not names else label_indices(rows[label], names, f"glue/{name}")

    return Task(
        kind="classification",
        train=train,
        eval=held,
        tokenize=lambda tokenizer, rows: tokenize_texts(
            tokenizer, [list(rows[column]) for column in text], labels(rows), limit(settings, tokenizer)
        ),
        metrics=measuring(*glue.metrics),
        headline=glue.metrics[0],
        model_config={"num_labels": len(names), "problem_type": "single_label_classification"}
        if names
        else {"num_labels": 1, "problem_type": "regression"},
        classes=np.asarray(labels(train)) if names else np.asarray(pd.cut(labels(train), 5, labels=False)),
    )


def _scores(values: Any, where: str) -> list[float]:
    """The labels of a regression."""
    numbers = pd.to_numeric(pd.Series(values), errors="coerce")
    if not np.isfinite(numbers).all():
        odd = np.asarray(values)[~np.isfinite(numbers)][0]
        raise DataError(f"{where} has a score {odd!r} that is no number: mend that row, or leave it out")
    return [float(number) for number in numbers]


def _read(path: Path, glue: Glue) -> Rows:
    if not path.is_file():
        raise DataError(f"{path} does not exist: task.data must hold {glue.folder}/train.tsv and dev.tsv as GLUE publishes them")
    names = list(glue.columns) if glue.columns else None
    try:
        rows = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, dtype=str, keep_default_na=False, encoding="utf-8-sig", names=names)
    except (ValueError, pd.errors.ParserError) as error:
        raise DataError(f"{path} is not a GLUE file: {str(error).splitlines()[0]}") from None
    rows.index += 1 if glue.columns else 2  # lines of the file
    require_values(rows, [*glue.text, glue.label], str(path))
    return rows
