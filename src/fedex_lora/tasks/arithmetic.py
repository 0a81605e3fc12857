"""Arithmetic reasoning: trained on MetaMathQA, measured on GSM8K or MATH by the answers that the model writes.

From the hub, or a folder with `MetaMathQA-395K.json`, `gsm8k/test.jsonl` and `math/test.jsonl` as published. A row of each::

    MetaMathQA: {"query": "Gracie and Joe are choosing numbers ...", "response": "... The answer is: 10", "type": "MATH_AnsAug"}
    GSM8K:      {"question": "Janet's ducks lay 16 eggs per day. ...", "answer": "... 9 * 2 = $<<9*2=18>>18 ... #### 18"}
    MATH:       {"problem": "If $2^8=4^x$, what is the value of $x$?", "solution": "... $x=\\boxed{4}$.", "level": "Level 1"}

`task.train` names other training rows, of any of the three layouts: `task.train = "gsm8k/train.jsonl"`. Prompts are MetaMath's (Yu et al.
2024): the same in training and measuring, but for the words "Let's think step by step." that start the answer when measuring.
"""

import re
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from fedex_lora import config
from fedex_lora.errors import DataError, require_extra
from fedex_lora.tasks._files import Rows, published, read_hub, read_rows
from fedex_lora.tasks._rows import require_values
from fedex_lora.tasks._task import Generation, Task, written_task
from fedex_lora.tasks.scoring.mathematics import equivalent, extract_answer, extract_number, normal_form

METAMATH, METAMATH_HUB = "MetaMathQA-395K.json", "meta-math/MetaMathQA"
TESTS = {"gsm8k": 512, "math": 2048}  # tokens that MetaMath's evaluation lets the model write
MATH_HUB = "EleutherAI/hendrycks_math"
MATH_SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra", "precalculus")
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{query}\n\n### Response:"
)


def load(name: str, settings: config.TaskSettings) -> Task:
    """The task `arithmetic/NAME`.

    Raises:
        DataError: a file or a column is missing, or a row without its answer.
    """
    test = as_metamath(_test(name, settings.data), f"arithmetic/{name}, test set,")
    if name == "gsm8k" and None in (gold := [extract_number(text) for text in test["response"]]):
        raise DataError(f"arithmetic/gsm8k, test set: row {gold.index(None) + 1} has no number as its answer: mend it, or leave it out")
    train = as_metamath(_train(settings), "arithmetic, training rows,") if settings.train != "" else test.head(0)
    return written_task(
        settings,
        (train, test),
        lambda _, rows: _prompts(rows),
        lambda rows: [f" {text.strip()}" for text in rows["response"]],
        pd.factorize(train["type"])[0] if "type" in train else None,
        generation=Generation(
            rows=test,
            prompts=lambda _, rows: [f"{prompt} Let's think step by step." for prompt in _prompts(rows)],
            score=score_gsm8k if name == "gsm8k" else score_math,
            settings={"max_new_tokens": TESTS[name]},
            require=(lambda: None) if name == "gsm8k" else partial(require_extra, "math_verify", "math", "equivalent answers"),
            column="query",
        ),
    )


def _prompts(rows: Rows) -> list[str]:
    return [PROMPT.format(query=query.strip()) for query in rows["query"]]


def _train(settings: config.TaskSettings) -> Rows:
    if settings.train:
        return read_rows(settings.train, settings.data)
    layout = f"{METAMATH}, or task.train must name other training rows (gsm8k/train.jsonl)"
    return published(settings.data, "MetaMathQA", METAMATH, layout, lambda: read_hub(METAMATH_HUB, None, "train"))


def _test(name: str, data: Path | None) -> Rows:
    parts = [("openai/gsm8k", "main")] if name == "gsm8k" else [(MATH_HUB, subject) for subject in MATH_SUBJECTS]
    layout = f"{name}/test.jsonl as published"
    return published(data, name, "test.jsonl", layout, lambda: pd.concat([read_hub(*part, "test") for part in parts], ignore_index=True))


def as_metamath(rows: Rows, where: str) -> Rows:
    """Rows of MetaMathQA, GSM8K or MATH with `query` and `response`, which ends in "The answer is: ...".

    Raises:
        DataError: of none of the three layouts, or a row has no answer.
    """
    if {"question", "answer"} <= set(rows.columns):
        require_values(rows, ["question", "answer"], where)
        responses = [_from_gsm8k(text) for text in rows["answer"]]
        rows = rows.assign(query=rows["question"], response=responses)
    elif "problem" in rows.columns:
        require_values(rows, ["problem", "solution"], where)
        answers = [extract_answer(text) for text in rows["solution"]]
        responses = [answer and f"{text} The answer is: {answer}" for text, answer in zip(rows["solution"], answers, strict=True)]
        rows = rows.assign(query=rows["problem"], response=responses)
    require_values(rows, ["query", "response"], where)
    return rows


def _from_gsm8k(text: str) -> str | None:
    """The reasoning without the calculator's notes; None where there is no answer after `####`."""
    reasoning, mark, answer = text.rpartition("####")
    return f"{re.sub(r'<<.*?>>', '', reasoning).strip()}\nThe answer is: {answer.strip()}" if mark else None


def score_gsm8k(texts: list[str], rows: Rows) -> dict[str, float]:
    """The share of texts whose number is the right one; texts without a number count as wrong, and are counted."""
    gold, got = [extract_number(text) for text in rows["response"]], [extract_number(text) for text in texts]
    return {
        "accuracy": float(np.mean([one == right for one, right in zip(got, gold, strict=True)])),
        "unanswered": float(got.count(None)),
    }


def score_math(texts: list[str], rows: Rows) -> dict[str, float]:
    """`accuracy` by equivalence, `exact_match` after the usual clean-up only; texts without an answer count as wrong, and are counted."""
    gold, got = [extract_answer(text) or "" for text in rows["response"]], [extract_answer(text) for text in texts]
    pairs = list(zip(gold, got, strict=True))
    return {
        "accuracy": float(np.mean([one is not None and equivalent(right, one) for right, one in pairs])),
        "exact_match": float(np.mean([one is not None and normal_form(right) == normal_form(one) for right, one in pairs])),
        "unanswered": float(got.count(None)),
    }
