"""Flower without a deployment: settings, the app folder, keys, the transport over nodes that come and go, a party and its worker."""

import json
import os
import shutil
import signal
import socket as socketlib
import ssl
import subprocess
import threading
import zipfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tests.fake import raising
from typer.testing import CliRunner

flwr = pytest.importorskip("flwr", reason="the extra flower is not installed")

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey  # noqa: E402
from cryptography.hazmat.primitives.serialization import load_ssh_public_key  # noqa: E402
from flwr.app import Message, RecordDict  # noqa: E402
from flwr.app.error import Error  # noqa: E402
from flwr.cli.build import build_fab_from_disk  # noqa: E402
from flwr.common.constant import ErrorCode  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402
from httpx import ConnectError  # noqa: E402

from fedex_lora.cli import app  # noqa: E402
from fedex_lora.cli.doctor import examine  # noqa: E402
from fedex_lora.config import base_folder, parse_config, read_config, write_config  # noqa: E402
from fedex_lora.engines.flower import _exchange, _worker  # noqa: E402
from fedex_lora.engines.flower._exchange import GridExchange, NodeDirectory  # noqa: E402
from fedex_lora.engines.flower._keys import make_certificates, make_node_key  # noqa: E402
from fedex_lora.engines.flower._messages import from_record, to_record  # noqa: E402
from fedex_lora.engines.flower._node import Node  # noqa: E402
from fedex_lora.engines.flower._request import NodeRequest  # noqa: E402
from fedex_lora.engines.flower._settings import RunSettings, node_settings, read_settings  # noqa: E402
from fedex_lora.engines.flower._trial import differing, short_demo, trial  # noqa: E402
from fedex_lora.engines.flower._worker import ask, serve  # noqa: E402
from fedex_lora.engines.flower.app_folder import write_app  # noqa: E402
from fedex_lora.engines.flower.server import Deployment  # noqa: E402
from fedex_lora.errors import ConfigError, FedexLoraError, StorageError, UsageError  # noqa: E402
from fedex_lora.protocol.envelopes import encode_failure, envelope_of  # noqa: E402
from fedex_lora.protocol.envelopes import message as message_bytes  # noqa: E402
from fedex_lora.protocol.failures import Failure  # noqa: E402
from fedex_lora.protocol.records import Apology  # noqa: E402
from fedex_lora.protocol.records import Request as ToClient  # noqa: E402
from fedex_lora.runs.emit import log_line, log_to  # noqa: E402
from fedex_lora.runs.listening import Reply  # noqa: E402
from fedex_lora.runs.party_log import FILE, left, log_failure, party_log  # noqa: E402
from fedex_lora.runs.round_loop import run_rounds  # noqa: E402
from fedex_lora.runs.run import run  # noqa: E402
from fedex_lora.runs.simulation import LocalSimulation  # noqa: E402
from fedex_lora.storage.events import HeldOut, RoundDone, RoundStarted, Warned, of_kind, read_events  # noqa: E402
from fedex_lora.storage.tensors import load_tensors  # noqa: E402
from fedex_lora.tasks import load_task  # noqa: E402


def ignore(event, **fields):
    pass


@pytest.fixture(autouse=True, scope="module")
def inside_a_task():
    """Flower's messages may only be made by a process that works on a task of it."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1


def test_settings_of_a_node():
    assert node_settings({"client": "a", "data": "/srv", "max-rows": 5, "max-megabytes": 7}).max_megabytes == 7.0
    assert node_settings({"partition-id": 0, "num-partitions": 3}).rows == "dealt"
    with pytest.raises(ConfigError, match="max_rows is for rows of this node's own, and these are the run's: remove it"):
        node_settings({"max-rows": 5}).applied(small())
    for wrong, words in (({"clinet": "a"}, "did you mean client"), ({"threads": "2"}, "of kind int"), ({"rows": "all"}, "own")):
        with pytest.raises(ConfigError, match=words):
            node_settings(wrong)
    assert read_settings(RunSettings(), {"out": "x", "clients": "b, a"}, "run config").names == ["a", "b"]


def custom(tmp_path):
    rows = "text,label\n" + "".join(f"row {n},{'yes' if n % 2 else 'no'}\n" for n in range(20))
    (tmp_path / "rows.csv").write_text(rows)
    task = {"name": "custom", "train": str(tmp_path / "rows.csv"), "eval": str(tmp_path / "rows.csv"), "labels": ["no", "yes"]}
    return parse_config({"base": {"model": "somewhere", "trust_remote_code": True}, "task": task})


def test_paths_and_code_are_the_party_s_own(tmp_path):
    config = custom(tmp_path)
    with pytest.raises(ConfigError, match="where its rows are"):
        node_settings({"client": "a"}).applied(config)
    mine = node_settings({"client": "a", "data": "/srv/a", "train": "mine.csv", "model": "/models/m", "threads": 2}).applied(config)
    with pytest.raises(ConfigError, match="another head"):
        node_settings({"data": "/srv/a"}).applied(config.model_copy(update={"task": config.task.model_copy(update={"labels": None})}))
    (tmp_path / "mine.csv").write_text("text,label\nonly one class,no\n")
    assert load_task(node_settings({"data": str(tmp_path), "train": "mine.csv"}).applied(config).task, 0).model_config["num_labels"] == 2
    assert (str(mine.task.data), mine.task.train, mine.task.eval) == ("/srv/a", "mine.csv", "mine.csv")
    assert (mine.base.model, mine.base.trust_remote_code, mine.torch_threads) == ("/models/m", False, 2)
    assert node_settings({"data": "/srv/a", "trust-remote-code": True}).applied(config).base.trust_remote_code
    assert node_settings({"data": "/srv/a"}).applied(config).task.train == "rows.csv"  # never the server's path


@pytest.mark.parametrize(("run_s", "node_s", "counts"), [(None, 0, None), (10, 0, 10), (None, 5, 5), (10, 5, 5), (5, 10, 5)])
def test_of_two_limits_of_rows_the_smaller_one_holds(run_s, node_s, counts, tmp_path):
    config = custom(tmp_path)
    config = config.model_copy(update={"task": config.task.model_copy(update={"train_rows": run_s})})
    assert node_settings({"data": "/srv/a", "max-rows": node_s}).applied(config).task.train_rows == counts
    private = {"epsilon": 3.0, "stated-rows": 20, "ledger": "/srv/ledger.jsonl"}
    assert node_settings({"data": "/srv/a", **private}).applied(config).task.train_rows is None


def test_nodes_with_files_of_their_own_end_in_the_bits_of_one_process(tmp_path):
    """`clients.data` and `data=`: the same rows are drawn and held out. Where a run's rows are, each node says itself."""
    names, rows = ("north", "south"), [f"{bed},{'yes' if bed % 2 else 'no'}\n" for bed in range(80)]
    for name, part in zip((*names, "eval"), (rows[:40], rows[40:], rows[::9]), strict=True):
        (tmp_path / f"{name}.csv").write_text("text,label\nbed " + "bed ".join(part))
    task = {"name": "custom", "text": ["text"], "label": "label", "labels": ["no", "yes"], "train_rows": 24, "eval": "eval.csv"}
    tree = small().model_dump(mode="json", exclude_none=True) | {"rounds": 1, "clients": {"data": {name: f"{name}.csv" for name in names}}}
    config = parse_config({**tree, "task": {**task, "data": str(tmp_path)}})
    own = {name: {"rows": "own", "data": str(tmp_path), "train": f"{name}.csv"} for name in names}
    assert alone(config, tmp_path / "alone", lambda request: Node(ignore).reply(request), own) == []
    run(config, tmp_path / "together", ignore)
    assert differing(tmp_path / "together", tmp_path / "alone" / "run") == []
    held = [of_kind(read_events(tmp_path / place / "events.jsonl"), HeldOut)[0].metrics for place in ("together", "alone")]
    assert held[0] == held[1]


def test_a_private_run_is_not_tried(tmp_path):
    """Its noise is never the same twice, and training would spend the ledger's epsilon."""
    private = {"epsilon": 3, "rows": 20, "ledger": str(tmp_path / "ledger.jsonl")}
    config = parse_config({"base": {"model": "demo"}, "method": "ffa", "task": {"name": "demo"}, "privacy": private})
    with pytest.raises(UsageError, match="private noise is never the same twice"):
        trial(config, tmp_path / "tried", 60, ignore)
    assert not list(tmp_path.iterdir())


def test_the_app_folder_is_one_that_flower_bundles(tmp_path):
    done = CliRunner().invoke(
        app, ["flower", "init", str(tmp_path / "My App"), "--config", "examples/quickstart.toml", "--clients", "b,a", "--json"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["clients"] == ["b", "a"]
    bundle = zipfile.ZipFile(BytesIO(build_fab_from_disk(tmp_path / "My App")))
    assert {"federation/server_app.py", "federation/client_app.py", "federation/config.toml"} <= set(bundle.namelist())
    (tmp_path / "config.toml").write_bytes(bundle.read("federation/config.toml"))
    assert read_config(tmp_path / "config.toml").method == "fedex"
    again = CliRunner().invoke(app, ["flower", "init", str(tmp_path / "My App"), "--config", "examples/quickstart.toml"])
    assert again.exit_code == 2
    assert "is not empty" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1


def test_paths_in_the_app_folder_do_not_depend_on_where_it_is_started(tmp_path, monkeypatch):
    config = custom(tmp_path)
    (tmp_path / "c.toml").write_text(
        write_config(config.model_copy(update={"task": config.task.model_copy(update={"train": "rows.csv", "eval": "rows.csv"})}))
    )
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(app, ["flower", "init", "app", "--config", "c.toml"]).exit_code == 0
    assert read_config(tmp_path / "app" / "federation" / "config.toml").task.train == str(tmp_path / "rows.csv")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = CliRunner().invoke(app, ["flower", "init", ".", "--config", "../c.toml", "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["out"] == str(tmp_path / "here-run")


def test_classes_that_every_node_would_ask_for_are_asked_for_at_once(tmp_path):
    config = custom(tmp_path)
    without = config.model_copy(update={"task": config.task.model_copy(update={"labels": None})})
    with pytest.raises(UsageError, match=r"task\.labels is not set"):
        write_app(tmp_path / "app", without, "out", ["a", "b"])
    assert not (tmp_path / "app").exists()
    write_app(
        tmp_path / "scores", without.model_copy(update={"task": without.task.model_copy(update={"kind": "regression"})}), "out", ["a"]
    )


def test_certificates_and_keys_are_good_and_private(tmp_path):
    make_certificates(tmp_path, ["localhost", "127.0.0.1"])
    make_node_key(tmp_path / "node")
    for name in ("ca.key", "server.key", "node"):
        assert (tmp_path / name).stat().st_mode & 0o077 == 0
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=tmp_path / "ca.crt")
    server.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    assert handshake(server, client, "localhost")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, client, "elsewhere.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(server, ssl.create_default_context(), "localhost")
    far = f"{'a' * 40}.{'b' * 40}.elb.example.org"  # more than the 64 characters of a certificate's common name
    make_certificates(tmp_path / "far", [far])
    client = ssl.create_default_context(cafile=tmp_path / "far" / "ca.crt")
    server.load_cert_chain(tmp_path / "far" / "server.pem", tmp_path / "far" / "server.key")
    assert handshake(server, client, far)
    shutil.rmtree(tmp_path / "far")
    assert isinstance(load_ssh_public_key((tmp_path / "node.pub").read_bytes()), EllipticCurvePublicKey)
    done = CliRunner().invoke(app, ["flower", "keys", str(tmp_path), "--node", "node"])
    assert done.exit_code == 2
    assert "not overwritten" in done.stderr
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for words, told in (
        (["--node", "ca.crt"], "none of ca.crt"),
        (["--node", "../evil"], "without slashes"),
        (["--node", "x", "--node", "x"], "once"),
        (["--node", "node.pub"], "not overwritten"),
        (["--hosts", "é b..org"], "not overwritten"),
    ):
        done = CliRunner().invoke(app, ["flower", "keys", str(tmp_path), *words])
        assert (done.exit_code, told in done.stderr) == (2, True), done.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    done = CliRunner().invoke(app, ["flower", "keys", str(tmp_path / "new"), "--hosts", "a..b"])
    assert "no name of a host" in done.stderr
    assert not (tmp_path / "new").exists()


def handshake(server, client, name):
    """TLS in memory, no socket."""
    pipes = [ssl.MemoryBIO() for _ in range(4)]
    left = client.wrap_bio(pipes[0], pipes[1], server_hostname=name)
    right = server.wrap_bio(pipes[2], pipes[3], server_side=True)
    done = {"left": False, "right": False}
    for _ in range(10):
        for side, one in (("left", left), ("right", right)):
            try:
                one.do_handshake()
                done[side] = True
            except ssl.SSLWantReadError:
                pass
            pipes[2].write(pipes[1].read())
            pipes[0].write(pipes[3].read())
    return all(done.values())


class Nodes:
    """A Grid whose nodes answer when the test says so."""

    def __init__(self, *nodes):
        self.nodes = {number: SimpleNamespace(node_id=number, name=name, last_activated_at="1") for number, name in enumerate(nodes, 10)}
        self.out, self.back, self.sent = {}, {}, []

    def get_nodes(self):
        return list(self.nodes.values())

    def push_messages(self, messages):
        for message in messages:
            identity = f"message {len(self.sent)}"
            self.out[identity] = message
            self.sent.append(message)
            yield identity

    def pull_messages(self, identities):
        return [self.back.pop(identity) for identity in identities if identity in self.back]

    def answer(self, number, content=b"answer"):
        identity = f"message {number}"
        message = self.out[identity]
        message.metadata.__dict__["_message_id"] = identity
        self.back[identity] = Message(to_record(content, {}) if isinstance(content, bytes) else content, reply_to=message)


def of_round(number):
    """A message of that round."""
    return message_bytes(ToClient(kind="train", run="r", round=number, client="a"))


def told(replies):
    return [None if reply is None else (reply.client, reply.payload, reply.error) for reply in replies]


def test_who_sits_where():
    nodes = Nodes("b", "", "")
    roster = NodeDirectory(nodes, ["a", "b", "c"])
    assert {client: seat.node for client, seat in roster.present().items()} == {"b": 10, "a": 11, "c": 12}
    gone = nodes.nodes.pop(11)
    assert {client: seat.node for client, seat in roster.present().items()} == {"b": 10, "c": 12}
    nodes.nodes[13] = SimpleNamespace(node_id=13, name="", last_activated_at="1")  # a node without a key has a new id when it returns
    assert {client: seat.node for client, seat in roster.present().items()} == {"b": 10, "c": 12, "a": 13}
    nodes.nodes[11] = gone
    assert {client: seat.node for client, seat in roster.present().items()} == {"b": 10, "c": 12, "a": 13}


def test_an_absent_node_is_waited_for_and_a_dead_one_is_named():
    nodes = Nodes("a")
    replies = GridExchange(nodes, ["a", "b"], {"run": "r"})({"a": of_round(1), "b": of_round(1)}, None)
    assert next(replies) is None
    assert from_record(nodes.sent[0]) == (of_round(1), {"run": "r", "client": "a"})
    nodes.nodes[20] = SimpleNamespace(node_id=20, name="b", last_activated_at="1")
    nodes.answer(0)
    assert told([next(replies)]) == [("a", b"answer", "")]
    assert next(replies) is None
    nodes.answer(1, Error(ErrorCode.NODE_UNAVAILABLE, "node 1 is gone"))
    assert told(replies) == [("b", None, "its node went away before it answered")]


def test_what_flower_cannot_unpack_is_a_failure_of_the_client_that_sent_it():
    """Whatever a node has stored at the SuperLink, the run goes on without it; a link that is down is none of its answers."""
    nodes = Nodes("a", "b")
    pull, replies = nodes.pull_messages, GridExchange(nodes, ["a", "b"], {"run": "r"})({"a": of_round(1), "b": of_round(1)}, None)

    nodes.pull_messages = lambda identities: raising(ValueError("no JSON"))() if "message 1" in identities else pull(identities)
    assert told([next(replies)]) == [("b", None, "its answer cannot be unpacked (ValueError)")]
    nodes.answer(0)
    assert told(replies) == [("a", b"answer", "")]
    again = GridExchange(nodes, ["a", "b"], {"run": "r"})({"b": of_round(2)}, None)
    nodes.pull_messages = raising(ConnectError("refused"))
    with pytest.raises(ConnectError):
        next(again)


def test_a_node_started_anew_is_asked_again_at_once():
    nodes = Nodes("a")
    replies = GridExchange(nodes, ["a"], {})({"a": of_round(1)}, None)
    assert next(replies) is None
    nodes.nodes[10].last_activated_at = "2"
    assert next(replies) is None
    assert [from_record(message)[0] for message in nodes.sent] == [of_round(1)] * 2
    nodes.answer(1)
    assert told(replies) == [("a", b"answer", "")]


def test_a_node_of_another_name_takes_nobody_s_place_and_a_name_that_two_have_is_nobody_s():
    nodes = Nodes("bone", "bone", "radiology", "chest")
    roster = NodeDirectory(nodes, ["bone", "chest", "skin"])
    assert {client: seat.node for client, seat in roster.present().items()} == {"chest": 13}
    assert roster.doubled == {"bone"}
    del nodes.nodes[11]
    assert {client: seat.node for client, seat in roster.present().items()} == {"bone": 10, "chest": 13}


def test_who_is_not_there_for_long_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(_exchange, "JOIN", 0.2)
    nodes = Nodes("a", "c", "c")
    exchange = GridExchange(nodes, ["a", "b", "c"], {})
    replies = exchange({"a": of_round(1), "b": of_round(1), "c": of_round(1)}, None)
    assert next(replies) is None
    nodes.answer(0)
    words = [(reply.client, reply.error) for reply in replies if reply]
    assert words[0] == ("a", "")
    assert dict(words[1:]) == {
        "b": "its node is not there (waited 0.2 seconds)",
        "c": "two nodes are registered under its name: unregister one (waited 0.2 seconds)",
    }


def test_a_late_answer_of_an_earlier_round_does_not_end_the_wait_for_this_one_s():
    nodes = Nodes("a", "b")
    exchange = GridExchange(nodes, ["a", "b"], {})
    assert [reply for reply in exchange({"a": of_round(1), "b": of_round(1)}, 0.01) if reply] == []
    replies = exchange({"a": of_round(2), "b": of_round(2)}, None)
    assert next(replies) is None
    nodes.answer(1, b"late")
    nodes.answer(2)
    assert [(reply.client, reply.round) for reply in (next(replies), next(replies))] == [("b", 1), ("a", 2)]
    assert next(replies) is None  # b's answer of this round is still waited for
    nodes.answer(3)
    assert [(reply.client, reply.round) for reply in replies if reply] == [("b", 2)]
    nodes.nodes[11].last_activated_at = "2"
    again = exchange({"a": of_round(3), "b": of_round(3)}, 0.01)
    assert [reply for reply in again if reply] == []
    assert len(nodes.sent) == 6  # what was asked in round 1 is not asked again


def test_a_message_that_is_not_taken_is_sent_again():
    nodes = Nodes("a")
    push, tries = nodes.push_messages, []

    def refuse_once(messages):
        tries.append(1)
        return [""] if len(tries) == 1 else push(messages)

    nodes.push_messages = refuse_once
    replies = GridExchange(nodes, ["a"], {})({"a": of_round(1)}, None)
    assert next(replies) is None
    assert next(replies) is None
    nodes.answer(0)
    assert told(replies) == [("a", b"answer", "")]


def test_what_comes_after_the_deadline_is_handed_out_later():
    nodes = Nodes("a", "b")
    exchange = GridExchange(nodes, ["a", "b"], {})
    assert told(exchange({"a": of_round(1), "b": of_round(1)}, 0.01)) == [None]
    nodes.answer(0, b"late")
    second = exchange({"b": of_round(2)}, None)
    assert told([next(second)]) == [("a", b"late", "")]
    nodes.answer(2)
    assert [reply for reply in told(second) if reply] == [("b", b"answer", "")]


def test_answers_that_are_not_ours():
    nodes = Nodes("a", "b")
    replies = GridExchange(nodes, ["a", "b"], {})({"a": of_round(1), "b": of_round(1)}, None)
    assert next(replies) is None
    nodes.answer(0, Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "<class 'ZeroDivisionError'>"))
    nodes.answer(1, RecordDict())
    errors = [error for _, _, error in told(replies)]
    assert errors[0] == "its app failed outside of fedex-lora: see that node's own log"  # what it raised may quote its rows
    assert "not of this protocol" in errors[1]


def small(**changes):
    tree = short_demo().model_dump(mode="json", exclude_none=True) | {"rounds": 2}
    tree["task"] |= {"train_rows": 30, "eval_rows": 9}
    tree["lora"] |= {"r": 2, "target_modules": ["q_proj"]}
    for table, values in changes.items():
        tree[table] = {**tree[table], **values} if isinstance(values, dict) else values
    return parse_config(tree)


def alone(config, folder, answer, own=None):
    """A federation in which every client is a party of its own with its own folder and settings, and answers by `answer(request)`."""
    place = LocalSimulation(config, ignore)

    def exchange(messages, deadline):
        for client, payload in messages.items():
            node = {"client": client, "state": str(folder / "state"), "rows": "dealt", **(own or {}).get(client, {})}
            request = NodeRequest(payload, client, "this-run", place.host.place.identity, write_config(config), node)
            yield Reply(client, answer(request))

    there = replace(place.federation(), exchange=exchange)
    folder.mkdir(exist_ok=True)
    run_rounds(config, place.initial(), there, folder / "run", log_to(folder / "events.jsonl"))
    return [event for event in read_events(folder / "events.jsonl") if event["event"] in ("rejected", "warning") and "client" in event]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"local": {"optimizer_state": "keep"}},
        {"method": "fedsa"},
        {"method": "fed-sb", "local": {"optimizer_state": "keep"}, "clients": {"fraction": 0.6}, "rounds": 4},
        {"clients": {"holdout": 0.0}},
        {"server": {"momentum": 0.5}, "clients": {"fraction": 0.6}, "rounds": 5},
    ],
    ids=["fedex", "moments kept", "fedsa", "fed-sb, one absent", "no held-out rows", "momentum, one absent in each round"],
)
def test_parties_alone_on_their_machines_end_in_the_bits_of_one_process(changes, tmp_path):
    """Every message is answered by a new `Node`, as by a new process: what it knows comes from its folder."""
    config = small(**{"rounds": 3, **changes})
    assert alone(config, tmp_path / "alone", lambda request: Node(ignore).reply(NodeRequest.from_bytes(request.to_bytes()))) == []
    run(config, tmp_path / "together", ignore)
    assert differing(tmp_path / "together", tmp_path / "alone" / "run") == []
    errors = [event.exactness_error for event in of_kind(read_events(tmp_path / "alone" / "events.jsonl"), RoundDone)]
    assert config.method == "fedsa" or (len(errors) == config.rounds and all(error < 1e-6 for error in errors))


class Apart(LocalSimulation):
    """The server of a run whose clients are each a new `Node` at every message, with its own folder."""

    def federation(self):
        def exchange(messages, deadline):
            for client, payload in messages.items():
                node = {"client": client, "state": str(self.state), "rows": "dealt"}
                words = write_config(self.host.place.config)
                request = NodeRequest(payload, client, "this-run", self.host.place.identity, words, node)
                yield Reply(client, Node(ignore).reply(NodeRequest.from_bytes(request.to_bytes())))

        return replace(super().federation(), exchange=exchange)

    def remember_in(self, out):
        self.state = out.parent / "state"


@pytest.mark.parametrize("local", [{}, {"optimizer_state": "keep"}], ids=["fedex", "moments kept"])
def test_more_rounds_over_flower_are_those_of_one_process(local, tmp_path):
    """The app runs again with more rounds: 1 + 2 on machines of their own are 3 in one process, to the bit."""
    run(small(rounds=1, local=local), tmp_path / "run", ignore, True, Apart)
    run(small(rounds=3, local=local), tmp_path / "run", ignore, True, Apart)
    run(small(rounds=3, local=local), tmp_path / "together", ignore)
    assert differing(tmp_path / "together", tmp_path / "run") == []
    assert (tmp_path / "state" / "this-run" / "skin").is_dir()


def test_a_run_goes_on_with_other_parties_and_says_so(tmp_path):
    """Over Flower the run config names them, and no key of the run: one has left, and another one came."""

    class Others(Apart):
        """`bone` is not there before round 2, and `skin` no longer."""

        def federation(self):
            there, absent = super().federation(), "bone" if self.host.place.config.rounds == 1 else "skin"
            return replace(there, clients=[name for name in there.clients if name != absent])

    lines = []
    run(small(rounds=1), tmp_path / "run", ignore, True, Others)
    run(small(rounds=2), tmp_path / "run", lambda event: lines.append(log_line(event)), True, Others)
    words = "the run goes on with other parties than it began with: gone: skin; new: bone"
    assert any(words in line for _, line in filter(None, lines))
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert [event.message for event in of_kind(events, Warned) if "parties" in event.message] == [words]
    assert [event.clients for event in of_kind(events, RoundStarted)] == [["chest", "skin"], ["bone", "chest"]]
    assert all(event.exactness_error < 1e-6 for event in of_kind(events, RoundDone))


def preferences(tmp_path, trainer):
    made = [{"prompt": f"bed {n} :", "completion": " red", "chosen": " red" * (1 + n % 2), "rejected": " blue"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    files = dict.fromkeys(("train", "eval"), str(tmp_path / "rows.jsonl"))
    task = {"name": "custom", "kind": "causal-lm", "completion": "{chosen}", "train_rows": None, "eval_rows": 9, **files}
    return small(rounds=3, task=task, clients={"partition": "iid", "column": None, "count": 2}, local={"trainer": trainer})


def test_a_node_trains_with_its_own_trainer_and_keeps_its_reference(tmp_path):
    """DPO, each message answered by a new `Node`: the bits of one process; the log-probabilities of the run's start do not leave."""
    pytest.importorskip("trl")
    config, answers = preferences(tmp_path, "trl:DPOTrainer"), []

    def answer(request):
        mine = Path(request.node["state"]) / "this-run" / request.client / "reference.safetensors"
        before = mine.stat().st_mtime_ns if mine.exists() else 0
        said = NodeRequest(**{**vars(request), "node": {**request.node, "trainer": "trl:DPOTrainer"}})
        answers.append(Node(ignore).reply(said))
        assert not before or mine.stat().st_mtime_ns == before  # worked out once
        found = load_tensors(mine)[0]
        assert found["chosen"].abs().min() > 0
        assert all(one.numpy().tobytes() not in answers[-1] for one in found.values())
        return answers[-1]

    assert alone(config, tmp_path / "alone", answer) == []
    run(config, tmp_path / "together", ignore)
    assert len(answers) == 8  # of three rounds, and the measuring at the end
    assert differing(tmp_path / "together", tmp_path / "alone" / "run") == []


def test_a_trainer_is_the_node_s_word_and_never_the_server_s(tmp_path, monkeypatch):
    """The server's machine does not load it; a node that names none does not train by ours instead; one that does takes its own."""
    (tmp_path / "ward_trainer.py").write_text("def make(model, rows, processor, arguments): ...")
    (tmp_path / "spy_trainer.py").write_text(f"open({str(tmp_path / 'was-here')!r}, 'w')\ndef make(model, rows, processor, arguments): ...")
    config = preferences(tmp_path, f"{tmp_path}/spy_trainer:make")
    config = config.model_copy(update={"training": {**config.training, "beta": 0.2}})
    server = Deployment(config, None, [])
    assert server.host.place.work.trainer is None
    assert server.host.place.config.training == {key: value for key, value in config.training.items() if key != "beta"}
    dealt = {"rows": "dealt"}
    with pytest.raises(ConfigError, match=r'set trainer = "trl:SFTTrainer", or a function of its own, in its file') as caught:
        node_settings(dealt).applied(config)
    assert caught.value.code == "settings"
    monkeypatch.chdir(tmp_path)
    for said in ("ward_trainer:make", f"{tmp_path}/ward_trainer:make"):
        assert node_settings(dealt | {"trainer": said}).applied(config).local.trainer == f"{tmp_path}/ward_trainer:make"
    assert node_settings(dealt | {"trainer": "trl:SFTTrainer"}).applied(small()).local.trainer == "trl:SFTTrainer"
    assert node_settings(dealt).applied(small()).local.trainer is None
    with pytest.raises(ConfigError, match=r"write it as package\.module:function"):
        node_settings(dealt | {"trainer": "make"}).applied(config)
    assert not (tmp_path / "was-here").exists()


def test_a_server_says_no_numbers_of_nodes_that_have_their_own(tmp_path):
    """What the run's file states is nobody's: each node states its own rows."""
    privacy = {"epsilon": 8, "delta": 1e-3, "rows": 20, "accountant": "rdp"}
    for names in ([], ["bone", "skin"]):
        facts = Deployment(small(method="ffa", privacy=privacy, clients={"holdout": 0}), None, names).federation().facts
        assert facts["privacy"]["epsilon"] == 8
        assert "private_clients" not in facts
        assert not any(facts["train_rows"].values())


def test_a_lost_or_broken_memory_is_asked_for_anew(tmp_path):
    config, seen = small(rounds=4, clients={"below_quorum": "wait"}), []

    def answer(request):
        path = Path(request.node["state"]) / "this-run" / "skin" / "memory.safetensors"
        if request.client == "skin":
            seen.append(request)
            if len(seen) == 3:
                path.unlink()
            if len(seen) == 5:
                whole = path.read_bytes()
                path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        return Node(ignore).reply(request)

    told = alone(config, tmp_path / "alone", answer)
    assert [(event["event"], event["round"]) for event in told] == [("warning", 3), ("warning", 4)]
    assert all(event["message"].startswith("skin is sent everything, because: it lacks what") for event in told)
    run(small(rounds=4), tmp_path / "together", ignore)
    assert differing(tmp_path / "together", tmp_path / "alone" / "run") == []


def test_a_worker_takes_no_file_s_place(tmp_path):
    (tmp_path / "rows.csv").write_text("precious")
    with pytest.raises(UsageError, match="no socket"):
        serve(tmp_path / "rows.csv", ignore)
    assert (tmp_path / "rows.csv").read_text() == "precious"


def test_a_worker_leaves_a_socket_that_it_may_not_open(tmp_path, monkeypatch):
    """It may be another user's; one that nobody listens at is replaced."""
    path = tmp_path / "w.sock"
    with socketlib.socket(socketlib.AF_UNIX) as other:
        other.bind(str(path))
    with monkeypatch.context() as here:
        here.setattr(_worker, "Client", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
        with pytest.raises(UsageError, match="may be somebody's"):
            _worker._require_free(path)
    assert path.is_socket()
    _worker._require_free(path)
    assert not path.exists()


def test_a_worker_answers_as_the_party_itself_would(tmp_path):
    config, socket = small(), tmp_path / "w.sock"
    lines, ready = [], threading.Event()

    def tell(line):
        lines.append(line)
        ready.set()

    threading.Thread(target=serve, args=(socket, tell), daemon=True).start()
    assert ready.wait(10)
    assert socket.stat().st_mode & 0o077 == 0
    node = {"worker": str(socket)}
    assert alone(config, tmp_path / "alone", lambda request: ask(NodeRequest(**{**vars(request), "node": {**request.node, **node}}))) == []
    run(config, tmp_path / "together", ignore)
    assert differing(tmp_path / "together", tmp_path / "alone" / "run") == []
    request = NodeRequest(b"garbage", "bone", "x", "", write_config(config), {**node, "rows": "dealt", "state": str(tmp_path / "s")})
    assert envelope_of(ask(request), Apology)[0].code == "message"
    assert "too short" in (tmp_path / "s" / "party.log").read_text()
    with pytest.raises(UsageError, match="does not answer"):
        ask(NodeRequest(**{**vars(request), "node": {"worker": str(tmp_path / "nobody.sock")}}))


def test_a_server_s_words_make_no_line_of_a_party_s_log(tmp_path):
    """Neither as a client's name nor in an error's text."""
    log, forged = party_log(tmp_path), "north\n2025-01-01 00:00:00,000 INFO north: sent nothing"
    asked = message_bytes(ToClient(kind="train", run="r", round=2, client="north", rejected=forged))
    left(log, encode_failure(Failure("settings"), "north"), forged, asked)
    try:
        raise UsageError(forged)
    except UsageError as error:
        log_failure(log, error, Failure("settings"), forged)
    lines = (tmp_path / FILE).read_text().splitlines()
    assert sum("sent nothing" in line for line in lines) >= 4
    assert all(line.startswith("    ") or r"'north\n2025" in line for line in lines)


def test_a_message_for_somebody_else_from_another_base_or_too_large_is_refused(tmp_path):
    config = small()
    request = NodeRequest(b"x" * 2000, "bone", "r", "", write_config(config), {"state": str(tmp_path), "rows": "dealt"})

    def refusal(**changes):
        asked = NodeRequest(**{**vars(request), **changes})
        with pytest.raises(FedexLoraError) as caught:
            Node(ignore).answer(asked, node_settings(asked.node))
        return str(caught.value)

    assert "is client 'skin'" in refusal(node={**request.node, "client": "skin"})
    assert "takes 0.001" in refusal(node={**request.node, "max-megabytes": 0.001})
    assert "not the server's" in refusal(base="another")
    assert "none to 'ward'" in refusal(client="ward")
    words = shutil.copytree(base_folder(), tmp_path / "other words") / "tokenizer.json"
    words.write_text(words.read_text().replace('"limp"', '"?"').replace('"burn"', '"limp"').replace('"?"', '"burn"'))
    theirs = LocalSimulation(config, ignore).host.place.identity
    assert "its tokenizer" in refusal(base=theirs, node={**request.node, "model": str(words.parent)})


def test_own_rows(tmp_path):
    """A party with rows of its own trains on those, and the server's file is not looked for."""
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"prompt": "bed 4 :", "completion": " red"}) + "\n" for _ in range(10)))
    task = {"name": "custom", "kind": "causal-lm", "train": "nowhere.jsonl", "eval": "nowhere.jsonl"}
    config = small().model_copy(update={"task": parse_config({"base": {"model": "demo"}, "task": task}).task})
    settings = node_settings({"client": "a", "data": str(tmp_path), "train": "mine.jsonl"})
    node, request = Node(ignore), NodeRequest(b"", "a", "r", "", write_config(config), {})
    _, data, accounts = node._ready(request, settings)
    assert (len(data["a"].train), len(data["a"].held_out), accounts) == (9, 1, {})
    assert torch.get_num_threads() == 1
    with pytest.raises(UsageError, match=r"no file nowhere\.jsonl"):  # and nothing is looked for elsewhere, on the hub for instance
        Node(ignore)._ready(request, node_settings({"client": "a", "data": str(tmp_path)}))
    with pytest.raises(StorageError, match="cannot keep its state"):
        node.answer(request, node_settings({"client": "a", "data": str(tmp_path), "state": str(tmp_path / "mine.jsonl")}))
    with pytest.raises(ConfigError, match="from zero up"):
        node_settings({"max-rows": -5})
    with pytest.raises(ConfigError, match="from zero up"):
        node_settings({"max-megabytes": float("nan")})


def test_doctor_warns_of_a_superlink_that_everybody_can_reach(tmp_path):
    """Of a process with that name and those options, whatever it does."""
    command = ["sh", "-c", "sleep 60", "--host", "0.0.0.0"]
    link = tmp_path / "flower-superlink"
    link.symlink_to(shutil.which("sh"))
    with subprocess.Popen([link, *command[1:]], start_new_session=True) as process:
        try:
            problems = examine()[1]
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert any("listens on 0.0.0.0" in problem and "docs/deployment.md" in problem for problem in problems)
    assert any("takes any node" in problem for problem in problems)
    assert not [problem for problem in examine()[1] if "listens on 0.0.0.0" in problem]


def test_an_installation_for_flower_can_measure_classes():
    for path in ("docs/deployment.md", "deploy/Dockerfile"):
        assert "'.[flower,tasks]'" in (Path(__file__).parents[2] / path).read_text(), path


def test_files_for_containers_name_only_what_is_there():
    root = Path(__file__).parents[2]
    for line in (root / "deploy" / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            assert all((root / source).exists() for source in line.split()[1:-1]), line
    for name in ("compose.yaml", "compose.node.yaml"):
        services = yaml.safe_load((root / "deploy" / name).read_text())["services"]
        for service in services.values():
            if "build" in service:
                context = root / "deploy" / service["build"]["context"]
                assert (context / service["build"]["dockerfile"]).is_file()
    nginx = (root / "deploy" / "compose.yaml").read_text()
    assert "./nginx.conf:" in nginx


def test_write_app_refuses_a_folder_with_something_in_it(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        write_app(tmp_path, small(), "out", [])
