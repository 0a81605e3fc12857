"""The round loop, a driver of `server.Server`: sample, send, listen, close, measure, store. All but the way that messages travel."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from fedex_lora import __version__
from fedex_lora.config import Config, Rules
from fedex_lora.errors import StorageError, TrainingError
from fedex_lora.exactness.measure import Held
from fedex_lora.runs.emit import Emit
from fedex_lora.runs.listening import Exchange, listen, tell
from fedex_lora.runs.measuring import MeasureLayers, best_of, held_out_event, learnt_nothing, round_numbers
from fedex_lora.server.checkpoint import FILE, Checkpoint, to_file
from fedex_lora.server.checks import quorum, sample
from fedex_lora.server.round import Round
from fedex_lora.server.server import Server
from fedex_lora.server.verdicts import Complete, Short
from fedex_lora.storage.adapter_folder import Format
from fedex_lora.storage.events import ClientRejected, Evaluated, Event, RoundStarted, RunDone, Waiting, Warned, record
from fedex_lora.storage.files import FINAL, ROUNDS
from fedex_lora.storage.handout import differs, for_parties
from fedex_lora.storage.result import write_result
from fedex_lora.storage.run_folder import remove, round_folder, run_rounds_of, strays
from fedex_lora.types import ClientUpdate, ServerState

PAUSE = 60.0  # seconds, at most, before clients are asked again


@dataclass(frozen=True, eq=False)
class Federation:
    """What the loop needs from the place where the model lives.

    Attributes:
        clients: the ids of all clients.
        exchange: the transport.
        evaluate: the global model's metrics on the task's evaluation rows, from the server's state.
        realised: (state, ideal) -> the exactness of the model's own layers, and more numbers for the round's event.
        format: how adapters are written, for result folders.
        facts: for manifests (base model, versions).
        ranks: client -> its rank, where they differ.
        finish: writes what else belongs to a finished run, from the last state, into the run folder.
    """

    clients: Sequence[str]
    exchange: Exchange
    evaluate: Callable[[ServerState], dict[str, float]]
    realised: MeasureLayers
    format: Format
    facts: Mapping[str, Any]
    ranks: Mapping[str, int] = field(default_factory=dict)
    finish: Callable[[ServerState, Path], None] = lambda state, out: None


@dataclass(frozen=True, eq=False)
class Gathered:
    """What a round's messages brought.

    Attributes:
        ready: are there enough updates?
        updates: those that count, in the order of client ids; none where there are too few.
        down, up: bytes.
    """

    ready: Complete | Short
    updates: Sequence[ClientUpdate]
    down: int
    up: int


def run_rounds(config: Config, start: ServerState | Checkpoint, federation: Federation, out: Path, emit: Emit) -> ServerState:
    """Run the rounds of `config` that come after `start` (a fresh state, or the checkpoint of a round) and return the final state.

    Every round leaves a result folder `out/rounds/NNNN`, written in one step, from which the run can go on; `out/final` is the last one.

    Raises:
        TrainingError: fewer updates than the quorum were there and accepted, and the run is to stop then.
    """
    here = Checkpoint(start) if isinstance(start, ServerState) else start
    server = Server(config, here.state, federation.clients, federation.ranks, out.name, here.registry)
    if here.state.round == 0:
        metrics = federation.evaluate(here.state)
        told = {key: value for key, value in federation.facts.items() if key != "labels"}  # names of classes may come from rows
        begun = {"method": config.method, "rounds": config.rounds, "seed": config.seed, "clients": list(federation.clients)}
        emit(record("started", **begun, metrics=metrics, **told))
    _forget(out, here, config.keep_rounds, federation.facts)
    for number in range(here.state.round + 1, config.rounds + 1):
        here = _one_round(number, here, server, federation, config, out, emit)
        emit(record("round_done", **here.done))
        _forget(out, here, config.keep_rounds, federation.facts)
    if len(here.skipped) == config.rounds:
        raise TrainingError(f"every round was skipped, so nothing was trained: {here.done['skipped']}")
    _finish(here, server, federation, config, out, emit)
    return here.state


def _one_round(number: int, here: Checkpoint, server: Server, federation: Federation, config: Config, out: Path, emit: Emit) -> Checkpoint:
    """One round, up to its folder, which is written in one step."""
    began, before = time.perf_counter(), server.state
    participants = sample(federation.clients, config.clients.fraction, config.seed, number)
    emit(RoundStarted(round=number, clients=participants))
    round = server.open_round(participants)
    got = gather(round, federation.exchange, config, emit)
    rejected = [{"client": one.client, "reason": one.reason} for one in round.rejections]
    facts = {**federation.facts, "participants": participants, "refused": rejected}
    facts |= {"momentum": config.server.model_dump(mode="json")} if config.server.moves else {}
    if isinstance(got.ready, Short):
        skip_or_stop(round, got.ready, config, emit)
        ended: dict[str, Any] = {"skipped": got.ready.reason}
        facts |= ended
        weights: Mapping[str, float] = {}
        held: Held = {}
        motion = None
        here = replace(here, skipped=[*here.skipped, number])
    else:
        measured_by = {client: round.receipts[client].metrics for client in got.ready.clients if client in round.receipts}
        here = replace(here, held_out={**here.held_out, before.round: held_out_event(before.round, measured_by, emit)})
        result = round.close(got.updates)
        weights, held, motion = result.aggregate.weights, result.held, result.motion
        ended = {"accepted": list(got.ready.clients), **round_numbers(result, federation.realised, emit)}
        facts |= {"late": sorted(got.ready.late)} if got.ready.late else {}
        del result
    metrics = federation.evaluate(server.state)
    done = {"bytes_down": got.down, "bytes_up": got.up, "round": number, "metrics": metrics, **ended}
    here = replace(here, state=server.state, registry=server.registry, done={**done, "seconds": time.perf_counter() - began})
    write_result(
        round_folder(out, number),
        here.state,
        got.updates,
        weights,
        federation.format,
        facts,
        before.base_delta,
        held,
        {FILE: to_file(here)},
        motion,
    )
    return here


def skip_or_stop(round: Round, short: Short, rules: Rules, emit: Emit) -> None:
    """End a round that has too few updates, where the rules say so.

    Raises:
        TrainingError: the run is to stop.
    """
    if rules.clients.below_quorum != "skip":
        hint = "mend that, or lower clients.quorum and clients.min_clients, or set clients.below_quorum"
        raise TrainingError(f"{short.reason}: {hint}")
    round.skip()
    emit(Warned(round=round.number, message=f"the round is skipped: {short.reason.partition(':')[0]}"))


def gather(round: Round, exchange: Exchange, rules: Rules, emit: Emit) -> Gathered:
    """Ask the participants; again those who lacked what their message counts on; and while the quorum is awaited, who has no update.

    Args:
        round: that was opened just now.
        exchange: the transport.
        rules: of the server; their table `clients` says how long is waited, and for how many.
        emit: told of each answer.

    Raises:
        TrainingError: asking again is of no use: so many clients blame the run's configuration, or are far too large twice.
    """
    asked, deadline, waits = len(round.participants), rules.clients.deadline, rules.clients.below_quorum == "wait"
    dispensable = asked - quorum(rules, asked)
    spare = math.inf if waits else dispensable
    updates, down, up, large = dict[str, ClientUpdate](), 0, 0, set[str]()
    for attempt in count():
        messages = round.messages
        up += listen(round, exchange(messages, deadline), deadline, emit, updates, spare)
        down += messages.size
        if round.needs_full and len(round.failed) <= spare:
            round.ask_again(round.needs_full)
            continue
        ready = round.ready()
        for verdict in ready.rejected:
            tell(verdict, round.number, 0, emit)
        if isinstance(ready, Complete):
            return Gathered(ready, [updates[client] for client in ready.clients], down, up)
        if ready.hopeless:
            raise TrainingError(f"{ready.reason}: asking again is of no use: mend the run's configuration, and begin a new run")
        if not waits:
            return Gathered(ready, [], down, up)
        large, before = {one.client for one in ready.rejected} & round.receipts.keys(), large
        if round.receipts.keys() >= set(round.participants) and len(large & before) > dispensable:  # all are there, and answer the same
            mend = "lower clients.quorum, or raise messages.norm_bound if that is why, and resume"
            raise TrainingError(f"{ready.reason}: asking again is of no use: {mend}")
        asking, pause = [client for client in round.participants if client not in ready.clients], min(PAUSE, 2.0 ** min(attempt, 10))
        emit(Waiting(round=round.number, clients=asking, since=time.time(), reason=ready.reason, seconds=pause))
        time.sleep(pause)
        round.ask_again(asking)
    raise AssertionError("unreachable")


def _finish(here: Checkpoint, server: Server, federation: Federation, config: Config, out: Path, emit: Emit) -> None:
    """What comes after the last round: the clients measure the final model, `out/final` is there, and the run is said to be done."""
    held_out = {**here.held_out, config.rounds: _final_held_out(config, server, federation, emit)}
    hand_on(out, config.rounds)
    federation.finish(here.state, out)
    if words := learnt_nothing(held_out, federation.facts):
        emit(Warned(round=config.rounds, message=words))
    best = best_of(held_out, federation.facts)
    _forget(out, replace(here, held_out=held_out), config.keep_rounds, federation.facts)
    told = {str(number): metrics for number, metrics in held_out.items()}
    skipped = {"skipped": list(here.skipped)} if here.skipped else {}
    emit(RunDone(rounds=config.rounds, best_round=best, headline=federation.facts["headline"], held_out=told, **skipped))


def hand_on(out: Path, last: int) -> None:
    """Make `out/final` what the last round left."""
    if not handed_on(out, last):
        if (out / FINAL).exists():
            remove(out, FINAL)
        with for_parties(round_folder(out, last), out / FINAL, leaves=False):
            pass


def handed_on(out: Path, last: int) -> bool:
    """Is `out/final` what the last round left?"""
    try:
        return differs(out / FINAL, round_folder(out, last)) is None
    except StorageError:
        return False


def _forget(out: Path, here: Checkpoint, keep: int | None, facts: Mapping[str, Any]) -> None:
    """Remove the folders of older rounds, but for the best so far, those whose base some client has, and those with what no run wrote."""
    kept = {*here.registry.version.values(), best_of(here.held_out, facts)}
    for folder in run_rounds_of(out) if keep else ():
        part, old = f"{ROUNDS}/{folder.name}", int(folder.name) <= here.state.round - (keep or 0)
        if old and int(folder.name) not in kept and not strays(out, part):
            remove(out, part)


def _final_held_out(config: Config, server: Server, federation: Federation, emit: Emit) -> dict[str, float]:
    """One more message, after the last round: how good is the final model on the clients' own rows? (No A, B travel back.)

    The model is there already, so no quorum is asked for: who fails is left out.
    """
    number, round = server.state.round, server.open_round(server.clients, "evaluate")

    def told(event: Event) -> None:
        if isinstance(event, ClientRejected | Waiting):
            emit(event.model_copy(update={"round": number}))

    messages = round.messages
    up = listen(round, federation.exchange(messages, config.clients.deadline), config.clients.deadline, told, {})
    emit(Evaluated(round=number, bytes_down=messages.size, bytes_up=up))
    return held_out_event(number, {client: round.receipts[client].metrics for client in sorted(round.receipts)}, emit)


@cache
def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    from importlib.metadata import version

    return {"fedex-lora": __version__} | {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "safetensors")}
