"""What trains: a model with the clients' rows in this process; or, in tests, whatever moves factors."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fedex_lora.client.trainers import REFERENCE, Place
from fedex_lora.client.training import ClientData, evaluate, local_update
from fedex_lora.runs.context import ModelContext
from fedex_lora.runs.emit import Emit
from fedex_lora.storage.events import Step
from fedex_lora.storage.result import safe_name
from fedex_lora.types import Adapter, ClientUpdate, Delta

LOG = logging.getLogger(__name__)


class ModelLearner:
    """The `Learner` of a run: `transformers.Trainer` on the model of a place.

    Args:
        place: the model.
        data: client -> its rows.
        emit: told of training steps.
        log: the party's own.

    Attributes:
        folder: where clients keep their files, in a folder each; None: nowhere.
    """

    folder: Path | None = None

    def __init__(self, place: ModelContext, data: Mapping[str, ClientData], emit: Emit, log: logging.Logger = LOG) -> None:
        self.place, self.data, self._emit, self._log = place, data, emit, log

    @property
    def first(self) -> Adapter:
        return self.place.first

    @property
    def base(self) -> Mapping[str, Delta]:
        return self.place.start

    @property
    def rows(self) -> Mapping[str, int]:
        privacy = self.place.config.privacy
        return {client: privacy.stated(client) or 0 if privacy.is_on else len(self.data[client].train) for client in self.data}

    def load(self, start: Adapter, delta: Mapping[str, Delta], other: Mapping[str, Tensor]) -> None:
        self.place.adapted.load(start, delta, other)

    def read(self) -> tuple[Adapter, Mapping[str, Tensor]]:
        return self.place.adapted.read()

    def measure(self, client: str) -> dict[str, float]:
        if self.place.config.privacy.is_on:  # a number that one row changes
            return {}
        metrics = evaluate(self.place.model, self.data[client].held_out, self.place.work)
        return {f"held_out_{name}": value for name, value in metrics.items()}

    def train(self, client: str, round: int, optimizer: Mapping[str, Any] | None) -> tuple[ClientUpdate, Mapping[str, Any] | None]:
        tell, place, log = self._emit, self.place, self._log
        try:
            return local_update(
                place.model,
                client,
                round,
                self.data[client],
                place.work,
                optimizer,
                lambda step, steps: tell(Step(round=round, client=client, step=step, steps=steps)),
                Place(
                    place.base,
                    self.folder and self.folder / safe_name(client) / REFERENCE,
                    *place.beginning,
                    tell=lambda level, words: log.log(level, "%s: round %d: %s", client, round, words),
                ),
            )
        except Exception:
            if place.work.trainer is not None:  # whatever it has done to the model
                place.build()
            raise
