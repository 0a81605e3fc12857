"""What trains: a model with the clients' rows in this process; or, in tests, whatever moves factors."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from fedex_lora.answers import Emit
from fedex_lora.client import ClientData, evaluate, local_update
from fedex_lora.peft_io import write_model
from fedex_lora.place import Place
from fedex_lora.types import Adapter, ClientUpdate, Delta


class Learner(Protocol):
    """One model on which clients train in turn."""

    @property
    def first(self) -> Adapter:
        """The initial adapter: the same for everyone who has the configuration and the base."""

    @property
    def rows(self) -> Mapping[str, int]:
        """Client -> how many training rows it has, of the clients that are here."""

    def put(self, start: Adapter, delta: Mapping[str, Delta], other: Mapping[str, Tensor]) -> None:
        """Write into the model the factors to train, what the frozen base has gained, and the other trained tensors."""

    def measure(self, client: str) -> dict[str, float]:
        """The model as it stands on the client's held-out rows, as `held_out_NAME`; nothing where it has none."""

    def train(self, client: str, round: int, optimizer: Mapping[str, Any] | None) -> tuple[ClientUpdate, Mapping[str, Any] | None]:
        """Train the model as it stands: the update, and the optimiser's state.

        Raises:
            TrainingError: see `client.local_update`.
        """


class ModelLearner:
    """The `Learner` of a run: `transformers.Trainer` on the model of a place.

    Args:
        place: the model.
        data: client -> its rows.
        emit: told of training steps.
    """

    def __init__(self, place: Place, data: Mapping[str, ClientData], emit: Emit) -> None:
        self.place, self.data, self._emit = place, data, emit

    @property
    def first(self) -> Adapter:
        return self.place.first

    @property
    def rows(self) -> Mapping[str, int]:
        return {client: len(data.train) for client, data in self.data.items()}

    def put(self, start: Adapter, delta: Mapping[str, Delta], other: Mapping[str, Tensor]) -> None:
        self.place.base.set(delta)
        write_model(self.place.model, start, other)

    def measure(self, client: str) -> dict[str, float]:
        metrics = evaluate(self.place.model, self.data[client].held_out, self.place.work)
        return {f"held_out_{name}": value for name, value in metrics.items()}

    def train(self, client: str, round: int, optimizer: Mapping[str, Any] | None) -> tuple[ClientUpdate, Mapping[str, Any] | None]:
        tell = self._emit
        return local_update(
            self.place.model,
            client,
            round,
            self.data[client],
            self.place.work,
            optimizer,
            lambda step, steps: tell("step", round=round, client=client, step=step, steps=steps),
        )
