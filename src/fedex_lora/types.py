"""The nouns of federated LoRA: frozen records of tensors, with their shapes. No mathematics beyond their own products.

Orientation is that of `nn.Linear` everywhere: a module's weight `W` is `out x in`, whatever the layer stores.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedex_lora.errors import AggregationError


@dataclass(frozen=True, eq=False, slots=True)
class LoRAPair:
    """One module's LoRA factors; the module computes `W x + scaling * B A x`.

    Args:
        A: `r x in`.
        B: `out x r`.
        scaling: alpha / r, or alpha / sqrt(r) with rsLoRA.

    Raises:
        AggregationError: the shapes do not chain.

    Example:
        >>> import torch
        >>> LoRAPair(A=torch.ones(2, 5), B=torch.ones(3, 2), scaling=0.5).delta().shape
        torch.Size([3, 5])
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.A.ndim != 2 or self.B.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise AggregationError(
                f"B {tuple(self.B.shape)} times A {tuple(self.A.shape)} is no LoRA product: give A as rank x in and B as out x rank"
            )

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the module's weight."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def parts(self) -> dict[str, Tensor]:
        """What the pair is made of, by letters: what travels, is trained and is kept."""
        return {"A": self.A, "B": self.B}

    @property
    def inner(self) -> "LoRAPair":
        """What is averaged of it: itself."""
        return self

    def around(self, inner: "LoRAPair") -> "LoRAPair":
        """The pair of this kind whose inner one that is."""
        return inner

    def with_part(self, part: str, tensor: Tensor) -> "LoRAPair":
        """The same with another factor."""
        changed: dict[str, Any] = {part: tensor}
        return replace(self, **changed)

    def first(self, rank: int) -> "LoRAPair":
        """The first components only."""
        return self if rank >= self.rank else LoRAPair(A=self.A[:rank], B=self.B[:, :rank], scaling=self.scaling)

    def after(self, rank: int) -> "LowRank":
        """What `first(rank)` leaves out, as `U V`, the scaling in U."""
        return LowRank(U=self.scaling * self.B[:, rank:], V=self.A[rank:])

    def delta(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The dense update `scaling * B A`, `out x in`."""
        return self.scaling * (self.B.to(dtype) @ self.A.to(dtype))

    def low_rank(self) -> "LowRank":
        """The same update as `U V`, the scaling in U."""
        return LowRank(U=self.scaling * self.B, V=self.A)


@dataclass(frozen=True, eq=False, slots=True)
class LowRank:
    """A matrix `U V`: `U` is `out x q`, `V` is `q x in`, any scaling inside; AggregationError if they do not chain. `dense()` is in fp64.

    Example:
        >>> import torch
        >>> LowRank(U=torch.ones(3, 2), V=torch.ones(2, 5)).dense().shape
        torch.Size([3, 5])
    """

    U: Tensor
    V: Tensor

    def __post_init__(self) -> None:
        if self.U.ndim != 2 or self.V.ndim != 2 or self.U.shape[1] != self.V.shape[0]:
            raise AggregationError(
                f"U {tuple(self.U.shape)} times V {tuple(self.V.shape)} is no product: give U as out x q and V as q x in"
            )

    @property
    def rank(self) -> int:
        """The number of columns of U: a bound on the rank of the product."""
        return self.V.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.U.shape[0], self.V.shape[1]

    @property
    def numel(self) -> int:
        return self.U.numel() + self.V.numel()

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.U.to(dtype) @ self.V.to(dtype)


@dataclass(frozen=True, eq=False, slots=True)
class Dense:
    """A matrix `W`, `out x in`, kept whole: the smaller form once factors have more numbers than the matrix."""

    W: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.W.shape[0], self.W.shape[1]

    @property
    def numel(self) -> int:
        return self.W.numel()

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.W.to(dtype)


@dataclass(frozen=True, eq=False, slots=True)
class MovingLowRank(LowRank):
    """What a frozen weight has gained under server momentum, and its velocity: the last change of the *effective* weight `W + s B A`.

    Both are combinations of the same terms, the residuals and adapter products of past rounds: `D = left diag(coefficients) right`,
    velocity `left diag(velocity) right`. So the rank grows with the rounds; that of appended changes would with their square.

    Attributes:
        U, V: D itself, without the last terms where it has none of them; V is a view of `right`.
        left, right: the terms side by side, `out x q` and `q x in`; the last ones are the product of the present adapter.
        coefficients, velocity: `q` numbers in fp64.
    """

    left: Tensor
    right: Tensor
    coefficients: Tensor
    velocity: Tensor

    @classmethod
    def of(cls, left: Tensor, right: Tensor, coefficients: Tensor, velocity: Tensor) -> "MovingLowRank":
        """From the terms and their coefficients."""
        there = coefficients.nonzero()
        used = int(there[-1]) + 1 if len(there) else 0
        U = left[:, :used] * coefficients[:used].to(left.dtype)
        return cls(U=U, V=right[:used], left=left, right=right, coefficients=coefficients, velocity=velocity)

    @property
    def numel(self) -> int:
        """With the terms that D has no part of."""
        return self.left.numel() + self.right.numel() + 2 * self.velocity.numel()


@dataclass(frozen=True, eq=False, slots=True)
class MovingDense(Dense):
    """The same as two matrices, once the terms have more numbers than one: `W` is D, `velocity` is `out x in`."""

    velocity: Tensor

    @property
    def numel(self) -> int:
        return 2 * self.W.numel()


Delta: TypeAlias = LowRank | Dense
"""What a frozen weight has gained: factors, or the matrix where that is smaller; the moving ones also know their last change."""

Adapter: TypeAlias = Mapping[str, LoRAPair]
"""Module path -> LoRA factors."""


@dataclass(frozen=True, eq=False, slots=True)
class ClientUpdate:
    """What one client sends back after local training.

    Args:
        client_id: unique within the round.
        adapter: module path -> `LoRAPair`, as trained.
        num_examples: training rows, the usual weight.
        other: every other trained tensor by name (classification head, biases, `modules_to_save`).
        metrics: numbers that the client reports (loss, its own held-out accuracy); never used in the aggregate.

    Example:
        >>> import torch
        >>> update = ClientUpdate("north", {"q_proj": LoRAPair(A=torch.ones(2, 5), B=torch.ones(3, 2))}, num_examples=120)
        >>> update.adapter["q_proj"].rank
        2
    """

    client_id: str
    adapter: Adapter
    num_examples: int
    other: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class Aggregate:
    """The result of one aggregation.

    Attributes:
        adapter: what the clients go on with.
        residual: module path -> what the frozen base gains this round, scaling included; absent where it gains nothing.
        other: the averaged other tensors.
        weights: client id -> p_i, float64, summing to one.
        method: the method's name.
        dropped: module path -> Frobenius norm of what a truncation left out, scaling included; empty for methods that truncate nothing.

    Example: see `fedex_lora.aggregate`, which gives one.
    """

    adapter: Adapter
    residual: Mapping[str, LowRank]
    other: Mapping[str, Tensor]
    weights: Mapping[str, float]
    method: str
    dropped: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class ServerState:
    """All that a server knows between rounds: a value, never changed in place.

    Attributes:
        method: the method's name.
        round: rounds completed; also the version of `base_delta`.
        adapter: the global adapter.
        base_delta: module path -> what the frozen base has gained since the pretrained model (`W = W0 + base_delta`).
        other: the other trained tensors.
        seed: of the run, for factors that start anew.
        personal: client -> its own factors, for methods whose clients keep them (and let the server know them).
        velocity: tensor -> its last change, of those with a momentum of their own: other tensors by name, factors as `factor|MODULE|A`.

    Example: see `fedex_lora.aggregation.server_state.step`, which makes the next one.
    """

    method: str
    round: int
    adapter: Adapter
    base_delta: Mapping[str, Delta]
    other: Mapping[str, Tensor]
    seed: int = 0
    personal: Mapping[str, Adapter] = field(default_factory=dict)
    velocity: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class Motion:
    """What the server adds to what a method makes of the clients' models (docs/momentum.md), as it was before the round.

    Attributes:
        momentum, learning_rate: b and h.
        adapter: the global one before the round.
        change: module path -> `W_{t-1} - W_{t-2}`, where that is not zero.
        other, other_change: the same of the other tensors, where these move too.
    """

    momentum: float
    learning_rate: float
    adapter: Adapter
    change: Mapping[str, Delta]
    other: Mapping[str, Tensor] = field(default_factory=dict)
    other_change: Mapping[str, Tensor] = field(default_factory=dict)
