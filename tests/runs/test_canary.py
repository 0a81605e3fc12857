"""Whatever fails at a party, no byte of its rows, columns, classes and files reaches the server, its files or its report."""

import logging
import os
import struct
import threading
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from multiprocessing.connection import Client
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from tests.canary import CLASSES, DIALOGUE, DIALOGUES, PICTURES, SECRET, TEXTS, UnspeakableError
from tests.tasks.test_images import SHAPE

pytest.importorskip("flwr", reason="the extra flower is not installed")

from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from transformers import ViTForImageClassification

from fedex_lora.config import parse_config, write_config
from fedex_lora.engines.flower._request import NodeRequest
from fedex_lora.engines.flower._worker import ask, serve
from fedex_lora.engines.flower.client import client_app
from fedex_lora.engines.flower.server import Deployment, narrate
from fedex_lora.errors import DataError
from fedex_lora.protocol.envelopes import answer_of, envelope_of
from fedex_lora.protocol.failures import WORDS, Failure, failure_of
from fedex_lora.protocol.records import Apology
from fedex_lora.report import write_report
from fedex_lora.runs.run import run
from fedex_lora.storage.events import read_events

HEALTHY = "healthy"


@pytest.fixture(autouse=True, scope="module")
def inside_a_task():
    """Flower's messages may only be made by a process that works on a task of it."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


class Machines:
    """A Grid whose nodes are ClientApps, each a party with its own settings; what goes back to the server is kept."""

    def __init__(self, config, parties):
        self.app, self.parties, self.back, self.sent = client_app(config), parties, {}, []
        self.names = sorted(parties)

    def get_nodes(self):
        return [SimpleNamespace(node_id=number, name=name, last_activated_at="1") for number, name in enumerate(self.names)]

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message {len(self.sent)}"
            node, within = self.parties[self.names[message.metadata.dst_node_id]]
            context = Context(run_id=1, node_id=message.metadata.dst_node_id, node_config=node, state=RecordDict(), run_config={})
            with within() if within else nullcontext():
                reply = self.app(message, context)
            self.sent.append(reply)
            self.back[message.metadata.message_id] = reply
            yield message.metadata.message_id

    def pull_messages(self, identities):
        return [self.back.pop(identity) for identity in identities if identity in self.back]


def settings(kind, folder):
    """The server's own configuration and rows, in which the secret does not occur."""
    own = {"classification": TEXTS, "image-classification": TEXTS, "causal-lm": None}[kind]
    folder.mkdir(parents=True)
    (folder / "rows.csv").write_text((own or "prompt,completion\nbed :, red\n").replace(SECRET, "a patient"))
    tree = {
        "rounds": 1,
        "torch_threads": 1,
        "base": {"model": "demo", "trust_remote_code": True},
        "lora": {"r": 2, "target_modules": ["q_proj"]},
        "task": {"name": "custom", "kind": kind, "train": "rows.csv", "eval": "rows.csv", "data": str(folder), "max_length": 32},
        "clients": {"quorum": 0.01, "count": 1},
        "training": {"per_device_train_batch_size": 8},
    }
    if kind != "causal-lm":
        tree["task"]["labels"] = ["no", "yes"]
    if kind == "image-classification":
        from PIL import Image

        ViTForImageClassification(SHAPE).save_pretrained(folder / "vit")
        tree["base"] = {"model": str(folder / "vit")}
        for number in range(8):
            Image.new("RGB", (12, 12)).save(folder / f"{number}.png")
        lines = [f"{number}.png,{'yes' if number % 2 else 'no'}\n" for number in range(8)]
        (folder / "rows.csv").write_text("".join(["image,label\n", *lines]))
    return tree


def good(kind, folder):
    """A party whose rows fit; they hold the secret, too."""
    folder.mkdir(parents=True)
    if kind == "classification":
        (folder / "rows.csv").write_text(TEXTS)
    elif kind == "causal-lm":
        (folder / "rows.csv").write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in DIALOGUE))
    else:
        return {**PICTURES["an image that is not there"](folder).node, "data": str(folder.parent.parent / "server")}
    return {"data": str(folder)}


def everything(folder):
    """All bytes of all files below a folder, and their names."""
    return b"\n".join(path.name.encode() + (path.read_bytes() if path.is_file() else b"") for path in sorted(folder.rglob("*")))


def bytes_of(reply):
    """All that a ClientApp sends back: nothing of it is left out."""
    records = reply.content.array_records.values()
    arrays = b"".join(array.data for record in records for array in record.values())
    return repr(reply).encode() + repr(dict(reply.content.config_records)).encode() + arrays


@pytest.mark.parametrize("path", ["over Flower", "through a worker's socket"])
@pytest.mark.parametrize(
    ("kind", "faults"),
    [("classification", CLASSES), ("causal-lm", DIALOGUES), ("image-classification", PICTURES)],
    ids=["texts", "dialogues", "images"],
)
def test_no_byte_of_a_secret_leaves_a_party(kind, faults, path, tmp_path, caplog, capfd):
    config = parse_config(settings(kind, tmp_path / "server"))
    (tmp_path / "config.toml").write_text(write_config(config))
    parties, codes = {HEALTHY: (good(kind, tmp_path / SECRET / "good"), None)}, {}
    for number, (name, make) in enumerate(faults.items()):
        folder = tmp_path / SECRET / str(number)
        folder.mkdir(parents=True)
        fault = make(folder)
        parties[f"party-{number:02d}"] = ({"data": str(folder), **fault.node}, fault.within)
        codes[f"party-{number:02d}"] = (name, fault.code)
    with ExitStack() as stack:
        if "socket" in path:
            socket, ready = tmp_path / "w", threading.Event()
            threading.Thread(target=serve, args=(socket, lambda _: ready.set()), daemon=True).start()
            assert ready.wait(10)
            parties = {name: ({"worker": str(socket), **node}, within) for name, (node, within) in parties.items()}
        parties = {name: ({"state": str(tmp_path / SECRET / "state" / name), **node}, within) for name, (node, within) in parties.items()}
        stack.enter_context(
            patch.dict("os.environ", {"XDG_STATE_HOME": str(tmp_path / SECRET / "home"), "HF_MODULES_CACHE": str(tmp_path)})
        )
        stack.enter_context(caplog.at_level(logging.INFO))
        machines, out = Machines(tmp_path / "config.toml", parties), tmp_path / "run"
        run(config, out, narrate, home=lambda config, emit: Deployment(config, machines, sorted(parties)))
    write_report([out], out / "report.html")
    reasons = {event["client"]: event["reason"] for event in read_events(out / "events.jsonl") if event["event"] == "rejected"}
    wrong = {
        codes[name]: reasons.get(name) for name in codes if not reasons.get(name, "").startswith(f"it failed: {WORDS[codes[name][1]]}")
    }
    assert wrong == {}
    assert HEALTHY not in reasons
    told = [everything(out), *map(bytes_of, machines.sent), "".join(record.getMessage() for record in caplog.records).encode()]
    printed, own = capfd.readouterr()  # a node that cannot write its log writes to its own standard error
    told.append(printed.encode())
    assert len(machines.sent) == 2 * len(parties)  # a round, and the final evaluation
    assert b"a label outside the set: 3 rows" in told[0] or kind != "classification"
    assert not [leak for leak in told if SECRET.lower().encode() in leak.lower()]
    logs = everything(tmp_path / SECRET / "state") + everything(tmp_path / SECRET / "home") + own.encode()
    failures = sum(b'"kind":"failure"' in bytes_of(reply) for reply in machines.sent)
    assert failures >= len(codes)
    assert logs.count(b"and nothing else") == failures  # all of it is in the parties' own logs: the texts of errors,
    assert SECRET.encode() in logs
    assert b"sent a message of kind update, round 1: " in logs  # and what left


def test_a_failure_s_code_is_never_a_text():
    assert failure_of(DataError("x", SECRET)) == Failure("unexpected")
    assert Failure(SECRET) == Failure("unexpected")  # also where it arrives: whoever sent it
    assert SECRET.encode() not in answer_of(b"", "a", failure_of(DataError("x", SECRET)))


def test_a_worker_outlives_code_that_leaves_and_lengths_that_are_none(tmp_path):
    socket, ready, said = tmp_path / "w", threading.Event(), list[str]()

    def tell(line):
        ready.set()
        said.append(line)
        raise BrokenPipeError

    threading.Thread(target=serve, args=(socket, tell), daemon=True).start()
    assert ready.wait(10)
    request = NodeRequest(b"", "a", "r", "", "", {"worker": str(socket), "state": str(tmp_path)})
    with Client(str(socket), "AF_UNIX") as connection:
        os.write(connection.fileno(), struct.pack("!iQ", -1, 2**62))
    with patch("fedex_lora.engines.flower._node.parse_config", side_effect=SystemExit(SECRET)):
        assert code_of(ask(request)) == "privacy"  # nobody knows whether a run is private whose configuration was not read
    assert code_of(ask(replace(request, client="ward[/x]\n"))) == "config"
    assert said[-1].startswith(r"'ward[/x]\n': answered with ")


def code_of(answer):
    return envelope_of(answer, Apology)[0].code


def at_work(name):
    """May this fault happen to a run in one process: it is in a file of rows, or in code?"""
    return "not there" not in name and (CLASSES[name].__qualname__.startswith(("rows", "raised")))


@pytest.mark.parametrize("name", sorted(filter(at_work, CLASSES)))
def test_in_one_process_files_have_nothing_of_it_and_the_console_has(name, tmp_path):
    tree = settings("classification", tmp_path / "server")
    folder, shown = tmp_path / "party", []
    folder.mkdir()
    fault = CLASSES[name](folder)
    train = str(fault.node.get("train", "rows.csv"))
    plain = folder / train.replace(SECRET, "rows")  # the configuration names the file, so its name is no secret
    (folder / train).rename(plain)
    tree["task"] |= {"train": plain.name, "data": str(folder), "eval": str(tmp_path / "server" / "rows.csv")}
    try:
        with fault.within() if fault.within else nullcontext():
            run(parse_config(tree), tmp_path / "run", lambda event: shown.append((event.name, getattr(event, "message", None))))
    except Exception as error:
        shown.append((type(error).__name__, "" if isinstance(error, UnspeakableError) else str(error)))
    assert {name for name, _ in shown} - {"started", "round_started", "warning", "rejected"}  # it did not go unseen
    assert SECRET.encode() not in everything(tmp_path / "run")
