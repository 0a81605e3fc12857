"""How far a result is from the ideal, module by module while it is written: exactly where that is cheap, else on random directions.

As in `measure`, everything is fp64 and uses the plain formulas.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from fedex_lora.exactness.measure import Exactness
from fedex_lora.types import LoRAPair

How = Literal["auto", "exact", "estimate", "none"]
DIRECTIONS = 32
PIECE = 2**20  # numbers of the matrix that are looked at together
COLUMNS = 512  # of factors that are multiplied together


def exact_flops(shape: tuple[int, int], columns: int, dense: bool) -> int:
    """What an exact audit of one module costs, in floating-point operations in fp64: of its matrix, or of a core where that is cheaper.

    Args:
        shape: `out, in`.
        columns: of all factors together: the clients', the adapter's and, unless it is a matrix, what the base gains.
        dense: is what the base gains a matrix?
    """
    out, inner = shape
    matrix, core = 2 * columns * out * inner, 2 * columns * columns * (out + inner)
    return matrix if dense else min(matrix, core)


def directions(inner: int, count: int = DIRECTIONS, seed: int = 0) -> Tensor:
    """Random orthonormal directions, `in x count`, scaled so that `|E X|_F` estimates `|E|_F` (exactly, where count >= in).

    The estimate's relative standard deviation is at most `1 / sqrt(count)`, and far less for errors of high rank, as rounding errors are.
    """
    count = min(count, inner)
    draws = torch.randn(inner, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(draws).Q * math.sqrt(inner / count)


class Audit:
    """|got - ideal|, |plain averaging - ideal| and |ideal| (Frobenius) of every module.

    Products `D = L R` are looked at as `D X`, `L (R X)`, a few rows at a time. X is the unit matrix, or an orthonormal basis of all
    that the factors R reach (its images come from one QR decomposition; Frobenius norms are the same), or random directions.

    For each module: `take`, then `result`, then `rows` until all rows are through.

    Attributes:
        exact: not estimated?
        seconds: what the audit itself took.
    """

    def __init__(self, exact: bool) -> None:
        self.exact, self.seconds = exact, 0.0
        self._clients: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._squares: dict[str, Tensor] = {}
        self._X: Tensor | None = None  # None: the unit matrix
        self._images: tuple[Tensor, Tensor, Tensor | None]
        self._adapter: LoRAPair

    def take(self, module: str, A: Tensor, B: Tensor, scalings: Sequence[float], p: Sequence[float]) -> None:
        """One module's factors of the clients as they were read, `k x r x in` and `k x out x r`; not copied."""
        shares = torch.tensor([weight * s for weight, s in zip(p, scalings, strict=True)], dtype=torch.float64)
        self._clients[module] = A, B, shares

    def result(self, module: str, adapter: LoRAPair, V: Tensor, dense: bool) -> None:
        """What became of it: the adapter, and `V` (`q x in`) of what the base gains, unless that is a matrix (`dense`)."""
        with self._clock():
            A, _, _ = self._clients[module]
            self._adapter, self._squares[module] = adapter, torch.zeros(3, dtype=torch.float64)
            factors = [A.flatten(0, 1), adapter.A, *([] if dense else [V])]
            columns, (out, inner) = sum(len(factor) for factor in factors), adapter.shape
            self._X = None
            if not self.exact:
                self._X = directions(inner)
                images = [torch.cat([some.double() @ self._X for some in factor.split(COLUMNS)]) for factor in factors]
            elif not dense and exact_flops((out, inner), columns, dense) < exact_flops((out, inner), columns, True):
                basis = torch.linalg.qr(torch.cat(factors).double().T, mode="r").R.T
                images = list(basis.split([len(factor) for factor in factors]))
            else:
                images = factors
            self._images = images[0].unflatten(0, A.shape[:2]), images[1], images[2] if len(images) > 2 else None

    def rows(self, module: str, rows: slice, left: Tensor) -> None:
        """These rows of what the base gains: those of U, or of the matrix."""
        with self._clock():
            start, width = rows.start, self._images[1].shape[1]
            for piece in left.split(max(1, PIECE // width)):
                self._squares[module] += self._squared(module, slice(start, start := start + len(piece)), piece)
            if start == self._adapter.shape[0]:
                del self._clients[module], self._images  # whoever made these stacks may need their memory

    def _squared(self, module: str, rows: slice, left: Tensor) -> Tensor:
        """Squares of the three norms, of some rows."""
        A, adapter, V = self._images
        _, B, shares = self._clients[module]
        some = max(1, COLUMNS // A.shape[1])
        ideal = A.new_zeros((rows.stop - rows.start, A.shape[2]), dtype=torch.float64)
        for a, b, share in zip(A.split(some), B[:, rows].split(some), shares.split(some), strict=True):
            ideal.addmm_((share[:, None, None] * b).transpose(0, 1).flatten(1), a.flatten(0, 1).double())
        size = torch.linalg.matrix_norm(ideal)
        missing = ideal.addmm_(self._adapter.B[rows].double(), adapter.double(), alpha=-self._adapter.scaling)
        plain = torch.linalg.matrix_norm(missing)
        right = V if V is not None else self._X
        missing = missing.sub_(left) if right is None else missing.addmm_(left.double(), right.double(), alpha=-1)
        return torch.stack([torch.linalg.matrix_norm(missing), plain, size]).square()

    @contextmanager
    def _clock(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started

    def errors(self, plain: bool = False) -> Exactness:
        """Of the result, or of plain averaging."""
        norms = {module: squares.sqrt().tolist() for module, squares in self._squares.items()}
        return Exactness({module: norm[plain] for module, norm in norms.items()}, {module: norm[2] for module, norm in norms.items()})
