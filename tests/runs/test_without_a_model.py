"""Whole runs of which only messages, folders and events matter (`tests/fake.py`)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import fake
from tests.fake import HEAD, Fake, setting
from tests.messages import tensors_of
from tests.runs.test_run import events_of, ignore

from fedex_lora import METHODS, load_model
from fedex_lora.aggregation import get_method
from fedex_lora.aggregation.momentum import NEGLIGIBLE
from fedex_lora.config import base_folder
from fedex_lora.errors import ModelError, TrainingError, UnreadableError, UnwritableError
from fedex_lora.exactness import measure
from fedex_lora.offline.verify import verify
from fedex_lora.protocol import delta_sync
from fedex_lora.protocol.envelopes import answer_of
from fedex_lora.protocol.failures import Failure
from fedex_lora.report.analysis import sent
from fedex_lora.runs import clients as pools
from fedex_lora.runs import listening
from fedex_lora.runs.clients import ClientPool
from fedex_lora.runs.emit import log_to
from fedex_lora.runs.listening import Reply
from fedex_lora.runs.measuring import best_of, held_out_event, learnt_nothing
from fedex_lora.runs.round_loop import run_rounds
from fedex_lora.runs.run import run
from fedex_lora.server.registry import ClientRegistry
from fedex_lora.storage.adapter_folder import read_adapter_folder
from fedex_lora.storage.events import read_events
from fedex_lora.storage.result import read_result

ROUNDS = 4


def numbers(payload):
    """How many of them travel, without the head."""
    return sum(tensor.numel() for name, tensor in tensors_of(payload).items() if not name.startswith("other|"))


@pytest.mark.parametrize("method", [*(name for name, row in METHODS.items() if row.lora), "fedit+balanced", "fedex-best+procrustes"])
def test_what_travels_is_what_the_method_s_row_says(method, tmp_path, monkeypatch):
    """Number by number, of every client, in every round and after the last one; and the bytes of events are those of the messages."""
    monkeypatch.setattr(fake, "SHAPES", {"wide": (60, 110), "tall": (90, 50)})
    row, config = get_method(method), setting(method=method, rounds=ROUNDS, clients={"partition": "iid", "count": 3})
    place, came, went = Fake(config, ignore), {}, {}
    federation, clients = place.federation(), len(place.pool.learner.rows)

    def exchange(messages, deadline):
        number = len(came) + 1
        came[number], went[number] = {}, {}
        for client, payload in messages.items():
            came[number][client] = payload
            went[number][client] = place.pool.answer(client, payload)
            yield Reply(client, went[number][client])

    tmp_path.joinpath("run").mkdir()
    emit = log_to(tmp_path / "run" / "events.jsonl")
    run_rounds(config, place.initial(), replace(federation, exchange=exchange), tmp_path / "run", emit)
    ranks, truncated = [config.lora.r] * clients, config.lora.r if row.residual_policy == "truncate" else None
    for number in range(1, ROUNDS + 2):
        promised = [row.message_size(ranks, 0, shape, number, truncated=truncated) for shape in fake.SHAPES.values()]
        up = sum(one.up for one in promised) if number <= ROUNDS else 0
        assert {numbers(payload) for payload in came[number].values()} == {sum(one.down for one in promised)}, number
        assert {numbers(payload) for payload in went[number].values()} == {up}, number
    everything = [sum(len(payload) for of_round in way.values() for payload in of_round.values()) for way in (came, went)]
    assert list(sent(read_events(tmp_path / "run" / "events.jsonl"))) == everything


def test_a_flat_spectrum_is_warned_of(tmp_path, monkeypatch):
    """The event comes when the tail is above the bound, and only then."""
    config = setting(method="fedex-svd", rounds=2, truncation={"rank": 1})
    for name, bound in (("kept", 0.999), ("flat", 1e-3)):
        monkeypatch.setattr(measure, "USELESS_TAIL", bound)
        run(config, tmp_path / name, ignore, home=Fake)
    kept, told = ([event for event in events_of(tmp_path / name, "warning") if "tail" in event] for name in ("kept", "flat"))
    assert not kept
    assert {event["round"] for event in told} <= {1, 2}
    assert all(event["tail"] > 1e-3 and "truncation is useless" in event["message"] for event in told)
    assert told


def test_the_bounds_that_other_tests_change_are_these():
    assert (measure.USELESS_TAIL, delta_sync.COLUMNS, listening.MAX_EXTRA_REJECTIONS, NEGLIGIBLE) == (0.7, 256, 100, 2.0**-40)


def test_personal_factors_stay_with_their_clients(tmp_path):
    """fedsa: no B in what is stored of an upload but the initial zeros, and each client's own model in clients/."""
    run(setting(method="fedsa", rounds=2), tmp_path / "run", ignore, home=Fake)
    result = read_result(tmp_path / "run" / "rounds" / "0002")
    assert result.updates
    assert not any(pair.B.any() for update in result.updates for pair in update.adapter.values())
    own = {folder.name: read_adapter_folder(folder / "adapter") for folder in (tmp_path / "run" / "clients").iterdir()}
    assert len(own) == 4
    for one in own.values():
        assert torch.equal(one.other[HEAD], result.other[HEAD])
        for name, pair in one.adapter.items():
            assert torch.equal(pair.A, result.adapter[name].A)
            assert pair.B.any()
    with pytest.raises(ModelError, match="load clients/CLIENT/adapter"):
        load_model(tmp_path / "run", base_folder())


def test_a_client_that_is_not_sent_all_it_lacks_is_noticed(tmp_path, monkeypatch):
    lacking = ClientRegistry.sync_for

    def last_only(self, since, state, messages):
        whole = lacking(self, since, state, messages)
        return replace(whole, since=max(since, state.round - 1), log=dict(list(whole.log.items())[-1:]))

    monkeypatch.setattr(ClientRegistry, "sync_for", last_only)
    said = []
    config = setting(rounds=5, clients={"partition": "iid", "count": 4, "fraction": 0.3})
    with pytest.raises(TrainingError, match="failed: it lacks what the message counts on"):
        run(config, tmp_path / "run", lambda event: said.append(str(getattr(event, "message", ""))), home=Fake)
    assert any(line.startswith("the base is at version") for line in said)


def test_no_round_is_best_when_different_clients_measured(tmp_path):
    run(setting(rounds=2, clients={"partition": "iid", "count": 4, "fraction": 0.5}), tmp_path / "run", ignore, home=Fake)
    assert events_of(tmp_path / "run", "run_done")[0]["best_round"] is None


def test_a_fraction_of_the_clients(tmp_path):
    """Absent clients catch up: the factor log brings every participant to the round's base, and every round stays exact."""
    config = setting(rounds=4, clients={"partition": "iid", "count": 5, "fraction": 0.4})
    run(config, tmp_path / "run", ignore, home=Fake)
    took_part = [event["clients"] for event in events_of(tmp_path / "run", "round_started")]
    assert all(len(clients) == 2 for clients in took_part)
    assert len({tuple(clients) for clients in took_part}) > 1
    assert verify(tmp_path / "run")["max_relative_error"] < 1e-6


@pytest.mark.parametrize(("many", "hopeless", "asked"), [(4, True, 1), (4, False, 3), (1, True, 3)])
def test_a_fault_of_the_configuration_stops_a_run_that_would_wait_for_ever(many, hopeless, asked, tmp_path, monkeypatch):
    """Only where so many clients say so that the quorum cannot be reached without them: one alone stops nobody."""
    config = setting(rounds=1, clients={"partition": "iid", "count": 4, "below_quorum": "wait", "quorum": 0.5})
    place, calls = Fake(config, ignore), []
    monkeypatch.setattr("fedex_lora.runs.round_loop.time.sleep", lambda seconds: None)

    def exchange(messages, deadline):
        calls.append(list(messages))
        for number, (client, payload) in enumerate(messages.items()):
            fails = number < many if len(calls) < 3 else False
            fails = fails or (many == 1 and len(calls) < 3)  # the others fail for other reasons
            said = hopeless and number < many
            failed = answer_of(payload, client, Failure("config" if said else "memory"))
            yield Reply(client, failed if fails else place.pool.answer(client, payload))

    federation = replace(place.federation(), exchange=exchange)
    if asked == 1:
        with pytest.raises(TrainingError, match="mend the run's configuration"):
            run_rounds(config, place.initial(), federation, tmp_path / "run", ignore)
    else:
        run_rounds(config, place.initial(), federation, tmp_path / "run", ignore)
    assert len([one for one in calls[:3] if len(one) == 4]) == asked


def test_a_memory_that_cannot_be_read_now_stays_and_a_broken_one_is_set_aside(tmp_path, monkeypatch):
    config = setting(rounds=1, clients={"partition": "iid", "count": 2})
    place = Fake(config, ignore)
    (tmp_path / "run").mkdir()
    place.remember_in(tmp_path / "run")
    run_rounds(config, place.initial(), place.federation(), tmp_path / "run", ignore)
    memory = tmp_path / "run" / "clients" / "client-0" / "memory.safetensors"
    pool = ClientPool(config, place.pool.learner.only("client-0"), alone=True)
    with monkeypatch.context() as here:
        here.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(UnreadableError, match="Input/output error"):
            pool.take_up(tmp_path / "run" / "clients")
    assert memory.is_file()
    memory.write_bytes(memory.read_bytes()[:-1])
    pool.take_up(tmp_path / "run" / "clients")
    assert [path.name for path in memory.parent.iterdir()] == ["memory.safetensors.broken"]


def test_a_full_disk_is_the_run_s_and_no_client_s_failure(tmp_path, monkeypatch):
    """In one process nothing goes on without the client: the run stops."""
    config = setting(rounds=2, clients={"partition": "iid", "count": 4, "quorum": 0.5})
    place, kept = Fake(config, ignore), pools.write_bytes
    (tmp_path / "run").mkdir()
    place.remember_in(tmp_path / "run")

    def full(path, content):
        if "client-2" in str(path):
            raise UnwritableError(f"cannot write {path}")
        kept(path, content)

    monkeypatch.setattr(pools, "write_bytes", full)
    with pytest.raises(UnwritableError):
        run_rounds(config, place.initial(), place.federation(), tmp_path / "run", ignore)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"accuracy": 0.5, "loss": 1.0}, {"accuracy": 0.5, "loss": 0.999}, "raise training.learning_rate or rounds"),
        ({"accuracy": 0.5, "loss": 1.0}, {"accuracy": 0.5, "loss": 0.9}, None),
        ({"accuracy": 0.5, "loss": 1.0}, {"accuracy": 0.6, "loss": 1.0}, None),
        ({"accuracy": 0.5, "loss": 1.0}, {"accuracy": 0.4, "loss": float("nan")}, "diverged, or the rate is too high (loss 1, then nan"),
        ({"accuracy": 0.5, "loss": 1.0}, {"accuracy": 0.5, "loss": 1.6}, "lower training.learning_rate"),
        ({}, {"accuracy": 0.4, "loss": 2.0}, None),
    ],
)
def test_a_run_that_learns_nothing_says_so(before, after, said):
    """By what two clients report, from whom numbers that are not finite do not come."""

    def mean(number, found):
        finite = {f"held_out_{name}": value for name, value in found.items() if value == value}
        whole = {f"held_out_{name}": 0.5 for name in found}
        return held_out_event(number, {"a": {**finite, "held_out_rows": 5.0}, "b": {**(whole | finite), "held_out_rows": 5.0}}, ignore)

    facts = {"headline": "accuracy", "greater_is_better": True}
    held = {0: mean(0, before) if before else {}, 3: mean(3, after)}
    words = learnt_nothing(held, facts)
    assert best_of(held, facts) == (3 if "accuracy" in held[3] and held[3]["accuracy"] == held[3]["accuracy"] else None)
    assert bool(words) == bool(said)
    assert not said or (said in words and "0.5 on the clients' own rows before" in words)
