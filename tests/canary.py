"""Faults at a party, each with a secret word in what it concerns: rows, columns, classes, names of files. See test_canary.py."""

import errno
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import torch
from PIL import Image

from fedex_lora.config import base_folder

SECRET = "Quagmire"
TEXTS = "text,label\n" + "".join(f"{SECRET} has bed {n},{'yes' if n % 2 else 'no'}\n" for n in range(12))
DIALOGUE = [{"prompt": f"{SECRET} bed {n} :", "completion": " red"} for n in range(12)]


@dataclass(frozen=True)
class Fault:
    """What is wrong at one party.

    Attributes:
        code: what it may say of it.
        node: more of its node config.
        within: the fault that its code meets while it answers.
    """

    code: str
    node: dict[str, object]
    within: Callable[[], AbstractContextManager[object]] | None = None


def rows(name: str, content: str | bytes | Callable[[Path], object], code: str) -> Callable[[Path], Fault]:
    """A file of rows with something wrong in it."""

    def make(folder: Path) -> Fault:
        path = folder / name
        if callable(content):
            content(path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return Fault(code, {"train": name})

    return make


def node(code: str, **settings: object) -> Callable[[Path], Fault]:
    """Settings of the party that do not work; FOLDER stands for its own."""

    def make(folder: Path) -> Fault:
        (folder / "rows.csv").write_text(TEXTS)
        (folder / f"{SECRET}-file").write_text(SECRET)
        return Fault(
            code, {key: str(value).replace("FOLDER", str(folder)) if isinstance(value, str) else value for key, value in settings.items()}
        )

    return make


def raised(code: str, where: str, error: BaseException) -> Callable[[Path], Fault]:
    """An exception out of somebody's code while the party is at work."""

    def make(folder: Path) -> Fault:
        (folder / "rows.csv").write_text(TEXTS)
        return Fault(code, {}, lambda: patch(where, side_effect=error))

    return make


def model(code: str, spoil: Callable[[Path], object], **settings: object) -> Callable[[Path], Fault]:
    """The party's own copy of the base, with something wrong in it."""

    def make(folder: Path) -> Fault:
        (folder / "rows.csv").write_text(TEXTS)
        copy = folder / f"{SECRET}-model"
        copy.mkdir()
        for file in base_folder().iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        spoil(copy)
        return Fault(code, {"model": str(copy), **settings})

    return make


class UnspeakableError(Exception):
    """Cannot even say what it is."""

    def __str__(self) -> str:
        raise ValueError(SECRET)


def _code_of_its_own(copy: Path) -> None:
    """A tokenizer with Python code, which raises with the row in its text."""
    (copy / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n"
        '    def __call__(self, *texts, **options):\n        raise RuntimeError(f"cannot read {texts}")\n'
    )
    path = copy / "tokenizer_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}})
    )


def _other_weights(copy: Path) -> None:
    from transformers import AutoModelForCausalLM

    changed = AutoModelForCausalLM.from_pretrained(base_folder())
    with torch.no_grad():
        next(p for name, p in changed.named_parameters() if "q_proj" in name).add_(1)
    changed.save_pretrained(copy)


def _table(rows: object) -> Callable[[Path], object]:
    return lambda path: path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))


def _cell(text: object, label: object) -> list[dict[str, object]]:
    return [*({"text": f"bed {n}", "label": "yes" if n % 2 else "no"} for n in range(8)), {"text": text, "label": label}]


WHOLE = f"{SECRET}.csv"
TRAIN = "transformers.Trainer.train"
CLASSES = {
    "a label outside the set": rows(WHOLE, TEXTS + f"bed 4,{SECRET}\n", "label"),
    "labels outside the set": rows(WHOLE, TEXTS + f"{SECRET},perhaps\n" * 3, "label"),
    "no header": rows(WHOLE, TEXTS.partition("\n")[2], "column"),
    "columns of another name": rows(WHOLE, TEXTS.replace("text", f"{SECRET}-note", 1), "column"),
    "no labels": rows(WHOLE, f"text,{SECRET}\nbed 1,yes\n", "column"),
    "an empty text": rows(WHOLE, TEXTS + ",yes\n", "empty"),
    "an empty label": rows(WHOLE, TEXTS + f"{SECRET},\n", "empty"),
    "more fields than the header": rows(WHOLE, TEXTS + f"{SECRET}, bed 4, room 2,yes\n", "table"),
    "a quote that is not closed": rows(WHOLE, TEXTS + f'"{SECRET},yes\n', "table"),
    "latin-1": rows(WHOLE, TEXTS.encode() + f"{SECRET} Müller,yes\n".encode("latin-1"), "encoding"),
    "utf-16": rows(WHOLE, TEXTS.encode("utf-16"), "encoding"),
    "an empty file": rows(WHOLE, "", "no-rows"),
    "a header only": rows(WHOLE, "text,label\n", "no-rows"),
    "an ending that is not read": rows(f"{SECRET}.xlsx", TEXTS, "table"),
    "a folder in place of a file": rows(WHOLE, lambda path: path.mkdir(), "file"),
    "a link to nowhere": rows(WHOLE, lambda path: path.symlink_to(path.with_name("nowhere")), "file"),
    "jsonl with a broken line": rows("rows.jsonl", _table('{"text": "' + SECRET + '", "label": "yes"\n'), "table"),
    "jsonl of lists": rows("rows.jsonl", _table([[SECRET, "yes"]]), "table"),
    "jsonl with a list as label": rows("rows.jsonl", _table(_cell("bed 4", [SECRET])), "label"),
    "jsonl with a record as label": rows("rows.jsonl", _table(_cell("bed 4", {SECRET: 1})), "label"),
    "jsonl with no text": rows("rows.jsonl", _table(_cell(None, SECRET)), "empty"),
    "labels of mixed kinds": rows("rows.jsonl", _table([*_cell(SECRET, 1), *_cell("bed 5", True)]), "label"),
    "json of one object": rows("rows.json", _table(json.dumps({SECRET: 1})), "column"),
    "json of a text": rows("rows.json", _table(json.dumps(SECRET)), "table"),
    "garbage as parquet": rows("rows.parquet", SECRET * 50, "table"),
    "parquet cut off": rows("rows.parquet", lambda path: _cut(path, pd.DataFrame({"text": [SECRET] * 9, "label": ["no"] * 9})), "table"),
    "parquet of other columns": rows("rows.parquet", lambda path: pd.DataFrame({SECRET: [1]}).to_parquet(path), "column"),
    "a file that is not there": node("file", train=WHOLE),
    "a folder that is not there": node("file", data=f"FOLDER/{SECRET}"),
    "no folder": node("no-data", data=""),
    "a state folder that cannot be": node("storage", state=f"FOLDER/{SECRET}-file"),
    "another client": node("client", client=SECRET),
    "an unknown setting": node("settings", **{SECRET: "x"}),
    "a setting of another kind": node("settings", threads=SECRET),
    "a message that is too large": node("size", **{"max-megabytes": 1e-6, "train": WHOLE}),
    "a worker that is not there": node("worker", worker=f"FOLDER/{SECRET}.sock"),
    "a model that is not there": node("model", model=f"FOLDER/{SECRET}"),
    "a broken config": model("model", lambda copy: (copy / "config.json").write_text("{" + SECRET)),
    "a config of an unknown kind": model("model", lambda copy: (copy / "config.json").write_text(json.dumps({"model_type": SECRET}))),
    "no tokenizer": model("model", lambda copy: [path.unlink() for path in copy.glob("tokenizer*")]),
    "weights cut off": model("model", lambda copy: _cut_file(copy / "model.safetensors")),
    "other weights": model("base", _other_weights),
    "a tokenizer with code that raises": model("unexpected", _code_of_its_own, **{"trust-remote-code": True}),
    "out of memory": raised("memory", TRAIN, torch.OutOfMemoryError(SECRET)),
    "out of memory on a CPU": raised("memory", TRAIN, RuntimeError(f"can't allocate memory: {SECRET}")),
    "no memory at all": raised("memory", "fedex_lora.runs.learner.evaluate", MemoryError(SECRET)),
    "an error in training": raised("unexpected", TRAIN, RuntimeError(f"shape mismatch at {SECRET}")),
    "an error of a kind of its own": raised("unexpected", TRAIN, type(SECRET, (Exception,), {})("oh")),
    "an error that cannot be said": raised("unexpected", TRAIN, UnspeakableError()),
    "a key that is missing": raised("unexpected", TRAIN, KeyError(SECRET)),
    "a package that is missing": raised("package", TRAIN, ImportError(f"No module named {SECRET}")),
    "a full disk": raised(
        "disk", "fedex_lora.runs.clients.write_bytes", OSError(errno.ENOSPC, "No space left on device", f"/srv/{SECRET}")
    ),
    "an error in a metric": raised("unexpected", "sklearn.metrics.accuracy_score", ValueError(f"{SECRET} is no class")),
    "an error in a batch": raised("unexpected", "transformers.DataCollatorWithPadding.__call__", ValueError(f"cannot pad {SECRET}")),
}
DIALOGUES = {
    "a column of the template is missing": rows(f"{SECRET}.jsonl", _table([{"prompt": SECRET, "answer": "red"}]), "column"),
    "an empty completion": rows(f"{SECRET}.jsonl", _table([*DIALOGUE, {"prompt": SECRET, "completion": ""}]), "empty"),
    "a record as prompt": rows(f"{SECRET}.jsonl", _table([{"prompt": {SECRET: 1}, "completion": " "}]), "empty"),
}


def _picture(path: Path, mode: str = "RGB") -> None:
    Image.new(mode, (12, 12)).save(path)


def _pictures(name: str, spoil: Callable[[Path], object], code: str) -> Callable[[Path], Fault]:
    def make(folder: Path) -> Fault:
        for number in range(8):
            _picture(folder / f"{number}.png")
        spoil(folder / name)
        lines = [f"{number}.png,{'yes' if number % 2 else 'no'}\n" for number in range(8)]
        (folder / "rows.csv").write_text("".join(["image,label\n", *lines, f"{name},yes\n"]))
        return Fault(code, {})

    return make


def _cut(path: Path, frame: pd.DataFrame) -> None:
    frame.to_parquet(path)
    _cut_file(path)


def _cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _truncated(path: Path) -> None:
    """Its header is whole, and its pixels are not: it opens, and fails in its batch."""
    Image.effect_noise((64, 64), 90).convert("RGB").save(path.with_suffix(".jpg"), quality=95)
    whole = path.with_suffix(".jpg").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


PICTURES = {
    "an image that is not there": _pictures(f"{SECRET}.png", lambda path: None, "file"),
    "an image that is none": _pictures(f"{SECRET}.png", lambda path: path.write_text(SECRET), "image"),
    "an image of 16 bits": _pictures(f"{SECRET}.png", lambda path: _picture(path, "I;16"), "image"),
    "an image that is cut off": _pictures(f"{SECRET}.jpeg", _truncated, "image"),
    "a folder as image": _pictures(f"{SECRET}.png", lambda path: path.mkdir(), "image"),
    "no name of an image": _pictures("", lambda path: (path.parent / SECRET).touch(), "empty"),
}
