"""Commonsense reasoning: trained on Commonsense170K, measured on one of eight tests, with LLM-Adapters' prompts (Hu et al. 2023).

From the files that LLM-Adapters publishes (downloaded, or a folder with `commonsense_170k.json` and `NAME/test.json`). A row::

    instruction: Please answer the following question with true or false, question: does ethanol take more energy make that produces?

    Answer format: true/false
    output: the correct answer is false
    answer: false

`task.train` names other training rows of this layout: `task.train = "boolq/train.json"`.
"""

from functools import partial
from pathlib import Path

import numpy as np

from fedex_lora import config
from fedex_lora.tasks._files import Rows, published, read_hub, read_rows, within
from fedex_lora.tasks._rows import require_values
from fedex_lora.tasks._task import Generation, Task, label_indices, written_task
from fedex_lora.tasks.scoring.choices import CHOICES, extract_choice

TRAIN = "commonsense_170k.json"
PUBLISHED = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main"
INDENT = " " * 16  # of LLM-Adapters' template
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
    f"{INDENT}### Instruction:\n{INDENT}{{instruction}}\n\n{INDENT}### Response:\n{INDENT}"
)
GENERATION = {"num_beams": 4, "max_new_tokens": 32}


def load(name: str, settings: config.TaskSettings) -> Task:
    """The task `commonsense/NAME`.

    Raises:
        DataError: a file or a column is missing, or an answer is not one of the test's.
    """
    test = _test(name, settings.data)
    require_values(test, ["instruction", "output", "answer"], f"commonsense/{name}, test set,")
    label_indices(test["answer"], list(CHOICES[name]), f"commonsense/{name}, test set,")
    train = _train(settings) if settings.train != "" else test.head(0)
    require_values(train, ["instruction", "output"], "commonsense, training rows,")

    def score(texts: list[str], rows: Rows) -> dict[str, float]:
        got = [extract_choice(text, CHOICES[name]) for text in texts]
        right = [one == gold for one, gold in zip(got, rows["answer"], strict=True)]
        return {"accuracy": float(np.mean(right)), "unanswered": float(got.count(None))}

    return written_task(
        settings,
        (train, test),
        lambda _, rows: _prompts(rows),
        lambda rows: list(rows["output"]),
        generation=Generation(
            rows=test,
            prompts=lambda _, rows: _prompts(rows),
            score=score,
            settings=GENERATION,
            require=lambda: None,
            column="instruction",
        ),
    )


def _prompts(rows: Rows) -> list[str]:
    return [PROMPT.format(instruction=text) for text in rows["instruction"]]


def _train(settings: config.TaskSettings) -> Rows:
    if settings.train:
        return read_rows(settings.train, within(settings.data, "commonsense") if settings.data else None)
    layout = f"{TRAIN}, or task.train must name other training rows (boolq/train.json)"
    return published(settings.data, "commonsense", TRAIN, layout, partial(_hub, f"ft-training_set/{TRAIN}"))


def _test(name: str, data: Path | None) -> Rows:
    file = f"{name}/test.json"
    return published(data, "commonsense", file, f"{file} as LLM-Adapters publishes it", partial(_hub, f"dataset/{file}"))


def _hub(file: str) -> Rows:
    return read_hub("json", None, "train", data_files=f"{PUBLISHED}/{file}")
