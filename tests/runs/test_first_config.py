"""`fedex-lora init`: a first TOML from a file's columns, which runs as it is."""

import json
import tomllib

import pytest
from PIL import Image
from tests.runs.test_run import ignore
from transformers import AutoTokenizer
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
    "classes beside days": (
        [
            {"opened": f"2026-03-0{1 + i % 9}", "note": f"{WORDS[i % 8]} and {i}", "queue": "xyz"[i % 3], "seen": f"{i % 9 + 1}.4.26"}
            for i in ROWS
        ],
        "classification",
        None,
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
    assert config.task.label not in ("opened", "seen")
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
    assert "max_length" not in tree["task"]  # the demo's tokenizer says nothing of another model's
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


SMALL = ["rounds=1", "torch_threads=1", "training.max_steps=1", "lora.r=2"]
REAL = {
    "ids, and semicolons": (
        "id;Fall;Bericht;Ausgang\n" + "".join(f'P{i:05};e3f2-{i}-77bb-aaaa-bbbb;"müde; sagt ""aua"" 😷 {i}";{"AB"[i % 2]}\n' for i in ROWS),
        {"kind": "classification", "text": ["Bericht"], "label": "Ausgang", "labels": ["A", "B"]},
    ),
    "rows without a label": (
        "text,label\n" + "".join(f"day {i},{['10', '9', ''][i % 3]}\n" for i in ROWS),
        {"kind": "classification", "labels": ["9", "10"], "on_bad_row": "drop"},
    ),
    "a text and what is made of it": (
        "text,label\n" + "".join(f"day {i},rest {i} hours\n" for i in ROWS),
        {"kind": "causal-lm", "prompt": "{text}", "completion": " {label}"},
    ),
    "a context": (
        "context,question,answer\n" + "".join(f"{'' if i % 2 else 'a fall'},day {i},rest {i} hours\n" for i in ROWS),
        {"kind": "causal-lm", "prompt": "[[{context}\n]]{question}", "completion": " {answer}"},
    ),
    "a text and its score": ("input,target\n" + "".join(f"day {i},{i / 7}\n" for i in ROWS), {"kind": "regression", "label": "target"}),
    "a client whose name could be a prompt's": (
        "source,document,summary\n" + "".join(f"{'ab'[i % 2]},day {i} of the long fever,fever {i}\n" for i in ROWS),
        {"kind": "causal-lm", "prompt": "{document}", "completion": " {summary}"},
    ),
    "the longest is the prompt": (
        "source,article,summary\n" + "".join(f"paper {i},day {i} of the long fever,fever {i}\n" for i in ROWS),
        {"kind": "causal-lm", "prompt": "{article}", "completion": " {summary}"},
    ),
    "a source and its target": ("source,target\n" + "".join(f"day {i},Tag {i}\n" for i in ROWS), {"prompt": "{source}"}),
    "77 classes": (
        "text,label\n" + "".join(f"day {i} is long,intent_{i % 77}\n" for i in range(300)),
        {"kind": "classification", "text": ["text"], "label": "label"},
    ),
    "choices are no pair": (
        "question,A,B,C,answer\n" + "".join(f"what is it on day {i},rest {i},walk {i},run far,{'ABC'[i % 3]}\n" for i in ROWS),
        {"kind": "classification", "text": ["question"], "label": "answer"},
    ),
    "a pair by letters": ("text_a,text_b,label\n" + "".join(f"{i},day {i},{i % 2}\n" for i in ROWS), {"text": ["text_a", "text_b"]}),
    "a line break in a name": ('text,"the\nclass"\n' + "".join(f"day {i},{'ab'[i % 2]}\n" for i in ROWS), {"label": "the\nclass"}),
    "two rows": ("text,label\nred,a\nblue,b\n", {"kind": "classification"}),
}


@pytest.mark.parametrize("case", REAL)
def test_tables_as_people_have_them_run_as_they_are(case, tmp_path):
    text, want = REAL[case]
    (tmp_path / "rows.csv").write_text(text)
    done = init(tmp_path / "rows.csv", "-o", tmp_path / "first.toml")
    assert done.exit_code == 0, done.output
    task = tomllib.loads((tmp_path / "first.toml").read_text())["task"]
    assert {key: task.get(key) for key in want} == want
    assert ("8 of 24 rows are left out" in done.output) == (case == "rows without a label")
    run(read_config(tmp_path / "first.toml", SMALL), tmp_path / "run", ignore)


def test_the_length_is_that_of_the_model_s_tokenizer(gpt2, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{'pain ' * 40 if i else 'pain ' * 90},{i % 2}\n" for i in ROWS))
    done = init(tmp_path / "rows.csv", "-o", tmp_path / "first.toml", "--model", gpt2)
    assert done.exit_code == 0, done.output
    assert tomllib.loads((tmp_path / "first.toml").read_text())["task"]["max_length"] == 64  # its positions
    longest = len(AutoTokenizer.from_pretrained(gpt2)("pain " * 90)["input_ids"])
    assert f"the longest row has {longest} tokens by the tokenizer of {gpt2}, of which 64 are read: EDIT" in done.output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no rows"),
        ("id,when\n" + "".join(f"{i},{i * 37}\n" for i in range(30)), "none that is a class or a score of a text"),
        ("a,b\n1\n2,3,4\n", "more fields than its header"),
        ("text,label\n" + "a,b\n" * 5, "has one class, b: give rows of two and more"),
    ],
)
def test_what_is_no_task_is_one_line(text, words, tmp_path):
    (tmp_path / "rows.csv").write_text(text)
    done = init(tmp_path / "rows.csv", "-o", tmp_path / "first.toml")
    assert done.exit_code != 0
    assert words in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "first.toml").exists()


def test_a_folder_and_a_base_that_does_not_fit_are_one_line(tmp_path):
    done = init(tmp_path, "-o", tmp_path / "first.toml")
    assert "is a folder: give a file of rows" in done.output
    Image.new("L", (8, 8)).save(tmp_path / "1.png")
    (tmp_path / "scans.csv").write_text("file,finding\n1.png,clear\n1.png,nodule\n" * 3)
    assert "a tiny model for texts, and no images" in init(tmp_path / "scans.csv", "-o", tmp_path / "first.toml").output
    begun = CliRunner().invoke(app, ["run", str(tmp_path / "first.toml"), "--dry-run"])
    assert begun.stderr == "error: demo is no model for this kind of task: give base.model one that is\n"


def task_of(path):
    return tomllib.loads(path.read_text())["task"]


@pytest.mark.parametrize(
    ("train", "others", "found"),
    [
        ("my.train.csv", {"my.test.csv": "text,label", "sts.dev.csv": "text,label"}, "my.test.csv"),
        ("train.csv", {"dev.csv": "text,class", "test.csv": "label,text"}, "test.csv"),
        ("notes.csv", {"skin-test.csv": "text,label", "contest.csv": "text,label"}, None),
        ("notes.csv", {"test.csv": "text,label"}, "test.csv"),
    ],
)
def test_the_file_that_measures_is_of_the_same_data_set(train, others, found, tmp_path):
    rows = "".join(f"day {i},{'ab'[i % 2]}\n" for i in ROWS)
    for name, header in {**others, train: "text,label"}.items():
        (tmp_path / name).write_text(f"{header}\n{rows if name == train else rows[:60]}")
    done = init(tmp_path / train, "-o", tmp_path / "first.toml")
    assert done.exit_code == 0, done.output
    assert task_of(tmp_path / "first.toml")["eval"] == (found or train)
    assert ("EDIT. There is no file for it" in done.output) == (found is None)


def test_what_is_given_is_not_called_a_guess(tmp_path):
    lines = [f"day {i},{'ab'[i % 2]},{'xyz'[i % 3]}" for i in ROWS]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label,queue", *lines]))
    (tmp_path / "held.csv").write_text("\n".join(["text,label,queue", *lines[:6]]))
    done = init(tmp_path / "rows.csv", "--eval", tmp_path / "held.csv", "--label", "queue", "-o", tmp_path / "a.toml")
    assert ("task.eval: held.csv" in done.output, "by its name" in done.output) == (True, False), done.output
    assert task_of(tmp_path / "a.toml")["labels"] == ["x", "y", "z"]
    done = init(tmp_path / "rows.csv", "--eval", tmp_path / "rows.csv", "-o", tmp_path / "b.toml")
    assert "task.eval: EDIT. rows.csv has the training rows" in done.output
    assert "did you mean 'queue'?" in init(tmp_path / "rows.csv", "--label", "queu", "-o", tmp_path / "c.toml").output
    (tmp_path / "three.csv").write_text("text,label\nred,a\nblue,b\ngreen,a\n")
    done = init(tmp_path / "three.csv", "-o", tmp_path / "d.toml")
    assert ("at random" in done.output, "belong to one client" in done.output) == (False, True)
    assert tomllib.loads((tmp_path / "d.toml").read_text())["clients"] == {"count": 1}


def test_choices_that_are_not_read_are_said(tmp_path):
    (tmp_path / "rows.csv").write_text(REAL["choices are no pair"][0])
    assert "EDIT task.text, if the model is to read A and B and C, too" in init(tmp_path / "rows.csv", "-o", tmp_path / "a.toml").output
