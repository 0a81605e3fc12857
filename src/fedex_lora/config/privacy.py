"""`[privacy]`: local training that says little of any single record, by DP-SGD (Abadi et al. 2016), accounted for by each party."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, field_validator

from fedex_lora.config.tables import ConfigTable

Count = Annotated[int, Field(ge=1, le=2**40)]


class Privacy(ConfigTable):
    """Record-level differential privacy of what a client sends (docs/privacy.md). Over Flower all but `clip_norm` is each node's own.

    Example:
        >>> Privacy(epsilon=3, rows={"north": 500, "south": 800}, ledger="ledger.jsonl").stated("north")
        500
    """

    epsilon: float | None = Field(
        None,
        gt=0,
        le=100,
        description="Bound on what the run's messages tell of one record of a client, at most 100. Set: training is private.",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="Of (epsilon, delta): less than one over the rows.")
    clip_norm: float = Field(
        1.0, ge=1e-6, le=1e6, description="C: each record's gradient, over all that is trained, is scaled down to this L2 norm at most."
    )
    rows: Count | dict[str, Count] | None = Field(
        None,
        description="Required with epsilon: the number of training rows a client states, or client -> number: its weight, steps and "
        "sampling rate. The true number is nobody's business, for one record changes it.",
    )
    budget: float | None = Field(
        None, gt=0, le=100, description="The most epsilon of all runs on a client's rows together, at most 100; by default `epsilon`."
    )
    ledger: Path | None = Field(
        None, description="Required with epsilon: the file in which all training on these rows is recorded (fedex-lora ledger)."
    )
    accountant: Literal["prv", "rdp"] = Field(
        "prv",
        description="How epsilon is computed: numerically (Gopi et al. 2021), or by Rényi divergences (Mironov et al. 2019), which is "
        "looser.",
    )

    @field_validator("rows", mode="wrap")
    @classmethod
    def _in_plain_words(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        try:
            return check(value)
        except ValidationError:
            raise ValueError(
                f"privacy.rows = {value!r}: give a whole number from 1 up, or one for each client: {{ north = 500 }}"
            ) from None

    @property
    def is_on(self) -> bool:
        """Is training private?"""
        return self.epsilon is not None

    def stated(self, client: str) -> int | None:
        """The number of rows that a client states; None where it says none."""
        return self.rows.get(client) if isinstance(self.rows, dict) else self.rows
