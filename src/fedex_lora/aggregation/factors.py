"""Stacks of low-rank products kept as factors: their SVD, and new factors. Nothing here forms an `out x in` matrix unless it is smaller."""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fedex_lora.types import LowRank


class Factors(NamedTuple):
    """Stacked factors of products `B^T A`, both with the rank as rows, so that every client's numbers lie together.

    Attributes:
        A: `g x q x in`.
        B: `g x q x out`: the transpose of LoRA's B.
    """

    A: Tensor
    B: Tensor


def without_zeros(product: Factors) -> Factors:
    """Without the columns that are zero in every product: padding, and what has not been trained."""
    alive = product.B.abs().amax(dim=(0, 2)).mul(product.A.abs().amax(dim=(0, 2))).ne(0)
    return product if bool(alive.all()) else Factors(A=product.A[:, alive], B=product.B[:, alive])


class Parts(NamedTuple):
    """A stack of singular value decompositions, fp64; the singular vectors stay inside the QR decompositions until they are asked for.

    Attributes:
        left, right: QR of `B^T` and of `A^T`, as `torch.geqrf` gives them.
        U: `g x q x q`, left singular vectors of the core; those of the product are `Q_B U`.
        S: `g x q`, the singular values, falling.
        V: `g x q x q`, right singular vectors of the core as rows.
        dtype: of the product's factors.
    """

    left: tuple[Tensor, Tensor]
    right: tuple[Tensor, Tensor]
    U: Tensor
    S: Tensor
    V: Tensor
    dtype: torch.dtype


def svd(product: Factors) -> Parts:
    """The SVD of `B^T A` from QR decompositions of the factors and the SVD of a `q x q` core, in fp64.

    Cost `O(q^2 (out + in) + q^3)`. Exact to fp64 rounding, also with dependent columns (duplicate clients), where the Gram form loses half
    of the digits.
    """
    left, right = torch.geqrf(product.B.double().mT), torch.geqrf(product.A.double().mT)
    R_B, R_A = (qr[..., : min(qr.shape[-2:]), :].triu() for qr, _ in (left, right))
    U, S, V = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Parts(left=left, right=right, U=U, S=S, V=V, dtype=product.A.dtype)


def components(parts: Parts, start: int, stop: int | None, fresh: Tensor | None = None) -> Factors:
    """Components `start..stop` as balanced factors `B = U sqrt(S)`, `A = sqrt(S) V`.

    Args:
        parts: the decompositions.
        start, stop: which components; None: all that are not zero (to fp64 rounding) in one of the products.
        fresh: `g x (stop - start) x in`, new A rows for components that are zero, or missing: balanced zeros would never train.
    """
    if stop is None:
        stop = max(start, int((parts.S[:, :1] * 1e-14 < parts.S).sum(1).max()))
    S = parts.S[:, start:stop]
    root = S.sqrt()[..., None]
    A, B = root * _times_q(parts.right, parts.V.mT[..., start:stop]), root * _times_q(parts.left, parts.U[..., start:stop])
    if fresh is not None:
        missing = stop - start - S.shape[1]
        dead = torch.nn.functional.pad(parts.S[:, :1] * torch.finfo(torch.float32).eps >= S, (0, missing), value=True)[..., None]
        A, B = (torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (A, B))
        A, B = torch.where(dead, fresh.double(), A), B.masked_fill(dead, 0)
    return Factors(A=A.to(parts.dtype), B=B.to(parts.dtype))


def recompressed(product: LowRank, rank: int | None = None) -> LowRank:
    """The balanced SVD of a product: its first `rank` components, or all that are not zero; factors that are functions of it alone."""
    factors = components(svd(Factors(A=product.V[None], B=product.U.mT[None])), 0, rank)
    return LowRank(U=factors.B[0].mT.contiguous(), V=factors.A[0].contiguous())


def _times_q(qr: tuple[Tensor, Tensor], columns: Tensor) -> Tensor:
    """`(Q x)^T` for columns x, without forming Q."""
    return torch.ormqr(*qr, torch.nn.functional.pad(columns, (0, 0, 0, qr[0].shape[-2] - columns.shape[-2]))).mT


def derive_seed(seed: int, round: int, purpose: str) -> int:
    """A seed of (run, round, client or purpose), so that results do not depend on who ran first."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{round}/{purpose}".encode()).digest()[:4], "big") >> 1


def init_lora_a(module: str, rank: int, inner: int, seed: int) -> Tensor:
    """A new A factor, `rank x in`, uniform in `+-1/sqrt(in)` as PEFT's (Kaiming, a = sqrt 5); a function of its arguments, in fp32."""
    digest = hashlib.sha256(f"{seed}/{module}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return (torch.rand(rank, inner, generator=generator) * 2 - 1) / math.sqrt(inner)
