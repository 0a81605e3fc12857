"""Where a model lives: the pieces that server and clients both need, and what the server's side does with them."""

import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, set_seed

from fedex_lora.aggregation import get_method
from fedex_lora.aggregation import server_state as server
from fedex_lora.aggregation.flatten import flatten_adapter
from fedex_lora.client.arguments import TrainingContext, training_arguments
from fedex_lora.client.probe import check_trainer
from fedex_lora.client.trainers import find_trainer
from fedex_lora.client.training import evaluate
from fedex_lora.config import DEMO, Config
from fedex_lora.errors import ModelError
from fedex_lora.exactness.measure import Realised
from fedex_lora.models.adapted import AdaptedModel
from fedex_lora.models.build import fitted
from fedex_lora.models.fingerprint import tokenizer_digest
from fedex_lora.models.loading import Loaded, averageable, load_base
from fedex_lora.models.lora import TASK_TYPES, add_lora, format_of, lora_layers, read_model, read_other, set_trained, trainable_parameters
from fedex_lora.models.processor import load_processor
from fedex_lora.models.start import adapted_as, read_start, require_base, standing
from fedex_lora.protocol.dumps import tensors_digest
from fedex_lora.runs.listening import Exchange
from fedex_lora.runs.privacy import privacy_facts
from fedex_lora.runs.round_loop import Federation, versions
from fedex_lora.server.checkpoint import bytes_needed
from fedex_lora.tasks import Task, limit, usable
from fedex_lora.types import Adapter, Delta, ServerState


class ModelContext:
    """The model of a run in this process, before anybody trained it: the same bits for everyone who has the configuration and the base.

    Args:
        config: the run.
        task: its task, loaded.
        given: the base, in place of the one that the configuration names.
        processor: its tokenizer or image processor; None: that of the named base.

    Attributes:
        first, start: the adapter, and what the frozen base has gained, before the first round.
        beginning: adapter, other tensors and base delta of the result that the run goes on from, for trainers that need a reference.
        notes: what is to be said of that result's names.
        stands_on: what is to be said of the result that the run goes on from; nothing where it begins at the base.

    Raises:
        FedexLoraError: settings or a model that do not work.
    """

    def __init__(self, config: Config, task: Task, given: PreTrainedModel | None = None, processor: Any = None) -> None:
        own = find_trainer(config.local.trainer)
        training_arguments(config, own=own)
        if config.torch_threads:
            torch.set_num_threads(config.torch_threads)
        self.config, self._given, self.notes = config, given, list[str]()
        self.work = TrainingContext(config=config, task=task, processor=processor or load_processor(config.base, task.kind), trainer=own)
        self.build()

    def build(self) -> None:
        """The model as it was before anybody trained it; one that was there is let go."""
        config, task, method = self.config, self.work.task, get_method(self.config.method)
        for name in ("adapted", "model", "base"):
            vars(self).pop(name, None)  # two of them might not fit
        set_seed(config.seed)
        names, folder = list(task.model_config.get("id2label", {}).values()), config.base.start
        start = None if folder is None else read_start(folder, task.kind, config.base.model, method, config.lora, names)
        loaded = load_base(config.base, task.kind, **task.model_config) if self._given is None else given_base(self._given, task)
        if start is not None:
            start, said = fitted(start, loaded.model)
            self.notes = [said] if said else []
        model: nn.Module = loaded.model
        if (padding := getattr(self.work.processor, "pad_token_id", None)) is not None:
            model.config.pad_token_id = padding  # type: ignore[union-attr]
        if method.lora:
            set_seed(config.seed)
            model = add_lora(loaded, config.lora, task.kind) if start is None else adapted_as(start, loaded, config.lora)
            for layer in lora_layers(model).values() if method.core else ():
                layer.hold_core()
            set_trained(model, method.trained(1))
        self.adapted = AdaptedModel(model, config.base.delta)
        self.model, self.base, self.start = model, self.adapted.base, dict[str, Delta]()
        if start is not None:
            require_base(start, self.base.fingerprint(), folder)
            self.start = dict(start.base_delta)
            self.adapted.load(start.adapter, self.start, start.other)
        self.first = read_model(model)
        kept = start is not None and self.work.trainer is not None
        self.beginning = (self.first, read_other(model), self.start) if kept else ({}, {}, {})
        self._mark = None if start is None else start.mark or ""
        self.stands_on = {} if start is None else standing(start, folder)

    @cached_property
    def identity(self) -> str:
        """The same for all who have the base, its tokenizer, and the result that the run goes on from."""
        begun = "" if self._mark is None else f" {tensors_digest(flatten_adapter('first', self.first), self._mark)}"
        return f"{self.base.fingerprint()} {tokenizer_digest(self.work.processor)}{begun}"


def given_base(model: PreTrainedModel, task: Task) -> Loaded:
    """A copy of a base that is here already.

    Raises:
        ModelError: it tells another number of classes apart than the task has, or has adapters or batch normalisation.
    """
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise ModelError("the model has adapters already: give the plain base, or go on from a result with base.start")
    wanted = task.model_config.get("num_labels", model.config.num_labels)
    if model.config.num_labels != wanted:
        raise ModelError(
            f"the model tells {model.config.num_labels} classes apart, and the task has {wanted}: load it with num_labels={wanted}"
        )
    made = deepcopy(averageable(model, "the model"))
    made.config.update(dict(task.model_config))
    return Loaded(made, [])


class GlobalModel:
    """The server's side of a run: the global model, and the evaluation set.

    Args:
        place: the model.
        ranks: client -> its rank, where they differ.

    Attributes:
        notes: what is to be said of the task's rows before anything is trained.

    Raises:
        ConfigError: the trainer refuses the settings.
    """

    def __init__(self, place: ModelContext, ranks: Mapping[str, int]) -> None:
        self.place, self.ranks = place, ranks
        task = place.work.task
        rows = place.work.tokens(task.eval)
        self.eval: Dataset
        self.eval, notes = usable(rows, place.config.task, "the rows to measure on")
        self.notes = [*task.notes, *notes, *place.notes]
        check_trainer(place.model, self.eval, place.work)

    def initial(self) -> ServerState:
        """The state before round 1."""
        place = self.place
        fresh = server.init(self._first, read_other(place.model), place.config.method, place.config.seed)
        return replace(fresh, base_delta=place.start)

    @cached_property
    def _first(self) -> Adapter:
        """Where cores are trained, only the server works out what is around them, and sends it."""
        place = self.place
        return place.adapted.cores() if get_method(place.config.method).core else place.first

    def federation(self, train_rows: Mapping[str, int], exchange: Exchange) -> Federation:
        """What the round loop needs of this place.

        Args:
            train_rows: client -> its number of training rows, as far as the server knows it.
            exchange: the transport.
        """
        return Federation(
            clients=sorted(train_rows),
            exchange=exchange,
            evaluate=self.evaluate,
            realised=self.realised,
            format=format_of(self.place.model),
            facts=self.facts(train_rows),
            ranks=self.ranks,
        )

    def load(self, state: ServerState) -> nn.Module:
        """The global model of a state."""
        self.place.adapted.load(state.adapter, state.base_delta, state.other)
        return self.place.model

    def evaluate(self, state: ServerState) -> dict[str, float]:
        """The global model on the task's evaluation rows; nothing once there is none."""
        if state.round and get_method(state.method).exactness == "personalised":
            return {}
        return evaluate(self.load(state), self.eval, self.place.work)

    def realised(self, state: ServerState, ideal: Mapping[str, Delta]) -> tuple[Realised, dict[str, float]]:
        """The exactness of what the model's layers compute, and of side paths their own error."""
        self.load(state)
        base = self.place.base
        return base.realised(ideal), {"side_error": error} if (error := base.side_error) else {}

    def _settings(self) -> dict[str, Any]:
        """What has a default that depends on the task, as it is."""
        config, place = self.place.config, self.place
        pairs = place.first.values()
        lora = {"rank": max(pair.rank for pair in pairs), "alpha": max(pair.scaling * pair.rank for pair in pairs)} if pairs else {}
        length = {"max_length": limit(config.task, place.work.processor)} if place.work.task.reads_text else {}
        return {**lora, "learning_rate": training_arguments(config).learning_rate, **length}

    def facts(self, train_rows: Mapping[str, int]) -> dict[str, Any]:
        """For the manifest and the first event."""
        place, config, task = self.place, self.place.config, self.place.work.task
        trained, total = trainable_parameters(place.model)
        return {
            "base_model": os.path.abspath(model) if (model := config.base.model) != DEMO and Path(model).is_dir() else model,
            "base_fingerprint": place.base.fingerprint(),
            "base_identity": place.identity,
            "task": config.task.name,
            "task_type": format_of(place.model).config.get("task_type") or TASK_TYPES[task.kind],
            **({"labels": list(names.values())} if (names := task.model_config.get("id2label")) else {}),
            "headline": task.headline,
            "greater_is_better": task.greater_is_better,
            "trainable_parameters": trained,
            "total_parameters": total,
            "base_bytes": sum(one.numel() * one.element_size() for one in place.model.parameters() if not one.requires_grad),
            "device": str(training_arguments(config).device),
            "settings": self._settings(),
            "disk_bytes": bytes_needed(config, self.initial(), len(train_rows)),
            "base_dtype": config.base.dtype,
            "base_quantization": config.base.quantization,
            **({"base_random_seed": config.seed} if config.base.random_weights else {}),
            **({"start": place.stands_on} if place.stands_on else {}),
            **privacy_facts(config, train_rows),
            "base_delta": place.base.homes,
            "train_rows": dict(train_rows),
            "torch_threads": torch.get_num_threads(),
            "versions": versions(),
        }
