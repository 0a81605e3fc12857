"""Random numbers that nobody can guess, of the operating system's cryptographic generator and of nothing else.

No generator of torch or numpy is one: who sees some numbers of a Mersenne twister solves its state, and knows all others. A server that
sends A = 0 in some modules sees there the noise as it is.
"""

import secrets

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

Numbers = npt.NDArray[np.float64]


def secret_uniforms(count: int) -> Numbers:
    """Numbers in (0, 1], each of 128 random bits: exact to a float64's digits, however small.

    Example:
        >>> bool((secret_uniforms(1000) <= 0.5).any())
        True
    """
    return _halves(count)[0]


def secret_normals(count: int) -> Numbers:
    """Standard normal numbers: the inverse of their distribution function at half a uniform number, with a random sign.

    Example:
        >>> bool(np.array_equal(secret_normals(2), secret_normals(2)))
        False
    """
    uniform, negative = _halves(count)
    return np.where(negative, 1.0, -1.0) * ndtri(uniform / 2)


def _halves(count: int) -> tuple[Numbers, npt.NDArray[np.bool_]]:
    """Uniform numbers, and a bit of each that makes no difference to it."""
    high, low = np.frombuffer(secrets.token_bytes(16 * count), dtype="<u8").reshape(2, count)
    return high * 2.0**-64 + (low + 1.0) * 2.0**-128, (low & 1).astype(bool)
