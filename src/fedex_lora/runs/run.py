"""The in-process runner: all clients on this machine, one base model in memory however many they are."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from transformers import EvalPrediction, PreTrainedModel

from fedex_lora.aggregation import get_method
from fedex_lora.client.arguments import spare_devices
from fedex_lora.client.training import ClientData
from fedex_lora.config import Config, read_config, write_config
from fedex_lora.errors import ConfigError, FedexLoraError, UsageError
from fedex_lora.privacy.account import rows_digest
from fedex_lora.protocol.failures import failure_of
from fedex_lora.protocol.messages import answer_of
from fedex_lora.runs.clients import ClientPool
from fedex_lora.runs.context import GlobalModel, ModelContext
from fedex_lora.runs.emit import Emit, log_to
from fedex_lora.runs.global_state import undone
from fedex_lora.runs.learner import ModelLearner
from fedex_lora.runs.listening import Reply
from fedex_lora.runs.privacy import noise_warning
from fedex_lora.runs.private import accounts_of, require_paid
from fedex_lora.runs.round_loop import Federation, handed_on, run_rounds
from fedex_lora.runs.trackers import Trackers
from fedex_lora.server.checkpoint import last_checkpoint, load_base_delta, require_space
from fedex_lora.server.checks import require_consistent
from fedex_lora.storage.events import Finished, PartyFailed, Resumed, RoundDone, Warned, is_over, read_events, record
from fedex_lora.storage.files import write_text, writing_failed
from fedex_lora.storage.run_folder import barely_begun, locked, remove_temporaries, round_folder, run_rounds_of, strays, word_of
from fedex_lora.tasks import Task, load_task, usable
from fedex_lora.tasks.dealt import Load, dealt
from fedex_lora.tasks.partition import Indices
from fedex_lora.types import Delta, ServerState

CENTRAL_CLIENT = "all"  # the one client of a centralised run


@dataclass(frozen=True, eq=False)
class Given:
    """What a run is given in memory, in place of what its configuration names.

    Attributes:
        load: see `tasks.dealt.dealt`.
        model: the base, which stays as it is: the run works on a copy.
        processor: its tokenizer or image processor.
        metrics: of predictions, beside the task's own.
    """

    load: Load = load_task
    model: PreTrainedModel | None = None
    processor: Any = None
    metrics: Callable[[EvalPrediction], dict[str, float]] | None = None

    def measured(self, task: Task) -> Task:
        """The task with these metrics, too."""
        own, theirs = self.metrics, task.metrics

        def both(prediction: EvalPrediction) -> dict[str, float]:
            known = theirs(prediction)
            return {**known, **_numbers(own(prediction), known)} if own else known

        return task if own is None else replace(task, metrics=both)


def _numbers(found: Any, known: Collection[str]) -> dict[str, float]:
    """What metrics of the user's own gave.

    Raises:
        UsageError: no numbers by names, or names that are taken.
    """
    if not isinstance(found, Mapping):
        raise UsageError(f"metrics gave a {type(found).__name__}: give a dictionary of numbers by their names")
    if taken := [str(name) for name in found if name in known or name in ("loss", "rows")]:
        raise UsageError(f"metrics gave {taken[0]!r}, which the task has already: give it another name")
    made = dict[str, float]()
    for name, value in found.items():
        try:
            made[str(name)] = float(value)
        except (TypeError, ValueError):
            raise UsageError(f"metrics gave {name!r} = {value!r:.60}, which is no number: give one") from None
    return made


class LocalSimulation:
    """All parties of a federation in one process: the server's side, every client, and the `exchange` that lets each train in turn.

    Args:
        config: the run.
        emit: told of steps.
        given: what is here already.

    Raises:
        FedexLoraError: whatever is wrong with the configuration, the data or the model; nothing has been written then.
    """

    def __init__(self, config: Config, emit: Emit, given: Given | None = None) -> None:
        given = given or Given()
        task, parts = dealt(config, given.load)
        require_consistent(config, len(parts))
        accounts = {
            client: replace(account, rows=rows_digest(task.train.iloc[np.concatenate(parts[client])].to_dict("records")))
            for client, account in accounts_of(config, list(parts)).items()
        }
        place = ModelContext(config, given.measured(task), given.model, given.processor)
        rows, notes = _rows(place, parts)
        self.pool, self._emit = ClientPool(config, ModelLearner(place, rows, emit), accounts=accounts), emit
        self.host = GlobalModel(place, ranks_of(config, parts))
        for note in [*self.host.notes, *notes]:
            emit(Warned(message=note))  # for the console: events say nothing of rows

    def require(self, out: Path) -> None:
        """The clients' ledgers pay for the next round of the run in `out`, at least.

        Raises:
            ConfigError: one does not.
        """
        for note in require_paid(self.pool.accounts, word_of(out, make=False)):
            self._emit(Warned(message=note))

    def initial(self) -> ServerState:
        """The state before round 1."""
        return self.host.initial()

    def facts(self) -> dict[str, Any]:
        """See `GlobalModel.facts`."""
        return self.host.facts(self.pool.learner.rows)

    def federation(self) -> Federation:
        """What the round loop needs of this place."""
        there = self.host.federation(self.pool.learner.rows, self.exchange)
        return replace(there, finish=lambda state, out: self.pool.save_personal(state, out / "clients", there.ranks, there.format))

    def remember_in(self, out: Path) -> None:
        """Keep the clients' memories in `out/clients`, and take up those that are there.

        Raises:
            StorageError: one of them is broken.
        """
        bases: dict[int, Mapping[str, Delta] | None] = {0: self.pool.learner.base}

        def base_of(version: int) -> Mapping[str, Delta] | None:
            if version not in bases:
                folder = round_folder(out, version)
                bases[version] = load_base_delta(folder) if folder.exists() else None
            return bases[version]

        self.pool.remember_in(out / "clients", base_of, word_of(out) if self.pool.accounts else "")

    def exchange(self, messages: Mapping[str, bytes], deadline: float | None = None) -> Iterable[Reply]:
        """The transport: each client in turn on the one model. (Nobody is late in one process, so the deadline is not used.)"""
        for client, payload in messages.items():
            try:
                yield Reply(client, self.pool.answer(client, payload))
            except FedexLoraError as error:
                self._emit(PartyFailed(client=client, message=str(error)))  # for this console: in one process its user is every party
                failure = failure_of(error)
                yield Reply(client, answer_of(payload, client, failure.private if self.pool.accounts else failure))


def _rows(place: ModelContext, parts: Mapping[str, tuple[Indices, Indices]]) -> tuple[dict[str, ClientData], list[str]]:
    """Every row tokenised once; clients hold selections; and what is to be said. A pooled method has one client with all training rows."""
    train, config = place.work.tokens(place.work.task.train), place.config
    if get_method(place.config.method).centralised:
        together = [np.sort(np.concatenate(rows)) for rows in zip(*parts.values(), strict=True)]
        parts = {CENTRAL_CLIENT: (together[0], together[1])}
    data, notes = dict[str, ClientData](), list[str]()
    for client, rows in parts.items():
        (mine, said), (held, _) = (usable(train.select(indices), place.config.task, f"client {client}") for indices in rows)
        batch = config.training.get("per_device_train_batch_size", 8)
        if config.training.get("dataloader_drop_last") and len(mine) < batch:
            raise ConfigError(
                f"client {client} has {len(mine)} rows, and training.dataloader_drop_last drops batches of less than {batch}: lower it"
            )
        data[client] = ClientData(train=mine, held_out=held)
        notes += said
    return data, notes


def ranks_of(config: Config, clients: Collection[str]) -> dict[str, int]:
    """Client -> its rank, in the order of their names; nothing where all have one."""
    return dict(zip(sorted(clients), config.clients.ranks or [], strict=False))


class Home(Protocol):
    """Where a run lives: `LocalSimulation`, or the server of a deployment."""

    def require(self, out: Path) -> None: ...
    def initial(self) -> ServerState: ...
    def facts(self) -> dict[str, Any]: ...
    def federation(self) -> Federation: ...
    def remember_in(self, out: Path) -> None: ...


def run(config: Config, out: Path, emit: Emit, resume: bool = False, home: Callable[[Config, Emit], Home] = LocalSimulation) -> ServerState:
    """One whole run into the run folder `out`; in this process, unless another home is given.

    Args:
        config: the run.
        out: the run folder.
        emit: told of everything.
        resume: go on with what `out` holds, if anything: the last whole round, and the answers of clients that finished in the next one.
            A run that is done goes on, too, where the configuration has more rounds.
        home: makes the place where the run lives.

    Raises:
        UsageError: `out` is not empty; with `resume`, it holds no run, another run, or one that another process is at work on.
        FedexLoraError: see `run_rounds`, and the home; or `out` cannot be written.
        OSError: what is none of `out`'s: a connection, a file of the rows.
    """
    resolved = write_config(config)
    found = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if found and not resume:
        raise UsageError(f"{out} exists and is not empty: give another --out, remove it, or go on with it by --resume")
    if found:
        _require_run(out, config)
    with undone():
        trackers = Trackers(config, out, emit)
        place = home(config, emit)
        place.require(out)
        require_space(out, place.facts()["disk_bytes"])
        try:
            out.mkdir(parents=True, exist_ok=True)
            with locked(out), trackers:
                remove_temporaries(out)
                write_text(out / "config.toml", resolved)
                return _resume_or_start(config, place, out, log_to(out / "events.jsonl", emit, trackers))
        except OSError as error:
            if not writing_failed(error, out):
                raise
            raise FedexLoraError(f"cannot write to {out}: {error.strerror}: give another --out, or mend it and --resume") from None


def _require_run(out: Path, config: Config) -> None:
    """`out` is the folder of a run with this configuration."""
    if barely_begun(out):
        return  # killed before anything was in its place
    if not _is_run(out):
        raise UsageError(f"{out} holds something that is no run: give another --out")
    if (rounds := run_rounds_of(out)) and config.rounds < (done := int(rounds[0].name)):
        raise UsageError(f"{out} has {done} rounds already, and rounds = {config.rounds}: give --rounds {done} or more")
    begun = read_config(out / "config.toml")
    if config.rounds != begun.rounds and "run" in (config.local.schedule, begun.local.schedule):
        raise UsageError(
            f'{out} has {begun.rounds} rounds, over which local.schedule = "run" spreads the learning rate: with {config.rounds} they '
            "would have been other rounds: give as many, or another --out"
        )
    if config.rounds != begun.rounds and begun.privacy.is_on:
        raise UsageError(
            f"{out} has {begun.rounds} rounds, over which privacy.epsilon = {begun.privacy.epsilon:g} was spread: more would spend more: "
            "begin another run from its result by base.start, which the ledger charges by itself"
        )
    here, there = (_keys(_resume_identity(one)) for one in (config, begun))
    if odd := next((key for key in here | there if here.get(key) != there.get(key)), None):
        yours, theirs = (f"{keys[odd]!r}" if odd in keys else "unset" for keys in (here, there))
        raise UsageError(
            f"{out} is a run with another configuration ({odd}: yours {yours}, the run's {theirs}): "
            f"go on with {out / 'config.toml'}, or give another --out"
        )


def _keys(table: Any, name: str = "") -> dict[str, Any]:
    """`table.key` -> value, of what is set."""
    tree = table.model_dump(mode="json", exclude_none=True) if isinstance(table, Config) else table
    if not isinstance(tree, dict):
        return {name: tree}
    return {key: found for inner, value in tree.items() for key, found in _keys(value, f"{name}.{inner}".lstrip(".")).items()}


def _is_run(out: Path) -> bool:
    """Has it the configuration and the events of a run? One that was killed in between left its configuration, as we write it, alone."""
    mark = out / "config.toml"
    if not mark.is_file() or (out / "events.jsonl").is_file():
        return mark.is_file()
    return not strays(out) and mark.read_text(encoding="utf-8") == write_config(read_config(mark))


def _resume_identity(config: Config) -> Config:
    """What makes a run's bits: without what only says how long it goes, whose updates count and what is kept, which may change."""
    messages = config.messages.model_copy(update={"norm_bound": None, "max_examples": 1})
    clients = config.clients.model_copy(
        update={"quorum": 1.0, "min_clients": 1, "deadline": None, "below_quorum": "stop", "late": "refuse"}
    )
    return config.model_copy(update={"messages": messages, "clients": clients, "rounds": 1, "keep_rounds": None, "trackers": []})


def _resume_or_start(config: Config, place: Home, out: Path, emit: Emit) -> ServerState:
    """The rounds that are not there yet; all of them in a new folder."""
    checkpoint, complaints = last_checkpoint(out)
    for complaint in complaints:
        emit(Warned(message=f"a broken round was set aside: {complaint}"))
    if spare := spare_devices(config):
        emit(Warned(message=spare))
    events = read_events(out / "events.jsonl") if (out / "events.jsonl").exists() else []
    if checkpoint is not None:
        number = checkpoint.state.round
        if is_over(events) and number == config.rounds and handed_on(out, number):
            emit(Finished(rounds=number))
            return checkpoint.state
        emit(Resumed(round=number + 1, rounds=config.rounds))
        if not any(isinstance(event, RoundDone) and event.round == number for event in events):
            emit(record("round_done", **checkpoint.done))
    place.remember_in(out)
    begun, there = checkpoint or place.initial(), place.federation()
    if isinstance(begun, ServerState) and (warning := noise_warning(config, begun.adapter, there.clients)):
        emit(Warned(message=warning))
    return run_rounds(config, begun, there, out, emit)
