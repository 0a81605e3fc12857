"""`fedex-lora init`: a first TOML from a file's columns, which runs as it is."""

import json
import tomllib

import pytest
from PIL import Image
from tests.runs.test_run import ignore
from typer.testing import CliRunner

from fedex_lora.cli import app
from fedex_lora.config import read_config
from fedex_lora.runs.check import check
from fedex_lora.runs.run import run

WORDS = "cough fever wheeze rash burn pain sprain sting".split()
ROWS = range(24)
CASES = {
    "classes": (
        [{"text": f"{WORDS[i % 8]} since day {i}", "label": WORDS[i % 3], "site": "ab"[i % 2]} for i in ROWS],
        "classification",
        "site",
    ),
    "a pair": ([{"sentence1": f"day {i}", "sentence2": f"week {i} is long", "quality": str(i % 2)} for i in ROWS], "classification", None),
    "scores": ([{"note": f"pain of day {i}", "score": str(i / 7)} for i in ROWS], "regression", None),
    "texts": (
        [{"question": f"day {i}", "answer": f"rest {i} hours", "clinic": "xyz"[i % 3]} for i in ROWS],
        "causal-lm",
        "clinic",
    ),
    "chats": (
        [
            {"messages": [{"role": "user", "content": f"day {i}"}, {"role": "assistant", "content": WORDS[i % 8]}], "id": str(i)}
            for i in ROWS
        ],
        "chat",
        None,
    ),
    "alpaca": ([{"instruction": f"say {i}", "input": "", "output": WORDS[i % 8]} for i in ROWS], "chat", None),
}


def init(*arguments):
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


@pytest.mark.parametrize("case", CASES)
def test_the_file_that_is_written_runs_as_it_is(case, tmp_path):
    rows, kind, column = CASES[case]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    done = init(tmp_path / "train.jsonl", "-o", tmp_path / "first.toml")
    assert done.exit_code == 0, done.output
    assert f"kind {kind}" in done.output
    assert "task.eval: dev.jsonl, by its name" in done.output
    config = read_config(tmp_path / "first.toml", ["rounds=1", "torch_threads=1", "training.max_steps=1", "lora.r=2"])
    assert (config.task.kind, config.clients.column) == (kind, column)
    assert not [finding.words for finding in check(config) if finding.stops]
    run(config, tmp_path / "run", ignore)
    assert (tmp_path / "run" / "final").is_dir()


def test_what_is_guessed_is_said(tmp_path):
    lines = [f'"{WORDS[i % 8]}, and {WORDS[i % 5]}",{"red" if i % 3 else "green"}' for i in ROWS]
    (tmp_path / "notes.csv").write_text("\n".join(["note,colour", *lines]) + "\n")
    done = init(tmp_path / "notes.csv", "-o", tmp_path / "first.toml")
    assert done.exit_code == 0, done.output
    tree = tomllib.loads((tmp_path / "first.toml").read_text())
    assert tree["task"]["labels"] == ["green", "red"]
    assert tree["task"]["text"] == ["note"]
    assert tree["task"]["max_length"] % 32 == 0
    for words in (
        "2 classes in colour",
        "EDIT. The rows are dealt to three at random",
        "EDIT. There is no file for it",
        "base.model: EDIT",
    ):
        assert words in done.output
        assert words in (tmp_path / "first.toml").read_text()
    again = init(tmp_path / "notes.csv", "-o", tmp_path / "first.toml")
    assert (again.exit_code, "exists: give another -o" in again.output) == (2, True)


def test_images_are_told_by_their_files(tmp_path):
    for number in range(8):
        Image.new("L", (8, 8), 30 * number).save(tmp_path / f"{number}.png")
    (tmp_path / "scans.csv").write_text("file,finding\n" + "".join(f"{i}.png,{'clear' if i % 2 else 'nodule'}\n" for i in range(8)))
    done = init(tmp_path / "scans.csv", "-o", tmp_path / "first.toml", "--model", "somewhere")
    assert done.exit_code == 0, done.output
    task = tomllib.loads((tmp_path / "first.toml").read_text())["task"]
    assert (task["kind"], task["image"], task["label"], task["labels"]) == ("image-classification", "file", "finding", ["clear", "nodule"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no rows"),
        ("id,when\n" + "".join(f"{i},{i * 37}\n" for i in range(30)), "none that is a class or a score of a text"),
        ("a,b\n1\n2,3,4\n", "more fields than its header"),
    ],
)
def test_what_is_no_task_is_one_line(text, words, tmp_path):
    (tmp_path / "rows.csv").write_text(text)
    done = init(tmp_path / "rows.csv", "-o", tmp_path / "first.toml")
    assert done.exit_code != 0
    assert words in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "first.toml").exists()
