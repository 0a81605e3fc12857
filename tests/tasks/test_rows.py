"""Rows are trained on as they are written: cells of every kind of file, token ids written down by hand, templates, and messy rows."""

import bz2
import csv
import gzip
import json
import lzma

import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedex_lora import config
from fedex_lora.errors import DataError
from fedex_lora.tasks import load_task, usable
from fedex_lora.tasks._completions import FULL, IGNORED, prompt_ids, tokenize_completions
from fedex_lora.tasks._files import as_text, read_rows
from fedex_lora.tasks._rows import classes_of
from fedex_lora.tasks._task import tokenize_texts

CELLS = {"id": "007", "size": "2.50", "seen": "TRUE", "date": "2024-01-05", "code": "NA", "note": "Zoë, bed 4"}
LINE = json.dumps(CELLS, ensure_ascii=False) + "\n"
CSV = ",".join(CELLS) + "\n" + ",".join(f'"{cell}"' if "," in cell else cell for cell in CELLS.values()) + "\n"
TSV = "\t".join(CELLS) + "\n" + "\t".join(CELLS.values()) + "\n"


def test_reading_changes_nothing_in_the_process(tmp_path):
    """A cell may be longer than the csv module lets others read."""
    limit = csv.field_size_limit()
    (tmp_path / "long.csv").write_text(f"note\n{'x' * (limit + 1)}\n")
    assert len(read_rows("long.csv", tmp_path)["note"][2]) == limit + 1
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", CSV.encode()),
        ("a.CSV", CSV.encode()),
        ("marked.csv", CSV.encode("utf-8-sig")),
        ("windows.csv", CSV.replace("\n", "\r\n").encode()),
        ("europe.csv", TSV.replace("\t", ";").encode()),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
        ("a.tsv", TSV.encode()),
        ("a.tsv.bz2", bz2.compress(TSV.encode())),
        ("a.jsonl", LINE.encode()),
        ("marked.jsonl", LINE.encode("utf-8-sig")),
        ("a.jsonl.gz", gzip.compress(LINE.encode(), mtime=0)),
        ("a.jsonl.xz", lzma.compress(LINE.encode())),
        ("a.ndjson", ("\n" + LINE + "\n").encode()),
        ("array.jsonl", f"[{LINE}]".encode()),
        ("lines.json", LINE.encode()),
        ("a.json", json.dumps([CELLS], indent=1).encode()),
    ],
)
def test_a_cell_is_the_text_that_is_written(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert read_rows(name, tmp_path).to_dict(orient="records") == [CELLS]


def test_cells_that_are_no_text_are_what_json_writes(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 7, "b": 2.50, "c": true, "d": null, "e": 1e3, "f": ["x", 1.5]}\n')
    assert read_rows("a.jsonl", tmp_path).iloc[0].to_dict() == {"a": "7", "b": "2.50", "c": "true", "d": None, "e": "1e3", "f": ["x", 1.5]}
    (tmp_path / "nan.jsonl").write_text('{"a": NaN, "b": [NaN], "c": "NaN", "d": Infinity}\n')
    assert read_rows("nan.jsonl", tmp_path).iloc[0].to_dict() == {"a": None, "b": [None], "c": "NaN", "d": "Infinity"}
    frame = pd.DataFrame(
        {"a": pd.array([7, None], dtype="Int64"), "c": [True, False], "t": ["007", "x"], "d": pd.to_datetime(["2024-01-05"] * 2)}
    )
    frame.to_parquet(tmp_path / "a.parquet")
    assert read_rows("a.parquet", tmp_path).to_dict(orient="records") == [
        {"a": "7", "c": "true", "t": "007", "d": "2024-01-05T00:00:00"},
        {"a": None, "c": "false", "t": "x", "d": "2024-01-05T00:00:00"},
    ]


@pytest.mark.parametrize(
    ("text", "columns", "line"),
    [
        ("note;urgency, final\nhurts;now\n", ["note", "urgency, final"], 2),
        ('"text, free, long";label\na, b;c\n', ["text, free, long", "label"], 2),
        ("sep=;\r\na,b,c;label\r\nx;y\r\n", ["a,b,c", "label"], 3),
        ("text, label\na, b\n", ["text", " label"], 2),
    ],
)
def test_columns_are_separated_by_what_the_header_says(text, columns, line, tmp_path):
    (tmp_path / "a.csv").write_text(text)
    rows = read_rows("a.csv", tmp_path)
    assert (list(rows.columns), list(rows.index)) == (columns, [line])


def test_whole_numbers_of_the_hub_stay_whole_where_a_row_has_none(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "rows.jsonl").write_text(f'{{"label": 1, "ids": [1, null]}}\n{{"label": null}}\n{{"label": {2**53 + 1}}}\n')
    rows = read_rows(f"{tmp_path / 'set'}:train")
    assert (list(rows["label"]), rows["ids"][0]) == (["1", None, str(2**53 + 1)], [1, None])


PACKED = gzip.compress(b"text\n" + b"row\n" * 5000, mtime=0)


def test_lines_are_those_of_the_file(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"two\nlines",yes\n\nx,\n')
    assert list(read_rows("a.csv", tmp_path).index) == [2, 5]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,text\n1,2\n", "the column 'text' twice"),
        ("a.csv", b"text,label\n1,2\n1,2,3\n", "line 3 has more fields than its header"),
        ("a.csv", b'text,label\n1,2\n"1,2\n', "cannot be read: the row of line 3: "),
        ("a.csv", b'text,label\n1,2\n"x" y,2\n', "the row of line 3: "),
        ("a.csv", b'"text" x,label\n1,2\n', "the row of line 1: "),
        ("a.jsonl", b'{"a": {"b": 1, "b": 2}}\n', "line 1: an object has one key twice"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1, "a": 2}\n', "an object has one key twice"),
        ("a.csv", b"\n".join([b"text"] + [b"row"] * 4000 + ["Zoë".encode("latin-1")]), r"is not UTF-8 \(line 4002\): .*iconv -f latin1"),
        ("a.csv", "text\nrow\n".encode("utf-16"), r"is not UTF-8 \(line 1\): .*iconv -f utf-16 -t utf-8"),
        ("a.csv.gz", b"text\n1\n", "cannot be read"),
        ("a.csv.gz", gzip.compress(b"text\n" + b"row\n" * 5000, mtime=0)[:40], "cannot be read"),
        ("a.csv.gz", PACKED[:12] + b"\xff" + PACKED[13:], "cannot be read"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "line 2: "),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "line 2 is no object"),
        ("a.json", b"[[1]]", "row 1 is no object"),
        ("a.json", b"[]", "has no rows"),
        ("a.csv", b"text\n", "has no rows"),
        ("a.csv", b"", "has no rows"),
    ],
)
def test_files_that_cannot_be_read_say_why(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_rows(name, tmp_path)
    assert "\n" not in str(caught.value)


SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2}


def wrapped(tokenizer, ends=False, begins=True):
    """With the tokens that a tokenizer puts around a text."""
    form = f"{'<s> ' if begins else ''}$A{' </s>' if ends else ''}"
    tokenizer.post_processor = processors.TemplateProcessing(single=form, pair=f"{form} $B", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def bytewise(**options):
    """One token a byte, as GPT-2's without its merges: `!` is 3, and the others follow; a space is 223."""
    vocabulary = SPECIAL | {mark: number for number, mark in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=3)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer, **options)


def spaced(**options):
    """A space in front of every text, as Llama 2's: `_` begins a word."""
    words = ["▁", "▁Once", "▁upon", "▁a", "▁time", "time", "▁:", ":"]
    tokenizer = Tokenizer(models.WordLevel(SPECIAL | {word: number for number, word in enumerate(words, start=3)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return wrapped(tokenizer, **options)


SAY = [85, 67, 91, 223, 19]  # say 1
WORD = [223, 89, 81, 84, 70]  # a space, then: word
ONCE = [4, 5, 6]  # Once upon a


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "completion", "head", "answer"),
    [
        (bytewise(), "say 1", " word", [1, *SAY], WORD),
        (bytewise(ends=True), "say 1", " word", [1, *SAY], WORD),
        (bytewise(begins=False), "say 1", " word", SAY, WORD),
        (bytewise(), "<s>say 1", " word", [1, *SAY], WORD),
        (bytewise(ends=True), "say 1</s>", " word", [1, *SAY, 2], WORD),
        (bytewise(), "say 1 ", "word", [1, *SAY, 223], WORD[1:]),
        (spaced(), "Once upon a", " time", [1, *ONCE], [7]),
        (spaced(ends=True), "Once upon a", " time", [1, *ONCE], [7]),
    ],
    ids=[
        "bytes",
        "ends texts",
        "begins none",
        "begin in the template",
        "end in the template",
        "space in the prompt",
        "spaced",
        "spaced, ends",
    ],
)
def test_what_is_trained_on_is_what_generation_sees(tokenizer, prompt, completion, head, answer):
    row = tokenize_completions(tokenizer, [prompt], [completion], 64)[0]
    assert row["input_ids"] == [*head, *answer, 2]
    assert row["labels"] == [IGNORED] * len(head) + [*answer, 2]
    assert prompt_ids(tokenizer, [prompt]) == [head]
    assert tokenizer.decode([*head, *answer], skip_special_tokens=True) == (prompt + completion).replace("<s>", "").replace("</s>", "")


def test_a_completion_that_would_change_the_prompt_s_tokens_is_tokenised_by_itself():
    vocabulary = SPECIAL | {mark: number for number, mark in enumerate(["a", "b", "ab", "=", "c"], start=3)}
    merging = wrapped(Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")])))
    assert merging("ab", add_special_tokens=False)["input_ids"] == [5]
    assert tokenize_completions(merging, ["ca"], ["bc"], 9)[0]["input_ids"] == [1, 7, 3, 4, 7, 2]  # generation sees c a


def settings(folder, **changes):
    return config.TaskSettings(**{"name": "custom", "data": folder, "train": "rows.jsonl", "eval": "rows.jsonl", **changes})


def written(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_empty_optional_column_and_columns_with_spaces(tmp_path):
    written(
        tmp_path,
        [
            {"the task": "add", "input": "1", "output": "1"},
            {"the task": "rest", "input": "", "output": "ok"},
            {"the task": "go", "output": "ok"},
        ],
    )
    lm = {"kind": "causal-lm", "completion": " {output}"}
    task = load_task(settings(tmp_path, prompt="{the task}[[ ({input})]]:", **lm), 0)
    texts = [bytewise().decode(row["input_ids"], skip_special_tokens=True) for row in task.tokenize(bytewise(), task.train)]
    assert texts == ["add (1): 1", "rest: ok", "go: ok"]
    plain = load_task(settings(tmp_path, prompt="{the task}\n{input}\n{{x}}", **lm), 0)
    assert bytewise().decode(plain.tokenize(bytewise(), plain.train)[1]["input_ids"], skip_special_tokens=True) == "rest\n\n{x} ok"
    with pytest.raises(DataError, match=r"2 rows with an empty prompt \(line 2, 3\)"):
        load_task(settings(tmp_path, prompt="{input}", **lm), 0)


MESSY = [
    {"text": "one", "label": "yes"},
    {"text": "", "label": "no"},
    {"text": "three", "label": "perhaps"},
    {"text": "four"},
    {"text": "five", "label": "no"},
    {"text": "six", "label": "maybe"},
]


def test_all_problems_at_once_or_dropped_and_counted(tmp_path):
    written(tmp_path, MESSY)
    with pytest.raises(DataError) as caught:
        load_task(settings(tmp_path, labels=["no", "yes"]), 0)
    for words in (
        "1 row with no 'text' (line 2)",
        "1 row with no 'label' (line 4)",
        "2 rows with a label outside ['no', 'yes'] ('perhaps', 'maybe')",
    ):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (caught.value.code, caught.value.rows) == ("empty", 2)
    with pytest.raises(DataError, match=r"\('yes', did you mean 'YES'\?, 'perhaps', 'maybe'\)"):
        load_task(settings(tmp_path, labels=["no", "YES"]), 0)
    task = load_task(settings(tmp_path, labels=["no", "yes"], on_bad_row="drop"), 0)
    assert list(task.train["text"]) == ["one", "five"]
    assert task.classes.tolist() == [1, 0]
    assert task.notes[0].startswith("4 of 6 rows are left out: rows.jsonl: 1 row with no 'text'")
    with pytest.raises(DataError, match="no row is left"):
        load_task(settings(tmp_path, labels=["x", "y"], on_bad_row="drop"), 0)


def test_labels_are_the_same_text_at_every_party(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,1\nb,2\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": "2"}\n')
    for name in ("rows.csv", "rows.jsonl"):
        for labels in (["1", "2", "NA"], [1, 2, 3]):
            task = load_task(settings(tmp_path, train=name, eval=name, labels=labels), 0)
            assert (task.model_config["num_labels"], task.classes.tolist()) == (3, [0, 1])
    assert classes_of(["10", "9", "2", "9" * 5000]) == ["2", "9", "10", "9" * 5000]  # more digits than `int` reads
    (tmp_path / "rows.csv").write_text("text,label\na,Hardware \nb,hardware\n")
    assert "'Hardware ' and 'hardware' are two classes" in load_task(settings(tmp_path, train="rows.csv", eval="rows.csv"), 0).notes[0]


def test_scores_are_a_regression_and_never_a_class_a_row(tmp_path):
    written(tmp_path, [{"text": f"row {number}", "label": number / 7} for number in range(30)])
    with pytest.raises(DataError, match=r"30 different values in 30 rows: set task.kind = 'regression'"):
        load_task(settings(tmp_path), 0)
    written(tmp_path, [{"text": f"row {number}", "label": number} for number in range(15)])
    with pytest.raises(DataError, match=r"15 different values in 15 rows: set task.kind = 'regression'"):
        load_task(settings(tmp_path), 0)
    written(tmp_path, [{"text": f"row {number}", "label": number / 7} for number in range(30)])
    task = load_task(settings(tmp_path, kind="regression"), 0)
    assert (task.model_config, task.headline, task.greater_is_better) == ({"num_labels": 1, "problem_type": "regression"}, "mse", False)
    assert task.tokenize(bytewise(), task.train)[3]["labels"] == pytest.approx(3 / 7)
    written(tmp_path, [{"text": "a", "label": "3"}, {"text": "b", "label": "high"}, {"text": "c", "label": "inf"}])
    with pytest.raises(DataError, match=r"2 rows with a score in 'label' that is no finite number \(line 2, 3\)"):
        load_task(settings(tmp_path, kind="regression"), 0)


def test_rows_that_are_cut_are_counted_and_those_that_lose_all_are_not_trained_on(tmp_path):
    written(tmp_path, [{"prompt": "p" * length, "completion": " word"} for length in (3, 8, 20, 30)])
    short = settings(tmp_path, kind="causal-lm", max_length=12)
    task = load_task(short, 0)
    tokenised = task.tokenize(bytewise(), task.train)
    with pytest.raises(DataError, match=r"2 of 4 rows have a prompt that fills task.max_length = 12.*on_bad_row = 'drop'"):
        usable(tokenised, short, "here")
    rows, notes = usable(tokenised, short.model_copy(update={"on_bad_row": "drop"}), "here")
    assert (len(rows), [len(one) for one in rows["input_ids"]]) == (2, [10, 12])
    assert FULL not in rows.column_names
    assert notes[1] == "here: 1 of 2 rows are cut at task.max_length = 12 (the longest has 15 tokens)"
    assert settings(tmp_path, kind="causal-lm").length == 1024
    left = bytewise()
    left.truncation_side = "left"
    cut = tokenize_texts(left, [["beginning and end"]], [0], 10)
    assert (left.decode(cut["input_ids"][0]), left.truncation_side) == ("<s>beginning", "left")
    bounded = bytewise()
    bounded.model_max_length = 16
    assert max(map(len, load_task(settings(tmp_path, kind="causal-lm"), 0).tokenize(bounded, task.train)["input_ids"])) == 16


@pytest.mark.parametrize("kind", ["classification", "regression", "causal-lm", "chat"])
def test_half_a_character_is_a_fault_of_its_row(tmp_path, kind):
    """JSON can have one half of an emoji alone, which no tokenizer takes; both halves are one character."""
    half = "bad \ud83d"
    rows = [
        {"text": text, "label": label, "prompt": text, "completion": "b", "messages": [{"role": "user", "content": text}, ANSWERED]}
        for text, label in (("\ud83d\ude42 good", "1"), (half, "0.5"), ("good", half), ("é", "1"))
    ]
    written(tmp_path, rows)
    with pytest.raises(DataError, match=r"2 rows with text that is not Unicode: half a character \(line 2, 3\)") as caught:
        load_task(settings(tmp_path, kind=kind), 0)
    assert (caught.value.code, str(caught.value).isprintable()) == ("encoding", True)
    task = load_task(settings(tmp_path, kind=kind, on_bad_row="drop"), 0)
    assert (list(task.train["text"]), list(task.lines)) == (["🙂 good", "é"], [1, 4])
    written(tmp_path, [{"text": "a", "label": "1", half: ""}])
    with pytest.raises(DataError, match="line 1 has a column name that is not Unicode: half a character"):
        load_task(settings(tmp_path, kind=kind), 0)


ANSWERED = {"role": "assistant", "content": "Yes."}


def test_a_class_of_rows_that_are_left_out_is_a_class(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\ncough,mild\nburn,bad\n,rare\n")
    (tmp_path / "eval.csv").write_text("text,label\nache,mild\nfever,rare\n")
    task = load_task(settings(tmp_path, train="train.csv", eval="eval.csv", on_bad_row="drop"), 0)
    assert (task.model_config["id2label"], len(task.train)) == ({0: "bad", 1: "mild", 2: "rare"}, 2)
    assert task.tokenize(bytewise(), task.eval)["labels"] == [1, 2]


def test_a_date_that_is_missing_in_a_frame_is_no_value():
    frame = pd.DataFrame({"day": pd.to_datetime(["2024-01-05", None]), "size": pd.array([7, None], dtype="Int64")})
    assert as_text(frame).to_dict(orient="records") == [{"day": "2024-01-05T00:00:00", "size": "7"}, {"day": None, "size": None}]
