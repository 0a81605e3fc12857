"""The in-process runner: all clients on this machine, one base model in memory however many they are."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import set_seed

from fedex_lora import server
from fedex_lora.aggregation import method_named
from fedex_lora.aggregation.lowrank import same_bits
from fedex_lora.answers import Emit, Reply, stays
from fedex_lora.catch_up import BaseCopy, caught_up
from fedex_lora.checkpoint import bytes_needed, last_checkpoint, require_space
from fedex_lora.client import ClientData, Work, evaluate, local_update, probe, quiet, training_arguments
from fedex_lora.config import IMAGES, Config, read_config, write_config
from fedex_lora.consistency import require_consistent
from fedex_lora.errors import FedexLoraError, TrainingError, UsageError, WireError
from fedex_lora.measure import Exactness
from fedex_lora.memory import MEMORY, ClientMemory, load_memory, save_memory
from fedex_lora.partition import partition
from fedex_lora.peft_io import (
    DELTA,
    IMAGE_TASK,
    FrozenBase,
    add_lora,
    format_of,
    frozen_bytes,
    load_base,
    load_processor,
    read_model,
    read_other,
    safe_name,
    set_trained,
    trainable_parameters,
    write_adapter_folder,
    write_model,
)
from fedex_lora.rounds import Federation, log_to, run_rounds, versions
from fedex_lora.storage import load_delta, locked, read_events, round_folder, swept, write_text
from fedex_lora.tasks import Task, load_task
from fedex_lora.trackers import Trackers
from fedex_lora.types import Adapter, ClientUpdate, Delta, ServerState
from fedex_lora.wire import Download, completed, decode_download, encode_update

TASK_TYPES = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM", IMAGES: IMAGE_TASK}  # of manifests
POOLED = "all"  # the one client of a centralised run


class InProcess:
    """All parties of a federation in one process: the model, every client's rows, and the `exchange` that lets each train in turn.

    Args:
        config: the run.
        emit: told of steps.

    Raises:
        FedexLoraError: whatever is wrong with the configuration, the data or the model; nothing has been written then.
    """

    def __init__(self, config: Config, emit: Emit) -> None:
        method = method_named(config.method)
        training_arguments(config)
        if config.torch_threads:
            torch.set_num_threads(config.torch_threads)
        task = load_task(config.task, config.seed)
        self._parts = partition(task, config.clients, config.seed)
        require_consistent(config, len(self._parts))
        self._ranks = dict(zip(sorted(self._parts), config.clients.ranks or [], strict=False))
        self._emit, self._config = emit, config
        self._work = Work(config=config, task=task, processor=load_processor(config.base, task.kind))
        set_seed(config.seed)
        loaded = load_base(config.base, task.kind, **task.model_config)
        model: nn.Module = loaded.model
        if (padding := getattr(self._work.processor, "pad_token_id", None)) is not None:
            model.config.pad_token_id = padding  # type: ignore[union-attr]
        if method.lora:
            set_seed(config.seed)
            model = add_lora(loaded, config.lora, task.kind)
            set_trained(model, method.trained(1))
        self.model = model
        self._base = FrozenBase(model, config.base.delta, config.base.compaction)
        self._memories = dict[str, ClientMemory]()  # base deltas with the same bits are one object
        self._folder: Path | None = None
        self._first = read_model(model)
        self._data, self._eval = self._tokenised(task)
        self._latest: Adapter = self._first  # what a client's copy of the global adapter is, in the factors that do not travel again
        probe(model, self._eval, self._work)

    def _tokenised(self, task: Task) -> tuple[dict[str, ClientData], Dataset]:
        """Every row tokenised once; clients hold selections. A pooled method has one client with all training rows."""
        train = task.tokenize(self._work.processor, task.train)
        parts = self._parts
        if method_named(self._config.method).pooled:
            together = [np.sort(np.concatenate(rows)) for rows in zip(*parts.values(), strict=True)]
            parts = {POOLED: (together[0], together[1])}
        data = {client: ClientData(train=train.select(mine), held_out=train.select(held)) for client, (mine, held) in parts.items()}
        return data, task.tokenize(self._work.processor, task.eval)

    def initial(self) -> ServerState:
        """The state before round 1."""
        return server.init(self._first, read_other(self.model), self._config.method, self._config.seed)

    def federation(self) -> Federation:
        """What the round loop needs of this place."""
        return Federation(
            clients=sorted(self._data),
            exchange=self.exchange,
            evaluate=self.evaluate,
            realised=self.realised,
            format=format_of(self.model),
            facts=self.facts(),
            ranks=self._ranks,
            finish=lambda state, out: self.save_personal(state, out / "clients"),
        )

    def remember_in(self, folder: Path, state: ServerState) -> None:
        """Keep the clients' memories in `folder/CLIENT`, and take up those that are there, of a run whose server is at `state`.

        Raises:
            StorageError: one of them is broken.
        """
        self._folder, self._latest = folder, state.adapter
        bases: dict[int, Mapping[str, Delta]] = {0: {}}

        def base_of(version: int) -> Mapping[str, Delta]:
            if version not in bases:
                bases[version] = load_delta(round_folder(folder.parent, version) / DELTA)
            return bases[version]

        for client in self._data:
            if (path := self._path(client)).exists():
                self._memories[client] = load_memory(path, base_of)

    def _path(self, client: str) -> Path:
        assert self._folder is not None
        return self._folder / safe_name(client) / MEMORY

    def _memory(self, client: str) -> ClientMemory:
        return self._memories.get(client, ClientMemory())

    def exchange(self, messages: Mapping[str, bytes], deadline: float | None = None) -> Iterable[Reply]:
        """The transport: each client in turn on the one model. (Nobody is late in one process, so the deadline is not used.)"""
        for client, payload in messages.items():
            memory = self._memory(client)
            try:
                yield Reply(client, self._answer(client, decode_download(payload, memory.adapter or self._latest)))
            except (TrainingError, WireError) as error:
                yield Reply(client, None, str(error))

    def _answer(self, client: str, message: Download) -> bytes:
        """What the client says to a message; to one that it answered before it was interrupted, the same again."""
        memory = self._memory(client)
        if message.kind == "train" and memory.round == message.round and memory.reply:
            return memory.reply
        method, message = method_named(message.method), self._catch_up(message)
        memory = self._memory(client)
        kept = _counted(memory, message.accepted) if method.own else {}
        start, held = server.start_of(message.method, message.adapter, message.rank, kept.get(message.accepted))
        self._base.set(server.advance(memory.base.delta, held))
        write_model(self.model, start, message.other)
        data, steps = self._data[client], self._emit
        own = {f"held_out_{name}": value for name, value in evaluate(self.model, data.held_out, self._work).items()}
        left = stays(message.method, message.round)
        if message.kind == "evaluate":
            update = ClientUpdate(client_id=client, adapter={}, num_examples=len(data.train), metrics=own)
            return encode_update(update, message.run, message.round, message.method, left, memory.base.version)
        update, optimizer = local_update(
            self.model,
            client,
            message.round,
            data,
            self._work,
            memory.optimizer,
            lambda step, total: steps("step", round=message.round, client=client, step=step, steps=total),
        )
        update = replace(update, metrics={**update.metrics, **own})
        reply = encode_update(update, message.run, message.round, message.method, left, memory.base.version)
        memory = replace(
            memory,
            trained={**kept, message.round: update.adapter} if method.own or self._config.messages.per_client else {},
            optimizer=optimizer if self._config.local.optimizer_state == "keep" else None,
            round=message.round,
            reply=reply,
        )
        if self._folder:
            save_memory(self._path(client), memory)
        self._memories[client] = replace(memory, reply=b"")
        return reply

    def _catch_up(self, message: Download) -> Download:
        """Bring the client's copies of base and adapter to the message's version, from what it has and what it was sent; the whole message.

        Each client has its own copies here, as on its own machine. Those that must have the server's bits are compared, and are one
        object in memory: one for each version that some client has.
        """
        client, counted_on, memory = message.client, message.share is not None, self._memory(message.client)
        message = completed(message, memory.trained.get(message.round - 1))
        copy = caught_up(BaseCopy() if message.anew else memory.base, message.catch_up)
        bases = [other.base for other in self._memories.values()]
        alike = (other for other in bases if other.version == copy.version and not other.lossy)
        if not copy.lossy and (twin := next(alike, None)):
            if copy.delta.keys() != twin.delta.keys() or not all(same_bits(copy.delta[name], twin.delta[name]) for name in twin.delta):
                raise WireError(f"the base of version {copy.version} is not the one that other clients were sent: ask for a snapshot")
            copy = twin
        own_copy = counted_on or memory.adapter is not None
        self._memories[client] = replace(memory, base=copy, adapter=message.adapter if own_copy else None)
        if not own_copy and message.rank is None:
            self._latest = message.adapter
        return message

    def load(self, state: ServerState) -> nn.Module:
        """The global model of a state."""
        self._base.set(state.base_delta)
        write_model(self.model, state.adapter, state.other)
        return self.model

    def evaluate(self, state: ServerState) -> dict[str, float]:
        """The global model on the task's evaluation rows; nothing once there is none."""
        if state.round and method_named(state.method).exactness == "personalised":
            return {}
        return evaluate(self.load(state), self._eval, self._work)

    def realised(self, state: ServerState, ideal: Mapping[str, Delta]) -> tuple[Exactness, float, dict[str, float]]:
        """The exactness of what the model's layers compute, its floor, and of side paths: their own error, and what compaction left out."""
        self.load(state)
        side = {"side_error": self._base.side_error, "compaction_error": self._base.compaction_error}
        return *self._base.realised(ideal), {name: value for name, value in side.items() if value}

    def save_personal(self, state: ServerState, folder: Path) -> None:
        """Under a personalised method each client's model is its own: its adapter, as a PEFT folder, in `CLIENT/adapter`."""
        if method_named(state.method).exactness != "personalised":
            return
        for client in self._data:
            kept = self._memory(client).trained
            adapter, _ = server.start_of(state.method, state.adapter, self._ranks.get(client), kept[max(kept)] if kept else None)
            write_adapter_folder(folder / safe_name(client) / "adapter", adapter, state.other, format_of(self.model))

    def facts(self) -> dict[str, Any]:
        """For the manifest and the first event."""
        trained, total = trainable_parameters(self.model)
        task = self._work.task
        return {
            "base_model": os.path.abspath(model) if Path(model := self._config.base.model).is_dir() else model,
            "base_fingerprint": self._base.fingerprint(),
            "task": self._config.task.name,
            "task_type": format_of(self.model).config.get("task_type") or TASK_TYPES[task.kind],
            **({"labels": list(names.values())} if (names := task.model_config.get("id2label")) else {}),
            "headline": task.headline,
            "greater_is_better": task.greater_is_better,
            "trainable_parameters": trained,
            "total_parameters": total,
            "base_bytes": frozen_bytes(self.model),
            "disk_bytes": bytes_needed(self._config, self.initial(), len(self._data)),
            "base_dtype": self._config.base.dtype,
            "base_quantization": self._config.base.quantization,
            **({"base_random_seed": self._config.seed} if self._config.base.random_weights else {}),
            "base_delta": self._base.homes,
            "train_rows": {client: len(data.train) for client, data in self._data.items()},
            "torch_threads": torch.get_num_threads(),
            "versions": versions(),
        }


def run(config: Config, out: Path, emit: Emit, resume: bool = False) -> ServerState:
    """One whole run in this process, into the run folder `out`.

    Args:
        config: the run.
        out: the run folder.
        emit: told of everything.
        resume: go on with what `out` holds, if anything: the last whole round, and the answers of clients that finished in the next one.

    Raises:
        UsageError: `out` is not empty; with `resume`, it holds no run, another run, or one that another process is at work on.
        FedexLoraError: see `InProcess` and `run_rounds`.
    """
    resolved = write_config(config)
    found = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if found and not resume:
        raise UsageError(f"{out} exists and is not empty: give another --out, remove it, or go on with it by --resume")
    if found:
        _require_run(out, config)
    quiet()
    trackers = Trackers(config, out)
    place = InProcess(config, emit)
    require_space(out, place.facts()["disk_bytes"])
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out), trackers:
            swept(out)
            write_text(out / "config.toml", resolved)
            return _go_on(config, place, out, log_to(out / "events.jsonl", emit, trackers))
    except OSError as error:
        raise FedexLoraError(f"cannot write to {out}: {error.strerror}: give another --out, or mend it and --resume") from None


def _require_run(out: Path, config: Config) -> None:
    """`out` is the folder of a run with this configuration."""
    if out.is_dir() and all(path.name.startswith(".") for path in out.iterdir()):
        return  # killed before anything was in its place
    if not (out / "config.toml").is_file():
        raise UsageError(f"{out} holds something that is no run: give another --out")
    here, there = (write_config(_without_bounds(one)).splitlines() for one in (config, read_config(out / "config.toml")))
    if here != there:
        odd = next(ours for ours, theirs in zip_longest(here, there) if ours != theirs)
        raise UsageError(f"{out} is a run with another configuration (first difference: {odd!r}): give the one in {out / 'config.toml'}")


def _without_bounds(config: Config) -> Config:
    """What makes a run's bits: without what only says whose updates count and what is kept, which may change when a run goes on."""
    messages = config.messages.model_copy(update={"norm_bound": None, "max_examples": 1})
    clients = config.clients.model_copy(
        update={"quorum": 1.0, "min_clients": 1, "deadline": None, "below_quorum": "stop", "late": "refuse"}
    )
    return config.model_copy(update={"messages": messages, "clients": clients, "keep_rounds": None, "trackers": []})


def _go_on(config: Config, place: InProcess, out: Path, emit: Emit) -> ServerState:
    """The rounds that are not there yet; all of them in a new folder."""
    checkpoint, complaints = last_checkpoint(out)
    for complaint in complaints:
        emit("warning", message=f"a broken round was set aside: {complaint}")
    events = read_events(out / "events.jsonl") if (out / "events.jsonl").exists() else []
    if checkpoint is not None:
        number = checkpoint.state.round
        if any(event["event"] == "run_done" for event in events):
            return checkpoint.state
        emit("resumed", round=number + 1, rounds=config.rounds)
        if not any(event["event"] == "round_done" and event.get("round") == number for event in events):
            emit("round_done", **checkpoint.done)
    place.remember_in(out / "clients", place.initial() if checkpoint is None else checkpoint.state)
    return run_rounds(config, checkpoint or place.initial(), place.federation(), out, emit)


def _counted(memory: ClientMemory, accepted: int) -> dict[int, Adapter]:
    """The client's own factors of the last round in which its update counted; what it trained since is forgotten.

    Raises:
        WireError: it has none of that round.
    """
    kept = {round: own for round, own in memory.trained.items() if round == accepted}
    if accepted and not kept:
        raise WireError(f"the server counts on this client's own factors of round {accepted}, and it has none: start the run anew")
    return kept
