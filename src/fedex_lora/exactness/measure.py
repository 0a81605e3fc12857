"""Numbers from types, no I/O: how exact a round was, how far plain averaging is off, and how large things are.

Everything here is fp64 and uses the plain formulas (mean of products minus product of means), not the closed form that
`aggregation` computes with, and linear algebra of its own: it checks that code and shares nothing with it but container types and the
rows of `METHODS`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedex_lora.aggregation import get_method
from fedex_lora.exactness.algebra import above, effective_rank, image, norm, relative_error, summed, worst
from fedex_lora.types import Adapter, Aggregate, ClientUpdate, Delta, LoRAPair, LowRank, Motion, ServerState

T = TypeVar("T")


@dataclass(frozen=True)
class Exactness:
    """|got - ideal| and |ideal| (Frobenius) per module, of updates relative to the pretrained weights.

    Attributes:
        error: module path -> |(W_eff - W0) - (E - W0)|.
        ideal: module path -> |E - W0|, a number (`Result.ideal` has the matrices).
        effective_rank: module path -> `effective_rank` of got - ideal, where it was asked for.
    """

    error: Mapping[str, float]
    ideal: Mapping[str, float]
    effective_rank: Mapping[str, float] = field(default_factory=dict)

    @property
    def per_module(self) -> dict[str, float]:
        """Module path -> |got - ideal| / |ideal|."""
        return {module: relative_error(self.error[module], self.ideal[module]) for module in self.error}

    @property
    def max_relative_error(self) -> float:
        """The worst module's relative error; NaN where one is NaN."""
        return worst(self.per_module.values())

    @property
    def total_relative_error(self) -> float:
        """|got - ideal| / |ideal| over all modules together."""
        return relative_error(math.hypot(*self.error.values()), math.hypot(*self.ideal.values()))


@dataclass(frozen=True)
class Realised(Exactness):
    """The same of what a model's own layers compute.

    Attributes:
        rounding: module path -> what rounding costs by itself, `eps |W|`, in the precision that the module computes in.
    """

    rounding: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> tuple[float, float]:
        """(|got - ideal|, its rounding), relative to |ideal|, of the module that is furthest above its own rounding.

        A module that no row reached has no update, and so counts relative to that of all modules together.

        >>> Realised(error={"a": 1e-6, "b": 9e-6}, ideal={"a": 1.0, "b": 0.0}, rounding={"a": 2e-6, "b": 1e-6}).worst
        (9e-06, 1e-06)
        """
        if not self.error:
            return 0.0, 0.0
        finite = {name: size if math.isfinite(size) else math.nan for name, size in self.rounding.items()}
        module = max(self.error, key=lambda name: above(self.error[name], finite[name]))
        size = self.ideal[module] or math.hypot(*self.ideal.values())
        return relative_error(self.error[module], size), relative_error(self.rounding[module], size)


USELESS_TAIL = 0.7  # of the residual's norm: less than half of its energy is kept
Held = Mapping[str, Mapping[str, Delta]]
"""client -> module path -> what the client's base has beside the common one (see `server_state.start_of`)."""


def ideal_update(
    base_delta: Mapping[str, Delta], updates: Sequence[ClientUpdate], weights: Mapping[str, float], held: Held | None = None
) -> Mapping[str, Delta]:
    """`E - W0` per module, `E = sum_i p_i (W0 + D + held_i + s_i B_i A_i)` the mean of the participants' models (paper, eq. 7-9), in fp64.

    A module's is made when it is asked for: all of them would be twice the memory of the updates.

    Args:
        base_delta: D, what the base had gained when the participants started.
        updates: the participants' updates.
        weights: client id -> p_i.
        held: what single clients held beside D.
    """

    def of(module: str) -> Delta:
        terms: list[tuple[float, Delta]] = [(weights[update.client_id], _product(update.adapter[module])) for update in updates]
        for update in updates:
            terms += _times(weights[update.client_id], (held or {}).get(update.client_id, {}), module)
        return summed(terms + _times(1.0, base_delta, module))

    return Made(updates[0].adapter, of)


def moved_ideal(ideal: Mapping[str, Delta], base_delta: Mapping[str, Delta], motion: Motion) -> Mapping[str, Delta]:
    """`W_t - W0 = X + h (E - W0 - X) + b (W_{t-1} - W_{t-2})` per module, with `X = W_{t-1} - W0 = D + s B A`, in fp64.

    Args:
        ideal: `E - W0`.
        base_delta: D before the round.
        motion: of the server.
    """
    here = effective_update(motion.adapter, base_delta)

    def of(module: str) -> Delta:
        terms: list[tuple[float, Delta]] = [(motion.learning_rate, ideal[module]), (1 - motion.learning_rate, here[module])]
        return summed(terms + _times(motion.momentum, motion.change, module))

    return Made(ideal, of)


def change_error(before: Mapping[str, Delta], after: Mapping[str, Delta], recorded: Mapping[str, Delta]) -> dict[str, float]:
    """Module path -> |(W_t - W_{t-1}) - what the server took down of it|, relative to |W_t - W0|.

    Args:
        before, after: `W - W0` (see `effective_update`).
        recorded: the last change, which the next round repeats.
    """
    errors = {}
    for module, now in after.items():
        terms: list[tuple[float, Delta]] = [(1.0, now), (-1.0, before[module])]
        errors[module] = relative_error(norm(summed(terms + _times(-1.0, recorded, module))), norm(now))
    return errors


def effective_update(adapter: Adapter, base_delta: Mapping[str, Delta]) -> Mapping[str, Delta]:
    """`D + s B A` per module, in fp64: what a model with these factors has beside W0."""
    return Made(adapter, lambda module: summed([(1.0, _product(adapter[module])), *_times(1.0, base_delta, module)]))


class Made(Mapping[str, T]):
    """Name -> what a function makes of it, anew whenever it is asked for."""

    def __init__(self, modules: Iterable[str], make: Callable[[str], T]) -> None:
        self._modules, self._make = dict.fromkeys(modules), make

    def __getitem__(self, module: str) -> T:
        if module not in self._modules:
            raise KeyError(module)
        return self._make(module)

    def __contains__(self, module: object) -> bool:
        return module in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


def exactness(ideal: Mapping[str, Delta], adapter: Adapter, base_delta: Mapping[str, Delta]) -> Exactness:
    """The model `W0 + base_delta + s B A` against `W0 + ideal`, from the factors."""
    error, size = dict[str, float](), dict[str, float]()
    for module, delta in ideal.items():
        terms: list[tuple[float, Delta]] = [(1.0, _product(adapter[module])), (-1.0, delta)]
        error[module] = norm(summed(terms + _times(1.0, base_delta, module)))
        size[module] = norm(delta)
    return Exactness(error=error, ideal=size)


def audit(
    before: ServerState, updates: Sequence[ClientUpdate], weights: Mapping[str, float], after: ServerState, held: Held | None = None
) -> Exactness:
    """One round's exactness: the state after it against the mean of the participants' models."""
    return exactness(ideal_update(before.base_delta, updates, weights, held), after.adapter, after.base_delta)


def deviation(result: Aggregate, updates: Sequence[ClientUpdate]) -> Exactness:
    """What averaging the factors alone would lose this round, `|s Bbar Abar - M| / |M|`, `M = sum_i p_i s_i B_i A_i` (paper, section 6).

    Factors of lower rank are padded with zeros.
    """
    ideal = ideal_update({}, updates, result.weights)
    error, rank = dict[str, float](), dict[str, float]()
    for module, lost in residual(result, updates).items():
        small = image(lost)
        error[module], rank[module] = float(torch.linalg.matrix_norm(small)), effective_rank(small)
    return Exactness(error=error, ideal={module: norm(delta) for module, delta in ideal.items()}, effective_rank=rank)


def residual(result: Aggregate, updates: Sequence[ClientUpdate]) -> Mapping[str, Delta]:
    """`M - s Bbar Abar` per module, in fp64, whatever the method's `Aggregate.residual` is; `M` as in `deviation`. Made when asked for."""
    ideal = ideal_update({}, updates, result.weights)
    return Made(result.adapter, lambda module: summed([(1.0, ideal[module]), (-1.0, _product(_mean_factors(module, result, updates)))]))


def per_module(deviation: Exactness, adapter: Adapter) -> dict[str, list[Any]]:
    """A round's deviation as columns, a row a module, for its event.

    Returns:
        `module`; `deviation` |s Bbar Abar - M| and `ideal` |M| (Frobenius); `scaled`, the deviation divided by sqrt(out in), its root
        mean square over the weight's entries; `effective_rank` of what is lost. Six significant digits.
    """
    names = sorted(deviation.error)
    entries = {name: math.sqrt(math.prod(adapter[name].shape)) for name in names}
    columns = {
        "deviation": [deviation.error[name] for name in names],
        "ideal": [deviation.ideal[name] for name in names],
        "scaled": [deviation.error[name] / entries[name] for name in names],
        "effective_rank": [deviation.effective_rank[name] for name in names],
    }
    return {"module": names} | {key: [float(f"{value:.6g}") for value in values] for key, values in columns.items()}


def drift(updates: Sequence[ClientUpdate], weights: Mapping[str, float]) -> dict[str, float]:
    """Client -> `|s_i B_i A_i - M| / |M|` over all modules: how far what it trained is from the participants' mean.

    From the inner products of the clients' updates, so a drift below 1e-8 is rounding.
    """
    inner = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    owner = {
        module: [index for index, update in enumerate(updates) for _ in range(update.adapter[module].rank)] for module in updates[0].adapter
    }
    for module, index in owner.items():
        U = torch.cat([_product(update.adapter[module]).U for update in updates], dim=1)
        V = torch.cat([update.adapter[module].A.double() for update in updates])
        of = torch.nn.functional.one_hot(torch.tensor(index), len(updates)).double()
        inner += of.T @ ((U.T @ U) * (V @ V.T)) @ of
    p = torch.tensor([weights[update.client_id] for update in updates], dtype=torch.float64)
    mean = p @ inner @ p
    apart, size = (inner.diag() - 2 * inner @ p + mean).clamp(min=0).sqrt(), float(mean.clamp(min=0).sqrt())  # `clamp` keeps NaN
    return {update.client_id: float(f"{relative_error(float(far), size):.6g}") for update, far in zip(updates, apart, strict=True)}


def _mean_factors(module: str, result: Aggregate, updates: Sequence[ClientUpdate]) -> LoRAPair:
    """`Abar`, `Bbar`, in the scaling that the aggregate keeps."""
    scaling = result.adapter[module].scaling
    weighted = [(result.weights[update.client_id], update.adapter[module]) for update in updates]
    A = _sum([weight * pair.A.double() for weight, pair in weighted])
    B = _sum([(weight * pair.scaling / scaling) * pair.B.double() for weight, pair in weighted])
    return LoRAPair(A=A, B=B, scaling=scaling)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, or of matrices padded with zeros to the largest."""
    if tensors[0].ndim == 2:
        rows, columns = (max(tensor.shape[axis] for tensor in tensors) for axis in (0, 1))
        tensors = [torch.nn.functional.pad(tensor, (0, columns - tensor.shape[1], 0, rows - tensor.shape[0])) for tensor in tensors]
    return torch.stack(list(tensors)).sum(0)


def tail(result: Aggregate) -> float:
    """What a truncation dropped, as a share of the whole residual: `|R - R'| / |R|` over all modules."""
    dropped = math.hypot(*result.dropped.values())
    kept = math.hypot(*(norm(gain) for gain in result.residual.values()))
    return dropped / math.hypot(dropped, kept) if dropped else 0.0


def useless_truncation(result: Aggregate) -> str | None:
    """What to say when a truncation of the residual costs bytes and buys little; None otherwise."""
    share = tail(result)
    if share <= USELESS_TAIL or get_method(result.method).residual_policy != "truncate":
        return None
    advice = "truncate less, or use fedex (all of it) or fedit (none of it)"
    return f"the residual's spectrum is so flat that truncation is useless: {share:.0%} of its norm is dropped; {advice}"


def other_errors(
    other: Mapping[str, Tensor], updates: Sequence[ClientUpdate], weights: Mapping[str, float], motion: Motion | None = None
) -> dict[str, float]:
    """Name -> |x - sum p_i x_i| / sum p_i |x_i| of the other tensors (heads, modules trained whole), in fp64.

    The clients' own size is the denominator: a bias of two numbers may well average to nearly nothing. Where the server moves these
    tensors, too, the ideal is `x + h (sum p_i x_i - x) + b (x_{t-1} - x_{t-2})`.
    """
    errors = {}
    for name, tensor in other.items():
        mean = _sum([weights[update.client_id] * update.other[name].double() for update in updates])
        if motion is not None and name in motion.other:
            here = motion.other[name].double()
            mean = here + motion.learning_rate * (mean - here)
            mean = mean + motion.momentum * motion.other_change[name].double() if name in motion.other_change else mean
        size = math.fsum(weights[update.client_id] * float(torch.linalg.vector_norm(update.other[name].double())) for update in updates)
        errors[name] = relative_error(float(torch.linalg.vector_norm(tensor.double() - mean)), size)
    return errors


def _times(weight: float, deltas: Mapping[str, Delta], module: str) -> list[tuple[float, Delta]]:
    """The module's term of a sum; none where it has no delta."""
    return [(weight, deltas[module])] if module in deltas else []


def _product(pair: LoRAPair) -> LowRank:
    return LowRank(U=pair.scaling * pair.B.double(), V=pair.A.double())
