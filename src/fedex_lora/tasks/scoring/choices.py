"""Which of the answers of a commonsense test a text gives, as LLM-Adapters (Hu et al. 2023) reads it: the first that occurs."""

import re
from collections.abc import Mapping, Sequence

CHOICES: Mapping[str, Sequence[str]] = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4"),
}


def extract_choice(text: str, choices: Sequence[str]) -> str | None:
    """The first of the choices that the text names; None where it names none.

    >>> extract_choice("the correct answer is solution2", CHOICES["piqa"])
    'solution2'
    >>> extract_choice("I do not know.", CHOICES["piqa"])
    """
    found = re.search("|".join(map(re.escape, choices)), text)
    return found[0] if found else None
