"""The loop against an fp64 oracle: every method, ranks that differ or not, who takes part, and what can happen to an answer.

No model (`tests/fake.py`). What each client is given must be the server's model, and the server's, under an exact method, the mean of the
models that its participants trained: `E = sum_i p_i (W_i,start + s_i B_i A_i)`, by the plain formula.

    python -m tests.runs.test_round_loop [--all]   how many combinations, which are wrong, the worst error, seconds; with --all every gauge
"""

import contextlib
import itertools
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import oracle
from tests.fake import HEAD, Alone, Fake, Network, Trace, setting
from tests.protocol.test_hostile import bits, equal
from tests.runs.test_run import ignore

from fedex_lora import METHODS, LoRAPair
from fedex_lora.aggregation import GAUGES, get_method
from fedex_lora.client import client as protocol_client
from fedex_lora.errors import FedexLoraError
from fedex_lora.protocol.messages import decode_body
from fedex_lora.report.analysis import participation
from fedex_lora.runs import round_loop as rounds
from fedex_lora.runs.round_loop import run_rounds
from fedex_lora.server.checkpoint import last_checkpoint
from fedex_lora.server.checks import require_consistent
from fedex_lora.storage.files import read_manifest

ROUNDS, CLIENTS = 5, 4
EVENTS = {  # name -> (what the configuration says of it, round -> fault)
    "quiet": ({}, {}),
    "absent": ({"quorum": 0.5}, {2: "lost", 3: "down", 4: "large"}),
    "skip": ({"below_quorum": "skip"}, {1: "lost", 3: "down", 4: "large"}),
    "wait": ({"below_quorum": "wait"}, {1: "lost", 3: "large", 4: "down"}),
    "late": ({"quorum": 0.5, "late": "next"}, {2: "held", 3: "lost", 4: "held"}),
    "late and skipped": ({"late": "next", "below_quorum": "skip"}, {2: "held", 4: "held"}),
    "duplicates": ({}, {2: "twice", 4: "twice"}),
    "forgotten": ({}, {2: "wiped", 4: "wiped"}),
    "killed": ({}, {3: "killed"}),
}
PACES = {"at rest": {}, "momentum": {"momentum": 0.5}, "momentum and rate": {"momentum": 0.3, "learning_rate": 1.7, "momentum_on": "all"}}
FEW = ("skip", "wait")  # of the events, where gauges are many
RANKS = {"one rank": None, "ranks": [1, 2, 4, 4]}
FRACTIONS = {"all": 1.0, "some": 0.75}
MESSAGES = {"smallest": {}, "log": {"catch_up": "log"}}


def combinations(method, everything=False):
    """(its name, its configuration, its faults) of every combination that may be configured."""
    for gauge, event, ranks, fraction, sent, pace in itertools.product(GAUGES, EVENTS, RANKS, FRACTIONS, MESSAGES, PACES):
        few = (gauge == "as-is" or (event, fraction) == ("skip", "some")) and (sent != "log" or event in FEW)
        few &= event != "quiet" or METHODS[method].centralised  # others have quiet rounds too
        few &= pace == "at rest" or (pace == "momentum") == (fraction == "some")
        if not few and not everything:
            continue
        changes, faults = EVENTS[event]
        clients = {"partition": "iid", "count": CLIENTS, "ranks": RANKS[ranks], "fraction": FRACTIONS[fraction], **changes}
        name = method if gauge == "as-is" else f"{method}+{gauge}"
        with contextlib.suppress(FedexLoraError):
            row, config = (
                get_method(name),
                setting(method=name, rounds=ROUNDS, clients=clients, messages=MESSAGES[sent], server=PACES[pace]),
            )
            require_consistent(config, 1 if row.centralised else CLIENTS)
            alike = (
                sent != "smallest" and (row.residual_policy == "drop" or row.reinitialises) and not PACES[pace]
            )  # nothing or all of it is sent
            if not (alike or (event == "forgotten" and row.client_state) or (row.centralised and faults)):
                yield f"{name}, {event}, {ranks}, {fraction}, {sent}, {pace}", config, faults


def off(got, want):
    size = np.linalg.norm(want)
    return float(np.linalg.norm(got - want) / size) if size else float(np.abs(got).max())


def model(pair, delta):
    """`s B A + D` in fp64."""
    return oracle.product(pair) + (0 if delta is None else oracle.numpy64(delta.dense()))


def effective(state, name):
    """`W - W0` in fp64."""
    return model(state.adapter[name], state.base_delta.get(name))


class Story:
    """One run, and what came of it."""

    def __init__(self, config, faults, folder, home=Fake):
        self.config, self.row, self.faults, self.trace, self.events = config, get_method(config.method), faults, Trace(), []
        place = home(config, ignore, self.trace)
        if home is Alone or "killed" in faults.values() or config.clients.below_quorum == "wait":
            place.remember_in(folder)
        self.network = Network(place, faults)
        try:
            self.final = run_rounds(config, place.initial(), self._federation(place), folder, self._emit)
        except InterruptedError:
            place = home(config, ignore, self.trace)
            place.remember_in(folder)
            self.final = run_rounds(config, last_checkpoint(folder)[0], self._federation(place), folder, self._emit)
        self.manifests = {number: read_manifest(folder / "rounds" / f"{number:04d}", check=False) for number in range(1, ROUNDS + 1)}
        self.rank = dict(zip(sorted(place.pool.learner.rows), config.clients.ranks or [], strict=False))

    def _federation(self, place):
        self.network.place = place
        return replace(place.federation(), exchange=self.network.exchange)

    def _emit(self, event):
        self.events.append(event)

    def of(self, event, field):
        """Round -> a field of an event."""
        return {one["round"]: one.get(field) for one in self.events if one["event"] == event}

    def participants(self):
        """Round -> (client, round that it was asked in) of those who belong in the mean, from what happened to the answers alone."""
        clients, everyone = self.config.clients, {}
        for number, asked in ((number, set(asked)) for number, asked in self.of("round_started", "clients").items()):
            gone = self.faults.get(number) in ("lost", "down", "large", "held") and clients.below_quorum != "wait"
            missing = {self.network.victims[number]} if gone else set()
            held = self.faults.get(number - 1) == "held" and clients.late == "next"
            late = ({self.network.victims[number - 1]} if held else set()) - (asked - missing)
            there = {(client, number) for client in asked - missing} | {(client, number - 1) for client in late}
            everyone[number] = set() if missing and clients.quorum == 1 else there
        return everyone

    def errors(self):
        """The worst of each kind: what clients were given (also as bits), the server's model, its head, and what the loop said of it."""
        worst, own, expected = dict.fromkeys(("given", "bits", "server", "head", "said"), 0.0), {}, self.participants()
        trained, said = {(one.client, one.round): one for one in self.trace.given if one.trained}, self.of("round_done", "exactness_error")

        def note(kind, error):
            worst[kind] = max(worst[kind], error)

        for number in range(1, ROUNDS + 2):
            for given in self.trace.given:
                if given.round == (number if number <= ROUNDS else None):
                    state = self.trace.states[number - 1]
                    note("given", self.given_off(given, state, own.get(given.client)))
                    note("bits", 0.0 if self.same_bits(given, state) else 1.0)
            if not expected.get(number):
                continue
            counted, state = [trained[key] for key in sorted(expected[number])], self.trace.states[number]
            own |= {one.client: one.trained.adapter for one in counted}
            p = oracle.shares([one.trained.num_examples for one in counted])
            head = sum(share * oracle.numpy64(one.trained.other[HEAD]) for share, one in zip(p, counted, strict=True))
            if self.config.server.momentum_on == "all":
                head = self.moved(number, head, lambda state: oracle.numpy64(state.other[HEAD]))
            note("head", off(oracle.numpy64(state.other[HEAD]), head))
            if self.row.exactness != "personalised" and state.adapter:
                E = {
                    name: sum(share * model(one.trained.adapter[name], one.delta.get(name)) for share, one in zip(p, counted, strict=True))
                    for name in state.adapter
                }
                E = {name: self.moved(number, mean, lambda state, name=name: effective(state, name)) for name, mean in E.items()}
                error = max(off(effective(state, name), E[name]) for name in state.adapter)
                note("server", error)
                note("said", abs(said[number] - error) / max(error, 1.0))
        return worst

    def moved(self, number, mean, of):
        """`x + h (mean - x) + b (x - y)`, of what the server had after the last round and the one before it."""
        x, y = (of(self.trace.states[max(0, number - back)]) for back in (1, 2))
        return x + self.config.server.learning_rate * (mean - x) + self.config.server.momentum * (x - y)

    def given_off(self, given, state, own):
        """How far the model that a client was given is from the one that it should have."""
        worst = 0.0
        for name, pair in state.adapter.items():
            want = model(pair, state.base_delta.get(name))
            if self.row.exactness == "personalised":
                want = pair.scaling * (oracle.numpy64(own[name].B if own else pair.B) @ oracle.numpy64(pair.A))
            elif not self.row.exact:  # a lower rank is another model
                want = want - oracle.product(pair) + oracle.product(self.first(given, pair))
            worst = max(worst, off(model(given.start[name], given.delta.get(name)), want))
        return worst

    def same_bits(self, given, state):
        """The head, and the factors that it begins with, where those are the global ones."""
        if self.row.client_state:
            return torch.equal(given.other[HEAD], state.other[HEAD])
        pairs = [(given.start[name], self.first(given, pair)) for name, pair in state.adapter.items()]
        alike = all(torch.equal(ours.A, theirs.A) and torch.equal(ours.B, theirs.B) for ours, theirs in pairs)
        return alike and torch.equal(given.other[HEAD], state.other[HEAD])

    def first(self, given, pair):
        rank = self.rank.get(given.client, pair.rank)
        return LoRAPair(pair.A[:rank], pair.B[:, :rank], pair.scaling)

    def wrong(self):
        """What is not as it should be; nothing, if all is well. The inexact ones must miss, by what the loop says."""
        errors, expected = self.errors(), self.participants()
        found = [f"{kind} {error:.2g}" for kind, error in errors.items() if kind != "server" and not error < 1e-6]
        if self.row.exactness != "personalised" and (errors["server"] < 1e-6) != self.row.exact:
            found.append(f"server {errors['server']:.2g}")
        for number, manifest in self.manifests.items():
            inputs, refused = ({entry["client"] for entry in manifest[key]} for key in ("inputs", "refused"))
            asked = set(manifest["participants"])
            if inputs != {client for client, _ in expected[number]} or (inputs and refused != asked - inputs):
                found.append(f"round {number} took {sorted(inputs)} and refused {sorted(refused)}")
        frame = participation([{"event": "started", "clients": sorted(self.network.place.pool.learner.rows)}, *self.events])
        for number, rows in frame.groupby("round"):
            taken, asked = set(rows.loc[rows["outcome"] == "accepted", "client"]), set(self.manifests[number]["participants"])
            if taken != {client for client, _ in expected[number]} & asked:
                found.append(f"round {number} is shown with {sorted(taken)}")
        return found, errors


def stories(method, folder, everything=False):
    """(name, what is wrong, the errors) of every combination of a method."""
    for index, (name, config, faults) in enumerate(combinations(method, everything)):
        try:
            yield name, *Story(config, faults, folder / str(index)).wrong()
        except FedexLoraError as error:
            yield name, [str(error)], {}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nothing here is about what a disk keeps, or how long one waits."""
    monkeypatch.setattr(rounds, "PAUSE", 0.0)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.mark.parametrize("method", METHODS)
def test_whatever_happens_everyone_has_the_mean_of_the_models(method, tmp_path):
    found = {name: wrong for name, wrong, _ in stories(method, tmp_path)}
    assert len(found) >= (2 if METHODS[method].centralised else 10)
    assert not {name: wrong for name, wrong in found.items() if wrong}


def test_the_check_can_fail(tmp_path, monkeypatch):
    """A client that takes what did not travel from the initial adapter trains another model, and the loop cannot know."""
    initial = []

    def forgetful(body, declared, known):
        initial.append(known)
        return decode_body(body, declared, initial[0])

    monkeypatch.setattr(protocol_client, "decode_body", forgetful)
    name, config, faults = next(one for one in combinations("fedex-best") if "skip, ranks, some" in one[0])
    wrong, errors = Story(config, faults, tmp_path / "run").wrong()
    assert min(errors["given"], errors["server"], errors["said"]) > 1e-2, name
    assert wrong


@pytest.mark.parametrize(
    ("method", "ranks"),
    [
        (name, ranks)
        for name, row in METHODS.items()
        for ranks in RANKS
        if not row.centralised and (row.per_client_ranks or not RANKS[ranks])
    ],
)
def test_clients_of_one_process_know_what_they_would_on_machines_of_their_own(method, ranks, tmp_path):
    """The same bits, also after rounds that were skipped or asked again."""
    for name, config, faults in combinations(method):
        if any(f"{method}, {event}, {ranks}, some" in name for event in FEW):
            here, there = (Story(config, faults, tmp_path / f"{home.__name__} {name}", home) for home in (Fake, Alone))
            assert equal(bits(here.final), bits(there.final)), name
            assert not there.wrong()[0], name


def main():
    torch.set_num_threads(1)
    rounds.PAUSE, os.fsync = 0.0, lambda descriptor: None
    began, count, bad, worst = time.perf_counter(), 0, 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for method, row in METHODS.items():
            for name, wrong, errors in stories(method, Path(folder) / method, "--all" in sys.argv):
                count, bad = count + 1, bad + bool(wrong)
                worst = max(worst, errors.get("given", 0.0), errors.get("head", 0.0), errors.get("server", 0.0) if row.exact else 0.0)
                if wrong:
                    print(f"{name}: {'; '.join(wrong)}", flush=True)
    print(f"{count} combinations, {bad} wrong, worst error {worst:.2e}, {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
