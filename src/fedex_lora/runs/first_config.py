"""A first configuration from a file's columns: what kind of task it is, what is read and what is said, whose rows they are, how long."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from fedex_lora.config import DEMO, IMAGES, nearest, parse_config
from fedex_lora.errors import DataError, FedexLoraError
from fedex_lora.runs.data import describe_rows
from fedex_lora.tasks._files import OPENERS, Rows, read_rows
from fedex_lora.tasks._rows import classes_of
from fedex_lora.tasks.chat import LAYOUTS

LABELS = ("label", "labels", "class", "category", "target", "intent", "sentiment", "diagnosis", "score", "rating", "y")
CLIENTS = ("site", "client", "hospital", "centre", "center", "party", "clinic", "country", "source", "domain")
QUESTIONS = ("prompt", "question", "instruction")  # the first that is there is the prompt, else the longest of PROMPTS
PROMPTS = ("input", "source", "mr", "document", "article", "dialogue", "text")
COMPLETIONS = ("completion", "answer", "response", "output", "target", "reference", "ref", "summary", "highlights", "solution", "label")
CONTEXTS = ("context", "passage", "input")  # what a prompt is about, if a row has it
PICTURES = re.compile(r"\.(png|jpe?g|webp|bmp|tiff?|gif)$", re.IGNORECASE)
MOST_CLASSES, MOST_CLIENTS = 50, 30
STEP = 32  # max_length is a multiple of it
PART = re.compile(r"(?:^|[^a-z])(train|training|eval|dev|valid|validation|test)(?:[-_. ]?set)?(?=[^a-z]|$)")
PAIR = re.compile(r"(.*[a-z].*?)[-_. ]?([12ab])")


@dataclass(frozen=True)
class _Guess:
    """What the columns look like.

    Attributes:
        task: the table `[task]`, without files.
        said: why, for whoever reads the file.
    """

    task: Mapping[str, Any]
    said: Sequence[str] = field(default_factory=list)


def first_config(file: Path, eval_file: Path | None = None, model: str = DEMO, label: str | None = None) -> str:
    """A configuration as TOML, with what was guessed in comments. It runs as it is, on the rows that it was made from.

    Args:
        file: training rows: jsonl, json, csv, tsv or parquet.
        eval_file: the evaluation set; None: a file beside it that is called so (eval, dev, valid, test) and has the same columns, else
            the same rows, which the text says.
        model: the base.
        label: the column of classes or scores; None: guessed.

    Raises:
        DataError: the file cannot be read, or its columns are of no task.
    """
    if file.is_dir():
        raise DataError(f"{file} is a folder: give a file of rows (of images: one with a column of their files and one of classes)", "file")
    rows = read_rows(str(file))
    column = _client_column(rows, label)
    guess = _guess(rows.drop(columns=[column]) if column else rows, file, label)
    held, count = eval_file or _beside(file, rows), max(1, min(3, len(rows) // 2))
    tree: dict[str, Any] = {
        "method": "fedex",
        "rounds": 5,
        "base": {"model": model},
        "task": {"name": "custom", **guess.task, "train": file.name, "eval": (held or file).name},
        "clients": {"partition": "column", "column": column} if column else {"count": count},
        "training": {"per_device_train_batch_size": 8, "num_train_epochs": 1},
    }
    if held is None or held.absolute().parent == file.absolute().parent:
        tree["task"]["data"] = str(file.absolute().parent)
    else:
        tree["task"] |= {"train": str(file.absolute()), "eval": str(held.absolute())}
    said = [*guess.said, *_of_clients(rows, column, count), *_of_files(rows, held, eval_file is not None), *_measured(tree)]
    reads = "texts of 56 words" if guess.task["kind"] != IMAGES else "texts, and no images"
    said += [f"base.model: EDIT. demo is a tiny model for {reads}; give a hub name or a folder"] if model == DEMO else []
    # Names of columns may have line breaks, and comments of TOML may not.
    lines = [re.sub(r"[\x00-\x1f\x7f]", lambda found: found[0].encode("unicode_escape").decode(), line) for line in said]
    return "".join(f"# {line}\n" for line in lines) + tomli_w.dumps(tree)


def _measured(tree: dict[str, Any]) -> list[str]:
    """Set what the rows themselves say, and say so: `task.max_length` from the longest, `task.on_bad_row` where some cannot be used."""
    try:
        report = describe_rows(parse_config(tree), rows=0)
    except FedexLoraError as error:
        return [f"EDIT. It does not run as it is: {error}"]
    said = [f"task.on_bad_row: EDIT. {note}" for note in report.notes if " rows are left out: " in note]
    tree["task"] |= {"on_bad_row": "drop"} if said else {}
    if "a row" not in report.lengths:
        return said
    if tree["base"]["model"] == DEMO:  # whose tokens are no other model's
        return [
            *said,
            f"task.max_length: {report.max_length} tokens, the default; --model NAME measures the rows by that model's tokenizer",
        ]
    longest = report.lengths["a row"].most
    tree["task"]["max_length"] = min(report.max_length or longest, -(-longest // STEP) * STEP)
    cut = f", of which {tree['task']['max_length']} are read: EDIT, if the model can more" if longest > tree["task"]["max_length"] else ""
    return [*said, f"task.max_length: the longest row has {longest} tokens by the tokenizer of {tree['base']['model']}{cut}"]


def _guess(rows: Rows, file: Path, label: str | None) -> _Guess:
    """The kind of task, told by the columns' names first, then by what is in them.

    Raises:
        DataError: no kind of task has such columns.
    """
    names = [str(name) for name in rows.columns]
    if label is not None and label not in names:
        near = nearest(label, names)
        mend = f"did you mean {near!r}?" if near else f"it has {', '.join(names)}"
        raise DataError(f"{file} has no column {label!r}: {mend}", "column")
    if label is None and any(
        layout.columns <= set(names) and len(layout.columns & {"instruction", "messages", "conversations", "chosen"}) for layout in LAYOUTS
    ):
        return _Guess({"kind": "chat"}, ["kind chat: the loss is on what the assistant says (docs: chats)"])
    if image := next((name for name in names if _is_image(rows[name].iloc[0])), None):
        label = label or _label(rows, [name for name in names if name != image])
        if label is None:
            raise DataError(f"{file} has images in {image!r}, and no column with their classes: add one called label", "column")
        return _Guess(
            {"kind": IMAGES, "image": image, "label": label, "labels": _classes(rows, label)}, [f"images in {image}, classes in {label}"]
        )
    names = [name for name in names if name and any(isinstance(cell, str) and cell.strip() for cell in rows[name])]
    if label is None and (written := _written(rows, names)):
        return written
    return _of_label(rows, file, names, label or _label(rows, names))


def _written(rows: Rows, names: Sequence[str]) -> _Guess | None:
    """A prompt and a completion, if there are columns of both."""
    asked_for = [name for name in QUESTIONS if name in names]
    prompt = next(iter([*asked_for, *_longest(rows, [name for name in PROMPTS if name in names])]), None)
    completion = next((name for name in COMPLETIONS if name in names and name != prompt and _is_written(rows, name)), None)
    if prompt is None or completion is None:
        return None
    context = next((name for name in CONTEXTS if name in names and name not in (prompt, completion)), None)
    asked = f"[[{{{context}}}\n]]{{{prompt}}}" if context else f"{{{prompt}}}"
    task = {"kind": "causal-lm", "prompt": asked, "completion": f" {{{completion}}}"}
    read = f"{context} and {prompt}" if context else prompt
    return _Guess(task, [f"kind causal-lm: the model reads {read}, and the loss is on {completion}"])


def _of_label(rows: Rows, file: Path, names: Sequence[str], label: str | None) -> _Guess:
    """Classes or scores of texts.

    Raises:
        DataError: there is no label, no text, or one class.
    """
    texts = _texts(rows, [name for name in names if name != label])
    if label is None or not texts:
        columns = ", ".join(map(str, rows.columns))
        raise DataError(
            f"{file} has the columns {columns}, and none that is a class or a score of a text, nor a prompt and a completion, nor "
            "messages: rename the columns to text and label, or to prompt and completion, or give --label COLUMN",
            "column",
        )
    if _is_score(rows, label):
        return _Guess({"kind": "regression", "text": texts, "label": label}, [f"kind regression: a score in {label}"])
    classes = _classes(rows, label)
    if len(classes) < 2:
        has = f"has one class, {classes[0]}" if classes else "is empty"
        raise DataError(f"{file}, column {label!r}, {has}: give rows of two and more, or rename the column", "label")
    said = f"kind classification: {len(classes)} classes in {label}. EDIT task.labels if some of them are missing in this file"
    scale = (
        ["EDIT task.kind: regression, and no task.labels, if these numbers are a scale"]
        if len(classes) > 2 and _are_numbers(classes)
        else []
    )
    others = [name for name in _few(rows, names) if name != label] if label.lower() not in LABELS else []
    scale += [f"EDIT task.label and task.labels, if the class is in {' or '.join(others)}"] if others else []
    unread = [name for name in names if name not in (label, *texts) and _words(rows, name) >= 2 * len(rows)]
    scale += [f"EDIT task.text, if the model is to read {' and '.join(unread)}, too"] if unread else []
    return _Guess({"kind": "classification", "text": texts, "label": label, "labels": classes}, [said, *scale])


def _is_image(cell: Any) -> bool:
    if isinstance(cell, Mapping):
        return bool({"bytes", "path"} & cell.keys())
    return isinstance(cell, bytes) or (isinstance(cell, str) and bool(PICTURES.search(cell.strip())))


def _label(rows: Rows, names: Sequence[str]) -> str | None:
    """The column of classes or scores: one that is called so, else the last one of few values that is no client."""
    if named := next((name for want in LABELS for name in names if name.lower() == want), None):
        return named
    few = _few(rows, names)
    return few[-1] if few else None


def _few(rows: Rows, names: Sequence[str]) -> list[str]:
    """The columns of few values that are neither clients nor days."""
    counts = {name: len(set(map(str, rows[name]))) for name in names if name.lower() not in CLIENTS}
    return [name for name, count in counts.items() if 2 <= count <= min(20, len(rows) // 2) and not all(map(_is_day, rows[name]))]


def _is_day(cell: Any) -> bool:
    return not isinstance(cell, str) or not cell.strip() or bool(re.match(r"\s*\d{1,4}([-/.])\d{1,2}\1\d{1,4}\b", cell))


def _is_score(rows: Rows, label: str) -> bool:
    """Numbers with fractions, or more different ones than classes are."""
    cells = set(_classes(rows, label))
    return _are_numbers(cells) and (any(float(cell) % 1 for cell in cells) or len(cells) > MOST_CLASSES)


def _are_numbers(cells: Iterable[str]) -> bool:
    return all(re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?\s*", cell, re.IGNORECASE) for cell in cells)


def _is_written(rows: Rows, name: str) -> bool:
    """Texts, of which most are there once: no classes, no scores."""
    counts = Counter(cell for cell in rows[name] if isinstance(cell, str) and cell.strip())
    if name.lower() in LABELS and all(len(cell.split()) <= 5 for cell in counts) and 10 * list(counts.values()).count(1) <= len(counts):
        return False  # short, and nearly all are there several times: classes, however many
    return not _are_numbers(counts) and len(counts) > min(MOST_CLASSES, max(2, len(rows) // 2))


def _classes(rows: Rows, label: str) -> list[str]:
    return classes_of(cell for cell in rows[label] if isinstance(cell, str) and cell.strip())


def _texts(rows: Rows, names: Sequence[str]) -> list[str]:
    """One text column, or the two of a pair: those with names that differ in a number, else the one with the most words, or characters."""
    ends = {(found[1], found[2]): name for name in names if (found := PAIR.fullmatch(name.lower()))}
    for (stem, end), name in ends.items():
        if other := ends.get((stem, {"1": "2", "a": "b"}.get(end, ""))):
            return [name, other]
    return _longest(rows, names)[:1]


def _longest(rows: Rows, names: Sequence[str]) -> list[str]:
    """Those with the most words, or characters, first."""
    return sorted(names, key=lambda name: (-_words(rows, name), -sum(len(cell) for cell in rows[name] if isinstance(cell, str))))


def _words(rows: Rows, name: str) -> int:
    return sum(len(cell.split()) for cell in rows[name] if isinstance(cell, str))


def _client_column(rows: Rows, label: str | None) -> str | None:
    """The column that says where a row is from: one that is called so, with not too many values."""
    for name in map(str, rows.columns):
        values = rows[name]
        if (
            name != label
            and name.lower() in CLIENTS
            and all(isinstance(cell, str) and cell.strip() for cell in values)
            and 2 <= len(set(values)) <= min(MOST_CLIENTS, len(rows) // 2)
        ):
            return name
    return None


def _of_clients(rows: Rows, column: str | None, count: int) -> list[str]:
    if column:
        return [f"clients: one for each of the {len(set(rows[column]))} values of {column}"]
    dealt = "belong to one client, because they are few" if count == 1 else f"are dealt to {['two', 'three'][count - 2]} at random"
    return [f"clients: EDIT. The rows {dealt}; give clients.column, or each its file in [clients.data]"]


def _beside(file: Path, rows: Rows) -> Path | None:
    """The file of the evaluation set that belongs to a training file: by its name, and with its columns."""

    def stem(path: Path) -> str:
        return re.sub(r"[^a-z0-9]", "", PART.sub("", path.name.lower().removesuffix(ending.lower())))

    ending = "".join(file.suffixes[-2:] if file.suffix.lower() in OPENERS else file.suffixes[-1:])
    there = [path for path in sorted(file.absolute().parent.glob(f"*{ending}")) if path.name != file.name]
    named = [path for path in there if any(part[1][:5] != "train" for part in PART.finditer(path.name.lower()))]
    near = [path for path in named if stem(path) == stem(file)] + [path for path in named if not stem(path) or not stem(file)]
    return next((path for path in near if _columns(path) == set(rows.columns)), None)


def _columns(path: Path) -> set[str]:
    try:
        return set(read_rows(str(path)).columns)
    except DataError:
        return set()


def _of_files(rows: Rows, held: Path | None, given: bool) -> list[str]:
    if held is None:
        return ["task.eval: EDIT. There is no file for it, so rows are measured on that were trained on; each client holds a tenth back"]
    if read_rows(str(held)).equals(rows):
        return [f"task.eval: EDIT. {held.name} has the training rows, so what is measured on was trained on"]
    return [f"task.eval: {held.name}" + ("" if given else ", by its name")]
