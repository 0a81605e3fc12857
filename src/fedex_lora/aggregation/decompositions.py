"""Splits: how the clients' updates become a rank-r adapter and a rest. Each reads like its equation.

A split sees `g` modules of one shape and scaling `s`, from `k` clients, stacked as `ClientStack`. With `M / s = sum_i p_i B_i A_i` the
ideal update over s, the split is exact when `adapter + rest = M / s`, and so is a method whose base gains the whole rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fedex_lora.aggregation.factors import Factors, components, init_lora_a, svd, without_zeros

FEW = 16  # clients
LONG = 16  # ranks from which rows of B are moved as they are
CLIENTS = 64  # whose sum is taken in the precision of their factors


@dataclass(frozen=True, eq=False)
class ClientStack:
    """What a split sees.

    Attributes:
        A: `g x k x r x in`; a client of lower rank has zero rows after its own.
        B: `g x k x r x out`, the transpose of LoRA's B, padded alike; a view of memory that has it as LoRA does, so `B.mT` is contiguous.
        p: `k` weights with sum one.
        modules: the g module paths.
        seed: for factors that start anew.
        scaling: s, which the adapter keeps.
        frozen: what the clients of lower rank hold frozen beside their adapter, weighted (`g x q`); None: nothing.
        origins: the factors that each client started from, padded alike, where every client goes on with its own; None: zero products.
    """

    A: Tensor
    B: Tensor
    p: Tensor
    modules: Sequence[str]
    seed: int
    scaling: float
    frozen: Factors | None = None
    origins: Factors | None = None

    @property
    def factors(self) -> Factors:
        return Factors(A=self.A, B=self.B)

    @property
    def fresh(self) -> Tensor:
        """New A factors, `g x r x in`."""
        return torch.stack([init_lora_a(module, self.A.shape[2], self.A.shape[3], self.seed).to(self.A) for module in self.modules])


Split: TypeAlias = tuple[Factors, Factors | None]
"""(the adapter that clients go on with: `g x r`, the rest of M: `g x q`, or None where there is none or nobody needs it)."""


def from_last(x: Tensor, out: Tensor | None = None) -> Tensor:
    """`x_i - x_k` for i < k, over dimension 1; in `out`, where that is given."""
    return torch.sub(x[:, :-1], x[:, -1:], out=out)


def weighted_sum(x: Tensor, p: Tensor) -> Tensor:
    """`sum_i p_i x_i` over dimension 1. Blocks of clients are added up in fp64: the rounding of one sum would grow with their number."""
    blocks = zip(x.split(CLIENTS, dim=1), p.split(CLIENTS), strict=True)
    sums = [torch.bmm(shares.expand(len(x), 1, -1), part.flatten(2)) for part, shares in blocks]  # p times a stack would copy the stack
    total = sums[0] if len(sums) == 1 else torch.cat(sums, dim=1).double().sum(dim=1, keepdim=True).to(x)
    return total.unflatten(2, x.shape[2:])[:, 0]


def centred(x: Tensor, p: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`xbar = sum_i p_i x_i`, and `x_i - xbar` for i < k, both to rounding of their own size.

    Differences `x_i - x_k` come first: they are exact in fp32 when the clients are close. Where they cancel out, the mean of the
    differences is a large number with a rounding error of that size, so what the deviations of many clients still sum to is taken out in a
    second step. (An error of the mean costs sqrt(k) times as much in R: little for a few clients.)
    """
    difference = from_last(x, out)
    first = weighted_sum(difference, p[:-1])
    difference.sub_(first[:, None])
    if len(p) <= FEW:
        return first.add_(x[:, -1]), difference
    second = weighted_sum(difference, p[:-1]).addcmul_(p[-1], first, value=-1)
    return first.add_(x[:, -1]).add_(second), difference.sub_(second[:, None])


def factor_means(clients: ClientStack) -> Split:
    """`Abar = sum p_i A_i`, `Bbar = sum p_i B_i` (FedEx-LoRA paper, eq. 3-4). Exact where the clients share A, or share B."""
    return Factors(A=centred(clients.A, clients.p)[0], B=centred(clients.B.mT, clients.p)[0].mT), None


def factor_means_and_residual(clients: ClientStack) -> Split:
    """The mean factors, and `R = sum p_i B_i A_i - Bbar Abar` as the rest (eq. 5-6, 11-14).

    R is a weighted covariance, `sum_i p_i (B_i - Bbar)(A_i - Abar)`, and the weighted deviations of B sum to zero, so
    `R = sum_{i<k} [p_i (B_i - Bbar)] [A_i - A_k]`: rank (k-1) r, in closed form. Differences come first, so R keeps all its digits in fp32
    however small it is (1e-7 relative, where the mean of products minus the product of means has none left). Bbar is computed more
    carefully than Abar: its error is multiplied by A_k, which is sqrt(k) times as large as Abar where clients are independent.
    """
    A, p = clients.A, clients.p
    dA, (B_mean, U_t) = from_last(A), centred_b(clients)  # A_i - A_k; Bbar and [p_i (B_i - Bbar)], transposed
    A_mean = weighted_sum(dA, p[:-1]).add_(A[:, -1])
    return Factors(A=A_mean, B=B_mean), Factors(A=dA.flatten(1, 2), B=U_t)


def centred_b(clients: ClientStack) -> tuple[Tensor, Tensor]:
    """`Bbar`, and `[p_1 (B_1 - Bbar), .., p_(k-1) (B_(k-1) - Bbar)]`, both transposed. Each is computed in the layout in
    which it is kept; below rank `LONG` in the transposed one, because rows of r numbers are too short for a call each.
    """
    B, p = clients.B, clients.p
    g, k, r, out = B.shape
    if r < LONG:
        mean, deviation = centred(B, p, out=B.new_empty(g, k - 1, r, out))
        return mean, deviation.mul_(p[:-1, None, None]).flatten(1, 2)
    mean, deviation = centred(B.mT, p, out=B.new_empty(g, out, k - 1, r).movedim(2, 1))
    return mean.mT, deviation.mul_(p[:-1, None, None]).movedim(1, 2).flatten(2).mT


def best_rank(clients: ClientStack) -> Split:
    """The best rank-r approximation of M as balanced factors, and what is left of M (Eckart-Young; rank sum r_i - r).

    The components are in falling order, so that a client of lower rank goes on with the strongest ones.
    """
    parts, rank = svd(products(clients)), clients.A.shape[2]
    return components(parts, 0, rank, clients.fresh), components(parts, rank, None)


def all_to_rest(clients: ClientStack) -> Split:
    """A new adapter (A random, B zero), and all of M as the rest: the stacking of FLoRA (rank sum r_i)."""
    A = clients.fresh
    return Factors(A=A, B=clients.B.new_zeros(*A.shape[:2], clients.B.shape[3])), products(clients)


def padded_means(clients: ClientStack) -> Split:
    """HetLoRA: factors padded with zeros to the largest rank, averaged with weights in proportion to `p_i |B_i A_i|`, per module.

    With uniform p these are the paper's weights. Components that no participant has get new A rows, because zeros would never train.
    """
    grams = [x.double() @ x.double().mT for x in clients.factors]
    norms = clients.p.double() * (grams[0] * grams[1]).sum((2, 3)).clamp(min=0).sqrt()
    total = norms.sum(1, keepdim=True)
    weights = torch.where(total > 0, norms / total, clients.p.double())[..., None, None]
    missing = (clients.A == 0).all(3).all(1)[..., None]
    A = torch.where(missing, clients.fresh, (weights * clients.A).sum(1).to(clients.A))
    return Factors(A=A, B=(weights * clients.B).sum(1).to(clients.B)), None


def products(clients: ClientStack) -> Factors:
    """`sum_i p_i (B_i A_i - origin_i)`, `M / s` without origins, and what is held frozen: one product of `sum r_i` (and more) columns."""
    p = clients.p[:, None, None]
    A, B = [clients.A], [p * clients.B]
    if clients.origins is not None:  # B A - B0 A0 = (B - B0) A + B0 (A - A0)
        B0 = clients.origins.B
        A, B = [clients.A, clients.A - clients.origins.A], [p * (clients.B - B0), p * B0]
    terms = [without_zeros(Factors(A=a.flatten(1, 2), B=b.flatten(1, 2))) for a, b in zip(A, B, strict=True)]
    if clients.frozen is not None:
        terms.append(without_zeros(clients.frozen))
    return Factors(A=torch.cat([term.A for term in terms], dim=1), B=torch.cat([term.B for term in terms], dim=1))
