"""What a task is: rows, how they become tokens, and how predictions become numbers."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, EvalPrediction

from fedex_lora import config
from fedex_lora.errors import DataError
from fedex_lora.tasks._completions import FULL, IGNORED, OPEN, TORN, UNK, completion_metrics, prompt_ids, tokenize_completions, unknown_id
from fedex_lora.tasks._files import Rows

Array: TypeAlias = NDArray[Any]
TOLD = {  # of rows of which a column says so
    TORN: "what asks for the answer has other tokens when no answer follows, so the model will be asked in another way than it learns: "
    "use a chat template of this tokenizer's family",
    OPEN: "the chat template ends an answer with nothing that is learnt, so the model will not learn where to stop: "
    "save with the tokenizer a template that marks the end of a turn, too, by {% generation %}",
}
STRANGE = 0.2  # more unknown words than this are not those of rows that a model can read
MOST_NEW_TOKENS = 256  # of a sample


@dataclass(frozen=True, eq=False)
class Generation:
    """How a task is measured by what the model writes. Too slow for every round; `fedex-lora evaluate` does it.

    Attributes:
        rows: what is asked.
        prompts: (tokenizer, rows) -> one text a row; it becomes tokens as in training.
        score: (texts, rows) -> name -> number; a text without an answer counts as wrong, and is counted in `unanswered`.
        settings: fields of `transformers.GenerationConfig`; repeated n-grams are those of the written text only.
        require: raises, before anything is generated, where `score` could not be computed here.
        column: of `rows`, what a text is an answer to; None: to the prompt.
        tokens: (tokenizer, prompts) -> the tokens of each.
        ends: (tokenizer, model) -> tokens that end a text; None: the tokenizer's end token.
        references: (tokenizer, rows) -> what could be written, to stand beside it.
        asked_for: the task is measured on predictions, and writes only where it is asked to.
    """

    rows: Rows
    prompts: Callable[[Any, Rows], list[str]]
    score: Callable[[list[str], Rows], dict[str, float]]
    settings: Mapping[str, Any]
    require: Callable[[], None]
    column: str | None
    tokens: Callable[[Any, Sequence[str]], list[list[int]]] = prompt_ids
    ends: Callable[[Any, Any], list[int]] | None = None
    references: Callable[[Any, Rows], list[str]] | None = None
    asked_for: bool = False


def samples(rows: Rows, prompts: Callable[[Any, Rows], list[str]], references: Callable[[Any, Rows], list[str]], **more: Any) -> Generation:
    """Texts for people to read, written greedily where they are asked for; nothing is scored.

    Args:
        rows, prompts, references, more: see `Generation`.
    """
    return Generation(
        rows=rows,
        prompts=prompts,
        score=lambda texts, rows: {},
        settings={"max_new_tokens": MOST_NEW_TOKENS},
        require=lambda: None,
        column=None,
        references=references,
        asked_for=True,
        **more,
    )


@dataclass(frozen=True, eq=False)
class Task:
    """A loaded task.

    Attributes:
        kind: the head that the model needs.
        train, eval: rows to learn from, the evaluation set.
        tokenize: (tokenizer, rows) -> data set of `input_ids`, `attention_mask`, `labels`; of images (encoded) and `labels`.
        metrics: predictions -> name -> number.
        headline: the metric that ranks rounds on the clients' own held-out rows.
        model_config: what the model's config needs (`num_labels`, `problem_type`).
        classes: one value a training row, for Dirichlet partitions.
        greater_is_better: of the headline.
        generation: for tasks that are measured by what the model writes.
        notes: what is to be said of the rows before anything is trained.
        eval_lines: of `eval` in its file, where there is one; else the rows' numbers, from 1, where some are left out.
        lines: of `train` in its file, where there is one.
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
    notes: Sequence[str] = ()
    eval_lines: Sequence[int] = ()
    lines: Sequence[int] = ()

    @property
    def reads_text(self) -> bool:
        """Does a tokenizer make its rows into inputs?"""
        return self.kind != config.IMAGES

    def limited(self, train_rows: int | None, eval_rows: int | None, seed: int) -> "Task":
        """The same task with at most so many rows, drawn at random and kept in their order."""
        kept, asked = _draw(len(self.train), train_rows, seed), self.generation
        places = self.eval_lines or range(1, len(self.eval) + 1)
        return replace(
            self,
            train=self.train.iloc[kept].reset_index(drop=True),
            eval=_drawn(self.eval, eval_rows, seed),
            classes=self.classes[kept],
            eval_lines=[places[row] for row in _draw(len(self.eval), eval_rows, seed)],
            lines=[self.lines[row] for row in kept] if self.lines else (),
            generation=replace(asked, rows=_drawn(asked.rows, eval_rows, seed)) if asked else None,
        )


def _draw(rows: int, wanted: int | None, seed: int) -> Array:
    if wanted is None or wanted >= rows:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, wanted, replace=False))


def _drawn(rows: Rows, wanted: int | None, seed: int) -> Rows:
    return rows.iloc[_draw(len(rows), wanted, seed)].reset_index(drop=True)


def written_task(
    settings: config.TaskSettings,
    rows: tuple[Rows, Rows],
    prompts: Callable[[Any, Rows], list[str]],
    completions: Callable[[Rows], list[str]],
    classes: Array | None = None,
    **more: Any,
) -> Task:
    """The task of a causal LM: the loss is on the completions only, and ranks rounds. Samples are written unless it brings a `generation`.

    Args:
        settings: say how long a row may be.
        rows: to learn from, and only to measure.
        prompts, completions: one text a row, the prompts for a tokenizer.
        classes: see `Task`; by default all rows are of one.
        more: of `Task`.
    """

    def tokenize(tokenizer: Any, rows: Rows) -> Dataset:
        return tokenize_completions(tokenizer, prompts(tokenizer, rows), completions(rows), limit(settings, tokenizer))

    written = {"generation": samples(rows[1], prompts, lambda _, rows: [text.strip() for text in completions(rows)]), **more}
    return causal_task(rows, tokenize, classes, **written)


def causal_task(rows: tuple[Rows, Rows], tokenize: Callable[[Any, Rows], Dataset], classes: Array | None = None, **more: Any) -> Task:
    """The task of a causal LM with labels on what it must say; see `written_task` and `Task`."""
    return Task(
        kind="causal-lm",
        train=rows[0],
        eval=rows[1],
        tokenize=tokenize,
        metrics=completion_metrics,
        headline="loss",
        model_config={},
        classes=np.zeros(len(rows[0]), dtype=int) if classes is None else classes,
        greater_is_better=False,
        **more,
    )


def text_collator(kind: str, tokenizer: Any) -> Any:
    """Pads a batch: inputs by the tokenizer, labels of a causal LM with `IGNORED`."""
    if kind == "causal-lm":
        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    return DataCollatorWithPadding(tokenizer)


def limit(settings: config.TaskSettings, tokenizer: Any) -> int:
    """Tokens of a row, at most: as the configuration says, else what its kind needs and the model has positions for."""
    return settings.max_length or min(settings.length, tokenizer.model_max_length)


def tokenize_texts(tokenizer: Any, texts: list[list[str]], labels: list[Any], max_length: int) -> Dataset:
    """Classification inputs: one text or a pair a row, cut at the right end; its columns are those of `tokenize_completions`."""
    columns = [list(column) for column in texts]
    encoded = {name: list(values) for name, values in tokenizer(*columns, verbose=False).items()}
    full = [len(ids) for ids in encoded["input_ids"]]
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    try:
        for row in (row for row, length in enumerate(full) if length > max_length):
            for name, values in tokenizer(*(column[row] for column in columns), truncation=True, max_length=max_length).items():
                encoded[name][row] = values
    finally:
        tokenizer.truncation_side = side
    unknown = unknown_id(tokenizer)
    return Dataset.from_dict({**encoded, "labels": labels, FULL: full, UNK: [ids.count(unknown) for ids in encoded["input_ids"]]})


def usable(rows: Dataset, settings: config.TaskSettings, source: str, may_be_empty: bool = False) -> tuple[Dataset, list[str]]:
    """Tokenised rows without those whose every label was cut off, and what is to be said of rows that are cut, or in unknown words.

    Args:
        rows: as `Task.tokenize` gives them.
        settings: says how long rows may be, and what becomes of rows that cannot be used.
        source: whose rows they are, for complaints.
        may_be_empty: none may be left, as of rows that are held out.

    Raises:
        DataError: rows cannot be used and are to be refused, or none is left.
    """
    if FULL not in rows.column_names or not len(rows):
        return rows, []
    full, lengths = np.asarray(rows[FULL]), np.asarray([len(ids) for ids in rows["input_ids"]])
    cut, notes, unknown = full > lengths, list[str](), sum(rows[UNK]) / max(1, lengths.sum())
    if unknown > STRANGE:
        notes.append(
            f"{source}: {unknown:.0%} of the tokens in these rows are unknown to this tokenizer: is it of this language, or of this model?"
        )
    for column, words in TOLD.items():
        if column in rows.column_names:
            such, rows = sum(rows[column]), rows.remove_columns([column])
            if such:
                notes.append(f"{source}: in {such} of {len(rows)} rows {words}")
    rows, room = rows.remove_columns([FULL, UNK]), f"task.max_length = {settings.max_length or int(lengths.max())}"
    if isinstance(rows[0]["labels"], list):  # of a token each
        lost = np.asarray([all(label == IGNORED for label in labels) for labels in rows["labels"]])
        if lost.any():
            words = f"{source}: {int(lost.sum())} of {len(lost)} rows have a prompt that fills {room}, and nothing is left to learn"
            if (refused := settings.on_bad_row == "refuse") or (lost.all() and not may_be_empty):
                mend = "raise it, or set task.on_bad_row = 'drop'" if refused else "raise it"
                raise DataError(f"{words}: {mend}", "long", int(lost.sum()))
            rows, cut, full = rows.select(np.flatnonzero(~lost)), cut[~lost], full[~lost]
            notes.append(f"{words}: they are left out")
    if cut.any():
        most = ", more than half: much of what they say is not read" if cut.mean() > 0.5 else ""
        notes.append(f"{source}: {int(cut.sum())} of {len(cut)} rows are cut at {room} (the longest has {int(full.max())} tokens){most}")
    return rows, notes


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
