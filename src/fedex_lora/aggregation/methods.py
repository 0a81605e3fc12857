"""The aggregation methods: one function and one row of data each.

A method's function takes the factors of `g` modules of one shape and scaling `s`, from `k` clients, stacked as `Factors`, and the
clients' weights `p` (sum one). It returns the mean factors that the clients go on with and, as factors too, what `W / s` gains
(None: nothing). With `M = sum_i p_i B_i A_i` the ideal update, a method is exact when `B A + gain = M`.

Every mean is taken as `x_k + sum_{i<k} p_i (x_i - x_k)`: differences first, then their weighted mean. When the clients are
close the differences are exact in fp32, and the residual keeps all its digits however small it is (1e-7 relative, where the
mean of products minus the product of means has none left).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fedex_lora.errors import AggregationError


class Factors(NamedTuple):
    """Stacked factors of products `B^T A`, both with the rank as rows, so that every client's numbers lie together.

    Attributes:
        A: `g x k x r x in` from clients, `g x q x in` of a result.
        B: `g x k x r x out` from clients, `g x q x out` of a result: the transpose of LoRA's B.
    """

    A: Tensor
    B: Tensor


Step: TypeAlias = tuple[Factors, Factors | None]


def differences(x: Tensor) -> Tensor:
    """`x_i - x_k` for i < k, over dimension 1; contiguous whatever the layout of x."""
    return torch.sub(x[:, :-1], x[:, -1:], out=x.new_empty(x[:, :-1].shape))


def mean(x: Tensor, difference: Tensor, p: Tensor) -> Tensor:
    """`xbar = x_k + sum_{i<k} p_i (x_i - x_k)`."""
    return (p[:-1] @ difference.flatten(2)).unflatten(1, x.shape[2:]).add_(x[:, -1])


def fedit(clients: Factors, p: Tensor) -> Step:
    """FedIT: `Abar = sum p_i A_i`, `Bbar = sum p_i B_i`, nothing for the base (FedEx-LoRA paper, eq. 3-4; inexact)."""
    A, B = clients
    return Factors(A=mean(A, differences(A), p), B=mean(B, differences(B), p)), None


def fedex(clients: Factors, p: Tensor) -> Step:
    """FedEx-LoRA: FedIT's factors, and `R = sum p_i B_i A_i - Bbar Abar` for the base (eq. 5-6, 11-14; exact).

    R is a weighted covariance, `sum_i p_i (B_i - Bbar)(A_i - Abar)`, and the weighted deviations of B sum to zero, so
    `R = sum_{i<k} [p_i (B_i - Bbar)] [A_i - A_k]`: rank (k-1) r, in closed form.
    """
    A, B = clients
    dA, dB = differences(A), differences(B)
    p_i = p[:-1, None, None]
    weighted_dB = dB.mul_(p_i)  # p_i (B_i - B_k)
    mean_dB = weighted_dB.sum(dim=1, keepdim=True)  # Bbar - B_k
    centred = weighted_dB.sub_(p_i * mean_dB)  # p_i (B_i - Bbar)
    return Factors(A=mean(A, dA, p), B=mean_dB[:, 0].add_(B[:, -1])), Factors(A=dA.flatten(1, 2), B=centred.flatten(1, 2))


def ffa(clients: Factors, p: Tensor) -> Step:
    """FFA-LoRA: A frozen and shared, `Bbar = sum p_i B_i` (arXiv 2403.12313; exact, half of the factors trained)."""
    A, B = clients
    if not torch.equal(A, A[:, -1:].expand_as(A)):
        raise AggregationError("ffa needs one A that all clients share, and theirs differ: freeze A while training, or use method fedex")
    return Factors(A=A[:, -1].clone(), B=mean(B, differences(B), p)), None


@dataclass(frozen=True)
class Method:
    """One aggregation method: its function, and what the rest of the system must know of it.

    Attributes:
        name: as in configurations.
        aggregate: (clients' factors, p) -> (global factors, gain of the base / s).
        exact: does `B A + gain` equal the ideal update?
        trains: the factors that clients train; a method that trains B only shares one frozen A.
        lora: False where clients train the whole model instead (all of it travels as other tensors).
        pooled: one client holds all rows: the centralised reference.
        paper: where it comes from.
    """

    name: str
    aggregate: Callable[[Factors, Tensor], Step]
    exact: bool
    paper: str
    trains: Literal["AB", "B"] = "AB"
    lora: bool = True
    pooled: bool = False


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("fedex", fedex, exact=True, paper="FedEx-LoRA, arXiv 2410.09432"),
        Method("fedit", fedit, exact=False, paper="FedIT, arXiv 2305.05644"),
        Method("ffa", ffa, exact=True, trains="B", paper="FFA-LoRA, arXiv 2403.12313"),
        Method("centralised", fedit, exact=True, pooled=True, paper="LoRA, arXiv 2106.09685, on all rows in one place"),
        Method("full-ft", fedit, exact=True, lora=False, paper="FedAvg of all weights, arXiv 1602.05629"),
    )
}
