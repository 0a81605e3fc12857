"""Independent references in fp64 numpy, by the plain formulas. Nothing here calls the code under test."""

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def numpy64(tensor) -> Matrix:
    return tensor.detach().cpu().double().numpy()


def product(pair) -> Matrix:
    """s B A."""
    return pair.scaling * (numpy64(pair.B) @ numpy64(pair.A))


def shares(raw) -> list[float]:
    total = float(np.sum(np.asarray(raw, dtype=np.float64)))
    return [float(value) / total for value in raw]


def ideal(pairs, p) -> Matrix:
    """M = sum_i p_i s_i B_i A_i: the mean of products (paper, eq. 7-9)."""
    return sum(weight * product(pair) for weight, pair in zip(p, pairs, strict=True))


def product_of_means(pairs, p) -> Matrix:
    """s (sum p_i (s_i / s) B_i)(sum p_i A_i): what averaging the factors gives (eq. 3-4), s of the first."""
    s = pairs[0].scaling
    B = sum(weight * (pair.scaling / s) * numpy64(pair.B) for weight, pair in zip(p, pairs, strict=True))
    A = sum(weight * numpy64(pair.A) for weight, pair in zip(p, pairs, strict=True))
    return s * (B @ A)


def total(result, module) -> Matrix:
    """What a result amounts to: s B A + U V."""
    gain = result.residual.get(module)
    return product(result.adapter[module]) + (0 if gain is None else numpy64(gain.U) @ numpy64(gain.V))


def relative(got: Matrix, want: Matrix) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
