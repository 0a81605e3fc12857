"""`fedex-lora data`: rows as the model sees them, and their numbers, against what stands in the files; the outputs on the docs' pages."""

import csv
import io
import json
import re
import shlex
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from tests.tasks.test_rows import bytewise, spaced
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, ViTConfig
from typer.testing import CliRunner

from fedex_lora.cli import _data, app
from fedex_lora.config import base_folder, parse_config, read_config, write_config
from fedex_lora.errors import UsageError
from fedex_lora.runs.data import describe_rows, pieces

ROOT = Path(__file__).parents[2]
TEXTS = ["no wifi", "the printer smells of ⟦ink⟧", "mouse is dead", "vpn fails\tand\x1b[31m fails", "slow page", "café is closed"]
LABELS = ["network", "hardware", "hardware", "network", "network", "kitchen"]


def invoke(*words):
    return CliRunner().invoke(app, ["data", *map(str, words)])


@pytest.fixture(scope="module")
def byte_base(tmp_path_factory):
    """The config of a tiny Llama and a tokenizer of bytes: no weights."""
    folder = tmp_path_factory.mktemp("bytes")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 64}
    LlamaConfig(vocab_size=259, **sizes).save_pretrained(folder)
    bytewise(ends=True).save_pretrained(folder)
    return folder


def configuration(folder, base, **task):
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "label", "score", "site"]])
        writer.writerows([text, label, index / 2, "ns"[index % 2]] for index, (text, label) in enumerate(zip(TEXTS, LABELS, strict=True)))
    return parse_config(
        {
            "base": {"model": str(base)},
            "task": {"name": "custom", "data": str(folder), "train": "rows.csv", "eval": "rows.csv", **task},
            "clients": {"partition": "column", "column": "site", "holdout": 0.0},
        }
    )


def test_notes_are_shown_as_they_are_read():
    """The words of the file between the tokens around them, the loss on the completion and the end token; the files are counted by hand."""
    report = describe_rows(read_config(ROOT / "examples" / "notes.toml"), rows=200)
    rows = [json.loads(line) for line in (ROOT / "examples" / "notes" / "train.jsonl").read_text().splitlines()]
    assert [(row.client, row.parts) for row in report.shown[:3]] == [
        (row["hospital"], [(f"<s> {row['note']}", False), (f" {row['colour']} <s>", True)])
        for row in (rows[int(shown.place.removeprefix("line ")) - 1] for shown in report.shown[:3])
    ]
    assert [row.client for row in report.shown[:4]] == ["bone", "chest", "skin", "bone"]
    held = Counter(row["hospital"] for row in rows)
    words = {name: [len(f"{row['note']} {row['colour']}".split()) + 2 for row in rows if row["hospital"] == name] for name in held}
    for name, one in report.clients.items():
        assert (one.rows + one.held_out, one.held_out, one.loss_tokens, one.classes) == (held[name], held[name] // 10, 2 * one.rows, {})
        assert one.tokens == sum(row.tokens for row in report.shown if row.client == name)
    counts = sorted(count for some in words.values() for count in some)
    assert vars(report.lengths["a row"]) == {
        "least": counts[0],
        "median": counts[len(counts) // 2 - 1],
        "most_of_95": counts[int(0.95 * len(counts)) - 1],
        "most": counts[-1],
    }
    assert (len(report.shown), report.eval_rows, report.cut) == (sum(one.rows for one in report.clients.values()), 45, {64: 0, 16: 120})


@pytest.mark.parametrize(
    ("tokenizer", "texts"),
    [
        (bytewise(), ["<s>ask: ", "one", "\nask: ", "two </s>", " "]),
        (bytewise(begins=False), ["caf", "é\n\n", "né", "e"]),
        (spaced(), ["Once", " upon a", " time", " :"]),
        (AutoTokenizer.from_pretrained(base_folder()), ["<s> bed 4 :", " the man has", " cough", " and fever"]),
    ],
    ids=["bytes", "characters of two bytes", "spaces in front", "words"],
)
def test_several_parts_with_the_loss_are_marked(tokenizer, texts):
    """Each part's own tokens, one after the other; every second part has the loss."""
    ids, on, so_far = [], [], ""
    for index, text in enumerate(texts):
        so_far += text
        grown = tokenizer(so_far, add_special_tokens=False)["input_ids"]
        assert grown[: len(ids)] == ids
        on += [index % 2 == 1] * (len(grown) - len(ids))
        ids = grown
    made = pieces(tokenizer, ids, on)
    assert "".join(text for text, _ in made) == tokenizer.decode(ids)
    assert [(text.strip(" "), marked) for text, marked in made if text.strip(" ")] == [
        (text.strip(" "), index % 2 == 1) for index, text in enumerate(texts) if text.strip(" ")
    ]


def test_a_character_of_which_the_loss_has_the_second_byte_is_shown_once():
    ids = bytewise()("né", add_special_tokens=False)["input_ids"]
    assert pieces(bytewise(), ids, [False, False, True]) == [("n", False), ("é", True)]


def test_classes_lengths_and_cuts_are_those_of_the_file(tmp_path, byte_base):
    report = describe_rows(configuration(tmp_path, byte_base, label="label", labels=["hardware", "network", "kitchen"], max_length=20), 6)
    lengths = {text: len(text.encode()) + 2 for text in TEXTS}
    assert (report.loss, report.cut) == ("class", {size: sum(length > size for length in lengths.values()) for size in (20, 16)})
    assert report.clients["n"].classes == {"hardware": 1, "network": 2, "kitchen": 0}
    assert report.clients["s"].classes == {"hardware": 1, "network": 1, "kitchen": 1}
    assert report.clients["s"].tokens == sum(min(20, lengths[text]) for text in TEXTS[1::2])
    shown = {int(row.place.removeprefix("line ")): row for row in report.shown}
    assert [shown[line].answer for line in sorted(shown)] == LABELS
    assert [shown[line].whole for line in sorted(shown)] == list(lengths.values())
    assert shown[7].parts == [("<s>café is closed</s>", False)]
    assert shown[3].parts == [(f"<s>{TEXTS[1].encode()[:18].decode()}</s>", False)]  # the tokenizer ends what it cuts
    scores = describe_rows(configuration(tmp_path, byte_base, kind="regression", label="score"), 6)
    assert (scores.loss, [row.answer for row in scores.shown]) == ("score", ["0.0", "0.5", "1.0", "1.5", "2.0", "2.5"])
    assert all(one.classes == {} for one in scores.clients.values())


TEMPLATE = """{% for turn in messages %}<{{ turn.role }}>
{{ turn.content }}</s>
{% endfor %}{% if add_generation_prompt %}<assistant>
{% endif %}"""


def test_every_turn_of_the_assistant_is_marked_in_chats(tmp_path):
    """Of three help desks: with system turns and without, of one answer or several."""
    pytest.importorskip("fedex_lora.tasks.chat")
    tokenizer = bytewise(begins=False)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=259, max_position_embeddings=1024).save_pretrained(tmp_path)
    desks = ROOT / "examples" / "desks"
    task = {"name": "custom", "kind": "chat", "data": str(desks), "train": "train.jsonl", "eval": "eval.jsonl"}
    clients = {"partition": "column", "column": "site", "holdout": 0.0}
    report = describe_rows(parse_config({"base": {"model": str(tmp_path)}, "task": task, "clients": clients}), 18)
    rows = [json.loads(line) for line in (desks / "train.jsonl").read_text().splitlines()]
    assert {len(row["messages"]) for row in rows} == {2, 3, 4, 5, 6}
    shown = {int(row.place.removeprefix("line ")): row for row in report.shown}
    for line, row in enumerate(rows, start=1):
        said, asked = [], ""
        for turn in row["messages"]:
            if turn["role"] == "assistant":
                said += [(f"{asked}<assistant>\n", False), (f"{turn['content']}</s>\n", True)]
            asked = "" if turn["role"] == "assistant" else f"{asked}<{turn['role']}>\n{turn['content']}</s>\n"
        assert (shown[line].client, shown[line].parts) == (row["site"], said)
    assert {name: one.rows for name, one in report.clients.items()} == {"harbour": 6, "hill": 6, "lake": 6}
    assert sum(one.loss_tokens for one in report.clients.values()) == sum(
        len(turn["content"].encode()) + 2 for row in rows for turn in row["messages"] if turn["role"] == "assistant"
    )


def test_texts_that_leave_nothing_to_learn_are_counted_and_not_shown(tmp_path, byte_base):
    task = {"kind": "causal-lm", "prompt": "{text}", "completion": " {label}"}
    report = describe_rows(configuration(tmp_path, byte_base, **task, max_length=20), 6)
    room = [20 - len(text.encode()) - 1 for text in TEXTS]  # the begin token
    assert report.nothing_left == sum(left <= 0 for left in room) == 2
    assert sorted(row.place for row in report.shown) == [f"line {line}" for line, left in enumerate(room, start=2) if left > 0]
    assert sum(one.loss_tokens for one in report.clients.values()) == sum(
        max(0, min(left, len(label) + 2)) for left, label in zip(room, LABELS, strict=True)
    )


def test_marks_are_of_no_text_and_nothing_moves_the_terminal(tmp_path, byte_base):
    path = tmp_path / "c.toml"
    path.write_text(write_config(configuration(tmp_path, byte_base)))
    done = invoke(path, "--rows", 6)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("the loss is on what stands between ⟪ and ⟫\n")
    assert done.stdout.count("class ⟪") == done.stdout.count("⟫\n    <s>") == 6
    assert "vpn fails<U+0009>and<U+001B>[31m fails" in done.stdout
    assert "\x1b" not in done.stdout
    assert _data._marks("".join(_data.MARKS)) == ("⟦⟦", "⟧⟧")
    colours = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", no_color=False)
    for line in _data._shown(colours, describe_rows(read_config(path), 6)):
        colours.print(line)
    said = colours.file.getvalue()
    assert re.findall(r"class \x1b\[30;42m(\w+)\x1b\[0m", said) == LABELS
    assert "⟦ink⟧" in said
    assert "⟪" not in said


def test_images_are_told_by_file_size_and_class(tmp_path):
    for index in range(4):
        Image.fromarray(np.zeros((20, 28, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    (tmp_path / "rows.csv").write_text("image,label\n0.png,red\n1.png,blue\n2.png,red\n3.png,red\n")
    ViTConfig(image_size=32, patch_size=8).save_pretrained(tmp_path / "shape")
    task = {"name": "custom", "kind": "image-classification", "data": str(tmp_path), "train": "rows.csv", "eval": "rows.csv"}
    path = tmp_path / "c.toml"
    clients = {"count": 1, "holdout": 0.0}
    path.write_text(write_config(parse_config({"base": {"model": str(tmp_path / "shape")}, "task": task, "clients": clients})))
    done = invoke(path, "--rows", 1)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[2:4] == [
        "client-0, line 2: class ⟦red⟧",
        f"    {tmp_path / '0.png'}: 28 x 20 RGB, to the model 32 x 32 in 3 channels",
    ]
    told = json.loads(invoke(path, "--json").stdout)
    assert (told["max_length"], told["lengths"], told["clients"]["client-0"]["classes"]) == (None, {}, {"blue": 1, "red": 3})


def test_one_client_s_rows(tmp_path, byte_base):
    config = configuration(tmp_path, byte_base)
    report = describe_rows(config, 2, client="s")
    assert [(row.client, row.place) for row in report.shown] == [("s", "line 3"), ("s", "line 5")]
    assert (list(report.clients), report.lengths["a row"].most) == (["s"], max(len(text.encode()) + 2 for text in TEXTS[1::2]))
    with pytest.raises(UsageError, match="'chset' holds no rows: did you mean 'chest'"):
        describe_rows(read_config(ROOT / "examples" / "notes.toml"), client="chset")


def test_errors_are_one_line_and_nothing_is_written(tmp_path, byte_base, monkeypatch):
    config = configuration(tmp_path, byte_base, labels=["network", "hardware"])
    path = tmp_path / "c.toml"
    path.write_text(write_config(config))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for words, line in (
        ([path, "--set", "task.label=lable"], "error: rows.csv has no column 'lable': did you mean 'label'?"),
        ([path, "--client", "north"], "error: --client 'north' holds no rows: give one of n, s"),
        ([path, "--set", f"base.model={tmp_path}"], f"error: {tmp_path} is a folder, but no model could be loaded from it"),
        (["no.toml"], "error: no.toml"),
    ):
        done = invoke(*words)
        assert done.exit_code != 0
        assert len(done.stderr.strip().splitlines()) == 1
        assert done.stderr.startswith(line), done.stderr
        assert done.stdout == ""
    done = invoke(path)  # a run would refuse the row of class kitchen: check says so; here it is left out
    assert done.exit_code == 0
    assert "2 of 12" not in done.stdout
    assert "1 of 6 rows are left out: rows.csv: 1 row with a label outside" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_many_classes_are_told_in_words(tmp_path, byte_base):
    many = [*dict.fromkeys(LABELS), *(f"class{number}" for number in range(10))]
    path = tmp_path / "c.toml"
    path.write_text(write_config(configuration(tmp_path, byte_base, labels=many)))
    assert "s: 1 network, 1 hardware, 1 kitchen\n" in invoke(path, "--rows", 0).stdout


# What the pages show

PAGES = "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
SHOWN = re.findall(r"```sh\n(fedex-lora data [^\n]*)\n```\n+```text\n(.*?)```", PAGES, flags=re.S)


def test_the_pages_show_outputs():
    assert len(SHOWN) >= 3


@pytest.mark.parametrize("command", [command for command, _ in SHOWN])
def test_outputs_on_the_pages_are_what_the_commands_print(command, request, tmp_path, monkeypatch):
    """MRPC with MiniLM's tokenizer, E2E with GPT-2's, of which only a config is beside it; the others with the demo's."""
    monkeypatch.chdir(ROOT)
    line = command
    if "mrpc" in command:
        line = line.replace("GLUE_FOLDER", f"{request.getfixturevalue('data_folder')}/glue").replace(
            "base.model=FOLDER", f"base.model={request.getfixturevalue('minilm')}"
        )
    if "e2e" in command:
        data = request.getfixturevalue("data_folder")
        tokenizer = data.parent / "models" / "tokenizers" / "gpt2" / "tokenizer.json"
        if not tokenizer.exists():
            pytest.skip("no models/tokenizers/gpt2 beside FEDEX_LORA_DATA")
        GPT2Config().save_pretrained(tmp_path)
        shutil.copy(tokenizer, tmp_path)
        line = line.replace("E2E_FOLDER", f"{data}/e2e").replace("base.model=FOLDER", f"base.model={tmp_path}")
    done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert done.exit_code == 0, done.output
    assert [row.rstrip() for row in done.stdout.splitlines()] == dict(SHOWN)[command].splitlines()
