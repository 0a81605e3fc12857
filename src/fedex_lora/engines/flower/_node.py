"""One party on its machine: its rows, its model, its memory; from a request to an answer."""

import logging
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from fedex_lora.client.arguments import spare_devices
from fedex_lora.client.probe import check_trainer, require_trainable
from fedex_lora.client.training import ClientData, silence_libraries
from fedex_lora.config import parse_config
from fedex_lora.engines.flower._private_rows import file_digest, private_rows, sample_rows, sample_task
from fedex_lora.engines.flower._request import NodeRequest, log_of
from fedex_lora.engines.flower._settings import NodeSettings, is_private, node_settings
from fedex_lora.errors import FedexLoraError, ModelError, StorageError, TrainingError, UsageError
from fedex_lora.exactness.measure import Made
from fedex_lora.privacy.account import Account, rows_digest
from fedex_lora.privacy.settings import require_private
from fedex_lora.protocol.envelopes import answer_of
from fedex_lora.protocol.failures import failure_of, told_to_end
from fedex_lora.runs.clients import ClientPool
from fedex_lora.runs.context import ModelContext
from fedex_lora.runs.emit import Emit
from fedex_lora.runs.learner import ModelLearner
from fedex_lora.runs.party_log import left, log_failure
from fedex_lora.runs.private import accounts_of
from fedex_lora.storage.result import safe_name
from fedex_lora.storage.run_folder import locked
from fedex_lora.tasks import Task, load_task, usable
from fedex_lora.tasks.dealt import dealt
from fedex_lora.tasks.partition import Indices, held_out


class Node:
    """A party, which keeps its base in memory from one answer to the next.

    Args:
        emit: told of training steps.
    """

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._made: tuple[object, ModelContext, Mapping[str, ClientData], Mapping[str, Account]] | None = None

    def reply(self, request: NodeRequest) -> bytes:
        """The bytes of this party's answer: its update, or that it failed; whatever was raised, its text goes to this party's log only."""
        log = log_of(request.node)
        try:
            payload = self.answer(request, node_settings(request.node))
            left(log, payload, request.client, request.payload)
            return payload
        except BaseException as error:  # a panic of a library is no Exception, nor is an exit of the party's own code
            if told_to_end(error):
                raise
            failure = failure_of(error)
            failure = failure.private if is_private(request.node, request.config) else failure
            log_failure(log, error, failure, request.client)
            return answer_of(request.payload, request.client, failure)

    def answer(self, request: NodeRequest, settings: NodeSettings) -> bytes:
        """The bytes of this party's update.

        Raises:
            FedexLoraError: the message is for somebody else, too large or wrong; the rows or the model are not there; training failed.
        """
        if settings.client and settings.client != request.client:
            raise UsageError(
                f"this node is client {settings.client!r}, and the message is for {request.client!r}: register it by its name", "client"
            )
        if len(request.payload) > settings.max_megabytes * 1e6:
            raise UsageError(f"the message has {len(request.payload) / 1e6:.0f} MB, and this node takes {settings.max_megabytes:g}", "size")
        folder = settings.folder / safe_name(request.run)
        mine = folder / safe_name(request.client)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            mine.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"this node cannot keep its state in {settings.folder}: {error.strerror}: give another state=") from None
        with _alone(mine):
            place, data, accounts = self._ready(request, settings)
            if request.base and request.base != place.identity:
                raise ModelError(
                    f"the base {place.config.base.model}, its tokenizer or its base.start is not the server's: give both the same", "base"
                )
            pool = ClientPool(place.config, ModelLearner(place, data, self._emit, log_of(request.node)), alone=True, accounts=accounts)
            pool.take_up(folder, folder.name)
            reply = pool.answer(request.client, request.payload)
            with suppress(FedexLoraError):  # of a ledger that was moved away meanwhile: the answer is in it
                for account in accounts.values():
                    log_of(request.node).info("%s: %s", account.client, account.standing(folder.name).words(account))
            return reply

    def _ready(self, request: NodeRequest, settings: NodeSettings) -> tuple[ModelContext, Mapping[str, ClientData], Mapping[str, Account]]:
        """Model, rows and account: those of the last answer, if nothing else was asked for. A private party's rows are not read yet."""
        key = (request.config, request.client, settings)
        if self._made is None or self._made[0] != key:
            self._made = None  # two bases would not fit
            silence_libraries()
            given = parse_config(tomllib.loads(request.config))
            config, deals = settings.applied(given), settings.deals(given)
            own_file = Path(settings.data) / str(config.task.train)
            if config.task.name == "custom" and not (deals or settings.train or own_file.is_file()):
                raise UsageError(
                    f'{settings.data} has no file {config.task.train}, which the run names: start this node with train="FILE"', "file"
                )
            accounts = accounts_of(config, [request.client])
            require_private(config)
            unread = bool(accounts) and not deals
            if deals:
                task, parts = dealt(config)
            else:
                task, parts = sample_task(config.task) if unread else load_task(config.task, config.seed), {}
            place = ModelContext(config, task)
            log = log_of(request.node)
            if spare := spare_devices(config):
                log.warning("%s: %s", request.client, spare)
            data, digest = _unread(place, request.client, log) if unread else _rows(place, request.client, parts, log)
            if place.work.trainer is not None or accounts:  # what is private is probed before its ledger has an entry
                check_trainer(place.model, sample_rows(place) if unread else data[request.client].train, place.work)
            if not accounts:
                require_trainable(place.model, request.client, data[request.client], place.work)
            self._made = (key, place, data, {client: replace(account, rows=digest) for client, account in accounts.items()})
        return self._made[1:]


def _held(data: ClientData, labels: Sequence[object], task: Task) -> str:
    rows = f"{len(data.train)} rows to train on, {len(data.held_out)} held out"
    names = dict(enumerate(labels)) or task.model_config.get("id2label", {})
    classes = Counter(names.get(label, label) for label in data.train["labels"]) if task.model_config.get("num_labels", 1) > 1 else {}
    return rows + "".join(f", {count} of class {name}" for name, count in sorted(classes.items(), key=str))


@contextmanager
def _alone(folder: Path, patience: float = 60.0) -> Iterator[None]:
    """`locked`, after waiting for an earlier process of this party to end: one that its node left behind, for instance."""
    end = time.monotonic() + patience
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(folder))
                break
            except UsageError:
                if time.monotonic() > end:
                    raise TrainingError(
                        f"another process of this party has been at work in {folder} for {patience:g} seconds", "busy"
                    ) from None
                time.sleep(1)
        yield


def _unread(place: ModelContext, client: str, log: logging.Logger) -> tuple[Mapping[str, ClientData], str]:
    """What a private party will train on, and the digest of its file."""

    @cache
    def read(name: str) -> ClientData:
        data = private_rows(place, client, log)
        log.info("%s: holds %s", client, _held(data, place.config.task.labels or [], place.work.task))
        return data

    return Made([client], read), file_digest(place.config.task)


def _rows(
    place: ModelContext, client: str, parts: Mapping[str, tuple[Indices, Indices]], log: logging.Logger
) -> tuple[Mapping[str, ClientData], str]:
    """What the party trains and measures on; and the digest of its rows, where it is private."""
    config, task = place.config, place.work.task
    if parts:
        if client not in parts:
            raise UsageError(
                f"the run's rows are dealt to {', '.join(parts)}, and none to {client!r}: give this node its own data", "dealt"
            )
        mine, held = parts[client]
    else:
        mine, held = held_out(client, len(task.train), config.clients.holdout, config.seed)
    own = task.train.iloc[[*mine, *held]].reset_index(drop=True)
    rows = place.work.tokens(own)
    train, notes = usable(rows.select(np.arange(len(mine))), config.task, "this party")
    measured, _ = usable(rows.select(np.arange(len(mine), len(rows))), config.task, "this party", may_be_empty=True)
    for note in [*task.notes, *notes]:
        log.warning("%s: %s", client, note)
    data = ClientData(train=train, held_out=measured)
    log.info("%s: holds %s", client, _held(data, config.task.labels or [], task))
    return {client: data}, rows_digest(own.to_dict("records")) if config.privacy.is_on else ""
