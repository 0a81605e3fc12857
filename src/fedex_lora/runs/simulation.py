"""All parties of a federation in one process, one base model in memory however many they are."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import EvalPrediction, PreTrainedModel

from fedex_lora.aggregation import get_method
from fedex_lora.client.probe import require_trainable
from fedex_lora.client.training import SPEED, ClientData
from fedex_lora.config import Config
from fedex_lora.errors import FedexLoraError, UnreadableError, UnwritableError, UsageError
from fedex_lora.privacy.account import rows_digest
from fedex_lora.protocol.envelopes import answer_of
from fedex_lora.protocol.failures import failure_of
from fedex_lora.protocol.records import METRIC
from fedex_lora.runs.clients import ClientPool
from fedex_lora.runs.context import GlobalModel, ModelContext
from fedex_lora.runs.emit import Emit
from fedex_lora.runs.learner import ModelLearner
from fedex_lora.runs.listening import Reply
from fedex_lora.runs.private import accounts_of, digests_of, require_ledgers, require_paid, trained_and_measured
from fedex_lora.runs.round_loop import Federation
from fedex_lora.server.checkpoint import load_base_delta
from fedex_lora.server.checks import require_consistent
from fedex_lora.storage.events import PartyFailed, RoundDone, Warned
from fedex_lora.storage.files import checksum, write_text
from fedex_lora.storage.run_folder import ROWS, require_rows, round_folder, run_rounds_of, word_of
from fedex_lora.tasks import Task, load_task, usable
from fedex_lora.tasks.dealt import Load, dealt
from fedex_lora.tasks.partition import Indices
from fedex_lora.types import Delta, ServerState

TAKEN = frozenset({"", "loss", "rows", *SPEED, *RoundDone.model_fields, "bytes_total", "participants", "refused"})
"""What metrics of the user's own cannot be called: a round's row has its own columns of that name, or trainers take it out."""
TAKEN_BEGINNINGS = ("eval_", "held_out_")
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
    for name in map(str, found):
        if name in known or name in TAKEN or name.startswith(TAKEN_BEGINNINGS):
            whose = "which the task has already" if name in {*known, "loss", "rows"} else "a name that is taken"
            raise UsageError(f"metrics gave {name!r}, {whose}: give it another name")
        if not METRIC.fullmatch(f"held_out_{name}"):
            raise UsageError(f"metrics gave {name!r}: name it by at most 55 letters a to z, digits, spaces and signs of _.@/+-")
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
        held = (digests_of(task, parts), trained_and_measured(config, task, parts)) if config.privacy.is_on else ()
        accounts = accounts_of(config, list(parts), *held)
        self._rows = "" if accounts else _digest(task, parts)  # of private rows the ledger has one, and nobody else
        place = ModelContext(config, given.measured(task), given.model, given.processor)
        rows, notes = _rows(place, parts)
        self.pool, self._emit = ClientPool(config, ModelLearner(place, rows, emit), accounts=accounts), emit
        self.host = GlobalModel(place, ranks_of(config, parts))
        for client, data in () if accounts else rows.items():  # of private rows those that do not fit are left out, one by one
            require_trainable(place.model, client, data, place.work)
        for note in [*self.host.notes, *notes]:
            emit(Warned(message=note))  # for the console: events say nothing of rows

    def require(self, out: Path) -> None:
        """The rows are those of the run in `out`, and the clients' ledgers pay for the next round of it, at least.

        Raises:
            UsageError: other rows.
            ConfigError: one does not.
        """
        if self._rows:
            require_rows(out, self._rows)
        if self.pool.accounts and run_rounds_of(out):
            require_ledgers(self.pool.accounts, word_of(out, make=False))
        for note in require_paid(self.pool.accounts, word_of(out, make=False)):
            self._emit(Warned(message=note))

    def initial(self) -> ServerState:
        """The state before round 1."""
        return self.host.initial()

    def federation(self) -> Federation:
        """What the round loop needs of this place."""
        there = self.host.federation(self.pool.learner.rows, self.exchange)
        return replace(there, finish=lambda state, out: self.pool.save_personal(state, out / "clients", there.ranks, there.format))

    def remember_in(self, out: Path) -> None:
        """Keep the clients' memories in `out/clients`, and take up those that are there.

        Raises:
            StorageError: one of them is broken.
        """
        if self._rows and not (out / ROWS).exists():
            write_text(out / ROWS, f"{self._rows}\n")
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
            except (UnreadableError, UnwritableError):  # the disk is everybody's here
                raise
            except FedexLoraError as error:
                self._emit(PartyFailed(client=client, message=str(error)))  # for this console: in one process its user is every party
                failure = failure_of(error)
                yield Reply(client, answer_of(payload, client, failure.private if self.pool.accounts else failure))


def _digest(task: Task, parts: Mapping[str, tuple[Indices, Indices]]) -> str:
    """One, of everybody's rows and those that measure, each in its place."""
    whose = {client: task.train.iloc[np.concatenate(mine)] for client, mine in parts.items()}
    every = [*whose.items(), ("", task.eval)]
    return rows_digest([[client, place, row] for client, rows in every for place, row in enumerate(_contents(task, rows))])


def _contents(task: Task, rows: pd.DataFrame) -> list[Any]:
    """What each row says, and of an image in a file what is in that."""
    said: list[Any] = rows.to_dict("records")
    if task.reads_text:
        return said
    images = task.tokenize(None, rows)["image"]
    return [[row, checksum(Path(cell["path"]))] if cell["path"] else row for row, cell in zip(said, images, strict=True)]


def _rows(place: ModelContext, parts: Mapping[str, tuple[Indices, Indices]]) -> tuple[dict[str, ClientData], list[str]]:
    """Every row tokenised once; clients hold selections; and what is to be said. A pooled method has one client with all training rows."""
    train = place.work.tokens(place.work.task.train)
    if get_method(place.config.method).centralised:
        together = [np.sort(np.concatenate(rows)) for rows in zip(*parts.values(), strict=True)]
        parts = {CENTRAL_CLIENT: (together[0], together[1])}
    data, notes = dict[str, ClientData](), list[str]()
    for client, (own, kept) in parts.items():
        mine, said = usable(train.select(own), place.config.task, f"client {client}")
        held, _ = usable(train.select(kept), place.config.task, f"client {client}", may_be_empty=True)
        data[client] = ClientData(train=mine, held_out=held)
        notes += said
    return data, notes


def ranks_of(config: Config, clients: Collection[str]) -> dict[str, int]:
    """Client -> its rank, in the order of their names; nothing where all have one."""
    return dict(zip(sorted(clients), config.clients.ranks or [], strict=False))
