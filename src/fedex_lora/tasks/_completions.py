"""Prompt and completion as the tokens that generation will see: the prompt's, then what a model would go on with, then the end token."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction

IGNORED = -100  # the label that transformers leaves out of the loss
# Columns beside tokens, until `usable` has read them; their names are none that a file's own columns have.
FULL = "fedex-lora:full_length"  # a column: tokens of a row before it was cut
UNK = "fedex-lora:unknown_tokens"  # a column: those of a row's tokens that stand for words that the tokenizer does not have
TORN = "fedex-lora:torn"  # a column: is a row's prompt, when it stands alone, of other tokens?
OPEN = "fedex-lora:open"  # a column: is nothing learnt that ends a row's answer?
ANCHORS = ("=", "\n", "a")  # a completion is tokenised behind one of them where its own prompt's last token would change


def unknown_id(tokenizer: Any) -> int | None:
    """The token of words that a tokenizer does not have; None where it has all (tokenizers of bytes name their end token).

    One without such a token may be of whole words, and then it has the padding token for them, which no row holds otherwise.
    """
    found: int | None = tokenizer.pad_token_id if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    return None if found in (tokenizer.bos_token_id, tokenizer.eos_token_id) else found


def prompt_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Each prompt as a model reads it before it writes: with the tokens that the tokenizer puts in front, and none that end a text.

    A begin token that the prompt holds already is not put in front again.
    """
    whole = tokenizer(list(prompts), add_special_tokens=True, return_attention_mask=False, verbose=False)["input_ids"]
    plain = plain_ids(tokenizer, prompts)
    begin = tokenizer.bos_token_id
    made = []
    for ids, own in zip(whole, plain, strict=True):
        ahead = next((start for start in range(len(ids) - len(own) + 1) if ids[start : start + len(own)] == own), None)
        ids = ids if ahead is None else ids[: ahead + len(own)]
        made.append(ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids)
    return made


def completion_ids(tokenizer: Any, prompts: Sequence[str], completions: Sequence[str]) -> list[list[int]]:
    """The tokens that go on from each prompt, so that both together are the text of both: no space is doubled or lost.

    The text of both is tokenised as one; where that would change the prompt's own tokens, which generation sees as they are, the completion
    is tokenised behind an anchor whose tokens it leaves alone.
    """
    plain = plain_ids(tokenizer, prompts)
    both = plain_ids(tokenizer, [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)])
    return [
        whole[len(own) :] if whole[: len(own)] == own and len(whole) > len(own) else _behind_anchor(tokenizer, completion)
        for own, whole, completion in zip(plain, both, completions, strict=True)
    ]


def _behind_anchor(tokenizer: Any, completion: str) -> list[int]:
    for anchor in ANCHORS:
        own, whole = plain_ids(tokenizer, [anchor, anchor + completion])
        if whole[: len(own)] == own and len(whole) > len(own):
            return whole[len(own) :]
    return plain_ids(tokenizer, [completion])[0]


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Each text's tokens and no others: none that the tokenizer puts around a text."""
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def tokenize_completions(tokenizer: Any, prompts: Sequence[str], completions: Sequence[str], max_length: int, end: bool = True) -> Dataset:
    """Causal-LM inputs: the prompt, the completion, the end token, with labels on the last two only.

    A row that is too long is cut at its right end: the beginning of a prompt, with its begin token and what the model is told first, stays.

    Args:
        tokenizer: the model's.
        prompts, completions: one of each a row.
        max_length: tokens, at most.
        end: put the end token behind the completion.

    Returns:
        `input_ids`, `attention_mask`, `labels` (`IGNORED` on the prompt), `FULL` and `UNK`.
    """
    tail = [tokenizer.eos_token_id] if end and tokenizer.eos_token_id is not None else []
    heads, answers = prompt_ids(tokenizer, prompts), completion_ids(tokenizer, prompts, completions)
    both = zip(heads, answers, strict=True)
    return token_rows(tokenizer, [([*head, *answer, *tail], [IGNORED] * len(head) + [*answer, *tail]) for head, answer in both], max_length)


def token_rows(tokenizer: Any, made: Sequence[tuple[list[int], list[int]]], max_length: int) -> Dataset:
    """Tokens and labels of each row, cut at the right end; its columns are those of `tokenize_completions`."""
    rows: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": [], FULL: [], UNK: []}
    unknown = unknown_id(tokenizer)
    for ids, labels in made:
        rows["input_ids"].append(ids[:max_length])
        rows["attention_mask"].append([1] * min(len(ids), max_length))
        rows["labels"].append(labels[:max_length])
        rows[FULL].append(len(ids))
        rows[UNK].append(rows["input_ids"][-1].count(unknown))
    return Dataset.from_dict(rows)


def completion_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Of the argmax at each completion token, with the true tokens before it: the share that is right, and of rows that are all right."""
    predicted, labels = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
    counted = labels != IGNORED
    right = (predicted == labels) | ~counted
    return {"token_accuracy": float(right[counted].mean()), "accuracy": float(right.all(axis=1).mean())}
