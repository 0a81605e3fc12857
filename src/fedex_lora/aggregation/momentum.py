"""Server momentum on effective weights, taken up by the frozen base: `docs/momentum.md`.

With W the effective weight `W0 + D + P` of a module, `P = s B A` the adapter's product, and E what a method makes of the clients' models,

    W_t = W_(t-1) + V_t,    V_t = h (E_t - W_(t-1)) + b V_(t-1),    V_0 = 0,

where `E_t - W_(t-1) = s R_t + P_t - P_(t-1)`, s R the residual. The adapter stays what the method makes it, so the base takes up the rest:
`D_t = D_(t-1) + V_t - P_t + P_(t-1)`. All of that is known to who has base and adapter before the round and is sent R and P of it, so the
server and its clients compute it alike, to the same bits, and nothing travels for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedex_lora.aggregation.factors import recompressed
from fedex_lora.aggregation.lowrank import concatenate, factorise, finite, linear_combination, parts
from fedex_lora.config import ServerOptimizer
from fedex_lora.errors import AggregationError
from fedex_lora.types import Adapter, Delta, Dense, LoRAPair, LowRank, MovingDense, MovingLowRank

NEGLIGIBLE = 2.0**-40  # a coefficient beside 1: what is left of a product after 40 rounds at b = 0.5


def moved_base(
    base_delta: Mapping[str, Delta], residual: Mapping[str, LowRank], before: Adapter, after: Adapter, pace: ServerOptimizer
) -> dict[str, Delta]:
    """`D_t` of every module, with its velocity.

    Args:
        base_delta: `D_(t-1)`, with the velocity `V_(t-1)` where there is one.
        residual: module path -> `s R_t`.
        before, after: the global adapter before the round and after it; a module that is missing has a product of zero.
        pace: b and h.

    Raises:
        AggregationError: a matrix that is not finite, of factors that are.

    Example:
        >>> pair = lambda: LoRAPair(A=torch.randn(2, 30), B=torch.randn(40, 2))
        >>> first, second = {"q": pair()}, {"q": pair()}
        >>> once = moved_base({}, {}, first, second, ServerOptimizer(momentum=0.5))  # W_1 = P_1: the base gains nothing yet
        >>> twice = moved_base(once, {}, second, second, ServerOptimizer(momentum=0.5))  # W_2 = P_1 + 0.5 (P_1 - P_0)
        >>> want = 0.5 * (second["q"].delta() - first["q"].delta())
        >>> once["q"].rank, bool(torch.allclose(twice["q"].dense(), want))
        (0, True)
    """
    result = dict(base_delta)
    for module in dict.fromkeys([*base_delta, *residual, *before, *after]):
        new = _moved(base_delta.get(module), residual.get(module), _product(before.get(module)), _product(after.get(module)), pace)
        if new is not None and not finite(*((new.W,) if isinstance(new, Dense) else (new.U, new.V))):
            raise AggregationError(f"the base delta of {module} overflows: lower server.momentum or server.learning_rate")
        if new is not None:
            result[module] = new
    return result


class _Terms(NamedTuple):
    """Some of the terms, with their coefficients in D and in the velocity (fp64)."""

    of: LowRank
    d: Tensor
    v: Tensor


def _moved(delta: Delta | None, gain: LowRank | None, before: LowRank | None, after: LowRank | None, pace: ServerOptimizer) -> Delta | None:
    """One module; before and after are the adapter's products."""
    if isinstance(delta, Dense):
        return _moved_matrix(delta, gain, before, after, pace)
    b, h = pace.momentum, pace.learning_rate
    old, product = _split(delta, before)
    old = [_alive(_Terms(of, d + b * v, b * v), b) for of, d, v in old]
    product = [_alive(_Terms(of, d + (b * v - h) + 1, b * v - h), b) for of, d, v in product]
    new = [_constant(term, d, h) for term, d in ((gain, h), (after, h - 1)) if term is not None]
    terms = [*old, *product, *new]
    if not terms:
        return None
    whole, d, v = concatenate([term.of for term in terms]), torch.cat([term.d for term in terms]), torch.cat([term.v for term in terms])
    made = MovingLowRank.of(whole.U, whole.V, d, v)
    if whole.numel < made.shape[0] * made.shape[1]:
        return made
    W, change = made.dense(), (whole.U.double() * v) @ whole.V.double()
    return _matrix(W, change, whole.U.dtype, b)


def _moved_matrix(delta: Dense, gain: LowRank | None, before: LowRank | None, after: LowRank | None, pace: ServerOptimizer) -> Dense:
    b, h = pace.momentum, pace.learning_rate
    step = _weighted([(h, gain), (h, after), (-h, before)])
    last = delta.velocity.double() if isinstance(delta, MovingDense) else torch.zeros(delta.shape, dtype=torch.float64)
    change = b * last + step
    W = delta.dense() + change + _weighted([(-1.0, after), (1.0, before)])
    return _matrix(W, change, delta.W.dtype, b)


def _weighted(terms: Sequence[tuple[float, LowRank | None]]) -> Tensor | float:
    """`sum_j c_j T_j` in fp64; zero of none."""
    there = [LowRank(U=c * term.U.double(), V=term.V.double()) for c, term in terms if term is not None]
    return concatenate(there).dense() if there else 0.0


def _matrix(W: Tensor, change: Tensor, dtype: torch.dtype, b: float) -> Dense:
    """Without momentum nobody needs the velocity."""
    return MovingDense(W=W.to(dtype), velocity=change.to(dtype)) if b else Dense(W=W.to(dtype))


def _split(delta: LowRank | None, product: LowRank | None) -> tuple[list[_Terms], list[_Terms]]:
    """The terms of D without those of the present adapter's product, and those."""
    last = 0 if product is None else product.rank
    if isinstance(delta, MovingLowRank) and len(delta.velocity) < last:
        raise AggregationError("a base delta lacks the product of its adapter among its terms: ask for a snapshot")
    if isinstance(delta, MovingLowRank):
        whole = _Terms(LowRank(U=delta.left, V=delta.right), delta.coefficients, delta.velocity)
        return [_columns(whole, slice(delta.right.shape[0] - last))], [_columns(whole, slice(delta.right.shape[0] - last, None))]
    return [_constant(term, 1.0, 0.0) for term in (delta,) if term is not None], [
        _constant(term, 0.0, 0.0) for term in (product,) if term is not None
    ]


def _alive(terms: _Terms, b: float) -> _Terms:
    """Without those that are no part of D any more, and will not be."""
    alive = (terms.d.abs() > NEGLIGIBLE) | (b * terms.v.abs() > NEGLIGIBLE)
    return terms if bool(alive.all()) else _columns(terms, alive)


def _columns(terms: _Terms, some: Any) -> _Terms:
    return _Terms(LowRank(U=terms.of.U[:, some], V=terms.of.V[some]), terms.d[some], terms.v[some])


def _constant(term: LowRank, d: float, v: float) -> _Terms:
    return _Terms(term, *(torch.full((term.rank,), number, dtype=torch.float64) for number in (d, v)))


def _product(pair: LoRAPair | None) -> LowRank | None:
    """`s B A`; None where it is zero."""
    return pair.low_rank() if pair is not None and bool(pair.A.any()) and bool(pair.B.any()) else None


def halted(base_delta: Mapping[str, Delta]) -> dict[str, Delta]:
    """The same after a round that changed nothing: its velocity is zero."""
    made = dict(base_delta)
    for module, delta in base_delta.items():
        if isinstance(delta, MovingLowRank | MovingDense):
            made[module] = replace(delta, velocity=torch.zeros_like(delta.velocity))
    return made


def last_change(delta: Delta | None) -> Delta | None:
    """The velocity of one module; None where there is none, or where it is zero: nothing was changed by a round that was skipped."""
    if not isinstance(delta, MovingDense | MovingLowRank) or not bool(delta.velocity.any()):
        return None
    if isinstance(delta, MovingDense):
        return Dense(W=delta.velocity)
    return LowRank(U=(delta.left * delta.velocity).to(delta.left.dtype), V=delta.right)


def gained(before: Mapping[str, Delta], after: Mapping[str, Delta]) -> dict[str, LowRank]:
    """`D_t - D_(t-1)` per module, as factors: what the base gained in a round, with what momentum added to the residual."""
    made: dict[str, LowRank] = {}
    for module, delta in after.items():
        change = linear_combination([(1.0, delta), *([(-1.0, before[module])] if module in before else [])])
        part, dtype = recompressed(change) if isinstance(change, LowRank) else factorise(change), next(iter(parts(delta).values())).dtype
        if part.rank:
            made[module] = LowRank(U=part.U.to(dtype), V=part.V.to(dtype))
    return made


def moved_tensors(
    before: Mapping[str, Tensor], mean: Mapping[str, Tensor], velocity: Mapping[str, Tensor], pace: ServerOptimizer
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors that move by themselves: `x_t = x_(t-1) + v_t`, `v_t = h (mean - x_(t-1)) + b v_(t-1)`, in fp64, rounded once.

    Returns:
        (name -> x_t, name -> v_t).
    """
    after, change = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in mean.items():
        old = before[name].double()
        step = (tensor.double() - old) * pace.learning_rate
        if name in velocity:
            step = step + pace.momentum * velocity[name].double()
        after[name], change[name] = (old + step).to(tensor.dtype), step.to(tensor.dtype)
    return after, change
