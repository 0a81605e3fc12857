"""The E2E NLG challenge: a restaurant described from a meaning representation. From the hub, or a folder with the published CSV files.

A row::

    mr: name[Blue Spice], eatType[coffee shop], area[city centre]
    ref: A coffee shop in the city centre area called Blue Spice.

What the model reads is as in the LoRA paper's code (Hu et al. 2022): `name : Blue Spice | Type : coffee shop | area : city centre`, then
the tokenizer's begin token (GPT-2's is its end token), then the text and the end token, with the loss on the text only. Rounds measure the
loss on the dev set; generation describes each of the test set's 630 meaning representations, with that paper's beam search, and is scored
by the challenge's five metrics (`fedex_lora.tasks.scoring`).
"""

import re
from functools import partial
from typing import Any

from fedex_lora import config
from fedex_lora.errors import DataError
from fedex_lora.tasks._files import Rows, published, read_hub
from fedex_lora.tasks._rows import require_values
from fedex_lora.tasks._task import Generation, Task, written_task
from fedex_lora.tasks.scoring.e2e import require_e2e, score_e2e

HUB = "tuetschek/e2e_nlg"
LAYOUT = "trainset.csv, devset.csv and testset_w_refs.csv of the E2E NLG challenge"
NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}  # the others keep their own
SPLITS = {"train": ("trainset.csv", "train"), "dev": ("devset.csv", "validation"), "test": ("testset_w_refs.csv", "test")}
GENERATION = {"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 4, "max_new_tokens": 64}
_SLOT = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]\s*(?:,|$)")


def load(settings: config.TaskSettings) -> Task:
    """The task `e2e`.

    Raises:
        DataError: a file, a column or a value is missing, or a meaning representation is not one.
    """
    splits = {name: published(settings.data, "e2e", file, LAYOUT, partial(_hub, split)) for name, (file, split) in SPLITS.items()}
    for name, rows in splits.items():
        require_values(rows, ["mr", "ref"], f"e2e, {name} set,")
    return written_task(
        settings,
        (splits["train"], splits["dev"]),
        prompts,
        lambda rows: [f" {text.strip()}" for text in rows["ref"]],
        generation=Generation(
            rows=splits["test"].groupby("mr", sort=False)["ref"].agg(list).reset_index(),
            prompts=prompts,
            score=lambda texts, rows: score_e2e(texts, list(rows["ref"])),
            settings=GENERATION,
            require=require_e2e,
            column="mr",
        ),
    )


def _hub(split: str) -> Rows:
    return read_hub(HUB, None, split).rename(columns={"meaning_representation": "mr", "human_reference": "ref"})


def prompts(tokenizer: Any, rows: Rows) -> list[str]:
    """What the model reads, with the token that ends it."""
    end = tokenizer.bos_token or tokenizer.eos_token or " ||"
    return [linearised(mr) + end for mr in rows["mr"]]


def linearised(mr: str) -> str:
    """A meaning representation as words.

    Raises:
        DataError: it is none.

    >>> linearised("name[Aromi], eatType[pub], priceRange[less than £20]")
    'name : Aromi | Type : pub | price : less than £20'
    """
    slots = list(_SLOT.finditer(mr))
    if not slots or "".join(slot[0] for slot in slots) != mr:
        raise DataError(f"{mr[:80]!r} is no meaning representation: write it as name[Aromi], eatType[pub]")
    return " | ".join(f"{NAMES.get(slot[1].strip(), slot[1].strip())} : {slot[2]}" for slot in slots)
