"""An adapter with a core: ordinary LoRA to whoever reads it, and its own parts to whoever averages, sends or keeps it."""

from dataclasses import dataclass, field

from torch import Tensor

from fedex_lora.errors import AggregationError
from fedex_lora.types import LoRAPair


@dataclass(frozen=True, eq=False, slots=True)
class CorePair(LoRAPair):
    """`B = U C`: a trained core C between two frozen factors (LoRA-XS, arXiv 2405.17604), so `W x + scaling * U C A x`.

    B is made of U and C, summed in fp64, so whoever reads a pair reads an ordinary one.

    Args:
        U: `out x r`.
        C: `r x r`.

    Example:
        >>> import torch
        >>> pair = CorePair(A=torch.eye(2, 5), U=torch.eye(3, 2), C=torch.ones(2, 2))
        >>> pair.B.shape, list(pair.parts), pair.inner.shape
        (torch.Size([3, 2]), ['A', 'U', 'C'], (2, 5))
    """

    B: Tensor = field(init=False)
    U: Tensor = field(kw_only=True)
    C: Tensor = field(kw_only=True)

    def __post_init__(self) -> None:
        if self.U.ndim != 2 or self.C.ndim != 2 or {*self.C.shape} != {self.U.shape[1]}:
            raise AggregationError(f"a core {tuple(self.C.shape)} does not go with U {tuple(self.U.shape)}: give U as out x rank, C square")
        object.__setattr__(self, "B", (self.U.double() @ self.C.double()).to(self.C.dtype))
        LoRAPair.__post_init__(self)

    @property
    def parts(self) -> dict[str, Tensor]:
        return {"A": self.A, "U": self.U, "C": self.C}

    @property
    def inner(self) -> LoRAPair:
        """`C A`, an update of `r x in`."""
        return LoRAPair(A=self.A, B=self.C, scaling=self.scaling)

    def around(self, inner: LoRAPair) -> "CorePair":
        return CorePair(A=inner.A, U=self.U, C=inner.B, scaling=inner.scaling)
