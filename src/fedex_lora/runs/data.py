"""`fedex-lora data`: the rows of a run as its model sees them: what the loss is on, lengths, classes of each client; nothing is trained.

What is wrong with rows is told by `fedex_lora.runs.check`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise, zip_longest
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from fedex_lora.config import IMAGES, Config, nearest
from fedex_lora.errors import UsageError
from fedex_lora.models.processor import load_processor
from fedex_lora.tasks import IGNORED, Task, limit
from fedex_lora.tasks._chat_template import common_length
from fedex_lora.tasks._completions import FULL
from fedex_lora.tasks._images import decode
from fedex_lora.tasks.dealt import dealt
from fedex_lora.tasks.partition import Indices

SHORTER = tuple(2**power for power in range(4, 20))  # tokens, to which rows might be cut instead


@dataclass(frozen=True)
class SeenRow:
    """One row as the model sees it.

    Attributes:
        client: who holds it.
        place: its line in the file, or its number among the rows.
        parts: its text, piece by piece, and whether the loss is on the piece; of an image, what it is.
        answer: the class or score that the loss is on; None of texts that are written.
        tokens, loss_tokens: in the text, and those of them that the loss is on; None of an image.
        whole: tokens before the row was cut.
    """

    client: str
    place: str
    parts: Sequence[tuple[str, bool]]
    answer: str | None = None
    tokens: int | None = None
    loss_tokens: int | None = None
    whole: int | None = None


@dataclass(frozen=True)
class Spread:
    """How many tokens rows have: 95 of 100 rows have `most_of_95` or fewer."""

    least: int
    median: int
    most_of_95: int
    most: int


@dataclass(frozen=True)
class ClientRows:
    """What one client holds.

    Attributes:
        rows, held_out: to train on, and to measure on.
        classes: class -> how many of the rows to train on; empty of scores and of texts that are written.
        tokens, loss_tokens: of the rows to train on, as the model sees them; None of images; and of those that the loss is on, None of
            texts that are read.
    """

    rows: int
    held_out: int
    classes: Mapping[str, int]
    tokens: int | None = None
    loss_tokens: int | None = None


@dataclass(frozen=True)
class RowReport:
    """What the rows of a run are.

    Attributes:
        loss: what it is on.
        notes: what the run itself says of its rows, those that are left out among it.
        shown: some rows.
        lengths: of what -> how long it is in tokens, before rows are cut; of images nothing.
        max_length: tokens to which the run cuts rows; None of images.
        cut: a length -> how many of the clients' rows are longer: the run's own, and shorter ones.
        nothing_left: rows that are cut before the loss begins, so that they are left out.
        clients: client -> what it holds.
        eval_rows: how many measure the global model.
    """

    loss: Literal["text", "class", "score"]
    notes: Sequence[str]
    shown: Sequence[SeenRow]
    lengths: Mapping[str, Spread]
    max_length: int | None
    cut: Mapping[int, int]
    nothing_left: int
    clients: Mapping[str, ClientRows]
    eval_rows: int


def describe_rows(config: Config, rows: int = 3, client: str | None = None) -> RowReport:
    """What the rows of a configuration are; of the base only the tokenizer or the image processor is loaded.

    Args:
        config: the run. Rows that cannot be used are left out, also where the run would refuse to begin.
        rows: so many are shown, of each client in turn.
        client: only this one's rows; None: everybody's.

    Raises:
        FedexLoraError: rows that cannot be read or dealt out, or a client that there is not.

    Example:
        >>> from fedex_lora.config import parse_config
        >>> report = describe_rows(parse_config({"base": {"model": "demo"}, "task": {"name": "demo"}, "clients": {"count": 2}}), rows=1)
        >>> report.shown[0].parts[1], report.clients["client-0"].rows
        ((' yellow', True), 540)
    """
    task, parts = dealt(config.model_copy(update={"task": config.task.model_copy(update={"on_bad_row": "drop"})}))
    if client is not None:
        if client not in parts:
            near = nearest(client, list(parts))
            mend = f"did you mean {near!r}?" if near else f"give one of {', '.join(parts)}"
            raise UsageError(f"--client {client!r} holds no rows: {mend}")
        parts = {client: parts[client]}
    processor = load_processor(config.base, task.kind)
    view = _View(task, processor, task.tokenize(processor, task.train))
    all_rows = np.concatenate([both for held in parts.values() for both in held])
    lengths, longest = dict[str, Spread](), None
    if task.kind != IMAGES:
        longest = limit(config.task, processor)
        lengths["a row"] = _spread(view.whole[all_rows])
        if view.loss == "text":
            lengths["its loss, once it is cut"] = _spread(view.learnt[all_rows])
        lengths["an evaluation row"] = _spread(_whole(task.tokenize(processor, task.eval)))
    return RowReport(
        loss=view.loss,
        notes=task.notes,
        shown=[view.seen(name, row) for name, row in islice(view.in_turn(parts), rows)],
        lengths=lengths,
        max_length=longest,
        cut={} if longest is None else _cut(view.whole[all_rows], longest),
        nothing_left=int((view.learnt[all_rows] == 0).sum()),
        clients={name: view.held(train, held) for name, (train, held) in parts.items()},
        eval_rows=len(task.eval),
    )


def _whole(rows: Dataset) -> NDArray[np.int64]:
    """Tokens of each row, before it was cut."""
    return np.asarray(rows[FULL], dtype=np.int64)


def _spread(tokens: NDArray[np.int64]) -> Spread:
    return Spread(*(int(value) for value in np.quantile(tokens, (0, 0.5, 0.95, 1), method="inverted_cdf")))


def _cut(whole: NDArray[np.int64], longest: int) -> dict[int, int]:
    """How many rows are longer than the run's length, and than shorter ones that would cut some."""
    sizes = [size for size in SHORTER if size < longest and (whole > size).any()]
    return {size: int((whole > size).sum()) for size in [longest, *reversed(sizes[-3:])]}


class _View:
    """The training rows of a task, as its model sees them.

    Attributes:
        loss: see `RowReport`.
        whole: tokens of a row before it was cut; zeros of images.
        learnt: how much the loss of a row is on: tokens of texts that are written; else one answer.
    """

    def __init__(self, task: Task, processor: Any, rows: Dataset) -> None:
        self.task, self.processor, self.rows = task, processor, rows
        self.labels, images = list(rows["labels"]), task.kind == IMAGES
        score = task.model_config.get("problem_type") == "regression"
        self.loss: Literal["text", "class", "score"] = "text" if task.kind == "causal-lm" else "score" if score else "class"
        self.whole = np.zeros(len(rows), dtype=np.int64) if images else _whole(rows)
        self.seen_tokens = self.whole if images else np.asarray([len(ids) for ids in rows["input_ids"]], dtype=np.int64)
        learnt = [sum(label != IGNORED for label in row) for row in self.labels] if self.loss == "text" else np.ones(len(rows))
        self.learnt = np.asarray(learnt, dtype=np.int64)

    def in_turn(self, parts: Mapping[str, tuple[Indices, Indices]]) -> Iterator[tuple[str, int]]:
        """The clients' first rows to train on, then their second ones, and so on."""
        turns = zip_longest(*([(name, int(row)) for row in train if self.learnt[row]] for name, (train, _) in parts.items()))
        return (one for one in chain.from_iterable(turns) if one is not None)

    def answer(self, label: Any) -> str:
        """A class by its name, or a score."""
        return str(self.task.model_config.get("id2label", {}).get(label, label))

    def seen(self, client: str, row: int) -> SeenRow:
        place = f"line {self.task.lines[row]}" if self.task.lines else f"row {row + 1}"
        if self.task.kind == IMAGES:
            return SeenRow(client, place, [(self._image(row), False)], self.answer(self.labels[row]))
        ids, text = self.rows[row]["input_ids"], self.loss == "text"
        on = [label != IGNORED for label in self.labels[row]] if text else [False] * len(ids)
        return SeenRow(
            client,
            place,
            pieces(self.processor, ids, on),
            None if text else self.answer(self.labels[row]),
            len(ids),
            sum(on) if text else None,
            int(self.whole[row]),
        )

    def _image(self, row: int) -> str:
        cell = self.rows[row]["image"]
        image = decode(cell)
        channels, height, width = self.processor.pixels([image]).shape[1:]
        name = cell["path"] or f"{len(cell['bytes'])} bytes"
        return f"{name}: {image.width} x {image.height} {image.mode}, to the model {width} x {height} in {channels} channels"

    def held(self, train: Indices, held: Indices) -> ClientRows:
        counts = Counter(self.answer(self.labels[row]) for row in train.tolist()) if self.loss == "class" else Counter[str]()
        classes = self.task.model_config.get("id2label", {}).values() or sorted(counts)
        return ClientRows(
            len(train),
            len(held),
            {name: counts[name] for name in classes},
            None if self.task.kind == IMAGES else int(self.seen_tokens[train].sum()),
            int(self.learnt[train].sum()) if self.loss == "text" else None,
        )


def pieces(tokenizer: Any, ids: Sequence[int], on: Sequence[bool]) -> list[tuple[str, bool]]:
    """The text of tokens, special ones too, cut where `on` changes; of each piece, whether it is on.

    A piece is what the text with its tokens has more than the text without: tokenizers write spaces between tokens, and characters of
    several tokens, only where they see both sides.
    """
    text_of = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    text = text_of(ids)
    starts = [0, *(place for place in range(1, len(ids)) if on[place] != on[place - 1]), len(ids)]
    ends = [common_length(text, text_of(ids[:start])) for start in starts[:-1]] + [len(text)]
    made = [(text[begin:end], on[start]) for (begin, end), start in zip(pairwise(ends), starts, strict=False)]
    return [(part, marked) for part, marked in made if part]
