"""The embedded default: triage notes of three hospitals, written by code, and a tiny base that was pretrained on such notes.

An example (prompt and the completion that the loss and the accuracy are about)::

    bed 4 : the woman has wheeze , fever and sniffle . triage :
    yellow

A note names three findings of a ward. Each finding has a weight (`WARDS`), and the right colour follows from their sum. The base
model has read many notes, but with colours drawn at random: it knows the language, which findings go together, and that a
colour comes next; its accuracy is chance. Each hospital sees the findings of its own ward only, so none of them alone can learn
the rule for all.
"""

import random
from collections.abc import Iterator

import pandas as pd

from fedex_lora import config
from fedex_lora.config import DEMO, Config, parse_config
from fedex_lora.tasks._completions import completion_metrics, tokenize_completions
from fedex_lora.tasks._task import Task

TRAIN_NOTES, EVAL_NOTES = 400, 200  # of each hospital
COLOURS = ("green", "yellow", "red")
WARDS = {
    "chest": {"sniffle": 0, "hoarseness": 0, "cough": 1, "fever": 1, "wheeze": 2, "palpitations": 2, "breathlessness": 3, "collapse": 3},
    "bone": {"stiffness": 0, "ache": 0, "limp": 1, "swelling": 1, "sprain": 2, "numbness": 2, "dislocation": 3, "fracture": 3},
    "skin": {"itch": 0, "dryness": 0, "rash": 1, "hives": 1, "blister": 2, "abscess": 2, "burn": 3, "laceration": 3},
}
WEIGHTS = {finding: weight for ward in WARDS.values() for finding, weight in ward.items()}
PATIENTS = ("woman", "man", "girl", "boy", "nurse", "driver", "teacher", "farmer")
ROUNDS = 5
THRESHOLDS = (4, 6)  # green below 4, yellow below 6, red from 6: 16, 24 and 16 of the 56 choices of findings


def colour_of(findings: list[str]) -> str:
    """The right colour of a note: the sum of its findings' weights, cut at `THRESHOLDS`."""
    score = sum(WEIGHTS[finding] for finding in findings)
    return COLOURS[sum(score >= threshold for threshold in THRESHOLDS)]


def note(rng: random.Random, ward: str) -> tuple[str, list[str]]:
    """One note of a ward, and its three findings."""
    first, second, third = findings = rng.sample(list(WARDS[ward]), 3)
    return f"bed {rng.randrange(1, 10)} : the {rng.choice(PATIENTS)} has {first} , {second} and {third} .", findings


def examples(ward: str, count: int, seed: int) -> Iterator[dict[str, str]]:
    """`count` labelled notes of one ward: `prompt`, `completion` and the `hospital` that wrote them."""
    rng = random.Random(f"{ward}-{seed}")
    for _ in range(count):
        text, findings = note(rng, ward)
        yield {"prompt": f"{text} triage :", "completion": f" {colour_of(findings)}", "hospital": ward}


def vocabulary() -> list[str]:
    """Every word that the generator can write, after the two special tokens."""
    words = ["bed", ":", "the", "has", ",", "and", ".", "?", "triage", "is"] + [str(n) for n in range(1, 10)]
    return ["<pad>", "<s>", *words, *COLOURS, *WEIGHTS, *PATIENTS]


def load(settings: config.TaskSettings) -> Task:
    """The demo's task: every hospital's notes, in one table with a column `hospital`; as many to measure on."""
    train, held = (
        pd.DataFrame([row for ward in WARDS for row in examples(ward, count, seed)]) for count, seed in ((TRAIN_NOTES, 0), (EVAL_NOTES, 1))
    )
    return Task(
        kind="causal-lm",
        train=train,
        eval=held,
        tokenize=lambda tokenizer, rows: tokenize_completions(tokenizer, list(rows["prompt"]), list(rows["completion"]), 64, end=False),
        metrics=completion_metrics,
        headline="accuracy",
        model_config={},
        classes=pd.factorize(train["completion"])[0],
    )


def configuration(method: str, rounds: int = ROUNDS) -> Config:
    """The demo's run of one method: every hospital is a client."""
    return parse_config(
        {
            "method": method,
            "rounds": rounds,
            "torch_threads": 1,  # the model is too small to share out
            "base": {"model": DEMO},
            "lora": {"r": 4, "alpha": 8, "target_modules": "all-linear"},
            "task": {"name": "demo"},
            "clients": {"partition": "column", "column": "hospital"},
            "training": {
                "learning_rate": 5e-3,
                "num_train_epochs": 2,
                "per_device_train_batch_size": 32,
                "per_device_eval_batch_size": 200,
            },
        }
    )
