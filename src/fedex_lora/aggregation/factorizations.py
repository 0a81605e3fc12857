"""Gauges: re-writing an adapter's factors, `(B G^-1, G A)`, without changing their product.

A gauge is a preconditioner of what comes next (gradients of A scale with B), so it changes training although it changes no model. The
literature mixes its effect up with that of exactness: here it is an option, written METHOD+GAUGE.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from fedex_lora.aggregation.factors import Factors, components, init_lora_a, svd
from fedex_lora.types import Adapter, LoRAPair

Gauge: TypeAlias = Callable[[Factors, Factors, Tensor], Factors]
"""(the adapter: `g x r`, the averaged factors that it is aligned to, new A rows for components that are zero) -> the same products."""


def as_is(adapter: Factors, reference: Factors, fresh: Tensor) -> Factors:
    """As the method leaves them."""
    return adapter


def balanced(adapter: Factors, reference: Factors, fresh: Tensor) -> Factors:
    """`B = U sqrt(S)`, `A = sqrt(S) V` from the SVD of the product; components that are zero get new A rows."""
    return components(svd(adapter), 0, adapter.A.shape[1], fresh)


def orthonormal_a(adapter: Factors, reference: Factors, fresh: Tensor) -> Factors:
    """`A` with orthonormal rows, `B = U S` (FedSVD, arXiv 2505.12805); a zero product keeps the span of A.

    Where A has more rows than columns, only as many rows as it has columns are orthonormal; the others are zero.
    """
    Q, R = torch.linalg.qr(adapter.A.double().mT)  # A^T = Q R, so B^T A = (R B)^T Q^T
    U, S, V = torch.linalg.svd((R @ adapter.B.double()).mT, full_matrices=False)
    missing = R.shape[1] - S.shape[1]  # a module with fewer outputs than the rank
    if missing:
        basis, _ = torch.linalg.qr(V.mT, mode="complete")
        V = torch.cat([V, basis.mT[:, V.shape[1] :]], dim=1)
        U, S = torch.nn.functional.pad(U, (0, missing)), torch.nn.functional.pad(S, (0, missing))
    extra = adapter.A.shape[1] - V.shape[1]
    A, B = V @ Q.mT, (U * S[:, None]).mT
    A, B = (torch.nn.functional.pad(x, (0, 0, 0, extra)) for x in (A, B))
    return Factors(A=A.to(adapter.A), B=B.to(adapter.B))


def procrustes(adapter: Factors, reference: Factors, fresh: Tensor) -> Factors:
    """The rotation `G` (orthogonal) that brings the factors nearest to the averaged ones: min `|G A - Abar|^2 + |B G^T - Bbar|^2`."""
    U, _, V = torch.linalg.svd(sum(ours.double() @ theirs.double().mT for ours, theirs in zip(adapter, reference, strict=True)))
    G = V.mT @ U.mT
    return Factors(A=(G @ adapter.A.double()).to(adapter.A), B=(G @ adapter.B.double()).to(adapter.B))


ALIGNED = ("procrustes",)  # gauges that need the averaged factors
GAUGES: dict[str, Gauge] = {
    "as-is": as_is,
    "balanced": balanced,
    "orthonormal-a": orthonormal_a,
    "procrustes": procrustes,
}


def regauged(adapter: Adapter, gauge: str) -> Adapter:
    """One client's own factors in a gauge that needs no others; the same products.

    Example:
        >>> pair = LoRAPair(A=torch.ones(1, 4), B=4 * torch.ones(4, 1))
        >>> regauged({"q": pair}, "balanced")["q"].A.norm() == regauged({"q": pair}, "balanced")["q"].B.norm()
        tensor(True)
    """
    if gauge == "as-is":
        return adapter
    turned = {}
    for module, pair in adapter.items():
        factors = Factors(A=pair.A[None], B=pair.B.mT[None])
        fresh = init_lora_a(module, pair.rank, pair.shape[1], seed=0)[None].to(pair.A)
        A, B = GAUGES[gauge](factors, factors, fresh)
        turned[module] = LoRAPair(A=A[0], B=B[0].mT.contiguous(), scaling=pair.scaling)
    return turned
