"""Your own rows: sequence or image classification, or a causal LM with a prompt template and the loss on the completion only.

A configuration and a row of its file::

    [task]
    name = "custom"
    kind = "causal-lm"
    train = "trainset.csv"
    eval = "devset.csv"
    prompt = "{mr} ||"
    completion = " {ref}"

    mr,ref
    "name[The Vaults], eatType[pub]",The Vaults is a pub.
"""

import string

import numpy as np
from sklearn.metrics import accuracy_score, f1_score
from transformers import EvalPrediction

from fedex_lora import config
from fedex_lora.errors import DataError
from fedex_lora.peft_io import require_pillow
from fedex_lora.tasks._images import image_cells, image_rows, require_images
from fedex_lora.tasks._task import (
    Rows,
    Task,
    completion_metrics,
    label_indices,
    read_rows,
    require_column,
    require_columns,
    tokenize_completions,
    tokenize_texts,
)


def load(settings: config.Task) -> Task:
    """The task that the settings describe.

    Raises:
        DataError: a file, column or image is missing, or no rows.
        UsageError: images without Pillow.
    """
    if not settings.train or not settings.eval:
        raise DataError("task custom needs task.train and task.eval: files (jsonl, csv, tsv, parquet) or HUB_NAME:SPLIT")
    train, held = read_rows(settings.train, settings.data), read_rows(settings.eval, settings.data)
    for name, rows in ((settings.train, train), (settings.eval, held)):
        if rows.empty:
            raise DataError(f"{name} has no rows: give a file that has some")
    kinds = {"classification": _classification, "causal-lm": _causal_lm, config.IMAGES: _images}
    return kinds[settings.kind](settings, train, held)


def _classification(settings: config.Task, train: Rows, held: Rows) -> Task:
    for name, rows in ((settings.train, train), (settings.eval, held)):
        require_columns(rows, [*settings.text, settings.label], str(name))
    classes = settings.labels or sorted(train[settings.label].unique().tolist())

    def labels(rows: Rows) -> list[int]:
        return label_indices(rows[settings.label].tolist(), classes, f"task.eval, column {settings.label!r},")

    return Task(
        kind="classification",
        train=train,
        eval=held,
        tokenize=lambda tokenizer, rows: tokenize_texts(
            tokenizer, [[str(text) for text in rows[column]] for column in settings.text], labels(rows), settings.max_length
        ),
        metrics=_class_metrics,
        headline="accuracy",
        model_config={"num_labels": len(classes), "problem_type": "single_label_classification"},
        classes=np.asarray(labels(train)),
    )


def _images(settings: config.Task, train: Rows, held: Rows) -> Task:
    require_pillow()
    column = settings.image or "image"
    for name, rows in ((settings.train, train), (settings.eval, held)):
        require_column(rows, column, str(name))
        require_columns(rows, [settings.label], str(name))
        require_images(rows, column, settings.data, str(name))
    classes = settings.labels or sorted(train[settings.label].unique().tolist())
    names = {index: str(value) for index, value in enumerate(classes)}

    def labels(rows: Rows) -> list[int]:
        return label_indices(rows[settings.label].tolist(), classes, f"task.eval, column {settings.label!r},")

    return Task(
        kind="image-classification",
        train=train,
        eval=held,
        tokenize=lambda _, rows: image_rows(image_cells(rows, column, settings.data), labels(rows)),
        metrics=_class_metrics,
        headline="accuracy",
        model_config={
            "num_labels": len(classes),
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
            "problem_type": "single_label_classification",
        },
        classes=np.asarray(labels(train)),
    )


def _class_metrics(prediction: EvalPrediction) -> dict[str, float]:
    values, labels = np.asarray(prediction.predictions).argmax(axis=-1), prediction.label_ids
    return {
        "accuracy": float(accuracy_score(labels, values)),
        "macro_f1": float(f1_score(labels, values, average="macro", zero_division=0.0)),
    }


def _causal_lm(settings: config.Task, train: Rows, held: Rows) -> Task:
    for name, rows in ((settings.train, train), (settings.eval, held)):
        require_columns(rows, placeholders(settings.prompt) + placeholders(settings.completion), str(name))

    def fill(template: str, rows: Rows) -> list[str]:
        return [template.format(**row) for row in rows.to_dict(orient="records")]

    return Task(
        kind="causal-lm",
        train=train,
        eval=held,
        tokenize=lambda tokenizer, rows: tokenize_completions(
            tokenizer, fill(settings.prompt, rows), fill(settings.completion, rows), settings.max_length
        ),
        metrics=completion_metrics,
        headline="loss",
        model_config={},
        classes=np.zeros(len(train), dtype=int),
        greater_is_better=False,
    )


def placeholders(template: str) -> list[str]:
    """The column names in a template."""
    try:
        names = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise DataError(f"template {template!r}: {error}: write column names in braces, and {{{{ for a brace") from None
    plain = all(not spec and not conversion for _, _, spec, conversion in string.Formatter().parse(template))
    if not plain or any(not name.isidentifier() for name in names):
        raise DataError(f"template {template!r}: only plain column names may stand in braces")
    return names
