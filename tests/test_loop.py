"""The loop against an fp64 oracle: every method, ranks that differ or not, who takes part, and everything that can happen to an answer.

No model: `tests/fake.py`. What each client is given must be the server's model, and the server's the mean of the participants' models.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import oracle
from tests.fake import HEAD, Fake, Network, Trace, setting
from tests.test_runner import ignore

from fedex_lora import METHODS, LoRAPair, rounds, storage
from fedex_lora.aggregation import GAUGES, method_named
from fedex_lora.consistency import require_consistent
from fedex_lora.errors import FedexLoraError
from fedex_lora.rounds import run_rounds
from fedex_lora.storage import read_manifest

ROUNDS = 6
EVENTS = {  # name -> (what the configuration says of it, round -> fault)
    "quiet": ({}, {}),
    "absent": ({"quorum": 0.5}, {2: "lost", 3: "down", 5: "large"}),
    "skip": ({"below_quorum": "skip"}, {1: "lost", 3: "down", 4: "large"}),
    "wait": ({"below_quorum": "wait"}, {1: "lost", 3: "large", 4: "down"}),
    "late": ({"quorum": 0.5, "late": "next"}, {2: "held", 3: "lost", 5: "held"}),
    "late and skipped": ({"quorum": 1.0, "late": "next", "below_quorum": "skip"}, {2: "held", 4: "held", 5: "lost"}),
    "duplicates": ({}, {2: "twice", 4: "twice"}),
    "forgotten": ({}, {3: "wiped", 5: "wiped"}),
}
RANKS = {"one rank": None, "ranks": [1, 2, 4, 4, 2]}
FRACTIONS = {"all": 1.0, "some": 0.6}


def combinations():
    gauged = [f"{method}+{gauge}" for method in METHODS for gauge in GAUGES if gauge != "as-is"]
    for method, event, ranks, fraction in itertools.product([*METHODS, *gauged], EVENTS, RANKS, FRACTIONS):
        yield method, event, ranks, fraction, {}


def allowed(method, event, ranks, fraction, messages):
    changes, faults = EVENTS[event]
    try:
        clients = {"partition": "iid", "count": 5, "ranks": RANKS[ranks], "fraction": FRACTIONS[fraction], **changes}
        config = setting(method=method, rounds=ROUNDS, clients=clients, messages=messages)
        row = method_named(method)
        require_consistent(config, 1 if row.pooled else 5)
    except FedexLoraError:
        return None
    return None if event == "forgotten" and row.own or row.pooled and faults else config


def off(got, want):
    size = np.linalg.norm(want)
    return float(np.linalg.norm(got - want) / size) if size else float(np.abs(got).max())


def model(adapter, delta, name):
    """`s B A + D` in fp64, or D alone."""
    gained = delta.get(name)
    return (oracle.product(adapter[name]) if adapter else 0) + (0 if gained is None else oracle.numpy64(gained.dense()))


class Story:
    """One run, and what came of it."""

    def __init__(self, config, faults, folder, resume_after=None):
        self.config, self.row, self.trace, self.events = config, method_named(config.method), Trace(), []
        emit = lambda event, **fields: self.events.append((event, fields))  # noqa: E731
        place = Fake(config, ignore, self.trace)
        self.network = Network(place, faults)
        self.trace.states[0] = place.initial()
        run_rounds(config, place.initial(), replace(place.federation(), exchange=self.network.exchange), folder, emit)
        manifests = [read_manifest(folder / "rounds" / f"{number:04d}") for number in range(1, ROUNDS + 1)]
        self.inputs = {one["round"]: {entry["client"] for entry in one["inputs"]} for one in manifests}
        self.rank = dict(zip(sorted(place.parties.learner.rows), config.clients.ranks or [], strict=False))
        self.asked = {fields["round"]: set(fields["clients"]) for event, fields in self.events if event == "round_started"}
        self.said = {fields["round"]: fields.get("exactness_error") for event, fields in self.events if event == "round_done"}
        self.trained = {(given.client, given.round): given for given in self.trace.given if given.trained}

    def participants(self, faults):
        """Round -> (client, round that it was asked in) of those who should be in the mean, from what happened to the answers alone."""
        clients, everyone = self.config.clients, {}
        for number, asked in self.asked.items():
            missing = {self.network.victims[number]} if faults.get(number) in ("lost", "down", "large", "held") else set()
            if clients.below_quorum == "wait":
                missing = set()
            late = {self.network.victims[number - 1]} if faults.get(number - 1) == "held" and clients.late == "next" else set()
            late -= asked - missing
            everyone[number] = {(client, number) for client in asked - missing} | {(client, number - 1) for client in late}
            if missing and clients.quorum == 1:
                everyone[number] = set()
        return everyone

    def check(self, faults):
        """The worst errors of models that clients were given, of the server's, and of what the loop said of it; how far the server missed."""
        expected, worst, own, heads = self.participants(faults), {"given": 0.0, "server": 0.0, "said": 0.0, "head": 0.0}, {}, []
        for number in range(1, ROUNDS + 2):
            before = self.trace.states[number - 1]
            for given in self.trace.given:
                if given.round == (number if number <= ROUNDS else None):
                    worst["given"] = max(worst["given"], self.given_off(given, before, own.get(given.client)))
            if number > ROUNDS or not expected[number]:
                continue
            assert self.inputs[number] == {client for client, _ in expected[number]}, number
            counted = [self.trained[key] for key in sorted(expected[number])]
            p = oracle.shares([given.trained.num_examples for given in counted])
            state = self.trace.states[number]
            head = sum(w * oracle.numpy64(given.trained.other[HEAD]) for w, given in zip(p, counted, strict=True))
            worst["head"] = max(worst["head"], off(oracle.numpy64(state.other[HEAD]), head))
            own |= {given.client: given.trained.adapter for given in counted}
            if self.row.exactness == "personalised":
                continue
            errors = [
                off(model(state.adapter, state.base_delta, name), sum(w * model(g.trained.adapter, g.delta, name) for w, g in zip(p, counted, strict=True)))
                for name in state.adapter
            ]
            error = max(errors, default=0.0)
            worst["server"] = max(worst["server"], error)
            worst["said"] = max(worst["said"], abs((self.said[number] or 0.0) - error) / max(error, 1.0))
        return worst

    def given_off(self, given, state, own):
        """How far the model that a client was given is from the server's; bit for bit in its factors, where those are the global ones."""
        rank, worst = self.rank.get(given.client), 0.0
        if not torch.equal(given.other[HEAD], state.other[HEAD]):
            return float("inf")
        for name, pair in state.adapter.items():
            first = pair if rank is None else LoRAPair(pair.A[:rank], pair.B[:, :rank], pair.scaling)
            want = model(state.adapter, state.base_delta, name)
            if self.row.exactness == "personalised":
                want = pair.scaling * (oracle.numpy64(own[name].B if own else pair.B) @ oracle.numpy64(pair.A))
            elif not self.row.exact:
                want = want - oracle.product(pair) + oracle.product(first)
            worst = max(worst, off(model(given.start, given.delta, name), want))
            if not self.row.own and not self.config.messages.per_client:
                same = torch.equal(given.start[name].A, first.A) and torch.equal(given.start[name].B, first.B)
                worst = worst if same else float("inf")
        return worst


def measured(method, folder):
    """(combination, worst errors) of one method."""
    for (_, event, ranks, fraction, messages) in (one for one in combinations() if one[0] == method):
        if config := allowed(method, event, ranks, fraction, messages):
            faults = EVENTS[event][1]
            where = folder / f"{event}-{ranks}-{fraction}-{len(messages)}"
            try:
                yield (method, event, ranks, fraction, str(messages)), Story(config, faults, where).check(faults)
            except (AssertionError, FedexLoraError) as error:
                yield (method, event, ranks, fraction, str(messages)), {"given": float("inf"), "error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    import sys, tempfile, time
    from pathlib import Path

    torch.set_num_threads(1)
    rounds.PAUSE = 0.0
    storage._fsync = lambda path: None
    began, count, bad, worst = time.perf_counter(), 0, [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for method in sorted({one[0] for one in combinations()}):
            try:
                method_named(method)
            except FedexLoraError:
                continue
            since = time.perf_counter()
            for combination, errors in measured(method, Path(folder) / method):
                count += 1
                row = method_named(method)
                wrong = "error" in errors or errors["given"] > 1e-6 or errors["head"] > 1e-6 or errors["said"] > 1e-6 or ((errors["server"] < 1e-6) != row.exact and row.exactness != "personalised")
                if wrong:
                    bad.append(combination)
                    print("WRONG", combination, errors, flush=True)
                else:
                    worst = max(worst, errors["given"], errors["server"] if row.exact else 0)
            print(method, f"{time.perf_counter() - since:.2f} s", flush=True)
    print(f"{count} combinations, {len(bad)} wrong, worst {worst:.2e}, {time.perf_counter() - began:.1f} s")
