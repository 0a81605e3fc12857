"""Late joiners and absent clients: whatever form they are sent what they lack in, they hold the model of those who were always there.

The parties here are clients on machines of their own: bytes come in, and all they know is what they kept. What they must hold is computed
in fp64 numpy by the plain formulas (`oracle`).
"""

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from tests import oracle
from tests.conftest import make_pair
from tests.runs.test_run import configuration, ignore

from fedex_lora import METHODS, ClientUpdate, LoRAPair
from fedex_lora.aggregation import server_state as server
from fedex_lora.client.client import Client
from fedex_lora.config import Base, Lora, Messages, Rules
from fedex_lora.errors import WireError
from fedex_lora.models.base_weights import FrozenBase
from fedex_lora.models.loading import load_base
from fedex_lora.models.lora import add_lora, read_model, write_model
from fedex_lora.protocol import delta_sync as catch_up
from fedex_lora.protocol.delta_sync import CatchUp, Log, ModelCopy, caught_up, lacking, pruned
from fedex_lora.runs.emit import log_to
from fedex_lora.runs.round_loop import run_rounds
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.server.server import Server
from fedex_lora.storage.events import read_events
from fedex_lora.types import Dense, LowRank

HEADER = 3_000  # bytes of JSON in a message, at most, of the few modules here


def model_of(copy, name):
    """W - W0 of a client's copy of the global model, in fp64."""
    delta = copy.delta.get(name)
    return (0 if delta is None else oracle.numpy64(delta.dense())) + oracle.product(copy.adapter[name])


@dataclass
class Story:
    """What came of a federation: every client's copy, the ideal model, and each round's download of each client in bytes and as sent."""

    state: server.ServerState
    copies: dict
    ideal: dict
    log: Log
    sizes: list
    sent: list

    def delta(self, client, name):
        return self.copies[client].delta.get(name)

    def worst(self, client):
        return max(oracle.relative(model_of(self.copies[client], name), want) for name, want in self.ideal.items())


def moved(start, client, round, spread=0.1):
    """The factors after training: all clients move together, and each a little apart."""
    far = {}
    for index, (name, pair) in enumerate(start.items()):
        common, own = (make_pair(100 * round + index + seed, *pair.shape, pair.rank) for seed in (0, 7000 + 1000 * ord(client[0])))
        A, B = pair.A + 0.1 * common.A + spread * own.A, pair.B + 0.1 * common.B + spread * own.B
        far[name] = LoRAPair(A=A, B=B, scaling=pair.scaling)
    return far


def twins(start, client, round):
    """All but `a` train alike: the residual has r dependent columns in (k-1) r."""
    return moved(start, "a" if client == "a" else "b", round)


def adapters(shapes=((80, 120), (120, 80)), rank=3):
    pairs = {f"m{index}": make_pair(index, *shape, rank) for index, shape in enumerate(shapes)}
    return {name: replace(pair, B=torch.zeros_like(pair.B)) for name, pair in pairs.items()}


def federate(attending, first=None, clients=None, train=moved, method="fedex", pace=None, **messages):
    """Rounds with these participants ("ab", "abc", ...), then the final message to every one of `clients`."""
    first = first or adapters()
    clients = sorted(clients or set("".join(attending)))
    tree = {"method": method, "messages": {"norm_bound": 0, **messages}, "server": pace or {}, "weights": "num_examples"}
    rules = Rules.model_validate(tree)
    central = Server(rules, server.init(first, {}, method), clients)
    parties = {client: Client(rules, client, first) for client in clients}
    D = {name: np.zeros(pair.shape) for name, pair in first.items()}
    sizes, sent = [], []

    def note(round):
        sizes.append({client: len(payload) for client, payload in round.messages.items()})
        sent.append({client: round._requests.download(client) for client in round.participants})

    for number, participants in enumerate(attending, start=1):
        round, updates = central.open_round(list(participants)), []
        note(round)
        for client, payload in round.messages.items():
            work = parties[client].receive(payload)
            update = ClientUpdate(client, train(work.start, client, number), 10 + ord(client) % 7)
            verdict = central.receive(client, parties[client].reply(update.num_examples, {}, update=update))
            updates.append(verdict.update)
        round.close(updates)
        p = oracle.shares([update.num_examples for update in updates])
        for name in D:
            pairs = [update.adapter[name] for update in updates]
            D[name] = D[name] + oracle.ideal(pairs, p) - oracle.product_of_means(pairs, p)
    ideal = {name: D[name] + oracle.product_of_means([update.adapter[name] for update in updates], p) for name in D}
    round = central.open_round(clients, "evaluate")
    note(round)
    for client, payload in round.messages.items():
        parties[client].receive(payload)
    copies = {client: party.state.copy for client, party in parties.items()}
    return Story(central.state, copies, ideal, central.registry.log, sizes, sent)


def equal(left, right):
    """Bit for bit, in the same form."""
    assert type(left) is type(right)
    return torch.equal(left.W, right.W) if isinstance(left, Dense) else torch.equal(left.U, right.U) and torch.equal(left.V, right.V)


ABSENT = ["abc", "ab", "ab", "abc", "ab"]  # c misses 2, 3 and 5; d comes for the final message only
FULL = {"first": adapters(((24, 40), (40, 24)), rank=12)}  # one round of a residual has more numbers than the matrix


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("log", {"catch_up": "log"}),
        ("log", {}),
        ("snapshot", FULL),
        ("gain", {"train": twins}),
        ("gain", {"tolerance": 1e-5, "train": twins}),
    ],
)
def test_a_late_joiner_and_an_absent_client_equal_the_participant(form, changes):
    """The same bits from log and snapshot, 1e-6 from the recompressed gain; all of them 1e-6 from the plain formula."""
    attending = ["abc", "abe", "abe", "abce", "abe"] if form == "gain" else ABSENT
    story = federate(attending, clients="abcd" + "e" * (form == "gain"), **changes)
    for client, rounds in (("c", (3, 5)), ("d", (5,))):
        for number in rounds:
            if client in story.sent[number]:
                sent = story.sent[number][client].body.catch_up
                assert all(bool(getattr(sent, kind)) == (kind == form) for kind in ("gain", "snapshot"))
                assert any(sent.log.values()) == (form == "log")
        assert story.worst(client) < 1e-6
        for name in story.ideal:
            always, late = story.delta("a", name), story.delta(client, name)
            assert equal(always, story.state.base_delta[name])
            assert torch.equal(story.copies[client].adapter[name].A, story.copies["a"].adapter[name].A)
            if form == "gain":
                assert story.copies[client].lossy
                assert 0 < oracle.relative(oracle.numpy64(late.dense()), oracle.numpy64(always.dense())) < 1e-6
            else:
                assert equal(late, always)


def test_forms_of_each_module_are_the_smallest():
    """Constructed sizes, one module for each form."""

    def gains(out, inner, rank, same=False):
        pairs = [make_pair(0 if same else seed, out, inner, rank, 1.0) for seed in range(3)]
        return [LowRank(U=pair.B, V=pair.A) for pair in pairs]

    made = {"log": gains(30, 40, 2), "snapshot": gains(10, 12, 4), "gain": gains(30, 40, 2, same=True)}
    log = Log(gains={number: {name: parts[number - 1] for name, parts in made.items()} for number in (1, 2, 3)})
    D = {}
    for number in (1, 2, 3):
        D = server.advance(D, log.gains[number])
    sent = lacking(log, D, 0, 3, Messages())
    assert (set(sent.snapshot), set(sent.gain), {name for gains in sent.log.values() for name in gains}) == (
        {"snapshot"},
        {"gain"},
        {"log"},
    )
    assert sent.gain["gain"].rank == 2
    caught = caught_up(ModelCopy(), sent, {})
    assert caught.lossy == {"gain"}
    for name, parts in made.items():
        want = sum(oracle.numpy64(part.U) @ oracle.numpy64(part.V) for part in parts)
        assert oracle.relative(oracle.numpy64(caught.delta[name].dense()), want) < 1e-6
    always_log = lacking(log, D, 0, 3, Messages(catch_up="log"))
    assert not always_log.snapshot
    assert not always_log.gain
    one = lacking(log, D, 2, 3, Messages())
    assert not one.gain
    assert set(one.snapshot) == {name for name, parts in made.items() if parts[2].numel > D[name].numel}


def test_a_larger_tolerance_is_lossy_by_as_much():
    generator = torch.Generator().manual_seed(1)
    fall = 10.0 ** -torch.arange(6.0)
    parts = [LowRank(torch.randn(60, 6, generator=generator) * fall, torch.randn(6, 50, generator=generator)) for _ in range(2)]
    log, D = Log(gains={1: {"m": parts[0]}, 2: {"m": parts[1]}}), {}
    for part in parts:
        D = server.advance(D, {"m": part})
    want = sum(oracle.numpy64(part.U) @ oracle.numpy64(part.V) for part in parts)
    for tolerance in (1e-1, 1e-3):
        sent = lacking(log, D, 0, 2, Messages(tolerance=tolerance))
        error = oracle.relative(oracle.numpy64(sent.gain["m"].dense()), want)
        assert tolerance / 100 < error < tolerance
    assert not lacking(log, D, 0, 2, Messages()).gain


def test_the_log_does_not_grow_for_ever(monkeypatch):
    """A client that never comes: the log stays within a few snapshots, and when it comes after all it is right. With "log" all is kept."""
    monkeypatch.setattr(catch_up, "COLUMNS", 12)
    story = federate(["ab"] * 40, clients="abz", first=adapters(((12, 20), (20, 12))))
    for name in story.state.base_delta:
        kept = [gains[name] for gains in story.log.gains.values() if name in gains]
        assert 0 < sum(gain.rank for gain in kept) <= 12
    assert equal(story.delta("z", "m0"), story.state.base_delta["m0"])
    assert story.worst("z") < 1e-6
    assert story.copies["z"].lossy == frozenset()
    whole = federate(["ab"] * 40, clients="abz", first=adapters(((12, 20), (20, 12))), catch_up="log")
    assert len(whole.log.gains) == 40
    assert equal(whole.delta("z", "m0"), story.delta("z", "m0"))


def test_pruning_drops_only_what_cannot_be_the_smallest(monkeypatch):
    """What is sent from the pruned log is what would be sent from the whole one (nothing here can be recompressed)."""
    monkeypatch.setattr(catch_up, "COLUMNS", 4)
    gains, D, log = {}, {}, Log()
    for number in range(1, 13):
        pairs = {name: make_pair(20 * number, *shape, 2, 1.0) for name, shape in (("small", (8, 9)), ("large", (20, 24)))}
        gains[number] = {name: LowRank(U=pair.B, V=pair.A) for name, pair in pairs.items()}
        D = server.advance(D, gains[number])
        log = pruned(replace(log, gains={**log.gains, number: gains[number]}), D, 0, Messages())
        for since in range(number):
            got, want = (lacking(some, D, since, number, Messages()) for some in (log, Log(gains=gains)))
            assert got.snapshot.keys() == want.snapshot.keys()
            assert {n: set(g) for n, g in got.log.items()} == {n: set(g) for n, g in want.log.items()}
    assert all("small" not in log.gains[number] for number in (1, 2, 3))
    assert "large" in log.gains[8]


def test_nothing_lacks_nothing():
    story = federate(["ab"], train=lambda start, client, round: start)  # nobody moved: no residual at all
    assert story.state.base_delta == {}
    assert story.copies["a"].version == 1


PAIR = LowRank(U=torch.ones(80, 2), V=torch.ones(2, 120))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (CatchUp(1, 3, {2: {}}), "from version 1 to 3 has a hole: round 3 is missing; ask the server for rounds 2 on"),
        (CatchUp(1, 3, {3: {"m0": PAIR}}), "from version 1 to 3 has a hole: round 2 is missing"),
        (CatchUp(1, 10**15, {3: {}}), "has a hole: round 2 is missing"),
        (
            CatchUp(0, 1, {1: {}}),
            "the base is at version 1, and the message counts from version 0: ask the server for what came after round 1",
        ),
        (CatchUp(2, 3, {3: {}}), "the base is at version 1, and the message counts from version 2"),
        (CatchUp(1, 0), "goes backwards"),
        (CatchUp(1, 2, {2: {}, 3: {}}), "holds round 3, which is not between them"),
        (CatchUp(1, 2, {2: {"m0": PAIR}}, gain={"m0": PAIR}), "module m0 comes in two forms"),
        (CatchUp(1, 2, {2: {}}, gain={"m0": PAIR}, snapshot={"m0": PAIR}), "module m0 comes in two forms"),
        (CatchUp(1, 2, {2: {"m0": PAIR}}, snapshot={"m0": PAIR}), "module m0 comes in two forms"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(message, said):
    with pytest.raises(WireError, match=said) as caught:
        caught_up(ModelCopy(version=1), message, {})
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def model(gpt2):
    """A tiny GPT-2 with LoRA (Conv1D layers), and its base."""
    torch.manual_seed(0)
    peft = add_lora(load_base(Base(model=str(gpt2)), "causal-lm"), Lora(r=2, target_modules=["c_attn", "c_fc"]), "causal-lm")
    return peft, FrozenBase(peft)


def logits(model, mine):
    """Of a client's copy of the model in fp64: its weights as they are in fp32, and no more rounding."""
    peft, base = model
    base.set(mine.delta)
    write_model(peft, mine.adapter, {})
    ids = torch.arange(24).reshape(2, 12) % 7 + 3
    with torch.no_grad():
        return copy.deepcopy(peft).double()(input_ids=ids).logits


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("log", {"catch_up": "log"}),
        ("snapshot", {"rank": 16}),
        ("gain", {"train": twins}),
    ],
)
def test_the_logits_of_a_real_model(form, changes, model):
    """The late joiner d and the absent c against a, who was always there: the same bits, or 1e-6."""
    peft, _ = model
    pairs = read_model(peft)
    changes = dict(changes)
    rank, train = changes.pop("rank", 2), changes.pop("train", moved)
    first = {name: replace(make_pair(index, *pair.shape, rank), scaling=pair.scaling) for index, (name, pair) in enumerate(pairs.items())}
    first = {name: LoRAPair(0.05 * pair.A, torch.zeros_like(pair.B), pair.scaling) for name, pair in first.items()}

    def small(start, client, round):
        far = train(start, client, round)
        return {
            name: LoRAPair(pair.A + 0.1 * (far[name].A - pair.A), pair.B + 0.1 * (far[name].B - pair.B), pair.scaling)
            for name, pair in start.items()
        }

    attending = ["abce", "abe", "abe", "abce"]
    story = federate(attending, first, "abcde", small, **changes)
    sent = story.sent[-1]["d"].body.catch_up
    assert (any(sent.log.values()), bool(sent.snapshot), bool(sent.gain)) == (
        form == "log",
        form == "snapshot",
        form == "gain",
    )
    server_s = logits(model, ModelCopy(4, story.state.base_delta, story.state.adapter))
    untouched = logits(model, ModelCopy(adapter=first))
    assert oracle.relative(oracle.numpy64(untouched), oracle.numpy64(server_s)) > 1e-2
    for client in "acd":
        got = logits(model, story.copies[client])
        if form in ("log", "snapshot") or client == "a":
            assert torch.equal(got, server_s)
        else:
            assert 0 < oracle.relative(oracle.numpy64(got), oracle.numpy64(server_s)) < 1e-6


FEW = {"target_modules": ["q_proj", "v_proj"]}


def whole_run(out, **changes):
    """A run in this process, and every client's model less W0 against the server's."""
    config = configuration(**changes)
    place = LocalSimulation(config, ignore)
    state = run_rounds(config, place.initial(), place.federation(), out, log_to(out.parent / "events.jsonl"))
    done = [event for event in read_events(out.parent / "events.jsonl") if event["event"] == "round_done"]
    assert len(done) == config.rounds
    assert all(event["exactness_error"] < 1e-6 and event["realised_error"] < 3 * event["floor"] for event in done)
    worst = 0.0
    for client in place.pool.clients.values():
        for name, delta in state.base_delta.items():
            want = oracle.numpy64(delta.dense()) + oracle.product(state.adapter[name])
            worst = max(worst, oracle.relative(model_of(client.state.copy, name), want))
    return place, done, worst


@pytest.mark.parametrize("messages", [{}, {"catch_up": "log"}])
def test_whole_runs_with_absent_clients_stay_exact(messages, tmp_path):
    clients = {"partition": "iid", "count": 5, "fraction": 0.4}
    place, _, worst = whole_run(tmp_path / "run", rounds=4, clients=clients, messages=messages, task={"train_rows": 50}, lora=FEW)
    assert worst < 1e-6
    held = [client.state.copy for client in place.pool.clients.values()]
    copies, lossy = {id(copy.delta) for copy in held}, [copy for copy in held if copy.lossy]
    assert len(copies) == len(lossy) + (len(lossy) < 5)  # one object for all that have the server's bits
    assert bool(worst) == bool(lossy)
    assert not (lossy and messages)  # by default a residual may happen to be recompressed


def test_the_base_delta_itself_travels_where_it_is_smaller(tmp_path):
    """Ranks so large that one round's residual has more numbers than the matrix: bytes as `Method.message_size` says, and exact."""
    place, done, worst = whole_run(tmp_path / "run", rounds=2, lora={**FEW, "r": 40})
    assert worst == 0
    shapes = [pair.shape for pair in place.host.place.first.values()]
    for event in done:
        promised = 4 * 3 * sum(METHODS["fedex"].message_size([40] * 3, 0, shape, event["round"]).down for shape in shapes)
        assert 0 <= event["bytes_down"] - promised < 3 * 10_000
    assert all(80 * sum(shape) > shape[0] * shape[1] for shape in shapes)
