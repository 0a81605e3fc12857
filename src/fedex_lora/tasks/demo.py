"""The embedded default: triage notes of three hospitals, written by code, and a tiny base that was pretrained on such notes.

An example (prompt and the completion that the loss and the accuracy are about)::

    bed 4 : the woman has severe fever , mild wheeze and no ache . triage :
    red

A note names symptoms with a degree; the right triage colour follows from a sum over them, and each symptom has a weight
of its own (`WEIGHTS`). The base model has read a lot of notes, but with colours drawn at random: it knows the language and
it knows that a colour comes next, and its accuracy is chance. Each hospital sees the symptoms of its own ward only, so no
hospital can learn the rule for all of them alone.
"""

import random
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pandas as pd

from fedex_lora import config
from fedex_lora.tasks._task import Task, completion_metrics, tokenize_completions

TRAIN_NOTES, EVAL_NOTES = 400, 200  # of each hospital
COLOURS = ("green", "yellow", "red")
DEGREES = {"no": 0, "mild": 1, "severe": 2}
WARDS = {
    "chest": {"cough": 1, "wheeze": 2, "palpitations": 3},
    "bone": {"ache": 1, "swelling": 2, "fracture": 3},
    "skin": {"rash": 1, "blister": 2, "burn": 3},
}
WEIGHTS = {symptom: weight for ward in WARDS.values() for symptom, weight in ward.items()}
PATIENTS = ("woman", "man", "girl", "boy", "nurse", "driver", "teacher", "farmer")
OBJECTS = ("bag", "chart", "door", "blanket", "cup", "label")
THRESHOLDS = (5, 8)  # green below 5, yellow below 8, red from 8: nine each of the 27 notes that a ward can write


def colour_of(degrees: dict[str, str]) -> str:
    """The right colour of a note: the degrees (0, 1, 2) times the symptoms' weights, cut at `THRESHOLDS`."""
    score = sum(DEGREES[degree] * WEIGHTS[symptom] for symptom, degree in degrees.items())
    return COLOURS[sum(score >= threshold for threshold in THRESHOLDS)]


def note(rng: random.Random, symptoms: list[str]) -> tuple[str, dict[str, str]]:
    """One note about `symptoms`, in a random order, and the degree of each of them."""
    symptoms = rng.sample(symptoms, len(symptoms))
    degrees = {symptom: rng.choice(list(DEGREES)) for symptom in symptoms}
    first, second, third = (f"{degree} {symptom}" for symptom, degree in degrees.items())
    text = f"bed {rng.randrange(1, 10)} : the {rng.choice(PATIENTS)} has {first} , {second} and {third} ."
    return text, degrees


def examples(ward: str, count: int, seed: int) -> Iterator[dict[str, str]]:
    """`count` labelled notes of one ward: `prompt`, `completion` and the `hospital` that wrote them."""
    rng = random.Random(f"{ward}-{seed}")
    for _ in range(count):
        text, degrees = note(rng, list(WARDS[ward]))
        yield {"prompt": f"{text} triage :", "completion": f" {colour_of(degrees)}", "hospital": ward}


def pretraining_text(rng: random.Random) -> str:
    """One document for the base: a note, questions about it with their answers, then a colour that means nothing."""
    text, degrees = note(rng, rng.sample(list(WEIGHTS), 3))
    questions = rng.choices(list(degrees), k=rng.choice((0, 3, 6)))
    answers = " ".join(f"{symptom} ? {degrees[symptom]} ." for symptom in questions)
    ending = rng.choice(("triage :", f"the {rng.choice(OBJECTS)} is"))
    return f"{text} {answers} {ending} {rng.choice(COLOURS)}"


def vocabulary() -> list[str]:
    """Every word that the generator can write, after the two special tokens."""
    words = ["bed", ":", "the", "has", ",", "and", ".", "?", "triage", "is"] + [str(n) for n in range(1, 10)]
    return ["<pad>", "<s>", *words, *COLOURS, *DEGREES, *WEIGHTS, *PATIENTS, *OBJECTS]


def base_folder() -> Path:
    """The folder of the tiny base that the package carries (made by scripts/pretrain_demo_base.py)."""
    return Path(str(files("fedex_lora"))) / "data" / "demo_base"


def load(settings: config.Task) -> Task:
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
