"""Sums, norms and errors in fp64, by the plain formulas and with linear algebra of their own."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedex_lora.types import Delta, Dense, LowRank


def worst(values: Iterable[float | None]) -> float:
    """The largest of some errors, 0 of none; NaN where one of them is NaN or None, as JSON has numbers that are not finite.

    `max` would drop a NaN, and an error that cannot be computed is not a small one.

    Example:
        >>> worst([1e-8, math.nan, 2e-8]), worst([1e-8, 2e-8])
        (nan, 2e-08)
    """
    found = [number(value) for value in values]
    return math.nan if any(map(math.isnan, found)) else max(found, default=0.0)


def number(value: float | None) -> float:
    """A number as JSON has it: null is one that was not finite."""
    return math.nan if value is None else float(value)


def failed(error: float, floor: float = 0.0) -> bool:
    """Could an error not be computed? An infinite one beside an infinite floor is rounding, relative to an update of zero."""
    return math.isnan(error) or (math.isinf(error) and not math.isinf(floor))


def relative_error(error: float, size: float) -> float:
    """`error / size`; 0 / 0 is no error, and NaN where one of them is not finite."""
    if not (math.isfinite(error) and math.isfinite(size)):
        return math.nan
    return error / size if size else (0.0 if error == 0 else math.inf)


def summed(terms: Sequence[tuple[float, Delta]]) -> Delta:
    """`sum_j c_j D_j` in fp64: the factors side by side, or one matrix where a term is a matrix."""
    factors = [(c, term) for c, term in terms if isinstance(term, LowRank)]
    if len(factors) == len(terms):
        return LowRank(
            U=torch.cat([c * term.U.double() for c, term in factors], dim=1), V=torch.cat([term.V.double() for _, term in factors])
        )
    total = torch.zeros(terms[0][1].shape, dtype=torch.float64)
    for c, term in terms:  # in place: never two matrices
        total = total.add_(term.W, alpha=c) if isinstance(term, Dense) else total.addmm_(term.U.double(), term.V.double(), alpha=c)
    return Dense(W=total)


def image(delta: Delta) -> Tensor:
    """An fp64 matrix with the singular values of D: `U R^T`, `out x q`, with `V^T = Q R`, because Q keeps lengths; or D where that
    costs less.

    Where the factors cancel, this is as accurate as the matrix; their Gram matrices would lose half of the digits.
    """
    if isinstance(delta, Dense) or 2 * delta.rank * sum(delta.shape) >= math.prod(delta.shape):
        return delta.dense()
    return delta.U.double() @ torch.linalg.qr(delta.V.double().T, mode="r").R.T


def norm(delta: Delta) -> float:
    """`|D|` (Frobenius)."""
    return float(torch.linalg.matrix_norm(image(delta)))


def effective_rank(matrix: Tensor) -> float:
    """The participation ratio of the squared singular values, `(sum s^2)^2 / sum s^4`: how many directions hold the energy.

    It is between 1 and the rank, needs no SVD, and is 0 for a zero matrix.

    Example:
        >>> round(effective_rank(torch.diag(torch.tensor([1.0, 1.0, 0.0]))), 6)
        2.0
    """
    size = torch.linalg.matrix_norm(matrix)
    if size == 0:
        return 0.0
    unit = matrix.double() / size
    gram = unit @ unit.T if unit.shape[0] <= unit.shape[1] else unit.T @ unit
    return float(1 / (gram * gram).sum())


def above(error: float, floor: float) -> float:
    """How many times its floor an error is: infinite where one is NaN, less than that beside a floor of 0, 0 beside an infinite one.

    >>> above(3e-6, 1e-6), above(math.nan, 1.0), above(math.inf, math.inf), above(0.0, 0.0), above(1.0, 0.0) < math.inf
    (3.0, inf, 0.0, 0.0, True)
    """
    if math.isnan(error) or math.isnan(floor):
        return math.inf
    return 0.0 if error == 0 or math.isinf(floor) else error / floor if floor else 1e308
