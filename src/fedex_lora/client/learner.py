"""What trains: a model with the clients' rows in this process; or, in tests, whatever moves factors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fedex_lora.client.client import Model
from fedex_lora.types import Adapter, ClientUpdate, Delta


class Learner(Model, Protocol):
    """One model on which clients train in turn.

    Attributes:
        folder: where they keep their files, in a folder each; set by whoever drives them.
    """

    folder: Path | None

    @property
    def first(self) -> Adapter:
        """The initial adapter: the same for everyone who has the configuration and the base."""

    @property
    def base(self) -> Mapping[str, Delta]:
        """What the frozen base has gained before the first round; as `first`."""

    @property
    def rows(self) -> Mapping[str, int]:
        """Client -> how many training rows it has, or states where it is private, of the clients that are here."""

    def measure(self, client: str) -> dict[str, float]:
        """The model as it stands on the client's held-out rows, as `held_out_NAME`; nothing where it has none, or is private."""

    def train(self, client: str, round: int, optimizer: Mapping[str, Any] | None) -> tuple[ClientUpdate, Mapping[str, Any] | None]:
        """Train the model as it stands: the update, and the optimiser's state.

        Raises:
            TrainingError: see `client.local_update`.
        """
