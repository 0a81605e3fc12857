"""Server, round and client as protocol objects: bytes in, bytes out, over any transport, interrupted anywhere."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests import oracle
from tests.conftest import make_pair
from tests.messages import retold, told
from tests.protocol.test_hostile import bits, equal
from transformers import LlamaConfig, LlamaForCausalLM

from fedex_lora import AdaptedModel, Client, ClientUpdate, LoRAPair, Rules, Server
from fedex_lora.aggregation.server_state import init
from fedex_lora.client.received import NeedsFull as ClientLacks
from fedex_lora.client.received import StoredAnswer
from fedex_lora.errors import AdapterError, ConfigError, StorageError, TrainingError, UsageError, WireError
from fedex_lora.protocol.frame import split
from fedex_lora.server.checks import sample
from fedex_lora.server.verdicts import Accepted, Complete, Failed, Ignored, Late, NeedsFull, Rejected, Short

EXAMPLES = Path(__file__).parents[2] / "examples"
FIRST = {f"m{index}": LoRAPair(pair.A, pair.B * 0, pair.scaling) for index, pair in enumerate(make_pair(s, 12, 20) for s in (1, 2))}
HEAD = {"head": torch.zeros(3, 4)}


def trained(client, work):
    """An update: noise of (client, round) on what it started from."""
    generator = torch.Generator().manual_seed(1000 * work.round + ord(client.name[0]))
    noise = lambda x: x + 0.1 * torch.randn(x.shape, generator=generator)  # noqa: E731
    adapter = {name: LoRAPair(noise(pair.A), noise(pair.B), pair.scaling) for name, pair in work.start.items()}
    return ClientUpdate(client.name, adapter, 10 + ord(client.name[0]) % 7, {name: noise(tensor) for name, tensor in work.other.items()})


def answer(client, payload):
    work = client.receive(payload)
    if isinstance(work, StoredAnswer | ClientLacks):
        return work.reply
    update = trained(client, work)
    return client.reply(update.num_examples, {"train_loss": 0.5}, update=update)


def federation(names="abc", **rules):
    rules = Rules.model_validate({"clients": {"quorum": 0.5}, **rules})
    return Server.start(rules, FIRST, HEAD, list(names)), {name: Client(rules, name, FIRST) for name in names}


def one_round(server, clients, absent=()):
    round, updates = server.open_round(list(server.clients)), []
    for name, message in round.messages.items():
        if name not in absent:
            updates.append(server.receive(name, answer(clients[name], message)).update)
    return round.close(updates)


def off(server, clients):
    """How far the copies of all clients are from the server's model, in fp64: the worst."""
    worst = 0.0
    message = server.open_round(list(server.clients), "evaluate").messages
    for name in server.clients:
        clients[name].receive(message[name])
        copy = clients[name].state.copy
        for module, pair in server.state.adapter.items():
            want = oracle.product(pair) + oracle.numpy64(server.state.base_delta[module].dense())
            worst = max(worst, oracle.relative(oracle.product(copy.adapter[module]) + oracle.numpy64(copy.delta[module].dense()), want))
    return worst


@pytest.mark.parametrize("name", ["own_loop.py", "own_transport.py"])
def test_the_examples_have_forty_lines(name):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 40


def test_three_processes_over_pipes_end_in_the_bits_of_one(tmp_path):
    """Both examples as they are; what each ends with is dumped by a line behind it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path])}
    ends = []
    for name in ("own_loop.py", "own_transport.py"):
        out, script = tmp_path / f"{name}.dump", tmp_path / f"my_{name}"
        script.write_text(
            (EXAMPLES / name).read_text() + f"    with open({str(out)!r}, 'wb') as file:\n        file.write(server.dump())\n"
        )
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        errors = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines()]
        assert len(errors) == 3
        assert all(error < 1e-6 for error in errors)
        ends.append(bits(Server.restore(out.read_bytes(), Rules(), ["north", "south"]).state))
    assert equal(*ends)


def test_whatever_is_dumped_and_restored_anywhere_ends_in_the_same_bits():
    """Server, round and clients, after every single message, also in the middle of a round."""
    server, clients = federation()
    again, others = federation()
    for _ in range(3):
        one_round(server, clients)
        round, updates = again.open_round(list("abc")), []
        for name in "abc":
            payload = answer(others[name], round.messages[name])
            updates.append(again.receive(name, payload).update)
            dumps = again.dump(), round.dump()
            again = Server.restore(dumps[0], again.rules, list("abc"))
            round = again.reopen(dumps[1])
            others = {one: Client.restore(client.dump(), again.rules, one, FIRST) for one, client in others.items()}
        round.close(updates)
    assert equal(bits(server.state), bits(again.state))
    assert off(server, clients) == 0
    for dump in (again.dump(), others["a"].dump()):
        odd = bytearray(dump)
        odd[-3] ^= 1
        with pytest.raises(StorageError, match="has changed since it was written"):
            Server.restore(bytes(odd), again.rules, ["a"]) if dump == again.dump() else Client.restore(bytes(odd), again.rules, "a", FIRST)
    with pytest.raises(StorageError, match="no dump of a server"):
        Server.restore(others["a"].dump(), again.rules, ["a"])
    with pytest.raises(StorageError, match="no dump of a round"):
        again.reopen(b"{}")


def test_a_late_answer_counts_after_a_restart_in_the_middle_of_the_next_round():
    ends = []
    for restarted in (False, True):
        server, clients = federation(clients={"quorum": 0.5, "late": "next"})
        round = server.open_round(list("abc"))
        late = {name: answer(clients[name], round.messages[name]) for name in "abc"}
        round.close([server.receive(name, late[name]).update for name in "ab"])
        round = server.open_round(list("abc"))
        updates = [server.receive("c", late["c"]).update]
        if restarted:
            dumps = server.dump(), round.dump()
            server = Server.restore(dumps[0], server.rules, list("abc"))
            with pytest.raises(StorageError, match="the dump of round 3, and the server is at round 2"):
                server.reopen(dumps[1].replace(b'"number": 2', b'"number": 3'))
            round = server.reopen(dumps[1])
        updates += [server.receive(name, answer(clients[name], round.messages[name])).update for name in "ab"]
        result = round.close(updates)
        assert result.exactness.max_relative_error < 1e-6
        ends.append(bits(result.state))
    assert equal(*ends)


def test_each_verdict():
    server, clients = federation(clients={"quorum": 0.5, "late": "next"})
    assert isinstance(server.receive("a", b""), Rejected)
    round = server.open_round(list("abc"))
    good = {name: answer(clients[name], round.messages[name]) for name in "abc"}
    assert round.missing == {"a", "b", "c"}
    assert isinstance(server.receive("a", good["a"]), Accepted)
    assert isinstance(server.receive("a", good["a"]), Ignored)
    wrong = server.receive("b", good["a"])
    assert (type(wrong), wrong.reason) == (Ignored, "the update's client is 'a', this round declared 'b'")
    assert round.missing == {"b", "c"}
    broken = server.receive("b", good["b"][:-4])
    assert (type(broken), round.missing) == (Rejected, {"c"})
    assert isinstance(round.ready(), Short)
    b = server.receive("b", good["b"])  # what was rejected before may be mended
    assert isinstance(b, Accepted)
    round.give_up("it did not answer")
    assert (round.ready().clients, [one.reason for one in round.rejections]) == (["a", "b"], ["it did not answer"])
    with pytest.raises(UsageError, match="with the updates of a, b"):
        round.close([b.update])
    updates = {"a": server.receive("a", good["a"]), "b": b}
    assert isinstance(updates["a"], Ignored)  # whoever did not keep the update has lost it
    server, clients = federation(clients={"quorum": 0.5, "late": "next"})
    round = server.open_round(list("abc"))
    round.close([server.receive(name, good[name]).update for name in "ab"])
    round = server.open_round(list("abc"))
    late = server.receive("c", good["c"])
    assert (type(late), late.round) == (Late, 1)
    failed = server.receive("b", clients["b"].fail("memory"))
    assert (type(failed), failed.hopeless, failed.code) == (Failed, False, "memory")
    assert "out of memory" in failed.reason
    assert isinstance(round.ready(), Short)
    assert isinstance(server.receive("d", good["a"]), Ignored)
    assert round.lost("a", "out of memory").code == ""  # words of the transport, not the party's


def test_a_client_that_lacks_something_is_sent_everything():
    server, clients = federation()
    one_round(server, clients)
    one_round(server, clients)
    clients["b"] = Client(server.rules, "b", FIRST)  # a new disk
    round = server.open_round(list("abc"))
    lacking = clients["b"].receive(round.messages["b"])
    assert "the base is at version 0" in lacking.reason
    verdict = server.receive("b", lacking.reply)
    assert (type(verdict), round.needs_full) == (NeedsFull, {"b"})
    again = round.ask_again(round.needs_full, full=True)
    assert list(again) == ["b"]
    updates = [server.receive(name, answer(clients[name], (again if name == "b" else round.messages).get(name) or b"")) for name in "b"]
    assert isinstance(updates[0], Accepted)


def test_a_party_is_taken_off_for_good_and_another_one_joins():
    server, clients = federation()
    for _ in range(3):
        one_round(server, clients, absent="c")  # whose log the server keeps
    kept = len(server.registry.log.gains)
    server.set_clients(["a", "b", "d"])
    clients["d"] = Client(server.rules, "d", FIRST)
    assert one_round(server, clients).exactness.max_relative_error < 1e-6
    assert server.state.round == 4
    assert len(server.registry.log.gains) < kept
    assert "c" not in server.registry.version
    assert off(server, clients) < 1e-6
    for wrong in ([], ["a", "a"], "ab", ["a", ""]):
        with pytest.raises(UsageError, match="a server needs a list of clients"):
            server.set_clients(wrong)


@pytest.mark.parametrize("restored", [False, True])
def test_a_late_answer_of_who_was_taken_off_is_ignored(restored):
    """By the server that is at work, and by one that is restored without it."""
    server, clients = federation(clients={"quorum": 0.5, "late": "next"})
    round = server.open_round(list("abc"))
    late = {name: answer(clients[name], round.messages[name]) for name in "abc"}
    round.close([server.receive(name, late[name]).update for name in "ab"])
    if restored:
        server = Server.restore(server.dump(), server.rules, ["a", "b"])
    else:
        server.set_clients(["a", "b"])
    server.open_round(["a", "b"])
    assert isinstance(server.receive("c", late["c"]), Ignored)


def test_own_factors_of_who_was_taken_off_are_forgotten():
    server, clients = federation(method="keep")
    for _ in range(2):
        one_round(server, clients)
    server.set_clients(["a", "b"])
    assert server.state.personal.keys() == {"a", "b"}
    server.set_clients(["a", "b", "c"])
    clients["c"] = Client(server.rules, "c", FIRST)
    assert one_round(server, clients).exactness.max_relative_error < 1e-6
    assert off(server, {**clients}) < 1e-6


def test_where_versions_alternate_each_body_is_encoded_once(monkeypatch):
    from fedex_lora.server import requests

    server, clients = federation("abcdef")
    one_round(server, clients)
    one_round(server, clients, absent="ace")
    made, encode = [], requests.encode_body
    monkeypatch.setattr(requests, "encode_body", lambda *args: made.append(args) or encode(*args))
    assert len(dict(server.open_round(list("abcdef")).messages)) == 6
    assert len(made) == 2


def test_a_client_of_an_odd_name_is_no_longer_missing_once_it_has_failed():
    """A name may be a value of a column: it is printed as it is by its own run, and known by it."""
    server, _ = federation(["a", "b\nc"])
    round = server.open_round(["a", "b\nc"])
    round.lost("b\nc", "gone")
    assert (round.missing, round.failed) == ({"a"}, {"b\nc"})


def test_one_body_is_shared_by_the_messages_of_a_version():
    server, clients = federation()
    one_round(server, clients)
    bodies = {bytes(split(payload, 10_000)[1]) for payload in server.open_round(list("abc")).messages.values()}
    assert len(bodies) == 1


def test_a_round_ends_once_and_only_the_one_that_is_open():
    server, clients = federation()
    first = server.open_round(list("abc"))
    updates = [server.receive(name, answer(clients[name], first.messages[name])).update for name in "abc"]
    first.close(updates)
    for again in (lambda: first.close(updates), first.skip, lambda: first.ask_again(["a"]), lambda: first.lost("a", "gone")):
        with pytest.raises(UsageError, match="round 1 has ended"):
            again()
    assert server.receive("a", b"").reason == "no round is open"
    left, right = server.open_round(list("abc")), server.open_round(list("abc"))
    with pytest.raises(UsageError, match="round 2 has ended"):
        left.close(updates)
    right.skip()
    with pytest.raises(UsageError, match="an evaluation is not closed"):
        server.open_round(list("abc"), "evaluate").close([])
    assert server.state.round == 2
    for odd in ([], ["a", "a"], ["a", "z"]):
        with pytest.raises(UsageError, match="a round asks some of a, b, c, each once"):
            server.open_round(odd)
    with pytest.raises(UsageError, match="z was not asked"):
        server.open_round(list("abc")).ask_again(["z"])


def with_a_late_answer():
    """A second round is open, and c has not sent its answer to the first."""
    server, clients = federation(clients={"quorum": 0.5, "late": "next"})
    round = server.open_round(list("abc"))
    late = {name: answer(clients[name], round.messages[name]) for name in "abc"}
    round.close([server.receive(name, late[name]).update for name in "ab"])
    clients["c"] = Client(server.rules, "c", FIRST)
    round = server.open_round(list("abc"))
    return server, clients, round, late["c"]


def test_a_late_update_never_takes_the_place_of_one_that_is_on_time():
    server, clients, round, late = with_a_late_answer()
    now = {name: answer(clients[name], round.messages[name]) for name in "abc"}
    assert isinstance(server.receive("c", now["c"]), Accepted)
    assert isinstance(server.receive("c", late), Ignored)
    updates = [server.receive(name, now[name]).update for name in "ab"]
    assert (round.ready().clients, round.ready().late) == (["a", "b", "c"], frozenset())
    assert len(updates) == 2


def test_an_update_that_is_asked_for_again_leaves_no_late_one_in_its_place():
    """A client whose update of this round was refused is judged by that, and not by the late one that it had sent before."""
    server, clients, round, late = with_a_late_answer()
    assert isinstance(server.receive("c", late), Late)
    for name in "abc":
        assert isinstance(server.receive(name, answer(clients[name], round.messages[name])), Accepted)
    round.ask_again(["c"])
    assert (round.ready().clients, round.ready().late) == (["a", "b"], frozenset())


def test_a_round_heeds_weights_and_truncation():
    """The parties have 16, 10 and 11 rows; of the residual's four ranks one is kept, or as many as bytes allow: none."""
    server, clients = federation(weights="uniform")
    assert one_round(server, clients).aggregate.weights == pytest.approx(dict.fromkeys("abc", 1 / 3))
    server, clients = federation()
    assert one_round(server, clients).aggregate.weights == pytest.approx({"a": 16 / 37, "b": 10 / 37, "c": 11 / 37})
    for cut, ranks in (({"rank": 1}, {1}), ({"rank": 3}, {3}), ({"energy": 1e-9}, {1}), ({"bytes": 1}, {0})):
        server, clients = federation(method="fedex-svd", truncation=cut)
        gains = one_round(server, clients).aggregate.residual
        assert {gains[module].rank if module in gains else 0 for module in FIRST} == ranks


def test_how_many_rows_a_client_may_claim_is_the_servers_word():
    server, _ = federation(messages={"max_examples": 12})
    client = Client(Rules(), "a", FIRST)
    client.receive(server.open_round(list("abc")).messages["a"])
    verdict = server.receive("a", client.reply(13, {}, update=ClientUpdate("a", FIRST, 13, HEAD)))
    assert isinstance(verdict, Rejected)
    assert "messages.max_examples = 12" in verdict.reason


def test_what_failed_in_the_round_before_does_not_fail_a_client_in_this_one():
    server, clients = federation()
    one_round(server, clients, absent="c")
    round = server.open_round(list("abc"))
    verdict = round.lost("c", "gone", 1)
    assert isinstance(verdict, Rejected)
    assert (verdict.round, "too late to matter" in verdict.reason) == (1, True)
    assert "c" in round.missing
    assert "c" not in round.failed


def test_how_many_take_part_and_who():
    for share, of, are in ((0.67, 3, 3), (0.66, 3, 2), (0.34, 3, 2), (0.5, 5, 3), (0.01, 9, 1), (0.1 + 0.2, 10, 3)):
        assert len(sample([f"c{number}" for number in range(of)], share, 0, 1)) == are
    assert len({tuple(sample(list("abcdefgh"), 0.25, seed, 1)) for seed in range(6)}) > 1
    assert len({tuple(sample(list("abcdefgh"), 0.25, 0, round)) for round in range(1, 7)}) > 1


def test_looking_whether_a_round_is_ready_changes_nothing():
    """Two small updates and one that is larger: polled after each answer, or judged once, the same count."""
    found = []
    for polled in (False, True):
        server, clients = federation("abcdef", messages={"norm_bound": 3.0}, clients={"quorum": 1.0})
        round = server.open_round(list("abcdef"))
        for index, name in enumerate("abcdef"):
            work = clients[name].receive(round.messages[name])
            update = trained(clients[name], work)
            scaled = {
                m: LoRAPair(work.start[m].A + (0.1 if index < 2 else 1) * (p.A - work.start[m].A), p.B, p.scaling)
                for m, p in update.adapter.items()
            }
            server.receive(name, clients[name].reply(10, {}, update=ClientUpdate(name, scaled, 10, update.other)))
            if polled:
                round.ready()
        found.append(round.ready())
    assert found[0] == found[1]
    assert server.registry.unknown_state == frozenset()  # nobody is settled before the end


@pytest.mark.parametrize("lost", [1, 2, 3])
def test_a_server_that_lost_rounds_is_noticed(lost):
    """It goes another way after that. Who went further in the lost rounds is sent everything, and all rounds are exact."""
    server, clients = federation()
    one_round(server, clients)
    before, noticed = server.dump(), []
    for _ in range(lost):
        one_round(server, clients)
    server = Server.restore(before, server.rules, list("abc"))
    for participants in ("ab", "abc", "abc"):
        round, updates = server.open_round(list(participants)), []
        messages = dict(round.messages)
        for name in participants:
            verdict = server.receive(name, answer(clients[name], messages[name]))
            if isinstance(verdict, NeedsFull):
                noticed.append((round.number, name))
                verdict = server.receive(name, answer(clients[name], round.ask_again([name])[name]))
            updates.append(verdict.update)
        assert round.close(updates).exactness.max_relative_error < 1e-6
    assert off(server, clients) < 1e-6
    assert noticed == [(2, "a"), (2, "b"), (3, "c")][2 * (lost == 1) :]


def test_an_evaluation_between_two_rounds_costs_nobody_anything():
    server, clients = federation()
    one_round(server, clients)
    round = server.open_round(list("abc"), "evaluate")
    for name in "abc":
        clients[name].receive(round.messages[name])
        server.receive(name, clients[name].reply(5, {"held_out_rows": 5.0, "held_out_loss": 1.0}))
    assert {client: receipt.metrics["held_out_loss"] for client, receipt in round.receipts.items()} == dict.fromkeys("abc", 1.0)
    assert one_round(server, clients).exactness.max_relative_error < 1e-6


def test_a_message_that_comes_twice_before_it_is_answered_costs_nothing():
    server, clients = federation()
    one_round(server, clients)
    one_round(server, clients)
    round = server.open_round(list("abc"))
    for name in "abc":
        clients[name].receive(round.messages[name])
    result = round.close([server.receive(name, answer(clients[name], round.messages[name])).update for name in "abc"])
    assert result.exactness.max_relative_error < 1e-6
    assert off(server, clients) == 0


def test_a_stale_model_is_no_answer():
    server, clients = federation()
    model = SimpleNamespace(load=lambda *args: None, read=lambda: (FIRST, HEAD))
    clients["a"].receive(server.open_round(list("abc")).messages["a"])
    clients["a"].load(model)
    clients["a"].receive(server.open_round(list("abc")).messages["a"])
    with pytest.raises(UsageError, match="load a model"):
        clients["a"].reply(1, {})


def test_rules_that_do_not_go_together_are_refused_before_the_first_round():
    for odd in (
        {"method": "keep", "clients": {"late": "next"}},
        {"method": "rolora", "server": {"momentum": 0.5}},
        {"method": "rolora", "local": {"head_rounds": 1}},  # whose first round of adapters would train A against B = 0
    ):
        with pytest.raises(ConfigError):
            Server.start(Rules.model_validate(odd), FIRST, HEAD, ["a", "b"])
    with pytest.raises(ConfigError, match="one rank for all"):
        Server(Rules(), init(FIRST, HEAD, "fedex"), ["a", "b"], {"a": 1, "b": 3})
    for odd in ({"method": "fedex-best", "clients": {"ranks": [1, 3]}}, {"method": "centralised"}, {"method": "full-ft"}):
        with pytest.raises(UsageError, match=r"ranks=\{client: rank\}|averages no adapters"):
            Server.start(Rules.model_validate(odd), FIRST, HEAD, ["a", "b"])


@pytest.mark.parametrize("method", ["fedex-svd", "flexlora"])
def test_a_round_in_which_no_adapter_moved_has_dropped_nothing(method):
    """As in rounds that train the head alone."""
    server, updates = Server.start(Rules(method=method), FIRST, HEAD, ["a", "b"]), []
    round = server.open_round()
    for name, payload in round.messages.items():
        client = Client(Rules(method=method), name, FIRST)
        work = client.receive(payload)
        still = ClientUpdate(name, work.start, 10, {key: one + 1 for key, one in work.other.items()})
        updates.append(server.receive(name, client.reply(10, {}, update=still)).update)
    assert round.close(updates).numbers["dropped"] == 0


def test_who_is_accepted_after_a_failure_is_told_of_no_rejection():
    server, clients = federation()
    round, updates = server.open_round(), []
    for name, payload in round.messages.items():
        server.round.lost(name, "the connection broke")
        updates.append(server.receive(name, answer(clients[name], payload)).update)
    assert round.rejections == []
    round.close(updates)
    assert {told(payload)["rejected"] for payload in server.open_round().messages.values()} == {""}


def test_odd_metrics_are_refused_in_a_line():
    server, clients = federation()
    for metrics in ({"late": 0.5}, {"a\nb": 1.0}, {f"m{i}": 1.0 for i in range(65)}, {"x": None}):
        clients["a"].receive(server.open_round(list("abc")).messages["a"])
        with pytest.raises(UsageError, match="at most 64 metrics"):
            clients["a"].reply(10, metrics, update=ClientUpdate("a", FIRST, 10, HEAD))


def test_a_number_of_rows_is_one_rule_at_both_ends():
    server, clients = federation()
    clients["a"].receive(server.open_round(list("abc")).messages["a"])
    give = lambda rows: clients["a"].reply(rows, {}, update=ClientUpdate("a", FIRST, 10, HEAD))  # noqa: E731
    for rows in (None, 0, -1, 10.5, 10.0, True, "10", 10_000_001):
        with pytest.raises(UsageError, match=f"num_examples is {rows!r}: it must be from 1 to messages.max_examples = 10000000, a whole"):
            give(rows)
    payload = give(np.int64(7))
    verdict = server.receive("a", retold(payload, num_examples=0))
    assert verdict.reason.startswith("num_examples is 0: it must be from 1 to messages.max_examples = 10000000, a whole number")
    assert server.receive("a", payload).update.num_examples == 7


def test_a_client_says_what_it_cannot_do():
    server, clients = federation()
    round = server.open_round(list("abc"))
    with pytest.raises(WireError, match="this is client 'b'"):
        clients["b"].receive(round.messages["a"])
    with pytest.raises(UsageError, match="receive a message before"):
        clients["b"].reply(1, {})
    clients["b"].receive(round.messages["b"])
    with pytest.raises(UsageError, match="load a model"):
        clients["b"].reply(1, {})
    with pytest.raises(TrainingError, match="has 0 updates of 3 clients"):
        round.close([])
    assert isinstance(round.ready(), Short)
    assert not isinstance(round.ready(), Complete)


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"bias": "all"}])
def test_what_has_no_exact_mean_is_no_adapted_model(setting):
    """Its factors alone are not what it does: the mean of them would be called exact, and be off."""
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], **setting))
    with pytest.raises(AdapterError, match=r"the adapter of this model: .*train with"):
        AdaptedModel(model)


def test_a_merged_adapter_is_no_adapted_model():
    """What `load` writes would not reach the outputs."""
    base = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]))
    model.merge_adapter()
    with pytest.raises(UsageError, match="merged into its base: call unmerge_adapter"):
        AdaptedModel(model)
    model.unmerge_adapter()
    AdaptedModel(model)
