"""Tiny data in the published layouts, made of the demo's triage notes, so that every recipe runs offline in minutes."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from fedex_lora.storage.files import write_text
from fedex_lora.tasks.demo import WARDS, colour_of, note
from fedex_lora.tasks.scoring.choices import CHOICES

TRAIN, DEV = 90, 30
GLUE = {  # folder -> its header
    "CoLA": "",
    "SST-2": "sentence\tlabel\n",
    "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n",
    "RTE": "index\tsentence1\tsentence2\tlabel\n",
    "QNLI": "index\tquestion\tsentence\tlabel\n",
    "STS-B": "sentence1\tsentence2\tscore\n",
}


def write_tiny_data(root: Path) -> None:
    """Every file that the loaders of `glue/*`, `e2e`, `arithmetic/*` and `commonsense/*` ask for, below `root`."""
    for folder, header in GLUE.items():
        for split, rows in (("train", TRAIN), ("dev", DEV)):
            rng = random.Random(f"{folder}-{split}")
            lines = ["\t".join(_line(folder, rng)) + "\n" for _ in range(rows)]
            write_text(root / "glue" / folder / f"{split}.tsv", header + "".join(lines))
    for split, rows in (("trainset", TRAIN), ("devset", DEV), ("testset_w_refs", DEV)):
        meanings = [f'"name[{text}]","{colour_of(findings)}"' for text, findings in _notes(split, rows)]
        write_text(root / "e2e" / f"{split}.csv", "\n".join(["mr,ref", *meanings]) + "\n")
    sums = {
        split: [{"question": text, "answer": f"#### {len(findings)}"} for text, findings in _notes(split, TRAIN)]
        for split in ("train", "test")
    }
    queries = [{"query": row["question"], "response": f"The answer is: {row['answer'][-1]}", "type": "tiny"} for row in sums["train"]]
    _write_json(root / "MetaMathQA-395K.json", queries)
    write_text(root / "gsm8k" / "test.jsonl", "".join(f"{json.dumps(row)}\n" for row in sums["test"]))
    answers = [{"problem": row["question"], "solution": f"\\boxed{{{row['answer'][-1]}}}"} for row in sums["test"]]
    write_text(root / "math" / "test.jsonl", "".join(f"{json.dumps(row)}\n" for row in answers))
    _write_json(root / "commonsense" / "commonsense_170k.json", [_choice(text, ["true", "false"]) for text, _ in _notes("170k", TRAIN)])
    for name, choices in CHOICES.items():
        _write_json(root / "commonsense" / name / "test.json", [_choice(text, choices) for text, _ in _notes(name, DEV)])


def _notes(split: str, rows: int) -> list[tuple[str, list[str]]]:
    rng = random.Random(split)
    return [note(rng, "chest") for _ in range(rows)]


def _choice(text: str, choices: Sequence[str]) -> dict[str, str]:
    answer = choices[len(text) % 2]
    return {"instruction": text, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def _write_json(path: Path, rows: list[dict[str, str]]) -> None:
    write_text(path, json.dumps(rows) + "\n")


def _line(folder: str, rng: random.Random) -> tuple[str, ...]:
    """A line of a file: whether a note is more than green, or how many findings two of one ward share."""
    ward = rng.choice(list(WARDS))
    text, findings = note(rng, ward)
    urgent = str(int(colour_of(findings) != "green"))
    if folder in ("CoLA", "SST-2"):
        return ("tiny", urgent, "", text) if folder == "CoLA" else (text, urgent)
    other, theirs = note(rng, ward)
    shared = len({*findings} & {*theirs})
    if folder == "MRPC":
        return str(int(shared > 1)), "0", "0", text, other
    if folder == "STS-B":
        return text, other, f"{5 * shared / 3:.3f}"
    return "0", text, other, "entailment" if shared > 1 else "not_entailment"
