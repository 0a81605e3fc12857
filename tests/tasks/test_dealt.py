"""Every client its own file, on one machine."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from tests.runs.test_run import assert_same_bits, ignore

from fedex_lora.config import parse_config, read_config
from fedex_lora.errors import ConfigError, DataError
from fedex_lora.runs.check import check
from fedex_lora.runs.data import describe_rows
from fedex_lora.runs.run import run
from fedex_lora.tasks.dealt import dealt

NOTES = Path(__file__).parents[2] / "examples" / "notes.toml"
ROWS = NOTES.parent / "notes"
TOOLS = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}]


def split(folder):
    """The notes as three files, one a hospital, and a configuration beside them."""
    files = {}
    for line in (ROWS / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        files.setdefault(row.pop("hospital"), []).append(json.dumps(row) + "\n")
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "eval.jsonl").write_text((ROWS / "eval.jsonl").read_text())
    text = NOTES.read_text().replace('data = "notes"', "").replace('train = "train.jsonl"', "")
    own = "".join(f'{name} = "{name}.jsonl"\n' for name in sorted(files, reverse=True))
    (folder / "own.toml").write_text(
        text.replace('partition = "column"\ncolumn = "hospital"', "").replace("[training]", f"[clients.data]\n{own}\n[training]")
    )
    return folder / "own.toml", sorted(files)


def test_three_files_are_one_file_with_a_column(tmp_path):
    """But for the rows that are held out, which are drawn for each file by itself: here none."""
    file, names = split(tmp_path)
    small = ["rounds=1", "training.num_train_epochs=1", "task.eval_rows=20", "clients.holdout=0"]
    run(read_config(NOTES, small), tmp_path / "column", ignore)
    config = read_config(file, small)
    assert sorted(config.clients.data) == names
    assert len(names) == 3
    run(config, tmp_path / "files", ignore)
    assert_same_bits(tmp_path / "files", tmp_path / "column")
    run(read_config(tmp_path / "files" / "config.toml"), tmp_path / "files", ignore, True)  # as it was written


def test_files_of_three_kinds_are_one_file_with_a_column(tmp_path):
    """CSV, JSON lines and Parquet; labels that are text here and numbers there; a class that one file lacks; columns of their own."""
    labels = [(i // 3) % (2 if i % 3 == 1 else 3) for i in range(36)]
    rows = [{"note": f"bed {i} {'cough' if i % 2 else 'itch'}", "label": label, "ward": "abc"[i % 3]} for i, label in enumerate(labels)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    a, b, c = (pd.DataFrame([row for row in rows if row["ward"] == ward]).drop(columns="ward") for ward in "abc")
    a.assign(label=a["label"].astype(str)).to_csv(tmp_path / "a.csv", index=False, columns=["label", "note"])
    b.assign(seen=[[1]] * len(b)).to_json(tmp_path / "b.jsonl", orient="records", lines=True)
    c.to_parquet(tmp_path / "c.parquet")
    assert (set(a["label"]), set(b["label"])) == ({0, 1, 2}, {0, 1})
    task = {"name": "custom", "text": ["note"], "labels": [0, 1, 2], "data": str(tmp_path), "eval": "all.jsonl"}
    common = {"base": {"model": "demo"}, "rounds": 1, "torch_threads": 1, "training": {"max_steps": 2}, "lora": {"r": 2}}
    files = {"c": "c.parquet", "b": "b.jsonl", "a": "a.csv"}
    run(parse_config({**common, "task": task, "clients": {"holdout": 0, "data": files}}), tmp_path / "files", ignore)
    column = {"holdout": 0, "partition": "column", "column": "ward"}
    run(parse_config({**common, "task": {**task, "train": "all.jsonl"}, "clients": column}), tmp_path / "column", ignore)
    assert_same_bits(tmp_path / "files", tmp_path / "column")


def test_a_column_that_only_some_files_have_has_no_value_elsewhere(tmp_path):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    for name, more in (("a", {"tools": TOOLS}), ("b", {})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"messages": chat, **more}) + "\n")
    task = {"name": "custom", "kind": "chat", "data": str(tmp_path), "eval": "b.jsonl"}
    tree = {"base": {"model": "demo"}, "task": task, "clients": {"holdout": 0.0, "data": {"a": "a.jsonl", "b": "b.jsonl"}}}
    assert list(dealt(parse_config(tree))[0].train["tools"]) == [TOOLS, None]


def test_what_is_wrong_with_each_file_is_said_in_one_line(tmp_path):
    file, names = split(tmp_path)
    (tmp_path / f"{names[0]}.jsonl").write_text('{"note": "a", "color": "red"}\n')
    (tmp_path / f"{names[1]}.jsonl").write_text("")
    (tmp_path / f"{names[2]}.jsonl").write_text('{"note": "a", "colour": ""}\n')
    (tmp_path / "eval.jsonl").write_text('{"note": "", "colour": "red"}\n')
    config, (one, two, three) = read_config(file), names
    with pytest.raises(DataError) as caught:
        run(config, tmp_path / "run", ignore)
    said = rf".*{one}\.jsonl has no column 'colour': did you mean 'color'\?; .*{two}\.jsonl has no rows.*; .*{three}\.jsonl: 1 row with "
    assert re.match(said + r"nothing to say.*; .*eval\.jsonl: 1 row with an empty prompt", str(caught.value))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_check_looks_into_every_file(tmp_path):
    file, names = split(tmp_path)
    text = (tmp_path / f"{names[1]}.jsonl").read_text()
    (tmp_path / f"{names[1]}.jsonl").write_text(text + text.splitlines()[0] + "\n")
    found = [finding.words for finding in check(read_config(file))]
    assert any("repeats the input of another" in words and f"{names[1]}.jsonl" in words for words in found)
    report = describe_rows(read_config(file), rows=len(names))
    assert list(report.clients) == names
    read = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in names}
    for shown in report.shown:  # by the line of its own file
        line = json.loads(read[shown.client][int(shown.place.removeprefix("line ")) - 1])
        assert line["note"] in "".join(text for text, _ in shown.parts)
    (tmp_path / f"{names[0]}.jsonl").write_text('{"note": "a", "color": "red"}\n')
    (tmp_path / f"{names[2]}.jsonl").unlink()
    found = [finding.words for finding in check(read_config(file))]
    for words in (f"{names[0]}.jsonl has no column 'colour'", f"{names[1]}.jsonl: 1 row repeats", f"{names[2]}.jsonl does not exist"):
        assert any(words in one for one in found), words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": {"train": "all.jsonl"}}, r"remove task\.train, or clients\.data"),
        ({"clients": {"partition": "dirichlet"}}, r"remove partition and column from \[clients\]"),
        ({"task": {"kind": "classification"}}, r"task\.labels is not set"),
    ],
)
def test_what_contradicts_it_is_refused(changes, words):
    tree = {
        "base": {"model": "demo"},
        "task": {"name": "custom", "kind": "causal-lm", "eval": "eval.jsonl"},
        "clients": {"data": {"a": "a.jsonl"}},
    }
    for table, more in changes.items():
        tree[table] = {**tree[table], **more}
    with pytest.raises(ConfigError, match=words):
        parse_config(tree)


OWN_TRAINER = """from transformers import DataCollatorForSeq2Seq, Trainer


def make(model, rows, processor, arguments):
    return Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(processor))
"""


def test_a_trainer_of_the_party_sees_the_columns_of_its_file_only(tmp_path, monkeypatch):
    """Whose row it is stands in a column that pyarrow cannot name: it is no column of theirs. A folder `demo` is not the base demo."""
    file, _ = split(tmp_path)
    (tmp_path / "trainer_of_files.py").write_text(OWN_TRAINER)
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    small = ["rounds=1", "training.max_steps=1", "task.eval_rows=9", "task.train_rows=9", "local.trainer=trainer_of_files:make"]
    run(read_config(file, small), tmp_path / "run", ignore)
    assert json.loads((tmp_path / "run" / "final" / "manifest.json").read_text())["base_model"] == "demo"
