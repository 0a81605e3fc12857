"""Hostile clients: each is refused with its reason, and the others' aggregate has the bits that it has without that client."""

import json
import re
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load
from tests.conftest import make_pair, make_updates
from tests.fake import Fake
from tests.fuzz_wire import campaign
from tests.messages import bounds, parts, retold, sealed, told, with_table, with_tensors
from tests.runs.test_run import configuration, events_of, ignore

from fedex_lora import LoRAPair
from fedex_lora.errors import ConfigError, TrainingError
from fedex_lora.exactness.measure import Realised
from fedex_lora.offline.verify import verify
from fedex_lora.protocol.envelopes import answer_in
from fedex_lora.protocol.frame import join
from fedex_lora.protocol.messages import declared_bytes
from fedex_lora.report.analysis import participation
from fedex_lora.runs.emit import log_to
from fedex_lora.runs.listening import Reply
from fedex_lora.runs.round_loop import run_rounds
from fedex_lora.runs.run import run
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.server.checkpoint import last_checkpoint
from fedex_lora.server.norm_filter import norm_rejected, size_of
from fedex_lora.storage.events import read_events, record
from fedex_lora.storage.files import read_manifest

MALLORY = "client-1"
NAN, INFINITY = float("nan"), float("inf")


def setting(**changes):
    clients = {"partition": "iid", "count": 4, "quorum": 0.75}
    few = {"task": {"train_rows": 40, "eval_rows": 10}, "lora": {"target_modules": ["q_proj", "v_proj"]}, "clients": clients}
    return configuration(**{**few, **changes})


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """Four honest clients over two rounds: the place, and what each sent in each round."""
    place, sent = LocalSimulation(setting(), ignore), {}
    told = place.federation()

    def exchange(messages, deadline=None):
        for reply in told.exchange(messages, deadline):
            sent.setdefault(reply.client, []).append(reply.payload)
            yield reply

    state = place.initial()
    quick = replace(told, evaluate=lambda state: {}, realised=lambda state, ideal: (Realised({}, {}), {}))
    run_rounds(setting(), state, replace(quick, exchange=exchange), tmp_path_factory.mktemp("honest") / "run", ignore)
    return state, quick, sent


def attacked(federation, folder, payloads, **changes):
    """The run again, with other answers of Mallory in round 2 (None: it fails); the final state and the reasons of refusals."""
    state, quick, sent = federation
    rounds = iter(range(3))

    def exchange(messages, deadline=None):
        number = next(rounds)
        for client in sorted(messages):
            for payload in payloads if (client, number) == (MALLORY, 1) else [sent[client][number]]:
                yield Reply(client, payload, "" if payload else "it is away")

    folder.mkdir()
    emit = log_to(folder / "events.jsonl")
    final = run_rounds(setting(**changes), state, replace(quick, exchange=exchange), folder / "run", emit)
    return final, [event for event in events_of(folder, "rejected") if event["round"] == 2]


def bits(state):
    found = dict(state.other)
    for name, pair in state.adapter.items():
        found |= {f"{name}|A": pair.A, f"{name}|B": pair.B}
    for name, delta in state.base_delta.items():
        found |= {f"{name}|D": delta.dense()}
    return found


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def without(federation, tmp_path_factory):
    return bits(attacked(federation, tmp_path_factory.mktemp("without") / "run", [None])[0])


def tensors(**changes):
    """The honest answer with one tensor changed by a function; None leaves it out."""

    def changed(found):
        for name, change in changes.items():
            key = next(key for key in found if key.endswith(name))
            tensor = found.pop(key)
            if change is not None:
                new = change(tensor)
                found |= new if isinstance(new, dict) else {key: new}
        return found

    return lambda payload: with_tensors(payload, changed)


def header(**changes):
    """The honest answer that says other things of itself."""
    return lambda payload: retold(payload, **changes)


def unsealed(payload):
    envelope, body = parts(payload)
    del envelope["body"]
    return join(json.dumps(envelope), body)


def swollen(payload):
    """A header above its bound in a message that is no larger than declared."""
    envelope, body = parts(payload)
    begin, end = bounds(body)
    limit, whole = declared_bytes(load(body))
    made = sealed(envelope, with_table(body[:end], body[begin:end].ljust(limit + 1)))
    assert len(made) <= whole
    return made


def text(change):
    """The honest answer with the text of its table changed."""

    def made(payload):
        envelope, body = parts(payload)
        begin, end = bounds(body)
        return sealed(envelope, with_table(body, change(body[begin:end].rstrip())))

    return made


def body(change):
    """The honest answer with other bytes as its body."""

    def made(payload):
        envelope, there = parts(payload)
        return sealed(envelope, change(there))

    return made


def offsets(payload):
    """Two tensors of one size that lie on the same bytes."""
    table = json.loads(payload)
    one, two = [entry for name, entry in table.items() if name.endswith("|A")][:2]
    one["data_offsets"] = two["data_offsets"]
    return json.dumps(table, separators=(",", ":")).encode()


HOSTILE = {
    "NaN": (tensors(A=lambda A: A * NAN), "holds NaN or infinity"),
    "one NaN": (tensors(B=lambda B: torch.cat([B.flatten()[:-1], torch.tensor([NAN])]).reshape(B.shape)), "holds NaN or infinity"),
    "infinity": (tensors(A=lambda A: A + INFINITY), "holds NaN or infinity"),
    "wrong names": (tensors(A=lambda A: {"adapter|other|A": A}), "'adapter[|]other[|]A' is not declared"),
    "path in a tensor name": (tensors(A=lambda A: {"adapter|../../etc/passwd|A": A}), "'adapter[|]../../etc/passwd[|]A' is not declared"),
    "lines in a tensor name": (tensors(A=lambda A: {"a\nb\x1b[2J" + "x" * 5000: A}), r"name that is too long or not printable"),
    "a tensor missing": (tensors(A=None), "is missing"),
    "transposed shape": (tensors(A=lambda A: A.T), "has shape .*, declared was"),
    "broadcastable shape": (tensors(A=lambda A: A[:, :1]), "has shape .*, declared was"),
    "broadcastable scalar": (tensors(A=lambda A: A[0, 0]), "has shape .*, declared was"),
    "wrong rank": (tensors(A=lambda A: torch.cat([A, A])), "has shape .*, declared was|at most"),
    "wrong dtype": (tensors(A=lambda A: A.double()), "has dtype F64, declared was F32|at most"),
    "half dtype": (tensors(A=lambda A: A.half()), "has dtype F16, declared was F32"),
    "negative examples": (header(num_examples=-5), "num_examples: Input should be greater than or equal to 0"),
    "no examples": (header(num_examples=0), "num_examples is 0: it must be from 1 to"),
    "huge examples": (header(num_examples=10**12), "num_examples is 1000000000000: it must be from 1 to messages.max_examples = 10000000"),
    "fractional examples": (header(num_examples=1.5), "num_examples: Input should be a valid integer"),
    "examples as text": (header(num_examples="10"), "num_examples: Input should be a valid integer"),
    "negative rows": (header(metrics={"held_out_rows": -7.0}), "held_out_rows is -7: it must be from 0"),
    "a metric that is an event's field": (header(metrics={"event": 1.0}), "'event' = 1 is no metric"),
    "an absurd metric": (header(metrics={"held_out_loss": 1e308}), "is no metric"),
    "too many metrics": (header(metrics={f"m{i}": 1.0 for i in range(65)}), "metrics: Dictionary should have at most 64 items"),
    "stale base version": (header(base_version=0), "base version is 0, this round declared 1"),
    "no base version": (header(base_version=None), "base_version: Input should be a valid integer"),
    "another run": (header(run="other"), "run is 'other', this round declared 'run'"),
    "another client": (header(client="client-0"), "client is 'client-0', this round declared 'client-1'"),
    "another scaling": (header(scalings={"m": 1e6}), "scalings is"),
    "zip bomb header": (body(lambda there: struct.pack("<Q", 2**40) + there[8:]), "truncated: its header is longer than its body"),
    "zip bomb envelope": (lambda payload: payload[:4] + struct.pack("<I", 2**32 - 1) + payload[8:], "envelope is longer than the message"),
    "swollen envelope": (header(client="x" * 20_000), "envelope has .* bytes where at most .* were expected|at most .* were declared"),
    "an altered envelope": (lambda payload: payload[:50] + b"!" + payload[51:], "checksum of the message's envelope is wrong"),
    "another version": (header(schema_version=1), "schema 1, this version speaks 2"),
    "a request": (header(kind="train"), "expected answer, got train|the message's envelope is wrong"),
    "header of spaces": (text(lambda text: text + b" " * 50_000), "bytes arrived where at most .* were declared"),
    "header in place of tensors": (swollen, "header has .* bytes where at most .* were expected"),
    "deep nesting": (text(lambda text: text[:-1] + b',"a":' + b"[" * 2000 + b"}"), "more brackets than its .* tensors need"),
    "many small values": (text(lambda text: text[:-1] + b',"a":[' + b"{}," * 1500 + b"{}]}"), "more brackets than its .* tensors need"),
    "a key twice": (text(lambda text: text[:-1] + text[text.rindex(b',"adapter') :]), "has the key 'adapter.*' twice"),
    "overlapping offsets": (text(offsets), "a gap, or two that overlap"),
    "offsets out of range": (text(lambda text: text.replace(b'offsets":[0,', b'offsets":[1000000,')), "shape and offsets disagree"),
    "bytes to spare": (body(lambda there: there + b"\0" * 8), "bytes to spare"),
    "one bit flipped": (lambda payload: payload[:-5] + bytes([payload[-5] ^ 1]) + payload[-4:], "checksum is wrong"),
    "no checksum": (unsealed, "checksum is wrong"),
    "a pickle": (lambda payload: b"\x80\x04\x95" + payload, "no message of this version"),
    "1e12 norm": (tensors(B=lambda B: B * 0 + 1e12), r"norm .*, the round's median is .*: above messages.norm_bound = 10 times"),
    "1e12 in a factor without product": (tensors(A=lambda A: A + 1e12), r"norm .*, the round's median"),
    "twenty times too far": (tensors(B=lambda B: B + 20 * B.norm()), "above messages.norm_bound"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_updates_leave_the_honest_aggregate_as_it_is(case, federation, without, tmp_path):
    make, message = HOSTILE[case]
    honest = federation[2][MALLORY][1]
    payload = make(honest)
    final, refused = attacked(federation, tmp_path / "run", [payload])
    assert [event["client"] for event in refused] == [MALLORY]
    reason = refused[0]["reason"]
    assert re.search(message, reason), reason
    assert reason.isprintable()
    assert len(reason) <= 500
    assert equal(bits(final), without)
    manifest = read_manifest(tmp_path / "run" / "run" / "rounds" / "0002")
    assert manifest["refused"] == [{"client": MALLORY, "reason": reason}]
    assert manifest["participants"] == ["client-0", "client-1", "client-2", "client-3"]
    assert {entry["client"] for entry in manifest["inputs"]} == {"client-0", "client-2", "client-3"}


def test_replays_and_second_answers(federation, without, tmp_path):
    """An answer to an older round does not count, nor a second one; the first valid one does, and its client is refused nothing."""
    old, new = federation[2][MALLORY][:2]
    final, refused = attacked(federation, tmp_path / "replay", [old])
    assert "round is 1, this round declared 2" in refused[0]["reason"]
    assert equal(bits(final), without)
    whole, refused = attacked(federation, tmp_path / "both", [old, new, new, None])
    assert not refused
    again = [event for event in events_of(tmp_path / "both", "warning") if "client" in event]
    assert [(event["round"], event["client"]) for event in again] == 3 * [(2, MALLORY)]
    assert [event["message"].partition(": ")[2].split(",")[0] for event in again] == [
        "the update's round is 1",
        *2 * ["its first answer counts"],
    ]
    assert read_manifest(tmp_path / "both" / "run" / "rounds" / "0002")["refused"] == []
    checkpoint, _ = last_checkpoint(tmp_path / "both" / "run")
    assert checkpoint.registry.pending_rejection == {}
    events = [event for event in read_events(tmp_path / "both" / "events.jsonl") if event.name != "started"]
    frame = participation([record("started", method="fedex", clients=[MALLORY]), *events])
    assert frame["outcome"].tolist() == ["accepted", "accepted"]
    honest, refused = attacked(federation, tmp_path / "honest", [new])
    assert not refused
    assert equal(bits(whole), bits(honest))
    assert not equal(bits(whole), without)


@pytest.mark.parametrize("case", HOSTILE)
def test_the_round_of_a_message_is_read_from_its_envelope_or_not_at_all(case, federation):
    honest = federation[2][MALLORY][1]
    said = answer_in(HOSTILE[case][0](honest))
    assert said is None or said.round == 2
    assert answer_in(honest).round == 2


def test_who_was_not_asked_is_not_heard(federation, without, tmp_path):
    state, quick, sent = federation

    def exchange(messages, deadline=None):
        number = 0 if len(seen) < 1 else 1
        seen.append(number)
        yield Reply("eve\n" + "x" * 300, sent[MALLORY][number])
        for client in messages:
            yield Reply(client, None if number and client == MALLORY else sent[client][number], "it is away")

    seen = []
    emit = log_to(tmp_path / "events.jsonl")
    final = run_rounds(setting(), state, replace(quick, exchange=exchange), tmp_path / "run", emit)
    first = events_of(tmp_path, "rejected")[0]
    assert first["reason"] == "it was not asked in this round"
    assert first["client"].isprintable()
    assert len(first["client"]) < 200
    assert equal(bits(final), without)


def screened(updates, starts, other, factor):
    """The updates that may be averaged, in the order of client ids, and client -> why its update may not."""
    sizes = {update.client_id: size_of(update, starts[update.client_id], other) for update in updates}
    rejected = norm_rejected(sizes, factor)
    return [update for update in sorted(updates, key=lambda one: one.client_id) if update.client_id not in rejected], rejected


def test_without_a_bound_or_with_two_updates_size_is_not_looked_at(federation, without, tmp_path):
    payload = HOSTILE["twenty times too far"][0](federation[2][MALLORY][1])
    final, refused = attacked(federation, tmp_path / "off", [payload], messages={"norm_bound": 0})
    assert not refused
    assert not equal(bits(final), without)
    pairs = make_updates(2)
    far = replace(pairs[1], adapter={name: replace(pair, B=pair.B * 1e6) for name, pair in pairs[1].adapter.items()})
    starts = {update.client_id: {n: replace(p, B=p.B * 0) for n, p in update.adapter.items()} for update in pairs}
    accepted, refused = screened([pairs[0], far], starts, pairs[0].other, 10)
    assert len(accepted) == 2
    assert not refused


def test_what_would_overflow_is_refused_however_few_they_are():
    update = make_updates(1)[0]
    far = replace(update, adapter={name: replace(pair, B=pair.B * 1e30) for name, pair in update.adapter.items()})
    accepted, refused = screened([far], {far.client_id: update.adapter}, update.other, None)
    assert not accepted
    assert refused == {far.client_id: "its numbers are too large to be averaged: lower its training.learning_rate"}


def test_the_norm_is_the_dense_one_and_the_order_does_not_matter():
    updates = make_updates(5)
    start = {name: make_pair(900 + index, *pair.shape, 3) for index, (name, pair) in enumerate(updates[0].adapter.items())}
    other = {"head.weight": torch.zeros(4, 12)}
    grown = replace(updates[3], adapter={n: replace(p, B=p.B * 50) for n, p in updates[3].adapter.items()})
    head = replace(updates[1], other={"head.weight": updates[1].other["head.weight"] * 100})
    updates = [updates[0], head, updates[2], grown, updates[4]]
    want = {
        update.client_id: sum(float((pair.delta() - start[name].delta()).norm() ** 2) for name, pair in update.adapter.items()) ** 0.5
        for update in updates
    }
    middle = sorted(want.values())[2]
    for order in (updates, updates[::-1], [*updates[2:], *updates[:2]]):
        accepted, refused = screened(order, dict.fromkeys(want, start), other, 5)
        assert [update.client_id for update in accepted] == ["client-0", "client-2", "client-4"]
        assert f"norm {want['client-3']:.3g}, the round's median is {middle:.3g}" in refused["client-3"]
        assert "the other trained tensors" in refused["client-1"]


def test_a_median_of_zero_refuses_nobody():
    update = make_updates(1)[0]
    still = [replace(update, client_id=name) for name in "abc"]
    moved = replace(
        update, client_id="d", adapter={name: LoRAPair(2 * pair.A, pair.B, pair.scaling) for name, pair in update.adapter.items()}
    )
    assert len(screened([*still, moved], dict.fromkeys("abcd", update.adapter), update.other, 10)[0]) == 4


def test_below_the_quorum_the_run_stops_with_one_line(federation, tmp_path):
    payload = HOSTILE["NaN"][0](federation[2][MALLORY][1])
    for clients in ({"quorum": 1.0}, {"quorum": 0.5, "min_clients": 4}):
        tree = {"partition": "iid", "count": 4, **clients}
        with pytest.raises(
            TrainingError, match=r"round 2 has 3 updates of 4 clients and needs 4: client client-1: .*NaN.*clients\.quorum"
        ) as caught:
            attacked(federation, tmp_path / f"run{clients['quorum']}", [payload], clients=tree)
        assert "\n" not in str(caught.value)


def test_nobody_is_waited_for_once_the_quorum_cannot_be_reached(federation, tmp_path):
    state, quick, _ = federation
    asked = []

    def exchange(messages, deadline=None):
        for client in messages:
            asked.append(client)
            yield Reply(client, None, "out of memory")

    with pytest.raises(TrainingError, match="has 0 updates of 4 clients and needs 3: client client-0: it failed: out of memory; client"):
        run_rounds(setting(), state, replace(quick, exchange=exchange), tmp_path / "run", ignore)
    assert asked == ["client-0", "client-1"]


def test_after_the_last_round_nobody_is_needed(federation, tmp_path):
    """Who fails to measure the final model is left out, and the run has ended well."""
    state, quick, sent = federation
    rounds = iter(range(3))

    def exchange(messages, deadline=None):
        number = next(rounds)
        for client in messages:
            lost = number == 2 and client in (MALLORY, "client-2")
            payload = b"junk" if lost and client == MALLORY else None if lost else sent[client][number]
            yield Reply(client, payload, "it is away")

    emit = log_to(tmp_path / "events.jsonl")
    run_rounds(setting(clients={"partition": "iid", "count": 4}), state, replace(quick, exchange=exchange), tmp_path / "run", emit)
    assert [(event["round"], event["client"], event["reason"]) for event in events_of(tmp_path, "rejected")] == [
        (2, MALLORY, "a message of 4 bytes is too short"),
        (2, "client-2", "it failed: it is away"),
    ]
    assert events_of(tmp_path, "held_out")[-1]["clients"].keys() == {"client-0", "client-3"}
    assert events_of(tmp_path, "run_done")
    assert read_manifest(tmp_path / "run" / "rounds" / "0002")["refused"] == []


def test_a_quorum_that_can_never_be_is_a_configuration_error(tmp_path):
    with pytest.raises(ConfigError, match=r"clients.min_clients = 3 and 2 clients take part"):
        run(setting(clients={"partition": "iid", "count": 4, "fraction": 0.5, "min_clients": 3}), tmp_path / "run", ignore)


ANSWERS = {"fails": None, "is lost": None, "is refused": HOSTILE["NaN"][0], "is too large": tensors(A=lambda A: A + 1e12)}


def bothered(config, folder, answer, home):
    """A run in which Mallory gives no good answer in round 2; the place, the final state, and what Mallory's downloads said."""
    place, rounds, said = home(config, ignore), iter(range(1, 9)), {}
    there = replace(place.federation(), evaluate=lambda state: {})

    def exchange(sent, deadline=None):
        number = next(rounds)
        said[number] = told(sent[MALLORY])
        reached = {client: payload for client, payload in sent.items() if (number, client, answer) != (2, MALLORY, "fails")}
        for client in sent.keys() - reached.keys():
            yield Reply(client, None, "it never got the message")
        for reply in there.exchange(reached, deadline):
            hit, change = (number, reply.client) == (2, MALLORY), ANSWERS[answer]
            yield replace(reply, payload=change(reply.payload) if change else None) if hit else reply

    folder.mkdir()
    emit = log_to(folder / "events.jsonl")
    return place, run_rounds(config, place.initial(), replace(there, exchange=exchange), folder / "run", emit), said


@pytest.mark.parametrize(
    ("method", "messages", "answers", "home"),
    [
        ("fedex", {}, ["fails", "is too large"], Fake),
        ("fedex", {"catch_up": "log"}, ["is lost", "is too large"], Fake),
        ("keep", {"catch_up": "log"}, list(ANSWERS), Fake),
        ("fedsa", {}, ["fails", "is refused"], Fake),
        ("keep", {"catch_up": "log"}, ["fails", "is too large"], LocalSimulation),
    ],
)
def test_who_was_refused_takes_part_again_and_the_run_stays_exact(method, messages, answers, home, tmp_path):
    """Whatever it holds, its next message brings it to the others' model, and what was refused counts nowhere.

    So the run ends with the same bits whether its round 2 failed before it began, was lost on the way, or was refused.
    """
    ends = []
    for answer in answers:
        folder = tmp_path / answer
        place, state, said = bothered(setting(method=method, messages=messages, rounds=3), folder, answer, home)
        ends.append(bits(state))
        refused = events_of(folder, "rejected")
        assert [(event["round"], event["client"]) for event in refused] == [(2, MALLORY)]
        assert (said[2]["rejected"], said[3]["rejected"], said[4]["rejected"]) == ("", refused[0]["reason"], "")
        assert [said[number]["full"] for number in (1, 2, 3, 4)] == [False, False, answer != "is too large", False]
        assert [said[number]["accepted"] for number in (1, 2, 3, 4)] == [0, 1, 1, 3]
        copies = [place.pool.clients[client].state.copy for client in ("client-0", MALLORY)]
        assert [copy.version for copy in copies] == [3, 3]
        assert all(float((copies[0].delta[n].dense() - delta.dense()).norm()) < 1e-6 for n, delta in copies[1].delta.items())
        if method != "fedsa":
            assert verify(folder / "run" / "rounds" / "0003")["max_relative_error"] < 1e-6
            done = events_of(folder, "round_done")
            assert all(event["exactness_error"] < 1e-6 for event in done)
            assert home is Fake or all(event["realised_error"] < 3 * event["floor"] for event in done)
    assert all(equal(ends[0], end) for end in ends)


@pytest.mark.campaign
def test_a_short_fuzz_campaign():
    """The long form is `make fuzz`."""
    counts, slowest, _ = campaign(5000, seed=1)
    assert sum(counts.values()) == 5000
    assert counts["update raw refused"] > 1000
    assert counts["update sealed refused"] > 500
    assert counts["update raw accepted"] == 0
    assert slowest < 1
