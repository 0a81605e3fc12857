"""The aggregation methods: one engine, and one row of data each.

A method is a choice of what is trained, how the clients' updates are split into a rank-r adapter and a rest, what happens to the
rest (the frozen base gains it, gains a truncation of it, or it is dropped), and the gauge of the adapter's factors.

A split sees `g` modules of one shape and scaling `s`, from `k` clients, stacked as `Clients`. With `M = sum_i p_i B_i A_i` the ideal
update (over s), the split is exact when `adapter + rest = M`, and so is the method when the base gains the whole rest.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fedex_lora.aggregation.factors import Factors, components, fresh_a, svd, without_zeros

Part: TypeAlias = Literal["AB", "A", "B"]
Exactness: TypeAlias = Literal["exact", "to the reported tail", "best rank r", "inexact", "personalised"]


@dataclass(frozen=True, eq=False)
class Clients:
    """What a split sees.

    Attributes:
        A: `g x k x r x in`; a client of lower rank has zero rows after its own.
        B: `g x k x r x out`, the transpose of LoRA's B, padded alike.
        p: `k` weights with sum one.
        modules: the g module paths.
        seed: for factors that start anew.
        frozen: what the clients of lower rank hold frozen beside their adapter, weighted (`g x q`); None: nothing.
        origins: the factors that each client started from, padded alike, where every client goes on with its own; None: zero products.
    """

    A: Tensor
    B: Tensor
    p: Tensor
    modules: Sequence[str]
    seed: int
    frozen: Factors | None = None
    origins: Factors | None = None

    @property
    def factors(self) -> Factors:
        return Factors(A=self.A, B=self.B)

    @property
    def fresh(self) -> Tensor:
        """New A factors, `g x r x in`."""
        return torch.stack([fresh_a(module, self.A.shape[2], self.A.shape[3], self.seed).to(self.A) for module in self.modules])


Split: TypeAlias = tuple[Factors, Factors | None]
"""(the adapter that clients go on with: `g x r`, the rest of M: `g x q`, or None where there is none or nobody needs it)."""


def differences(x: Tensor) -> Tensor:
    """`x_i - x_k` for i < k, over dimension 1; contiguous whatever the layout of x."""
    return torch.sub(x[:, :-1], x[:, -1:], out=x.new_empty(x[:, :-1].shape))


def mean(x: Tensor, difference: Tensor, p: Tensor) -> Tensor:
    """`xbar = x_k + sum_{i<k} p_i (x_i - x_k)`: differences first, which are exact in fp32 when the clients are close."""
    return (p[:-1] @ difference.flatten(2)).unflatten(1, x.shape[2:]).add_(x[:, -1])


def factor_means(clients: Clients) -> Split:
    """`Abar = sum p_i A_i`, `Bbar = sum p_i B_i` (FedEx-LoRA paper, eq. 3-4). Exact where the clients share A, or share B."""
    A, B, p = clients.A, clients.B, clients.p
    return Factors(A=mean(A, differences(A), p), B=mean(B, differences(B), p)), None


def factor_means_and_residual(clients: Clients) -> Split:
    """The mean factors, and `R = sum p_i B_i A_i - Bbar Abar` as the rest (eq. 5-6, 11-14).

    R is a weighted covariance, `sum_i p_i (B_i - Bbar)(A_i - Abar)`, and the weighted deviations of B sum to zero, so
    `R = sum_{i<k} [p_i (B_i - Bbar)] [A_i - A_k]`: rank (k-1) r, in closed form. Differences come first, so R keeps all its digits in fp32
    however small it is (1e-7 relative, where the mean of products minus the product of means has none left).
    """
    A, B, p = clients.A, clients.B, clients.p
    dA, dB = differences(A), differences(B)
    p_i = p[:-1, None, None]
    weighted_dB = dB.mul_(p_i)  # p_i (B_i - B_k)
    mean_dB = weighted_dB.sum(dim=1, keepdim=True)  # Bbar - B_k
    centred = weighted_dB.sub_(p_i * mean_dB)  # p_i (B_i - Bbar)
    means = Factors(A=mean(A, dA, p), B=mean_dB[:, 0].add_(B[:, -1]))
    return means, Factors(A=dA.flatten(1, 2), B=centred.flatten(1, 2))


def best_rank(clients: Clients) -> Split:
    """The best rank-r approximation of M as balanced factors, and what is left of M (Eckart-Young; rank sum r_i - r).

    The components are in falling order, so that a client of lower rank goes on with the strongest ones.
    """
    parts, rank = svd(products(clients)), clients.A.shape[2]
    return components(parts, 0, rank, clients.fresh), components(parts, rank, None)


def all_to_rest(clients: Clients) -> Split:
    """A new adapter (A random, B zero), and all of M as the rest: the stacking of FLoRA (rank sum r_i)."""
    A = clients.fresh
    return Factors(A=A, B=clients.B.new_zeros(*A.shape[:2], clients.B.shape[3])), products(clients)


def padded_means(clients: Clients) -> Split:
    """HetLoRA: factors padded with zeros to the largest rank, averaged with weights `|B_i A_i| / sum_j |B_j A_j|` (per module)."""
    grams = [x.double() @ x.double().mT for x in (clients.A, clients.B)]
    norms = (grams[0] * grams[1]).sum((2, 3)).clamp(min=0).sqrt()
    total = norms.sum(1, keepdim=True)
    weights = torch.where(total > 0, norms / total, clients.p.double())[..., None, None]
    return Factors(A=(weights * clients.A).sum(1).to(clients.A), B=(weights * clients.B).sum(1).to(clients.B)), None


def products(clients: Clients) -> Factors:
    """`M = sum_i p_i (B_i A_i - origin_i)` and what is held frozen, as one product of `sum r_i` (and more) columns."""
    p = clients.p[:, None, None]
    A, B = [clients.A], [p * clients.B]
    if clients.origins is not None:  # B A - B0 A0 = (B - B0) A + B0 (A - A0)
        B0 = clients.origins.B
        A, B = [clients.A, clients.A - clients.origins.A], [p * (clients.B - B0), p * B0]
    terms = [without_zeros(Factors(A=a.flatten(1, 2), B=b.flatten(1, 2))) for a, b in zip(A, B, strict=True)]
    if clients.frozen is not None:
        terms.append(without_zeros(clients.frozen))
    return Factors(A=torch.cat([term.A for term in terms], dim=1), B=torch.cat([term.B for term in terms], dim=1))


@dataclass(frozen=True)
class Method:
    """One aggregation method, and all that the rest of the system must know of it.

    Attributes:
        name: as in configurations, with `+GAUGE` where one was asked for.
        exactness: how the global model compares with the ideal: "exact" (fp32 rounding), "to the reported tail" of a truncation,
            "best rank r" (Eckart-Young), "inexact", or "personalised" (there is no global model).
        split: (clients) -> (adapter, rest).
        rest: what becomes of the rest: the base gains it, gains a truncation of it, or it is dropped and the base stays.
        trains: the factors that clients train, round after round in turn; the others are frozen and shared.
        uploads: the factors that may leave a client.
        own: the factors that each client keeps for itself from round to round (a stateful client); "" for none.
        gauge: see `GAUGES`: how the adapter's factors are re-written without changing their product.
        refactors: the adapter after a round is not in the coordinates that it was trained in (so Adam's moments mean nothing there).
        draws: the adapter after a round is drawn from the run's seed, so it does not travel.
        per_client_ranks: may clients have different ranks?
        lora: False where clients train the whole model instead (all of it travels as other tensors).
        pooled: one client holds all rows: the centralised reference.
        paper: where it comes from.
    """

    name: str
    exactness: Exactness
    split: Callable[[Clients], Split]
    paper: str
    rest: Literal["base", "truncate", "drop"] = "drop"
    trains: tuple[Part, ...] = ("AB",)
    uploads: Part = "AB"
    own: Part | Literal[""] = ""
    gauge: str = "as-is"
    refactors: bool = False
    draws: bool = False
    per_client_ranks: bool = False
    lora: bool = True
    pooled: bool = False

    @property
    def exact(self) -> bool:
        return self.exactness == "exact"

    @property
    def frozen_side(self) -> bool:
        """Does a client of lower rank hold the other components of the global adapter frozen beside its own?"""
        return self.per_client_ranks and self.rest == "base" and not self.draws

    def trained(self, round: int) -> Part:
        """The factors that clients train in a round (from 1)."""
        return self.trains[(round - 1) % len(self.trains)]

    def sent(self, round: int) -> str:
        """The factors that travel up in a round."""
        return "".join(part for part in self.trained(round) if part in self.uploads)


FEDEX = "FedEx-LoRA, arXiv 2410.09432"
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("fedex", "exact", factor_means_and_residual, FEDEX, rest="base"),
        Method("fedex-best", "exact", best_rank, f"{FEDEX}, with the best rank-r part", rest="base", refactors=True, per_client_ranks=True),
        Method("fedex-svd", "to the reported tail", factor_means_and_residual, f"{FEDEX}, eq. 15-16", rest="truncate"),
        Method("reinit", "exact", all_to_rest, "FLoRA, arXiv 2409.05976", rest="base", refactors=True, draws=True, per_client_ranks=True),
        Method("keep", "exact", all_to_rest, f"{FEDEX}, section 6", rest="base", own="AB", draws=True, per_client_ranks=True),
        Method("fedit", "inexact", factor_means, "FedIT, arXiv 2305.05644"),
        Method("ffa", "exact", factor_means, "FFA-LoRA, arXiv 2403.12313", trains=("B",)),
        Method("rolora", "exact", factor_means, "RoLoRA, arXiv 2502.01755", trains=("B", "A")),
        Method("fedsvd", "exact", factor_means, "FedSVD, arXiv 2505.12805", trains=("B",), gauge="orthonormal-a", refactors=True),
        Method("flexlora", "best rank r", best_rank, "FlexLoRA, arXiv 2402.11505", refactors=True, per_client_ranks=True),
        Method("hetlora", "inexact", padded_means, "HetLoRA, arXiv 2401.06432", per_client_ranks=True),
        Method("fedsa", "personalised", factor_means, "FedSA-LoRA, arXiv 2410.01463", uploads="A", own="B"),
        Method("centralised", "exact", factor_means, "LoRA, arXiv 2106.09685, on all rows in one place", pooled=True),
        Method("full-ft", "exact", factor_means, "FedAvg of all weights, arXiv 1602.05629", lora=False),
    )
}
