"""The in-process runner: all clients on this machine, one base model in memory however many they are."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import set_seed

from fedex_lora import server
from fedex_lora.aggregation import method_named
from fedex_lora.answers import Emit, Reply, stays
from fedex_lora.catch_up import BaseCopy, caught_up
from fedex_lora.client import ClientData, Work, evaluate, local_update, probe, quiet, training_arguments
from fedex_lora.config import IMAGES, Config, write_config
from fedex_lora.consistency import require_consistent
from fedex_lora.errors import FedexLoraError, TrainingError, UsageError, WireError
from fedex_lora.measure import Exactness
from fedex_lora.partition import partition
from fedex_lora.peft_io import (
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
from fedex_lora.storage import write_text
from fedex_lora.tasks import Task, load_task
from fedex_lora.types import Adapter, ClientUpdate, Delta, Dense, ServerState
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
        self._copies = dict[str, BaseCopy]()  # every client's base delta; those with the same bits are one object
        self._adapters = dict[str, Adapter]()  # the copies of the global adapter that are not its bits (messages.per_client)
        self._trained = dict[str, tuple[int, Adapter]]()  # (round, what the client trained in it), where messages count on it
        self._first = read_model(model)
        self._data, self._eval = self._tokenised(task)
        self._latest: Adapter = self._first  # what a client's copy of the global adapter is, in the factors that do not travel again
        self._own = dict[str, dict[int, Adapter]]()  # client -> round -> the factors of its own that it trained in it
        self._optimizers: dict[str, Mapping[str, Any]] = {}
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
        )

    def exchange(self, messages: Mapping[str, bytes], deadline: float | None = None) -> Iterable[Reply]:
        """The transport: each client in turn on the one model. (Nobody is late in one process, so the deadline is not used.)"""
        for client, payload in messages.items():
            try:
                yield Reply(client, self._answer(client, decode_download(payload, self._adapters.get(client, self._latest))))
            except (TrainingError, WireError) as error:
                yield Reply(client, None, str(error))

    def _answer(self, client: str, message: Download) -> bytes:
        method = method_named(message.method)
        message = self._catch_up(message)
        own_factors = self._counted(client, message.accepted) if method.own else None
        start, held = server.start_of(message.method, message.adapter, message.rank, own_factors)
        self._base.set(server.advance(self._copies[client].delta, held))
        write_model(self.model, start, message.other)
        data, steps = self._data[client], self._emit
        own = {f"held_out_{name}": value for name, value in evaluate(self.model, data.held_out, self._work).items()}
        if message.kind == "evaluate":
            update = ClientUpdate(client_id=client, adapter={}, num_examples=len(data.train), metrics=own)
        else:
            kept = self._optimizers.get(client)
            update, optimizer = local_update(
                self.model,
                client,
                message.round,
                data,
                self._work,
                kept,
                lambda step, total: steps("step", round=message.round, client=client, step=step, steps=total),
            )
            update = replace(update, metrics={**update.metrics, **own})
            if self._config.local.optimizer_state == "keep":
                self._optimizers[client] = optimizer
            if method.own:
                self._own.setdefault(client, {})[message.round] = update.adapter
            if self._config.messages.per_client:
                self._trained[client] = message.round, update.adapter
        left = stays(message.method, message.round)
        return encode_update(update, message.run, message.round, message.method, left, self._copies[client].version)

    def _counted(self, client: str, accepted: int) -> Adapter | None:
        """The client's own factors of the last round in which its update counted; what it trained since is forgotten.

        Raises:
            WireError: it has none of that round.
        """
        kept = self._own[client] = {round: own for round, own in self._own.get(client, {}).items() if round == accepted}
        if accepted and not kept:
            raise WireError(f"the server counts on this client's own factors of round {accepted}, and it has none: start the run anew")
        return kept.get(accepted)

    def _catch_up(self, message: Download) -> Download:
        """Bring the client's copies of base and adapter to the message's version, from what it has and what it was sent; the whole message.

        Each client has its own copies here, as on its own machine. Those that must have the server's bits are compared, and are one
        object in memory: one for each version that some client has.
        """
        client, counted_on = message.client, message.share is not None
        round, trained = self._trained.get(client, (0, None))
        message = completed(message, trained if round == message.round - 1 else None)
        copy = caught_up(BaseCopy() if message.anew else self._copies.get(client, BaseCopy()), message.catch_up)
        alike = (other for other in self._copies.values() if other.version == copy.version and not other.lossy)
        if not copy.lossy and (twin := next(alike, None)):
            if not _same(copy.delta, twin.delta):
                raise WireError(f"the base of version {copy.version} is not the one that other clients were sent: ask for a snapshot")
            copy = twin
        self._copies[client] = copy
        if counted_on or client in self._adapters:
            self._adapters[client] = message.adapter
        elif message.rank is None:
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

    def realised(self, state: ServerState, ideal: Mapping[str, Delta]) -> tuple[Exactness, float, float]:
        """The exactness of what the model's layers compute, its floor, and the share of the base delta that compaction left out."""
        self.load(state)
        return *self._base.realised(ideal), self._base.compaction_error

    def save_personal(self, state: ServerState, folder: Path) -> None:
        """Under a personalised method each client's model is its own: its adapter, as a PEFT folder, in `CLIENT/adapter`."""
        if method_named(state.method).exactness != "personalised":
            return
        for client in self._data:
            kept = self._own.get(client)
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
            "base_dtype": self._config.base.dtype,
            "base_quantization": self._config.base.quantization,
            "base_delta": self._base.homes,
            "train_rows": {client: len(data.train) for client, data in self._data.items()},
            "torch_threads": torch.get_num_threads(),
            "versions": versions(),
        }


def run(config: Config, out: Path, emit: Emit) -> ServerState:
    """One whole run in this process, into the run folder `out`.

    Raises:
        UsageError: `out` is not empty.
        FedexLoraError: see `InProcess` and `run_rounds`.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty: give another --out, or remove it")
    quiet()
    place = InProcess(config, emit)
    resolved = write_config(config)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.toml", resolved)
    except OSError as error:
        raise FedexLoraError(f"cannot write to {out}: {error.strerror}: give another --out") from None
    state = run_rounds(config, place.initial(), place.federation(), out, log_to(out / "events.jsonl", emit))
    place.save_personal(state, out / "clients")
    return state


def _same(left: Mapping[str, Delta], right: Mapping[str, Delta]) -> bool:
    return left.keys() == right.keys() and all(
        type(delta) is type(right[module]) and all(map(torch.equal, _matrices(delta), _matrices(right[module])))
        for module, delta in left.items()
    )


def _matrices(delta: Delta) -> list[torch.Tensor]:
    return [delta.W] if isinstance(delta, Dense) else [delta.U, delta.V]
