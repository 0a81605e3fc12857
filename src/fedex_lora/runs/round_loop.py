"""The round loop: sample, send, collect, step, measure, store. All of a federation but the way that messages travel."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from fedex_lora import __version__
from fedex_lora.aggregation import derive_seed, get_method
from fedex_lora.aggregation import server_state as server
from fedex_lora.aggregation.momentum import gained
from fedex_lora.aggregation.server_state import start_of
from fedex_lora.client.metrics import weighted_mean
from fedex_lora.config import Config, Server
from fedex_lora.errors import StorageError, TrainingError
from fedex_lora.exactness import algebra, measure
from fedex_lora.exactness.measure import Exactness, Held
from fedex_lora.protocol.messages import Download, encode_download
from fedex_lora.server.checkpoint import FILE, Checkpoint, to_file
from fedex_lora.server.checks import participants as how_many
from fedex_lora.server.checks import quorum
from fedex_lora.server.norm_filter import screened
from fedex_lora.server.replies import Answers, Emit, Refusal, Reply, below_quorum, collect, refuse
from fedex_lora.storage.adapter_folder import Format
from fedex_lora.storage.events import append_event
from fedex_lora.storage.files import FINAL, ROUNDS
from fedex_lora.storage.handout import differs, for_parties
from fedex_lora.storage.result import write_result
from fedex_lora.storage.run_folder import remove, round_folder, run_rounds_of, strays
from fedex_lora.types import Aggregate, ClientUpdate, Delta, LowRank, ServerState

Exchange = Callable[[Mapping[str, bytes], float | None], Iterable[Reply | None]]
"""(client -> message, deadline in seconds) -> replies, in any order. A transport is one such function.

While it waits it yields None every second or so. It ends when all have answered; the loop stops it at the deadline. What arrives
afterwards it yields in a later call.
"""
PAUSE = 60.0  # seconds, at most, before clients are asked again
SHOWN = ("step", "finished")  # events that are no part of the record


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


class Encoded(Mapping[str, bytes]):
    """Messages that become bytes when they are asked for: k messages of k r N numbers at once would be most of what the server holds.

    Args:
        downloads: client -> its message, and the factors that do not travel.
    """

    def __init__(self, downloads: Mapping[str, tuple[Download, str]]) -> None:
        self._downloads, self._sizes = downloads, dict[str, int]()

    def __getitem__(self, client: str) -> bytes:
        download, omit = self._downloads[client]
        payload = encode_download(download, omit)
        self._sizes[client] = len(payload)
        return payload

    def __iter__(self) -> Iterator[str]:
        return iter(self._downloads)

    def __len__(self) -> int:
        return len(self._downloads)

    def __contains__(self, client: object) -> bool:
        return client in self._downloads

    @property
    def size(self) -> int:
        """Bytes of those that were asked for."""
        return sum(self._sizes.values())


@dataclass(frozen=True, eq=False)
class _Gathered:
    """What a round's messages brought.

    Attributes:
        updates: those that may be averaged, in the order of client ids.
        held: client -> what its base had beside the common one.
        late: the clients among them whose update was asked for in the round before.
        refused: whose updates are no part of the mean, and why.
        open: the messages that were not answered.
        down, up: bytes.
        here: the server, with what the answers say of who holds what.
        short: why there are too few; "" where there are not.
    """

    updates: Sequence[ClientUpdate]
    held: Mapping[str, Mapping[str, LowRank]]
    late: frozenset[str]
    refused: Sequence[Refusal]
    open: Mapping[str, Download]
    down: int
    up: int
    here: Checkpoint
    short: str


@dataclass(frozen=True, eq=False)
class _Missed:
    """The messages of the last round that were not answered, and what the base has gained since they were sent."""

    downloads: Mapping[str, Download] = field(default_factory=dict)
    gained: Mapping[str, LowRank] = field(default_factory=dict)


def run_rounds(config: Config, start: ServerState | Checkpoint, federation: Federation, out: Path, emit: Emit) -> ServerState:
    """Run the rounds of `config` that come after `start` (a fresh state, or the checkpoint of a round) and return the final state.

    Every round leaves a result folder `out/rounds/NNNN`, written in one step, from which the run can go on; `out/final` is the last one.

    Raises:
        TrainingError: fewer updates than the quorum were there and accepted, and the run is to stop then.
    """
    here, missed = Checkpoint(start) if isinstance(start, ServerState) else start, _Missed()
    if here.state.round == 0:
        metrics = federation.evaluate(here.state)
        told = {key: value for key, value in federation.facts.items() if key != "labels"}  # names of classes may come from rows
        emit("started", method=config.method, rounds=config.rounds, clients=list(federation.clients), metrics=metrics, **told)
    _forget(out, here, config.keep_rounds)
    for number in range(here.state.round + 1, config.rounds + 1):
        began, before = time.perf_counter(), here.state
        participants = sample(federation.clients, config.clients.fraction, config.seed, number)
        emit("round_started", round=number, clients=participants)
        got = _gather(participants, here, missed, federation, config, out.name, emit)
        if got.short and config.clients.below_quorum != "skip":
            raise TrainingError(f"{got.short}: mend that, or lower clients.quorum and clients.min_clients, or set clients.below_quorum")
        here, missed, weights = _skipped(got, federation, config, emit) if got.short else _stepped(got, federation, config, emit)
        here = replace(here, done={"bytes_down": got.down, "bytes_up": got.up, **here.done, "seconds": time.perf_counter() - began})
        facts = {**federation.facts, "participants": participants, "refused": [vars(refusal) for refusal in got.refused]}
        facts |= {"late": sorted(got.late)} if got.late else {}
        facts |= {"skipped": got.short} if got.short else {}
        folder, updates, more = round_folder(out, number), [] if got.short else got.updates, {FILE: to_file(here)}
        motion = None if got.short else server.motion_of(before, config.server)
        facts |= {"momentum": config.server.model_dump(mode="json")} if config.server.moves else {}
        write_result(folder, here.state, updates, weights, federation.format, facts, before.base_delta, got.held, more, motion)
        emit("round_done", **here.done)
        _forget(out, here, config.keep_rounds)
        del got, updates  # or those of the next round come on top
    if len(here.skipped) == config.rounds:
        raise TrainingError(f"every round was skipped, so nothing was trained: {here.done['skipped']}")
    held_out = {**here.held_out, config.rounds: _final_held_out(config, here, federation, out.name, emit)}
    if not handed_on(out, config.rounds):
        if (out / FINAL).exists():
            remove(out, FINAL)
        with for_parties(round_folder(out, config.rounds), out / FINAL, leaves=False):
            pass
    federation.finish(here.state, out)
    if words := _learnt_nothing(held_out, federation.facts):
        emit("warning", round=config.rounds, message=words)
    best = _best(held_out, federation.facts)
    told = {str(number): metrics for number, metrics in held_out.items()}
    emit("run_done", rounds=config.rounds, best_round=best, held_out=told, **({"skipped": list(here.skipped)} if here.skipped else {}))
    return here.state


def handed_on(out: Path, last: int) -> bool:
    """Is `out/final` what the last round left?"""
    try:
        return differs(out / FINAL, round_folder(out, last)) is None
    except StorageError:
        return False


def _gather(
    participants: Sequence[str], here: Checkpoint, missed: _Missed, federation: Federation, config: Config, run: str, emit: Emit
) -> _Gathered:
    """Ask the participants; again those who lacked what their message counts on; and while the quorum is awaited, who has no update."""
    state, number, waits = here.state, here.state.round + 1, config.clients.below_quorum == "wait"
    spare = math.inf if waits else len(participants) - quorum(config, len(participants))
    found, late, open, down, up = dict[str, ClientUpdate](), dict[str, ClientUpdate](), dict[str, Download](), 0, 0
    refused, asking = list[Refusal](), list(participants)
    for attempt in count():
        sent, downloads = _messages("train", asking, here, federation, config, run)
        replies = federation.exchange(sent, config.clients.deadline)
        answers = collect(replies, downloads, config, emit, spare, missed.downloads, Answers(found, late) if attempt else None)
        found |= answers.updates
        late = {client: update for client, update in {**late, **answers.late}.items() if client not in found}
        down, up = down + sent.size, up + answers.size
        refused = [*(refusal for refusal in refused if refusal.client not in asking), *answers.refused]
        here = replace(here, books=here.books.answered(state.round, asking, answers.updates.keys(), refused))
        open = {client: open[client] for client in open.keys() - set(asking)} | {client: downloads[client] for client in answers.silent}
        if answers.lacking:
            asking = sorted(answers.lacking)
            continue
        starts = {
            client: start_of(state.method, state.adapter, federation.ranks.get(client), state.personal.get(client)) for client in found
        }
        starts |= {client: (missed.downloads[client].adapter, _behind(missed)) for client in late}
        first = {client: adapter for client, (adapter, _) in starts.items()}
        other = {client: missed.downloads[client].other for client in late}
        updates, large = screened([*found.values(), *late.values()], first, state.other, config.messages.norm_bound, other)
        far = [refuse(number, client, reason, emit) for client, reason in large.items()]
        here = replace(here, books=here.books.judged(far))
        on_time = {update.client_id for update in updates} & found.keys()
        short = below_quorum(number, len(on_time), len(participants), [*refused, *far], config)
        if short and len(answers.hopeless) > len(participants) - quorum(config, len(participants)):
            raise TrainingError(f"{short}: asking again is of no use: mend the run's configuration, and begin a new run")
        if not (short and waits):
            break
        found = {client: update for client, update in found.items() if client in on_time}
        asking, pause = [client for client in participants if client not in found], min(PAUSE, 2.0 ** min(attempt, 10))
        emit("waiting", round=number, clients=asking, since=time.time(), reason=short, seconds=pause)
        time.sleep(pause)
    late_ones = frozenset(update.client_id for update in updates if update.client_id not in on_time)
    held = {update.client_id: starts[update.client_id][1] for update in updates}
    return _Gathered(updates, held, late_ones, [*refused, *far], open, down, up, here, short)


def _behind(missed: _Missed) -> dict[str, LowRank]:
    """What the base of a client that trained in the round before has beside the common one: less, by what that gained since."""
    return {module: LowRank(U=-gain.U, V=gain.V) for module, gain in missed.gained.items()}


def _stepped(got: _Gathered, federation: Federation, config: Config, emit: Emit) -> tuple[Checkpoint, _Missed, Mapping[str, float]]:
    """The server after a round: its numbers are in `done`."""
    here, before = got.here, got.here.state
    behind = {client: got.held[client] for client in got.late}
    held_out = _held_out_event(before.round, [update for update in got.updates if update.client_id not in got.late], emit)
    state, result = server.step(before, got.updates, config.weights, config.truncation, behind, config.server)
    books = here.books.stepped(before, state, result, got.updates, federation.clients, config)
    numbers = _measured(before, got.updates, result, state, got.held, federation, config.server)
    if useless := measure.useless_truncation(result):
        emit("warning", round=state.round, message=useless, tail=measure.tail(result))
    if odd := numbers.get("not_finite"):
        words = f"{', '.join(odd)} cannot be computed, so this round is not shown to be exact: does the base overflow in its base.dtype?"
        emit("warning", round=state.round, message=words)
    accepted = [update.client_id for update in got.updates]
    done = {"round": state.round, "metrics": federation.evaluate(state), "accepted": accepted, **numbers}
    gain = gained(before.base_delta, state.base_delta) if config.server.through_base and got.open else result.residual
    return Checkpoint(state, books, {**here.held_out, before.round: held_out}, done, here.skipped), _Missed(got.open, gain), result.weights


def _skipped(got: _Gathered, federation: Federation, config: Config, emit: Emit) -> tuple[Checkpoint, _Missed, Mapping[str, float]]:
    """The server after a round with too few updates: as before it, and its number is used up."""
    before, state = got.here.state, server.skip(got.here.state)
    books = got.here.books.skipped(before, state, federation.clients, config) if config.server.through_base else got.here.books
    emit("warning", round=state.round, message=f"the round is skipped: {got.short.partition(':')[0]}")
    done = {"round": state.round, "metrics": federation.evaluate(state), "skipped": got.short}
    return replace(got.here, state=state, books=books, done=done, skipped=[*got.here.skipped, state.round]), _Missed(got.open), {}


def _forget(out: Path, here: Checkpoint, keep: int | None) -> None:
    """Remove the folders of older rounds, but for those whose base some client has, or that hold what no run wrote."""
    versions = set(here.books.version.values())
    for folder in run_rounds_of(out) if keep else ():
        part, old = f"{ROUNDS}/{folder.name}", int(folder.name) <= here.state.round - (keep or 0)
        if old and int(folder.name) not in versions and not strays(out, part):
            remove(out, part)


def sample(clients: Sequence[str], fraction: float, seed: int, round: int) -> list[str]:
    """This round's participants: `ceil(fraction * k)` of the clients, sorted."""
    wanted = how_many(fraction, len(clients))
    rng = np.random.default_rng(derive_seed(seed, round, "sampling"))
    return sorted(str(client) for client in rng.choice(sorted(clients), wanted, replace=False))


def _messages(
    kind: Any, participants: Sequence[str], here: Checkpoint, federation: Federation, config: Config, run: str
) -> tuple[Encoded, dict[str, Download]]:
    """The participants' messages as bytes, and as values: each gets what it lacks."""
    state, books, method = here.state, here.books, get_method(here.state.method)
    drawn = method.reinitialises and state.round > 0
    downloads = dict[str, Download]()
    since = {client: books.version.get(client, 0) for client in participants}
    lacking = {version: books.lacking(version, state, config) for version in set(since.values())}
    for client in participants:
        rank = federation.ranks.get(client)
        whole = rank is None or method.holds_tail or drawn
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
    return Encoded({client: (download, "AB" if drawn else books.known(client)) for client, download in downloads.items()}), downloads


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


def _final_held_out(config: Config, here: Checkpoint, federation: Federation, run: str, emit: Emit) -> dict[str, float]:
    """One more message, after the last round: how good is the final model on the clients' own rows? (No A, B travel back.)

    The model is there already, so no quorum is asked for: who fails is left out.
    """
    round = here.state.round
    sent, downloads = _messages("evaluate", list(federation.clients), here, federation, config, run)

    def told(event: str, **fields: Any) -> None:
        if event in ("refused", "waiting"):
            emit(event, **{**fields, "round": round})

    answers = collect(federation.exchange(sent, config.clients.deadline), downloads, config, told)
    emit("evaluated", round=round, bytes_down=sent.size, bytes_up=answers.size)
    return _held_out_event(round, [answers.updates[client] for client in sorted(answers.updates)], emit)


def _measured(
    before: ServerState,
    updates: Sequence[ClientUpdate],
    result: Aggregate,
    after: ServerState,
    held: Held,
    federation: Federation,
    pace: Server,
) -> dict[str, Any]:
    """The exactness that this round achieved, from the factors and from the model's own weights; nothing where there is no global model.

    Under momentum the ideal is what it makes of the mean of the participants' models; what is taken down of the change is checked as well.
    """
    if not after.adapter or get_method(after.method).exactness == "personalised":
        return {}
    ideal = measure.ideal_update(before.base_delta, updates, result.weights, held)
    more = dict[str, float]()
    if motion := server.motion_of(before, pace):
        ideal = measure.moved(ideal, before.base_delta, motion)
    if motion and motion.momentum:
        start, end = (measure.effective_update(state.adapter, state.base_delta) for state in (before, after))
        more = {"change_error": algebra.worst(measure.change_error(start, end, server.last_changes(after, pace)).values())}
    factors = measure.exactness(ideal, after.adapter, after.base_delta)
    realised, floor, side = federation.realised(after, ideal)
    more |= side
    cuts = get_method(after.method).exactness in ("truncated", "rank-r-optimal")
    deviation = measure.deviation(result, updates)
    errors = {
        "exactness_error": factors.max_relative_error,
        "exactness_error_total": factors.total_relative_error,
        "realised_error": realised.max_relative_error,
    }
    odd = [name for name, value in {**errors, **more}.items() if algebra.failed(value, floor if name == "realised_error" else 0.0)]
    dropped = {"dropped": math.hypot(*result.dropped.values()) / math.hypot(*factors.ideal.values())} if cuts else {}
    return (
        dropped
        | more
        | errors
        | ({"not_finite": odd} if odd else {})
        | {
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
    worth = {number: sign * value if math.isfinite(value) else -math.inf for number, value in measured.items()}  # `max` is lost in NaN
    return max(worth, key=lambda number: (worth[number], -number)) if worth and compared else None


def _learnt_nothing(held_out: Mapping[int, Mapping[str, float]], facts: Mapping[str, Any]) -> str:
    """What to say where the clients' own held-out rows are predicted no better after the last round than before the first; "" elsewhere."""
    headline, sign = facts["headline"], 1 if facts["greater_is_better"] else -1
    before, after = held_out.get(0, {}), held_out[max(held_out)]
    if not before.get("rows") or before["rows"] != after.get("rows") or not {headline, "loss"} <= before.keys() & after.keys():
        return ""
    if sign * after[headline] > sign * before[headline] or after["loss"] < 0.99 * before["loss"]:
        return ""
    numbers = f"{headline} {before[headline]:.3g} on the clients' own rows before, {after[headline]:.3g} after"
    if not after["loss"] <= 1.5 * before["loss"]:  # NaN, too
        rose = f"loss {before['loss']:.3g}, then {after['loss']:.3g}; {numbers}"
        return f"training diverged, or the rate is too high ({rose}): lower training.learning_rate"
    return f"the model learnt nothing ({numbers}): raise training.learning_rate or rounds, and look at the rows by fedex-lora check"


def log_to(path: Path, *others: Emit) -> Emit:
    """An `Emit` that appends to `events.jsonl` and tells the others; what is `SHOWN` is not kept."""

    def emit(event: str, **fields: Any) -> None:
        if event not in SHOWN:
            append_event(path, event, **fields)
        for other in others:
            other(event, **fields)

    return emit


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    from importlib.metadata import version

    return {"fedex-lora": __version__} | {name: version(name) for name in ("torch", "transformers", "peft", "accelerate", "safetensors")}
