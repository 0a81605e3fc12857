"""A first configuration from a file's columns: what kind of task it is, what is read and what is said, whose rows they are, how long."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedex_lora.config import DEMO, IMAGES, parse_config
from fedex_lora.errors import DataError, FedexLoraError
from fedex_lora.runs.data import describe_rows
from fedex_lora.tasks._files import Rows, read_rows
from fedex_lora.tasks.chat import LAYOUTS

LABELS = ("label", "labels", "class", "category", "target", "intent", "sentiment", "diagnosis", "score", "rating", "y")
CLIENTS = ("site", "client", "hospital", "centre", "center", "party", "clinic", "country", "source", "domain")
PROMPTS = ("prompt", "question", "instruction", "input", "source", "mr")
COMPLETIONS = ("completion", "answer", "response", "output", "target", "reference", "ref", "summary")
PICTURES = re.compile(r"\.(png|jpe?g|webp|bmp|tiff?|gif)$", re.IGNORECASE)
MOST_CLASSES, MOST_CLIENTS = 50, 30
STEP = 32  # max_length is a multiple of it


@dataclass(frozen=True)
class _Guess:
    """What the columns look like.

    Attributes:
        task: the table `[task]`, without files.
        said: why, for whoever reads the file.
    """

    task: Mapping[str, Any]
    said: Sequence[str] = field(default_factory=list)


def first_config(file: Path, eval_file: Path | None = None, model: str = DEMO) -> str:
    """A configuration as TOML, with what was guessed in comments. It runs as it is, on the rows that it was made from.

    Args:
        file: training rows: jsonl, json, csv, tsv or parquet.
        eval_file: rows that only measure; None: a file beside it that is called so (eval, dev, valid, test), else the same rows, which the
            text says.
        model: the base.

    Raises:
        DataError: the file cannot be read, or its columns are of no task.
    """
    rows = read_rows(str(file))
    guess, column = _guess(rows, file), _client_column(rows)
    held = eval_file or _beside(file)
    tree: dict[str, Any] = {
        "method": "fedex",
        "rounds": 5,
        "base": {"model": model},
        "task": {"name": "custom", **guess.task, "train": file.name, "eval": (held or file).name},
        "clients": {"partition": "column", "column": column} if column else {"count": 3},
        "training": {"per_device_train_batch_size": 8, "num_train_epochs": 1},
    }
    if held is None or held.absolute().parent == file.absolute().parent:
        tree["task"]["data"] = str(file.absolute().parent)
    else:
        tree["task"] |= {"train": str(file.absolute()), "eval": str(held.absolute())}
    length = [] if guess.task["kind"] == IMAGES else _measured(tree)
    said = [*guess.said, *_of_clients(rows, column), *_of_files(file, held)]
    said += length
    said += ["base.model: EDIT. demo is a tiny model that comes with the package; give a hub name or a folder"] if model == DEMO else []
    return "".join(f"# {line}\n" for line in said) + tomli_w.dumps(tree)


def _measured(tree: dict[str, Any]) -> list[str]:
    """Set `task.max_length` to what the longest row needs, and say so; or why nobody can tell."""
    try:
        report = describe_rows(parse_config(tree), rows=0)
    except FedexLoraError as error:
        return [f"task.max_length: EDIT. The rows could not be measured: {error}"]
    longest = report.lengths["a row"].most
    tree["task"]["max_length"] = min(report.max_length or longest, -(-longest // STEP) * STEP)
    return [f"task.max_length: the longest row has {longest} tokens by the tokenizer of {tree['base']['model']}"]


def _guess(rows: Rows, file: Path) -> _Guess:
    """The kind of task, told by the columns' names first, then by what is in them.

    Raises:
        DataError: no kind of task has such columns.
    """
    names = [str(name) for name in rows.columns]
    if any(
        layout.columns <= set(names) and len(layout.columns & {"instruction", "messages", "conversations", "chosen"}) for layout in LAYOUTS
    ):
        return _Guess({"kind": "chat"}, ["kind chat: the loss is on what the assistant says (docs: chats)"])
    if image := next((name for name in names if _is_image(rows[name].iloc[0])), None):
        label = _label(rows, [name for name in names if name != image])
        if label is None:
            raise DataError(f"{file} has images in {image!r}, and no column with their classes: add one called label", "column")
        return _Guess(
            {"kind": IMAGES, "image": image, "label": label, "labels": _classes(rows, label)}, [f"images in {image}, classes in {label}"]
        )
    prompt = next((name for name in PROMPTS if name in names), None)
    completion = next((name for name in COMPLETIONS if name in names and name != prompt), None)
    if prompt and completion and len(set(rows[completion])) > min(MOST_CLASSES, len(rows) // 2):
        task = {"kind": "causal-lm", "prompt": f"{{{prompt}}}", "completion": f" {{{completion}}}"}
        return _Guess(task, [f"kind causal-lm: the model reads {prompt}, and the loss is on {completion}"])
    label = _label(rows, names)
    texts = _texts(rows, [name for name in names if name != label])
    if label is None or not texts:
        raise DataError(
            f"{file} has the columns {', '.join(names)}, and none that is a class or a score of a text, nor a prompt and a completion, nor "
            "messages: rename the columns to text and label, or to prompt and completion",
            "column",
        )
    if _is_score(rows, label):
        return _Guess({"kind": "regression", "text": texts, "label": label}, [f"kind regression: a score in {label}"])
    classes = _classes(rows, label)
    said = f"kind classification: {len(classes)} classes in {label}. EDIT task.labels if some of them are missing in this file"
    return _Guess({"kind": "classification", "text": texts, "label": label, "labels": classes}, [said])


def _is_image(cell: Any) -> bool:
    if isinstance(cell, Mapping):
        return bool({"bytes", "path"} & cell.keys())
    return isinstance(cell, bytes) or (isinstance(cell, str) and bool(PICTURES.search(cell.strip())))


def _label(rows: Rows, names: Sequence[str]) -> str | None:
    """The column of classes or scores: one that is called so, else the last one of few values that is no client."""
    if named := next((name for want in LABELS for name in names if name.lower() == want), None):
        return named
    few = [name for name in names if name.lower() not in CLIENTS and 2 <= len(set(map(str, rows[name]))) <= min(20, len(rows) // 2)]
    return few[-1] if few else None


def _is_score(rows: Rows, label: str) -> bool:
    """Numbers with fractions, or more different ones than classes are."""
    cells = [cell for cell in rows[label] if isinstance(cell, str) and cell.strip()]
    try:
        numbers = [float(cell) for cell in cells]
    except ValueError:
        return False
    return any(number % 1 for number in numbers) or len(set(numbers)) > MOST_CLASSES


def _classes(rows: Rows, label: str) -> list[str]:
    return sorted({cell for cell in rows[label] if isinstance(cell, str) and cell.strip()})


def _texts(rows: Rows, names: Sequence[str]) -> list[str]:
    """One text column, or the two of a pair: those with names that differ in a number, else the one with the longest cells."""
    lengths = {
        name: sum(len(cell) for cell in rows[name] if isinstance(cell, str)) / len(rows) for name in names if name.lower() not in CLIENTS
    }
    plain = {name: re.sub(r"[12ab]$", "", name.lower()) for name in lengths}
    pairs = [[one for one in plain if plain[one] == plain[name]] for name in plain if plain[name] != name.lower()]
    if pair := next((pair for pair in pairs if len(pair) == 2), None):
        return pair
    return [max(lengths, key=lambda name: lengths[name])] if lengths else []


def _client_column(rows: Rows) -> str | None:
    """The column that says where a row is from: one that is called so, with not too many values."""
    for name in map(str, rows.columns):
        values = rows[name]
        if (
            name.lower() in CLIENTS
            and all(isinstance(cell, str) and cell.strip() for cell in values)
            and 2 <= len(set(values)) <= MOST_CLIENTS
        ):
            return name
    return None


def _of_clients(rows: Rows, column: str | None) -> list[str]:
    if column:
        return [f"clients: one for each of the {len(set(rows[column]))} values of {column}"]
    return ["clients: EDIT. The rows are dealt to three at random; give clients.column, or each its file in [clients.data]"]


def _beside(file: Path) -> Path | None:
    """The file of rows that only measure which belongs to a training file, by their names."""
    for there in sorted(file.absolute().parent.glob(f"*{''.join(file.suffixes)}")):
        if there.name != file.name and re.search(r"(^|[^a-z])(eval|dev|valid|validation|test)([^a-z]|set|$)", there.name.lower()):
            return there
    return None


def _of_files(file: Path, held: Path | None) -> list[str]:
    if held is None:
        return ["task.eval: EDIT. There is no file for it, so rows are measured on that were trained on; each client holds a tenth back"]
    return [f"task.eval: {held.name}, by its name"]
