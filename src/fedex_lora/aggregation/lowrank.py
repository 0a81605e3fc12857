"""Algebra of low-rank matrices kept as factors. Pure functions; nothing here forms an `out x in` matrix unless it is smaller."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedex_lora.types import Adapter, Delta, Dense, LoRAPair, LowRank, MovingDense, MovingLowRank


def finite(*tensors: Tensor) -> bool:
    """Is every number in them finite? One sum finds NaN and infinity; it may overflow by itself, so then every number is looked at."""
    return all(math.isfinite(tensor.sum()) or bool(torch.isfinite(tensor).all()) for tensor in tensors)


def concatenate(terms: Sequence[LowRank]) -> LowRank:
    """The sum of products as one product: `sum_j U_j V_j = [U_1 .. U_t] [V_1; ..; V_t]`."""
    return LowRank(U=torch.cat([term.U for term in terms], dim=1), V=torch.cat([term.V for term in terms], dim=0))


def add_weighted(gains: Mapping[str, LowRank], others: Sequence[tuple[float, Mapping[str, LowRank]]]) -> dict[str, LowRank]:
    """`gains + sum_j w_j others_j` per module, as concatenated factors."""
    terms = {module: [gain] for module, gain in gains.items()}
    for weight, other in others:
        for module, delta in other.items():
            terms.setdefault(module, []).append(LowRank(U=weight * delta.U, V=delta.V))
    return {module: concatenate(parts) if len(parts) > 1 else parts[0] for module, parts in terms.items()}


def parts(delta: Delta) -> dict[str, Tensor]:
    """All that a delta is made of, by name: `U V`, `W`, or what a moving one is made of (`types.MovingLowRank`)."""
    if isinstance(delta, MovingLowRank):
        return {name: getattr(delta, name) for name in ("left", "right", "coefficients", "velocity")}
    if isinstance(delta, MovingDense):
        return {"W": delta.W, "velocity": delta.velocity}
    return {"W": delta.W} if isinstance(delta, Dense) else {"U": delta.U, "V": delta.V}


def from_parts(found: Mapping[str, Tensor]) -> Delta:
    """The inverse of `parts`.

    Raises:
        ValueError: these are the parts of no delta, or they do not chain.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if not all(tensor.is_floating_point() for tensor in found.values()):
        raise ValueError(f"{shapes}, which are no floating-point numbers")
    match sorted(found):
        case ["U", "V"] if _chain(shapes["U"], shapes["V"]):
            return LowRank(**found)
        case ["coefficients", "left", "right", "velocity"] if (
            _chain(shapes["left"], shapes["right"])
            and shapes["coefficients"] == shapes["velocity"] == shapes["right"][:1]
            and found["coefficients"].dtype == found["velocity"].dtype == torch.float64
        ):
            return MovingLowRank.of(**found)
        case ["W"] if len(shapes["W"]) == 2:
            return Dense(**found)
        case ["W", "velocity"] if len(shapes["W"]) == 2 and shapes["velocity"] == shapes["W"]:
            return MovingDense(**found)
    raise ValueError(f"{shapes}: it must be U and V that chain, or W alone; or the same with its velocity")


def _chain(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    return len(left) == len(right) == 2 and left[1] == right[0]


def same_bits(left: Delta | None, right: Delta | None) -> bool:
    """Are two deltas the same in form and in every bit?"""
    if left is right or left is None or right is None:
        return left is right
    ours, theirs = parts(left), parts(right)
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def smallest(delta: Delta) -> Delta:
    """The form with fewer numbers: factors have `q (out + in)`, the matrix `out * in` (summed in fp64, kept in the factors' dtype)."""
    if isinstance(delta, LowRank) and delta.numel >= delta.shape[0] * delta.shape[1]:
        return Dense(W=delta.dense().to(delta.U.dtype))
    return delta


def add(delta: Delta | None, gain: LowRank) -> Delta:
    """`delta + gain`, in the smaller of the two forms.

    Deterministic in its arguments, so parties that add the same gains in the same order hold the same bits.
    """
    if delta is None:
        return smallest(gain)
    if isinstance(delta, Dense):
        return Dense(W=(delta.dense() + gain.dense()).to(delta.W.dtype))
    return smallest(concatenate([delta, gain]))


def linear_combination(terms: Sequence[tuple[float, Delta]]) -> Delta:
    """`sum_j c_j D_j` in fp64: as factors when every term has factors, else as a matrix."""
    factors = [LowRank(U=c * term.U.double(), V=term.V.double()) for c, term in terms if isinstance(term, LowRank)]
    if len(factors) == len(terms):
        return concatenate(factors)
    matrices = (c * term.dense() for c, term in terms if isinstance(term, Dense))
    total = concatenate(factors).dense() if factors else next(matrices)
    for matrix in matrices:  # never all of them at once
        total += matrix
    return Dense(W=total)


def factorise(delta: Delta) -> LowRank:
    """Any delta as factors; a dense one by its SVD, with as many columns as its numerical rank in its own dtype."""
    if isinstance(delta, LowRank):
        return delta
    U, sigma, V = torch.linalg.svd(delta.dense(), full_matrices=False)
    rank = max(1, int((sigma > sigma[0] * torch.finfo(delta.W.dtype).eps * 1e-2).sum()))
    root = sigma[:rank].sqrt()
    return LowRank(U=(U[:, :rank] * root).to(delta.W.dtype), V=(root[:, None] * V[:rank]).to(delta.W.dtype))


def concat_adapter(adapter: Adapter, base_delta: Mapping[str, Delta]) -> dict[str, LoRAPair]:
    """One stand-alone adapter, `s B A + D = [s B, U] [A; V]`: all of the update, with scaling one."""
    total: dict[str, LoRAPair] = {}
    for module, pair in adapter.items():
        terms = [pair.low_rank()] + ([factorise(base_delta[module])] if module in base_delta else [])
        whole = concatenate(terms)
        total[module] = LoRAPair(A=whole.V, B=whole.U, scaling=1.0)
    return total
