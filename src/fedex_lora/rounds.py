"""The round loop: sample, send, collect, step, measure, store. All of a federation but the way that messages travel."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedex_lora import __version__, measure, server
from fedex_lora.aggregation import derive_seed, method_named
from fedex_lora.answers import Emit, Refusal, Reply, collect, refuse, require_quorum
from fedex_lora.catch_up import CatchUp, Log, lacking, of_the_others, pruned
from fedex_lora.checkpoint import FILE, Checkpoint, to_file
from fedex_lora.client import weighted_mean
from fedex_lora.config import Config, Messages
from fedex_lora.consistency import participants as how_many
from fedex_lora.consistency import quorum
from fedex_lora.measure import Exactness, Held
from fedex_lora.peft_io import Format, write_result
from fedex_lora.screening import screened
from fedex_lora.server import start_of
from fedex_lora.storage import FINAL, append_event, copied_folder, removed, round_folder, run_rounds_of
from fedex_lora.types import Adapter, Aggregate, ClientUpdate, Delta, ServerState
from fedex_lora.wire import Download, encode_download

Exchange = Callable[[Mapping[str, bytes], float | None], Iterable[Reply]]
"""(client -> message, deadline in seconds) -> replies, in any order. A transport is one such function."""


@dataclass(frozen=True, eq=False)
class Federation:
    """What the loop needs from the place where the model lives.

    Attributes:
        clients: the ids of all clients.
        exchange: the transport.
        evaluate: the global model's metrics on the task's evaluation rows, from the server's state.
        realised: (state, ideal) -> the exactness of the model's own layers, its floor, and more numbers for the round's event.
        format: how adapters are written, for result folders.
        facts: for manifests (base model, versions).
        ranks: client -> its rank, where they differ.
        finish: writes what else belongs to a finished run, from the last state, into the run folder.
    """

    clients: Sequence[str]
    exchange: Exchange
    evaluate: Callable[[ServerState], dict[str, float]]
    realised: Callable[[ServerState, Mapping[str, Delta]], tuple[Exactness, float, dict[str, float]]]
    format: Format
    facts: Mapping[str, Any]
    ranks: Mapping[str, int] = field(default_factory=dict)
    finish: Callable[[ServerState, Path], None] = lambda state, out: None


@dataclass
class _Books:
    """What the server remembers of its clients.

    Attributes:
        messages: what may travel.
        log: what the base gained in past rounds, as far as some client may need it.
        version: client -> the round after which it has base and adapter.
        changed: "A" and "B" -> the last round that changed those factors of the global adapter.
        updates, weights: of the last round, for messages to its clients that count on their own factors.
        lost: the clients that gave no valid answer when last asked: what they hold is not known.
        accepted: client -> the last round in which its update was part of the mean.
        told: client -> why its last update was refused, until it is told.
    """

    messages: Messages
    log: Log = field(default_factory=Log)
    version: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=lambda: {"A": 0, "B": 0})
    updates: Sequence[ClientUpdate] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)
    accepted: dict[str, int] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, start: Checkpoint, messages: Messages) -> "_Books":
        """As they were at a checkpoint."""
        updates, weights = (start.updates, start.weights) if messages.per_client else ((), {})
        changed, told = dict(start.changed), dict(start.told)
        return cls(messages, start.log, dict(start.version), changed, updates, weights, set(start.lost), dict(start.accepted), told)

    def checkpoint(
        self, state: ServerState, updates: Sequence[ClientUpdate], weights: Mapping[str, float], held_out: Any, done: Mapping[str, Any]
    ) -> Checkpoint:
        """They, and the server after a round."""
        return Checkpoint(
            state=state,
            log=self.log,
            version=self.version,
            changed=self.changed,
            lost=sorted(self.lost),
            accepted=self.accepted,
            told=self.told,
            updates=updates,
            weights=weights,
            held_out=held_out,
            done=done,
        )

    def answered(self, version: int, downloads: Mapping[str, Download], valid: Collection[str], reasons: Sequence["Refusal"]) -> None:
        """Remember who holds base and adapter of `version`: who answered validly. What the others hold is not known."""
        for client in downloads:
            self.version.pop(client, None)
            self.told.pop(client, None)
        self.version |= dict.fromkeys(valid, version)
        self.lost = (self.lost | downloads.keys()) - set(valid)
        self.told |= {refusal.client: refusal.reason for refusal in reasons if refusal.client in downloads}

    def stepped(
        self, before: ServerState, after: ServerState, result: Aggregate, updates: Sequence[ClientUpdate], clients: Sequence[str]
    ) -> None:
        """Remember what a round changed: its participants have the base of the version before."""
        self.version |= {update.client_id: before.round for update in updates}
        self.accepted |= {update.client_id: after.round for update in updates}
        oldest = min(self.version.get(client, 0) for client in clients)
        gains = {**self.log.gains, after.round: result.residual}
        self.log = pruned(replace(self.log, gains=gains), after.base_delta, oldest, self.messages)
        if self.messages.per_client:
            self.updates, self.weights = updates, result.weights
        for part in self.changed:
            if any(not torch.equal(getattr(before.adapter[name], part), getattr(pair, part)) for name, pair in after.adapter.items()):
                self.changed[part] = after.round

    def known(self, client: str) -> str:
        """The factors of the global adapter that a client has as they are."""
        return "".join(part for part, last in self.changed.items() if client in self.version and last <= self.version[client])

    def lacking(self, since: int, state: ServerState) -> CatchUp:
        """What a client with the base of version `since` lacks."""
        return lacking(self.log, state.base_delta, since, state.round, self.messages)

    def of_the_others(self, client: str, state: ServerState) -> tuple[Adapter, CatchUp, float] | None:
        """What the client cannot work out from its own factors of the last round, and its weight there; None if it was not in it.

        A client with all the weight has no others, and factors that did not change need not be worked out.
        """
        share = self.weights.get(client, 1.0)
        return (
            None if share >= 1 or self.known(client) else (*of_the_others(client, self.updates, self.weights, state, self.messages), share)
        )


def run_rounds(config: Config, start: ServerState | Checkpoint, federation: Federation, out: Path, emit: Emit) -> ServerState:
    """Run the rounds of `config` that come after `start` (a fresh state, or the checkpoint of a round) and return the final state.

    Every round leaves a result folder `out/rounds/NNNN`, written in one step, from which the run can go on; `out/final` is the last one.

    Raises:
        TrainingError: fewer updates than the quorum were there and accepted.
    """
    start = Checkpoint(start) if isinstance(start, ServerState) else start
    books = _Books.of(start, config.messages)
    state, held_out = start.state, dict(start.held_out)
    if state.round == 0:
        metrics = federation.evaluate(state)
        emit("started", method=config.method, rounds=config.rounds, clients=list(federation.clients), metrics=metrics, **federation.facts)
    _forget(out, state.round, config.keep_rounds, set(books.version.values()))
    for number in range(state.round + 1, config.rounds + 1):
        began = time.perf_counter()
        participants = sample(federation.clients, config.clients.fraction, config.seed, number)
        emit("round_started", round=number, clients=participants)
        sent, downloads, down = _messages("train", participants, state, books, federation, out.name)
        spare = len(participants) - quorum(config, len(participants))
        updates, refused, up = collect(federation.exchange(sent, None), downloads, config, emit, spare)
        valid = [update.client_id for update in updates]
        starts = {
            client: start_of(state.method, state.adapter, federation.ranks.get(client), state.personal.get(client)) for client in valid
        }
        held = {client: frozen for client, (_, frozen) in starts.items()}
        updates, large = screened(
            updates, {client: first for client, (first, _) in starts.items()}, state.other, config.messages.norm_bound
        )
        for client, reason in large.items():
            refused.append(refuse(number, client, reason, emit))
        books.answered(state.round, downloads, valid, refused)
        require_quorum(number, updates, participants, refused, config)
        held_out[number - 1] = _held_out_event(number - 1, updates, emit)
        before, (state, result) = state, server.step(state, updates, config.weights, config.truncation)
        books.stepped(before, state, result, updates, federation.clients)
        numbers = _measured(before, updates, result, state, held, federation)
        if useless := measure.useless_truncation(result):
            emit("warning", round=number, message=useless, tail=measure.tail(result))
        done = {"round": number, "metrics": federation.evaluate(state), "bytes_down": down, "bytes_up": up, **numbers}
        done["seconds"] = time.perf_counter() - began
        checkpoint = books.checkpoint(state, updates, result.weights, held_out, done)
        facts = {**federation.facts, "participants": participants, "refused": [vars(refusal) for refusal in refused]}
        folder, more = round_folder(out, number), {FILE: to_file(checkpoint)}
        write_result(folder, state, updates, result.weights, federation.format, facts, before.base_delta, held=held, more=more)
        emit("round_done", **done)
        _forget(out, number, config.keep_rounds, set(books.version.values()))
    held_out[config.rounds] = _final_held_out(config, state, federation, books, out, emit)
    if not (out / FINAL).exists():
        copied_folder(round_folder(out, config.rounds), out / FINAL, leave=[FILE])
    federation.finish(state, out)
    best = _best(held_out, federation.facts)
    emit("run_done", rounds=config.rounds, best_round=best, held_out={str(number): metrics for number, metrics in held_out.items()})
    return state


def _forget(out: Path, number: int, keep: int | None, versions: set[int]) -> None:
    """Remove the folders of older rounds, but for those whose base some client has."""
    for folder in run_rounds_of(out) if keep else ():
        if int(folder.name) <= number - (keep or 0) and int(folder.name) not in versions:
            removed(folder)


def sample(clients: Sequence[str], fraction: float, seed: int, round: int) -> list[str]:
    """This round's participants: `ceil(fraction * k)` of the clients, sorted."""
    wanted = how_many(fraction, len(clients))
    rng = np.random.default_rng(derive_seed(seed, round, "sampling"))
    return sorted(str(client) for client in rng.choice(sorted(clients), wanted, replace=False))


def _messages(
    kind: Any, participants: Sequence[str], state: ServerState, books: _Books, federation: Federation, run: str
) -> tuple[dict[str, bytes], dict[str, Download], int]:
    """The participants' messages as bytes, as values, and the number of bytes: each gets what it lacks."""
    method = method_named(state.method)
    drawn = method.draws and state.round > 0
    sent, downloads = {}, {}
    since = {client: books.version.get(client, 0) for client in participants}
    lacking = {version: books.lacking(version, state) for version in set(since.values())}
    for client in participants:
        rank = federation.ranks.get(client)
        whole = rank is None or method.frozen_side or drawn
        downloads[client] = Download(
            kind=kind,
            run=run,
            round=state.round + 1,
            client=client,
            method=state.method,
            adapter=state.adapter if whole else start_of(state.method, state.adapter, rank, None)[0],
            other=state.other,
            catch_up=lacking[since[client]],
            rank=rank,
            fresh=state.seed if drawn else None,
            anew=client in books.lost,
            accepted=books.accepted.get(client, 0),
            refused=books.told.get(client, ""),
        )
        if others := books.of_the_others(client, state):
            adapter, catch_up, share = others
            downloads[client] = replace(downloads[client], adapter=adapter, catch_up=catch_up, share=share)
        sent[client] = encode_download(downloads[client], omit="AB" if drawn else books.known(client))
    return sent, downloads, sum(map(len, sent.values()))


def _held_out_event(version: int, updates: Sequence[ClientUpdate], emit: Emit) -> dict[str, float]:
    """The mean over the clients' own held-out rows of the model that they received (after round `version`)."""
    own = {
        update.client_id: {name.removeprefix("held_out_"): value for name, value in update.metrics.items() if name.startswith("held_out_")}
        for update in updates
    }
    metrics = weighted_mean(list(own.values()))
    if metrics:
        emit("held_out", round=version, metrics=metrics, clients=own)
    return metrics


def _final_held_out(config: Config, state: ServerState, federation: Federation, books: _Books, out: Path, emit: Emit) -> dict[str, float]:
    """One more message, after the last round: how good is the final model on the clients' own rows? (No A, B travel back.)

    The model is there already, so no quorum is asked for: who fails is left out.
    """
    sent, downloads, down = _messages("evaluate", list(federation.clients), state, books, federation, out.name)

    def told(event: str, **fields: Any) -> None:
        if event == "refused":
            emit(event, **{**fields, "round": state.round})

    updates, _, up = collect(federation.exchange(sent, None), downloads, config, told)
    emit("evaluated", round=state.round, bytes_down=down, bytes_up=up)
    return _held_out_event(state.round, updates, emit)


def _measured(
    before: ServerState, updates: Sequence[ClientUpdate], result: Aggregate, after: ServerState, held: Held, federation: Federation
) -> dict[str, Any]:
    """The exactness that this round achieved, from the factors and from the model's own weights; nothing where there is no global model."""
    if not after.adapter or method_named(after.method).exactness == "personalised":
        return {}
    ideal = measure.ideal_update(before.base_delta, updates, result.weights, held)
    factors = measure.exactness(ideal, after.adapter, after.base_delta)
    realised, floor, more = federation.realised(after, ideal)
    cuts = method_named(after.method).exactness in ("to the reported tail", "best rank r")
    deviation = measure.deviation(result, updates)
    dropped = {"dropped": math.hypot(*result.dropped.values()) / math.hypot(*factors.ideal.values())} if cuts else {}
    return (
        dropped
        | more
        | {
            "exactness_error": factors.max_relative_error,
            "exactness_error_total": factors.total_relative_error,
            "realised_error": realised.max_relative_error,
            "floor": floor,
            "deviation": deviation.total_relative_error,
            "modules": measure.per_module(deviation, result.adapter),
            "drift": measure.drift(updates, result.weights),
        }
    )


def _best(held_out: Mapping[int, Mapping[str, float]], facts: Mapping[str, Any]) -> int | None:
    """The round whose model was best on the held-out rows of all clients; ties go to the earlier one.

    A round that only some clients measured (`clients.fraction` below one) is not compared: its rows were other rows.
    """
    headline, sign = facts["headline"], 1 if facts["greater_is_better"] else -1
    rows = max((metrics.get("rows", 0) for metrics in held_out.values()), default=0)
    measured = {
        number: metrics[headline] for number, metrics in held_out.items() if number > 0 and headline in metrics and metrics["rows"] == rows
    }
    compared = len(measured) == len(held_out.keys() - {0})
    return max(measured, key=lambda number: (sign * measured[number], -number)) if measured and compared else None


def log_to(path: Path, *others: Emit) -> Emit:
    """An `Emit` that appends to `events.jsonl` and tells the others. Steps are shown, not kept."""

    def emit(event: str, **fields: Any) -> None:
        if event != "step":
            append_event(path, event, **fields)
        for other in others:
            other(event, **fields)

    return emit


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    from importlib.metadata import version

    return {"fedex-lora": __version__} | {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "safetensors")}
