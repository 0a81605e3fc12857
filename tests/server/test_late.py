"""Who is waited for and until when, what becomes of late answers, and what happens below the quorum.

The clients train no model (`tests/fake.py`); between them and the loop stands a network that holds answers back or loses them.
"""

import time
from dataclasses import replace

import numpy as np
import pytest
from tests import oracle
from tests.fake import HEAD, Fake, Network, Noise, setting
from tests.messages import tensors_of
from tests.protocol.test_hostile import bits, equal, header
from tests.runs.test_run import events_of, ignore

from fedex_lora.errors import ConfigError, StorageError, TrainingError
from fedex_lora.offline.verify import verify
from fedex_lora.runs import listening
from fedex_lora.runs import round_loop as rounds
from fedex_lora.runs.emit import log_to
from fedex_lora.runs.listening import Reply
from fedex_lora.runs.round_loop import run_rounds
from fedex_lora.runs.run import run
from fedex_lora.server.checkpoint import last_checkpoint
from fedex_lora.server.checks import require_consistent
from fedex_lora.storage.files import read_manifest
from fedex_lora.storage.result import read_result

SLOW = "client-0"  # to whom the network's faults happen


def slow(**clients):
    tree = {"partition": "iid", "count": 4, "quorum": 0.75, "deadline": 0.2, **clients}
    return {"clients": tree, "rounds": 3}


def network(config, faults=(), patient=False):
    """(the network, what the loop needs of the clients behind it)."""
    net = Network(Fake(config, ignore), dict(faults), patient)
    return net, replace(net.place.federation(), exchange=net.exchange)


def federate(folder, changes, faults=(), patient=False):
    config = setting(**changes)
    net, federation = network(config, faults, patient)
    folder.mkdir(exist_ok=True)
    return run_rounds(config, net.place.initial(), federation, folder / "run", log_to(folder / "events.jsonl")), net


def test_at_the_deadline_the_round_goes_on_without_those_who_did_not_answer(tmp_path):
    final, _ = federate(tmp_path / "late", slow(), {2: "lost"}, patient=True)
    refused = events_of(tmp_path / "late", "rejected")
    assert [(event["round"], event["client"]) for event in refused] == [(2, SLOW)]
    assert refused[0]["reason"] == "it did not answer within clients.deadline = 0.2 seconds"
    manifest = read_manifest(tmp_path / "late" / "run" / "rounds" / "0002")
    assert manifest["participants"] == [f"client-{index}" for index in range(4)]
    assert len(manifest["inputs"]) == 3
    assert verify(tmp_path / "late" / "run")["max_relative_error"] < 1e-6
    # the same bits as a client that failed outright
    config = setting(**slow())
    net, _ = network(config)

    def failing(messages, deadline=None):
        for reply in net.exchange(messages, deadline):
            yield Reply(SLOW, None, "gone") if net.calls == 2 and reply.client == SLOW else reply

    (tmp_path / "failed").mkdir()
    other = run_rounds(config, net.place.initial(), replace(net.place.federation(), exchange=failing), tmp_path / "failed" / "run", ignore)
    assert equal(bits(final), bits(other))


def test_without_a_deadline_everyone_is_waited_for_and_it_is_said_who(tmp_path, monkeypatch):
    monkeypatch.setattr(listening, "WAITING", 0.05)
    config = setting(rounds=1, clients={"partition": "iid", "count": 4})
    net, _ = network(config)

    def tardy(messages, deadline=None):
        for reply in net.exchange(messages, deadline):
            for _ in range(20 if reply.client == "client-3" else 0):
                yield None
                time.sleep(0.01)
            yield reply

    began = time.time()
    emit = log_to(tmp_path / "events.jsonl")
    run_rounds(config, net.place.initial(), replace(net.place.federation(), exchange=tardy), tmp_path / "run", emit)
    waiting = [event for event in events_of(tmp_path, "waiting") if event["round"] == 1]
    assert waiting
    assert all(event["clients"] == ["client-3"] for event in waiting)
    assert began <= waiting[0]["since"] <= waiting[0]["time"]
    assert not events_of(tmp_path, "rejected")


def test_a_late_answer_is_refused_by_default(tmp_path):
    final, _ = federate(tmp_path / "late", slow(), {2: "held"})
    without, _ = federate(tmp_path / "without", slow(), {2: "lost"})
    assert equal(bits(final), bits(without))
    reasons = [(event["round"], event["reason"]) for event in events_of(tmp_path / "late", "rejected")]
    assert reasons == [
        (2, "it did not answer within clients.deadline = 0.2 seconds"),
        (2, "it answered in round 3 only: too late (clients.late = 'refuse')"),
    ]


@pytest.mark.parametrize("method", ["fedex", "fedex+balanced", "fedex-best", "reinit", "fedit", "ffa", "fed-sb", "fedex-svd"])
def test_a_late_answer_is_part_of_the_next_mean_with_the_base_it_was_trained_on(method, tmp_path):
    """Round 2 holds SLOW back, round 3 does not get its own answer: the mean of round 3 is of three models on D_2 and one on D_1."""
    changes = slow(late="next") | {"method": method}
    final, net = federate(tmp_path / "late", changes, {2: "held", 3: "lost"})
    assert [event["client"] for event in events_of(tmp_path / "late", "client_done") if event.get("late") == 1] == [SLOW]
    folder = tmp_path / "late" / "run" / "rounds" / "0003"
    assert read_manifest(folder)["late"] == [SLOW]
    if method not in ("fedit", "fedex-svd"):
        assert verify(tmp_path / "late" / "run")["max_relative_error"] < 1e-6
    # the oracle: D_1, D_2 from the folders, the factors from the bytes, all in fp64
    base = {number: _delta(tmp_path / "late" / "run" / "rounds" / f"000{number}") for number in (1, 2)}
    pairs = {client: _pairs(net, (2 if client == SLOW else 3, client), final) for client in (f"client-{i}" for i in range(4))}
    counts = {entry["client"]: entry["num_examples"] for entry in read_manifest(folder)["inputs"]}
    p = dict(zip(counts, oracle.shares(list(counts.values())), strict=True))
    for module, pair in final.adapter.items():
        gained = final.base_delta.get(module)
        got = oracle.product(pair) + (0 if gained is None else oracle.numpy64(gained.dense()))
        zero = 0 * got
        start = {client: base[1 if client == SLOW else 2].get(module, zero) for client in pairs}
        want = sum(p[client] * (start[client] + oracle.product(pairs[client][module])) for client in pairs)
        naive = sum(p[client] * (base[2].get(module, zero) + oracle.product(pairs[client][module])) for client in pairs)
        error = oracle.relative(got, want)
        if method == "fedit":
            assert error > 1e-4
        elif method == "fedex-svd":  # no worse than the best that its rank can do, of what the base should have gained
            tail = np.linalg.svd(want - base[2].get(module, zero) - oracle.product(pair), compute_uv=False)[pair.rank :]
            assert 0 < np.linalg.norm(got - want) <= 1.001 * np.linalg.norm(tail)
        else:
            assert error < 1e-6
            assert method in ("ffa", "fed-sb") or oracle.relative(naive, want) > 1e-5  # their bases never gain


def test_the_head_of_a_late_answer_is_measured_from_the_one_it_started_from(tmp_path, monkeypatch):
    """The others' heads go far in round 2, the late one's does not: beside the head of round 3 it looks as if it had."""
    train = Noise.train

    def far(self, client, round, optimizer):
        update, state = train(self, client, round, optimizer)
        if round == 2 and client != SLOW:
            update = replace(update, other={HEAD: update.other[HEAD] + 100})
        return update, state

    monkeypatch.setattr(Noise, "train", far)
    federate(tmp_path / "run", slow(late="next"), {2: "held", 3: "lost"})
    manifest = read_manifest(tmp_path / "run" / "run" / "rounds" / "0003")
    assert (manifest["late"], manifest["refused"]) == ([SLOW], [])
    assert [event["round"] for event in events_of(tmp_path / "run", "rejected")] == [2]  # it was late


def _delta(folder):
    return {module: oracle.numpy64(delta.dense()) for module, delta in read_result(folder).base_delta.items()}


def _pairs(net, key, final):
    """The factors in an answer as they travelled; those that did not are frozen, and the final adapter has them (ffa, fed-sb)."""
    found = tensors_of(net.came[key])
    pairs = dict(final.adapter)
    for name, tensor in found.items():
        if name.startswith("adapter|"):
            _, module, part = name.split("|")
            pairs[module] = pairs[module].with_part(part, tensor)
    return pairs


def test_an_answer_of_this_round_goes_before_a_late_one(tmp_path):
    final, _ = federate(tmp_path / "late", slow(late="next"), {2: "held"})
    without, _ = federate(tmp_path / "without", slow(late="next"), {2: "lost"})
    assert equal(bits(final), bits(without))
    assert "late" not in read_manifest(tmp_path / "late" / "run" / "rounds" / "0003")


def test_a_late_answer_does_not_make_the_quorum(tmp_path):
    with pytest.raises(TrainingError, match="round 3 has 3 updates of 4 clients and needs 4"):
        federate(tmp_path / "run", slow(late="next", quorum=1.0, below_quorum="stop") | {"rounds": 3}, {3: "lost"})
    with pytest.raises(TrainingError, match="round 2 has 3 updates of 4 clients and needs 4"):
        federate(tmp_path / "two", slow(late="next", quorum=1.0), {2: "held"})


@pytest.mark.parametrize("changes", [{}, {"method": "reinit"}, {"method": "keep"}, {"method": "rolora"}])
def test_a_round_below_the_quorum_may_be_skipped(changes, tmp_path):
    """The model stays as it was, the round's number is used up, and the run goes on and ends well."""
    federate(tmp_path / "run", slow(quorum=1.0, below_quorum="skip") | changes, {2: "lost"})
    manifest = read_manifest(tmp_path / "run" / "run" / "rounds" / "0002")
    assert "needs 4" in manifest["skipped"]
    assert manifest["inputs"] == []
    done = events_of(tmp_path / "run", "round_done")
    assert [event["round"] for event in done] == [1, 2, 3]
    assert done[1]["metrics"] == pytest.approx(done[0]["metrics"], abs=1e-6)
    assert "skipped" in done[1]
    assert done[2]["metrics"] != done[1]["metrics"]
    assert len(read_manifest(tmp_path / "run" / "run" / "rounds" / "0003")["inputs"]) == 4
    checked = verify(tmp_path / "run" / "run")
    assert [line["round"] for line in checked["rounds"]] == [1, 3]
    assert checked["max_relative_error"] < 1e-6


def test_skipped_rounds_only(tmp_path):
    with pytest.raises(TrainingError, match="every round was skipped, so nothing was trained: round 3 has 3 updates of 4 clients"):
        federate(tmp_path / "run", slow(quorum=1.0, below_quorum="skip"), dict.fromkeys((1, 2, 3), "lost"))
    checkpoint, _ = last_checkpoint(tmp_path / "run" / "run")
    assert equal(bits(checkpoint.state), bits(Fake(setting(**slow()), ignore).initial()))
    with pytest.raises(StorageError, match="was skipped: nothing to verify"):
        verify(tmp_path / "run" / "run")


def test_a_run_goes_on_after_a_skipped_round(tmp_path):
    """Stopped in round 3, resumed in a new process's objects: the same bits."""
    config = setting(**slow(quorum=1.0, below_quorum="skip"))
    want, _ = federate(tmp_path / "whole", slow(quorum=1.0, below_quorum="skip"), {2: "lost"})
    net, _ = network(config, {2: "lost"})

    def stopped(messages, deadline=None):
        if net.calls == 2:
            raise InterruptedError
        yield from net.exchange(messages, deadline)

    (tmp_path / "part").mkdir()
    with pytest.raises(InterruptedError):
        run_rounds(config, net.place.initial(), replace(net.place.federation(), exchange=stopped), tmp_path / "part" / "run", ignore)
    checkpoint, _ = last_checkpoint(tmp_path / "part" / "run")
    assert checkpoint.state.round == 2
    rest = run_rounds(config, checkpoint, replace(net.place.federation(), exchange=net.place.exchange), tmp_path / "part" / "run", ignore)
    assert equal(bits(rest), bits(want))


def test_below_the_quorum_clients_may_be_asked_again_until_they_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "PAUSE", 0.0)
    changes = slow(quorum=1.0, below_quorum="wait") | {"rounds": 2}
    final, net = federate(tmp_path / "run", changes, {2: ["lost", "lost"]})
    want, _ = federate(tmp_path / "want", changes)
    assert equal(bits(final), bits(want))
    asked_again = [event for event in events_of(tmp_path / "run", "waiting") if "reason" in event]
    assert [(event["round"], event["clients"]) for event in asked_again] == [(2, [SLOW]), (2, [SLOW])]
    assert "needs 4" in asked_again[0]["reason"]
    assert [call for call, client in net.came if client == "client-1"] == [1, 2, 5]  # who answered is not asked again
    assert read_manifest(tmp_path / "run" / "run" / "rounds" / "0002")["refused"] == []


def test_who_is_far_too_large_twice_is_not_waited_for_again(tmp_path, monkeypatch):
    """Asked again, a client sends the same bytes; where the quorum can do without it, nothing ends."""
    monkeypatch.setattr(rounds, "PAUSE", 0.0)
    with pytest.raises(
        TrainingError,
        match=r"client-0: .*messages.norm_bound.*asking again is of no use: lower clients.quorum, or raise messages.norm_bound",
    ):
        federate(tmp_path / "run", slow(quorum=1.0, below_quorum="wait"), {2: ["large"] * 100})
    assert len([event for event in events_of(tmp_path / "run", "waiting") if "reason" in event]) == 1
    federate(tmp_path / "less", slow(quorum=0.75, below_quorum="wait"), {2: ["large"] * 100})
    assert len(read_manifest(tmp_path / "less" / "run" / "rounds" / "0002")["inputs"]) == 3


@pytest.mark.parametrize("policy", ["wait", "skip"])
def test_a_client_that_failed_once_comes_back(policy, tmp_path, monkeypatch):
    """What it holds is not known, so its next message brings everything."""
    monkeypatch.setattr(rounds, "PAUSE", 0.0)
    changes = slow(quorum=1.0, below_quorum=policy) | {"rounds": 4}
    federate(tmp_path / "run", changes, {3: "lost"})
    done = events_of(tmp_path / "run", "round_done")
    assert [event["round"] for event in done if "skipped" in event] == ([3] if policy == "skip" else [])
    assert len(read_manifest(tmp_path / "run" / "run" / "rounds" / "0004")["inputs"]) == 4
    assert verify(tmp_path / "run" / "run")["max_relative_error"] < 1e-6


def test_a_client_that_lost_its_memory_is_sent_everything_in_the_same_round(tmp_path):
    config = setting(rounds=3, clients={"partition": "iid", "count": 4})
    want, _ = federate(tmp_path / "whole", {"rounds": 3, "clients": {"partition": "iid", "count": 4}})
    net, _ = network(config)

    def forgetful(messages, deadline=None):
        if net.calls == 2:
            net.place.pool.forget(SLOW)
        yield from net.exchange(messages, deadline)

    (tmp_path / "run").mkdir()
    federation = replace(net.place.federation(), exchange=forgetful)
    emit = log_to(tmp_path / "run" / "events.jsonl")
    assert equal(bits(run_rounds(config, net.place.initial(), federation, tmp_path / "run" / "run", emit)), bits(want))
    assert not events_of(tmp_path / "run", "rejected")
    assert [(event["round"], event["client"]) for event in events_of(tmp_path / "run", "warning")] == [(3, SLOW)]
    assert net.calls == 5  # three rounds, one client once more, and the last measurement


def test_noise_does_not_keep_a_round_open_nor_fill_the_record(tmp_path):
    config = setting(**slow())
    net, _ = network(config)

    def noisy(messages, deadline=None):
        for reply in net.exchange(messages, deadline):
            if reply.client != SLOW or net.calls != 2:
                yield reply
        while net.calls == 2:  # for ever
            yield Reply("eve", b"junk")
            yield Reply(SLOW, b"junk")

    (tmp_path / "run").mkdir()
    federation = replace(net.place.federation(), exchange=noisy)
    run_rounds(config, net.place.initial(), federation, tmp_path / "run" / "run", log_to(tmp_path / "run" / "events.jsonl"))
    reasons = [event["client"] for event in events_of(tmp_path / "run", "rejected")]
    assert SLOW in reasons
    assert len(reasons) <= listening.MAX_EXTRA_REJECTIONS + 10


def test_of_two_late_answers_the_first_counts(tmp_path):
    config = setting(**slow(late="next"))
    net, _ = network(config, {2: "lost", 3: "lost"})

    def twice(messages, deadline=None):
        for reply in net.exchange(messages, deadline):
            yield reply
            if net.calls == 3 and reply and reply.client == "client-1":
                late = net.came[2, SLOW]
                yield Reply(SLOW, late)
                yield Reply(SLOW, header(num_examples=999)(late))

    (tmp_path / "run").mkdir()
    federation = replace(net.place.federation(), exchange=twice)
    run_rounds(config, net.place.initial(), federation, tmp_path / "run" / "run", log_to(tmp_path / "run" / "events.jsonl"))
    inputs = {entry["client"]: entry["num_examples"] for entry in read_manifest(tmp_path / "run" / "run" / "rounds" / "0003")["inputs"]}
    assert inputs[SLOW] < 999
    assert len([event for event in events_of(tmp_path / "run", "client_done") if event.get("late")]) == 1
    assert [(event["round"], event["client"]) for event in events_of(tmp_path / "run", "rejected")] == [(2, SLOW)]
    assert [(event["round"], event["client"]) for event in events_of(tmp_path / "run", "warning")] == [(3, SLOW)]
    assert read_manifest(tmp_path / "run" / "run" / "rounds" / "0003")["refused"] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "keep"},
        {"method": "fedsa"},
        {"method": "rolora"},
        {"method": "fedsvd"},
        {"method": "ffa+orthonormal-a"},
        {"method": "fedex-best", "ranks": [1, 2, 2, 4]},
    ],
)
def test_late_updates_that_cannot_be_part_of_a_mean_are_a_configuration_error(changes):
    ranks = {"ranks": changes.pop("ranks")} if "ranks" in changes else {}
    with pytest.raises(ConfigError, match=r"clients.late = 'next' does not go with"):
        require_consistent(setting(**changes, clients={"partition": "iid", "count": 4, "late": "next", **ranks}), 4)


def test_in_one_process_nobody_is_late(tmp_path):
    config = setting(clients={"partition": "iid", "count": 4, "deadline": 1e-6})
    run(config, tmp_path / "run", ignore, home=Fake)
    assert not events_of(tmp_path / "run", "rejected")
