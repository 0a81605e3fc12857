"""What a task is: rows, how they become tokens, and how predictions become numbers."""

import csv
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from datasets import Dataset, load_dataset
from numpy.typing import NDArray
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, EvalPrediction

from fedex_lora import config
from fedex_lora.errors import DataError

Rows: TypeAlias = pd.DataFrame
Array: TypeAlias = NDArray[Any]
IGNORED = -100  # the label that transformers leaves out of the loss


@dataclass(frozen=True, eq=False)
class Generation:
    """How a task is measured by what the model writes. Too slow for every round; `fedex-lora evaluate` does it.

    Attributes:
        rows: what is asked.
        prompts: (tokenizer, rows) -> one text a row; it becomes tokens as in training.
        score: (texts, rows) -> name -> number; a text without an answer counts as wrong, and is counted in `unanswered`.
        settings: fields of `transformers.GenerationConfig`; repeated n-grams are those of the written text only.
        require: raises, before anything is generated, where `score` could not be computed here.
        column: of `rows`, what a text is an answer to.
    """

    rows: Rows
    prompts: Callable[[Any, Rows], list[str]]
    score: Callable[[list[str], Rows], dict[str, float]]
    settings: Mapping[str, Any]
    require: Callable[[], None]
    column: str


@dataclass(frozen=True, eq=False)
class Task:
    """A loaded task.

    Attributes:
        kind: the head that the model needs.
        train, eval: rows to learn from, rows that only measure.
        tokenize: (tokenizer, rows) -> data set of `input_ids`, `attention_mask`, `labels`; of images (encoded) and `labels`.
        metrics: predictions -> name -> number.
        headline: the metric that ranks rounds on the clients' own held-out rows.
        model_config: what the model's config needs (`num_labels`, `problem_type`).
        classes: one value a training row, for Dirichlet partitions.
        greater_is_better: of the headline.
        generation: for tasks that are measured by what the model writes.
    """

    kind: Literal["classification", "causal-lm", "image-classification"]
    train: Rows
    eval: Rows
    tokenize: Callable[[Any, Rows], Dataset]
    metrics: Callable[[EvalPrediction], dict[str, float]]
    headline: str
    model_config: Mapping[str, Any]
    classes: Array
    greater_is_better: bool = True
    generation: Generation | None = None

    def limited(self, train_rows: int | None, eval_rows: int | None, seed: int) -> "Task":
        """The same task with at most so many rows, drawn at random and kept in their order."""
        kept, asked = _draw(len(self.train), train_rows, seed), self.generation
        return replace(
            self,
            train=self.train.iloc[kept].reset_index(drop=True),
            eval=_drawn(self.eval, eval_rows, seed),
            classes=self.classes[kept],
            generation=replace(asked, rows=_drawn(asked.rows, eval_rows, seed)) if asked else None,
        )


def _draw(rows: int, wanted: int | None, seed: int) -> Array:
    if wanted is None or wanted >= rows:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, wanted, replace=False))


def _drawn(rows: Rows, wanted: int | None, seed: int) -> Rows:
    return rows.iloc[_draw(len(rows), wanted, seed)].reset_index(drop=True)


def text_collator(kind: str, tokenizer: Any) -> Any:
    """Pads a batch: inputs by the tokenizer, labels of a causal LM with `IGNORED`."""
    if kind == "causal-lm":
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    return DataCollatorWithPadding(tokenizer)


def tokenize_texts(tokenizer: Any, texts: list[list[str]], labels: list[Any], max_length: int) -> Dataset:
    """Classification inputs: one text or a pair a row."""
    columns = [list(column) for column in texts]
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    return Dataset.from_dict({**encoded, "labels": labels})


def tokenize_completions(tokenizer: Any, prompts: list[str], completions: list[str], max_length: int, end: bool = True) -> Dataset:
    """Causal-LM inputs: prompt then completion then the end token; labels on the completion only; long prompts lose their beginning."""
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    tail = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
    heads = tokenizer(prompts, return_attention_mask=False)["input_ids"]
    answers = tokenizer(completions, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    for head, answer in zip(heads, answers, strict=True):
        answer = (answer + tail)[: max_length - 1]
        head = head[max(0, len(head) + len(answer) - max_length) :]
        rows["input_ids"].append(head + answer)
        rows["attention_mask"].append([1] * (len(head) + len(answer)))
        rows["labels"].append([IGNORED] * len(head) + answer)
    return Dataset.from_dict(rows)


def completion_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Of the argmax at each completion token, with the true tokens before it: the share that is right, and of rows that are all right."""
    predicted, labels = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
    counted = labels != IGNORED
    right = (predicted == labels) | ~counted
    return {"token_accuracy": float(right[counted].mean()), "accuracy": float(right.all(axis=1).mean())}


def read_rows(source: str, data: Path | None = None) -> Rows:
    """The rows of a jsonl, json, csv, tsv or parquet file, or of HUB_NAME:SPLIT (nothing is cached of a local file).

    Raises:
        DataError: not there, not readable, or a hub that cannot be reached.
    """
    path = data / source if data else Path(source)
    readers: dict[str, Callable[[Path], Rows]] = {
        ".jsonl": lambda file: pd.read_json(file, lines=True),
        ".json": pd.read_json,
        ".csv": lambda file: _read_table(file),
        ".tsv": lambda file: _read_table(file, sep="\t", quoting=csv.QUOTE_NONE),
        ".parquet": pd.read_parquet,
    }
    if path.suffix in readers:
        if not path.is_file():
            raise DataError(f"{path} does not exist: give task.train and task.eval as files, or HUB_NAME:SPLIT", "file")
        try:
            return readers[path.suffix](path)
        except (ValueError, OSError, pd.errors.ParserError) as error:
            code = "encoding" if isinstance(error, UnicodeError) else "table"
            raise DataError(f"{path} cannot be read as {path.suffix[1:]}: {str(error).splitlines()[0]}", code) from None
    if path.is_file():
        raise DataError(f"{path} has an ending that is not read: give {', '.join(readers)}, or HUB_NAME:SPLIT", "table")
    name, _, split = source.partition(":")
    return read_hub(name, None, split or "train")


def _read_table(path: Path, **options: Any) -> Rows:
    """A delimited file; a row with more fields than the header is an error, not a shift of columns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            return pd.read_csv(path, keep_default_na=False, index_col=False, **options)
        except pd.errors.ParserWarning:
            raise DataError(f"{path} has rows with more fields than its header: quote fields that hold the separator", "table") from None


def read_layout(root: Path, name: str, layout: str) -> Rows:
    """A file of a published layout.

    Raises:
        DataError: it is not there (`layout` says what should be), or not readable.
    """
    if not (root / name).is_file():
        raise DataError(f"{root / name} does not exist: task.data must hold {layout}", "file")
    return read_rows(name, root)


def within(data: Path, name: str) -> Path:
    """The folder `name` in `data`, or `data` itself, where that is the folder."""
    return data / name if (data / name).is_dir() else data


def read_hub(name: str, subset: str | None, split: str, **options: Any) -> Rows:
    """A split of a data set on the Hugging Face hub (or, with `name` "json", of `data_files`, which may be addresses)."""
    try:
        frame = load_dataset(name, subset, split=split, **options).to_pandas()
    except Exception as error:  # datasets, hub and network each raise their own
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        source = options.get("data_files", name)
        raise DataError(
            f"data set {source} ({split}) cannot be had from the hub: go online, or give task.data as a local folder ({reason})", "table"
        ) from None
    assert isinstance(frame, pd.DataFrame)
    return frame


def require_columns(rows: Rows, columns: list[str], where: str) -> None:
    """Every column is there, with a value in every row."""
    for column in columns:
        require_column(rows, column, where)
        empty = rows[column].isna() | (rows[column].astype(str).str.strip() == "")
        if empty.any():
            count = int(empty.sum())
            raise DataError(
                f"{where}: row {int(np.argmax(empty)) + 1} has no {column!r} ({count} such): fill it in or leave the row out",
                "empty",
                count,
            )


def require_column(rows: Rows, column: str, where: str) -> None:
    """The column is there."""
    if column not in rows.columns:
        near = config.nearest(column, [str(name) for name in rows.columns])
        hint = f"did you mean {near!r}?" if near else f"it has {', '.join(map(str, rows.columns))}"
        raise DataError(f"{where} has no column {column!r}: {hint}", "column")


def label_indices(values: Any, names: list[Any], where: str) -> list[int]:
    """Class names or numbers to 0..n-1.

    Raises:
        DataError: some are none of the names.
    """
    index = {name: position for position, name in enumerate(names)}
    if odd := [value for value in values if not isinstance(value, Hashable) or value not in index]:
        such = f" ({len(odd)} such)" if len(odd) > 1 else ""
        raise DataError(f"{where} has a label {odd[0]!r} outside {names}{such}: mend that row, or leave it out", "label", len(odd))
    return [index[value] for value in values]
