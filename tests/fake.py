"""Federations without a model: the real loop, protocol objects, messages and folders; a client "trains" by adding noise to its factors.

`Fake` is a `LocalSimulation` whose learner is `Noise` and whose server side measures the head alone. `Network` stands between clients and
loop.
"""

import copy
import time
from dataclasses import dataclass, field

import torch
from tests.conftest import cored
from tests.messages import told, with_tensors
from tests.runs.test_run import configuration

from fedex_lora import LoRAPair
from fedex_lora.aggregation import derive_seed, get_method
from fedex_lora.aggregation import server_state as server
from fedex_lora.errors import WireError
from fedex_lora.exactness.measure import Realised
from fedex_lora.protocol.envelopes import answer_of
from fedex_lora.protocol.failures import failure_of
from fedex_lora.runs.clients import ClientPool
from fedex_lora.runs.listening import Reply
from fedex_lora.runs.round_loop import Federation
from fedex_lora.runs.simulation import CENTRAL_CLIENT, LocalSimulation, ranks_of
from fedex_lora.server.checks import require_consistent
from fedex_lora.storage.adapter_folder import Format
from fedex_lora.storage.events import Step
from fedex_lora.types import ClientUpdate

SHAPES = {"wide": (10, 16), "tall": (18, 8)}  # out x in
SCALING = 2.0
HEAD = "head.weight"


def raising(error):
    """A function that raises it, whatever it is given."""

    def raises(*_, **__):
        raise error

    return raises


def setting(**changes):
    """A configuration for `Fake`; what it says of base, task and training is not looked at."""
    return configuration(**{"lora": {"r": 4}, "clients": {"partition": "iid", "count": 4}, **changes})


@dataclass
class Given:
    """A model that a client was given, and what it made of it (nothing, where it only measured)."""

    client: str
    start: dict
    delta: dict
    other: dict
    round: int | None = None
    trained: ClientUpdate | None = None


@dataclass
class Trace:
    """What happened: every model that a client was given, in order, and the server's state after each round."""

    given: list = field(default_factory=list)
    states: dict = field(default_factory=dict)


class Noise:
    """A `Learner`: training adds noise of (client, round) to the factors that the method trains, and to the head."""

    def __init__(self, config, trace, emit):
        self.config, self.trace, self.emit, self.method = config, trace, emit, get_method(config.method)
        names = [CENTRAL_CLIENT] if self.method.centralised else [f"client-{index}" for index in range(config.clients.count)]
        self.rows = {name: 10 + 7 * index for index, name in enumerate(names)}
        generator, rank = torch.Generator().manual_seed(config.seed), config.lora.r
        first = {
            name: LoRAPair(torch.randn(rank, inner, generator=generator) / inner**0.5, torch.zeros(out, rank), SCALING)
            for name, (out, inner) in SHAPES.items()
        }
        self.first, self.base = first if self.method.lora else {}, {}
        self.other = {HEAD: torch.randn(3, 5, generator=generator)}

    def only(self, client):
        """The learner on the machine of one client."""
        alone = copy.copy(self)
        alone.rows = {client: self.rows[client]}
        return alone

    def load(self, start, delta, other):
        self._put = start, delta, other

    def read(self):
        return self._put[0], self._put[2]

    def measure(self, client):
        self.trace.given.append(Given(client, *self._put))
        return {"held_out_rows": 5.0, "held_out_loss": float(self._put[2][HEAD].norm())}

    def train(self, client, round, optimizer):
        given, parts = self.trace.given[-1], self.method.trained(round)
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, round, client))
        self.emit(Step(client=client, step=1, steps=1))
        adapter = {}
        for name, pair in given.start.items():
            noise = {part: 0.1 * torch.randn(factor.shape, generator=generator) for part, factor in pair.parts.items()}
            adapter[name] = pair
            for part in parts:
                adapter[name] = adapter[name].with_part(part, pair.parts[part] + noise[part])
        other = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in given.other.items()}
        given.round, given.trained = round, ClientUpdate(client, adapter, self.rows[client], other, {"train_loss": 1.0 / round})
        return given.trained, None


class FakeHost:
    """The server's side: it keeps every state, and measures the norm of the head."""

    def __init__(self, config, learner, trace):
        self.config, self.learner, self.trace = config, learner, trace
        self.ranks = ranks_of(config, learner.rows)

    def initial(self):
        return server.init(cored(self.learner.first, self.config.method), self.learner.other, self.config.method, self.config.seed)

    def facts(self, rows):
        return {"headline": "loss", "greater_is_better": False, "disk_bytes": 0, "base_bytes": 1000, "train_rows": dict(rows)}

    def federation(self, rows, exchange):
        format, facts = Format({"modules_to_save": ["head"]}), self.facts(rows)
        measured = Realised({}, {}), {}  # of no layers
        return Federation(sorted(rows), exchange, self.evaluate, lambda state, ideal: measured, format, facts, self.ranks)

    def evaluate(self, state):
        self.trace.states[state.round] = state
        return {"loss": float(state.other[HEAD].norm())}


class Fake(LocalSimulation):
    """All parties of a federation, as `LocalSimulation`, without model and rows."""

    def __init__(self, config, emit, trace=None):
        self.trace = Trace() if trace is None else trace
        learner = Noise(config, self.trace, emit)
        require_consistent(config, len(learner.rows))
        self.pool, self.host, self._emit = ClientPool(config, learner), FakeHost(config, learner, self.trace), emit
        self._rows = ""
        self.trace.states.setdefault(0, self.initial())


class Alone(Fake):
    """The same clients, each on a machine of its own: every message is answered by a new process, which knows what is in its folder."""

    def exchange(self, messages, deadline=None):
        for client, payload in messages.items():
            learner = self.pool.learner.only(client)
            pool = ClientPool(learner.config, learner, alone=True)
            pool.remember_in(self.folder, lambda version: {})
            try:
                yield Reply(client, pool.answer(client, payload))
            except WireError as error:
                yield Reply(client, answer_of(payload, client, failure_of(error)))

    def remember_in(self, out):
        self.folder = out / "clients"


def enlarged(payload):
    """The update with factors and head a million times as large."""
    return with_tensors(payload, lambda tensors: {name: tensor * 1e6 for name, tensor in tensors.items()})


class Network:
    """Between clients and loop: when a round with a fault is asked for, something happens to the first of its clients.

    Faults: "down" (the message does not reach it), "lost" (its answer is), "held" (its answer comes with those of the next call),
    "large" (its answer is a million times too large), "twice" (its answer comes twice, and again with those of the next call),
    "wiped" (it has forgotten everything), "killed" (everything stops once it has answered).

    Args:
        place: of the clients.
        faults: round -> fault, or several, one for each time that it is asked for.
        patient: wait for what does not come until the loop has had enough.
    """

    def __init__(self, place, faults, patient=False):
        self.place, self.patient = place, patient
        self.faults = {round: [fault] if isinstance(fault, str) else list(fault) for round, fault in faults.items()}
        self.victims, self.came, self.calls, self._waiting = {}, {}, 0, []

    def exchange(self, messages, deadline=None):
        self.calls += 1
        yield from self._waiting
        self._waiting = []
        round, victim = told(messages[min(messages)])["round"], min(messages)
        fault = faults.pop(0) if (faults := self.faults.get(round)) else None
        if fault:
            self.victims[round] = victim
        if fault == "wiped":
            self.place.pool.forget(victim)
        if fault == "down":
            messages = {client: payload for client, payload in messages.items() if client != victim}
            yield Reply(victim, None, "it never got the message")
        for reply in self.place.exchange(messages, deadline):
            self.came[self.calls, reply.client] = reply.payload
            yield from self._passed_on(reply, fault if reply.client == victim else None)
        while self.patient and fault in ("held", "lost"):
            yield None
            time.sleep(0.01)

    def _passed_on(self, reply, fault):
        """What comes of one answer now."""
        if fault in ("held", "twice"):
            self._waiting.append(reply)
        if fault == "large":
            yield Reply(reply.client, enlarged(reply.payload))
        elif fault not in ("held", "lost"):
            yield reply
        if fault == "twice":
            yield reply
        if fault == "killed":
            raise InterruptedError
