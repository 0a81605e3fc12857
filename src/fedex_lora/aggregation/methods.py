"""The aggregation methods: one engine, and one row of data each.

A method is a choice of what is trained, how the clients' updates are split into a rank-r adapter and a rest (`decompositions`), what
happens to the rest (the frozen base gains it, gains a truncation of it, or it is dropped), and the gauge of the adapter's factors
(`factorizations`). Whoever must know something of a method asks its row, and never which split it has.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

from fedex_lora.aggregation.decompositions import (
    ClientStack,
    Split,
    all_to_rest,
    best_rank,
    factor_means,
    factor_means_and_residual,
    padded_means,
)
from fedex_lora.aggregation.factorizations import ALIGNED, GAUGES
from fedex_lora.config import method_name
from fedex_lora.errors import UsageError

Part: TypeAlias = Literal["AB", "A", "B", "C"]
Claim: TypeAlias = Literal["exact", "truncated", "rank-r-optimal", "inexact", "personalised"]


def _centred(ranks: Sequence[int], limit: int) -> int:
    """Of R: (k-1) r."""
    return sum(ranks) - max(ranks)


def _beyond_best(ranks: Sequence[int], limit: int) -> int:
    """Of what the best rank leaves: clients of lower rank hold the other components, which are part of the sum."""
    return min(sum(ranks) + max(ranks) - min(ranks), limit) - max(ranks)


def _stacked(ranks: Sequence[int], limit: int) -> int:
    """Of all products."""
    return sum(ranks)


class MessageSize(NamedTuple):
    """How many numbers travel for one module: to one client at the start of a round, and from it at the end."""

    down: int
    up: int


@dataclass(frozen=True)
class Method:
    """One aggregation method, and all that the rest of the system must know of it.

    Attributes:
        name: as in configurations, with `+GAUGE` where one was asked for.
        exactness: how the global model compares with the ideal: "exact" (fp32 rounding), "truncated" (but for the tail that was cut),
            "rank-r-optimal" (Eckart-Young), "inexact", or "personalised" (there is no global model).
        split: (clients) -> (adapter, rest).
        adapter: what the split's adapter is: "mean", the mean factors; "weighted", other means of the factors; "svd", components of the
            mean update; "drawn", new factors from the run's seed, so it does not travel.
        residual_policy: what becomes of the rest: the base gains it, gains a truncation of it, or it is dropped and the base stays.
        residual_rank: (ranks of the clients, smaller side of the module) -> columns of the rest that travels; None: nothing does.
        trained_schedule: the factors that clients train, round after round in turn; the others are frozen and shared.
        shared: the factors that may leave a client.
        client_state: the factors that each client keeps for itself from round to round (a stateful client); "" for none.
        gauge: see `GAUGES`: how the adapter's factors are re-written without changing their product.
        per_client_ranks: may clients have different ranks?
        momentum: may the server's next model repeat its last change (`aggregation.momentum`)?
        lora: False where clients train the whole model instead (all of it travels as other tensors).
        core: True where an r x r core C between frozen factors U and A is trained (`B = U C`), which the server takes from the base.
        centralised: one client holds all rows: the reference.
        private: does it go with private training? "yes": what the server makes of noised updates is their mean; "warns": it also makes
            products of one factor's noise with the other's; "no".
        paper: where it comes from.
    """

    name: str
    exactness: Claim
    split: Callable[[ClientStack], Split]
    paper: str
    adapter: Literal["mean", "weighted", "svd", "drawn"] = "mean"
    residual_policy: Literal["base", "truncate", "drop"] = "drop"
    residual_rank: Callable[[Sequence[int], int], int] | None = None
    trained_schedule: tuple[Part, ...] = ("AB",)
    shared: Part = "AB"
    client_state: Part | Literal[""] = ""
    gauge: str = "as-is"
    per_client_ranks: bool = False
    momentum: bool = False
    lora: bool = True
    core: bool = False
    centralised: bool = False
    private: Literal["yes", "warns", "no"] = "no"

    @property
    def parts(self) -> str:
        """The factors that an adapter is made of."""
        return "AUC" if self.core else "AB"

    @property
    def exact(self) -> bool:
        return self.exactness == "exact"

    @property
    def reinitialises(self) -> bool:
        """Does every round begin with new factors?"""
        return self.adapter == "drawn"

    @property
    def is_factor_mean(self) -> bool:
        """Is the adapter the mean factors, and the rest all of the rest or nothing? Its shapes are known before any number is."""
        return self.adapter == "mean" and self.residual_policy != "truncate"

    @property
    def refactorises(self) -> bool:
        """Is the adapter after a round in other coordinates than it was trained in (so that Adam's moments mean nothing there)?"""
        return self.gauge != "as-is" or (self.adapter in ("svd", "drawn") and not self.client_state)

    @property
    def holds_tail(self) -> bool:
        """Does a client of lower rank hold the other components of the global adapter frozen beside its own?"""
        return self.per_client_ranks and self.residual_policy == "base" and not self.reinitialises

    def trained(self, round: int) -> Part:
        """The factors that clients train in a round (from 1)."""
        return self.trained_schedule[(round - 1) % len(self.trained_schedule)]

    def uploaded(self, round: int) -> str:
        """The factors that travel up in a round."""
        return "".join(part for part in self.trained(round) if part in self.shared)

    def withheld(self, round: int) -> str:
        """The factors that do not travel up in a round."""
        return "".join(part for part in self.parts if part not in self.uploaded(round))

    def message_size(
        self, ranks: Sequence[int], client: int, shape: tuple[int, int], round: int, truncated: int | None = None
    ) -> MessageSize:
        """What travels in a round in which the clients of the last one take part again (bytes: times four, plus a header).

        Args:
            ranks: of all clients.
            client: the index of this one.
            shape: (out, in) of the module.
            round: from 1; the first one brings the whole adapter.
            truncated: the rank that a truncation keeps.

        Example:
            >>> METHODS["fedex"].message_size([4, 4, 4], client=0, shape=(768, 768), round=2)  # k r N down, r N up
            MessageSize(down=18432, up=6144)
        """
        rank = max(ranks) if self.holds_tail else ranks[client]
        size = {"B": shape[0], "A": shape[1], "U": shape[0], "C": rank}
        changed = self.parts if round == 1 or self.refactorises else [part for part in self.trained(round - 1) if part in self.shared]
        down = 0 if self.reinitialises and round > 1 else rank * sum(size[part] for part in changed)
        if self.residual_rank and round > 1:
            twice = self.client_state and round > 2  # with its own start, each product is two
            columns = self.residual_rank(ranks, min(shape)) * (2 if twice else 1)
            down += min(min(columns, truncated or columns) * sum(shape), shape[0] * shape[1])  # or the base delta itself
        return MessageSize(down=down, up=ranks[client] * sum(size[part] for part in self.uploaded(round)))


FEDEX = "FedEx-LoRA, arXiv 2410.09432"
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "fedex", "exact", factor_means_and_residual, FEDEX,
            residual_policy="base", residual_rank=_centred, momentum=True, private="warns",
        ),
        Method(
            "fedex-best", "exact", best_rank, f"{FEDEX}, with the best rank-r part in the adapter",
            adapter="svd", residual_policy="base", residual_rank=_beyond_best, per_client_ranks=True, momentum=True,
        ),
        Method(
            "fedex-svd", "truncated", factor_means_and_residual, f"{FEDEX}, eq. 15-16",
            residual_policy="truncate", residual_rank=_centred,
        ),
        Method(
            "reinit", "exact", all_to_rest, "FLoRA, arXiv 2409.05976",
            adapter="drawn", residual_policy="base", residual_rank=_stacked, per_client_ranks=True, momentum=True, private="warns",
        ),
        Method(
            "keep", "exact", all_to_rest, f"{FEDEX}, section 6",
            adapter="drawn", residual_policy="base", residual_rank=_stacked, client_state="AB", per_client_ranks=True,
        ),
        Method("fedit", "inexact", factor_means, "FedIT, arXiv 2305.05644", momentum=True, private="warns"),
        Method("ffa", "exact", factor_means, "FFA-LoRA, arXiv 2403.12313", trained_schedule=("B",), momentum=True, private="yes"),
        Method(
            "fed-sb", "exact", factor_means, "Fed-SB, arXiv 2502.15436", trained_schedule=("C",), shared="C", core=True, private="yes",
        ),
        Method("rolora", "exact", factor_means, "RoLoRA, arXiv 2502.01755", trained_schedule=("B", "A"), private="yes"),
        Method(
            "fedsvd", "exact", factor_means, "FedSVD, arXiv 2505.12805",
            trained_schedule=("B",), gauge="orthonormal-a", momentum=True, private="yes",
        ),
        Method("flexlora", "rank-r-optimal", best_rank, "FlexLoRA, arXiv 2402.11505", adapter="svd", per_client_ranks=True),
        Method("hetlora", "inexact", padded_means, "HetLoRA, arXiv 2401.06432", adapter="weighted", per_client_ranks=True),
        Method("fedsa", "personalised", factor_means, "FedSA-LoRA, arXiv 2410.01463", shared="A", client_state="B"),
        Method("centralised", "exact", factor_means, "LoRA, arXiv 2106.09685, on all rows in one place", centralised=True),
        Method("full-ft", "exact", factor_means, "FedAvg of all weights, arXiv 1602.05629", lora=False),
    )
}  # fmt: skip


REMOVED_GAUGES = {"gl-aligned": "use procrustes or balanced"}  # gauge -> what to use in its place


def get_method(name: str) -> Method:
    """The method called `name`, a key of `METHODS` or METHOD+GAUGE with a key of `GAUGES`.

    Raises:
        UsageError: unknown (the nearest is named), or a gauge where there are no common factors to re-write.

    Example:
        >>> get_method("fedit+balanced").gauge
        'balanced'
    """
    name = method_name(name)
    method, plus, gauge = name.partition("+")
    _require_known("method", method, METHODS)
    row = METHODS[method]
    if not plus:
        return row
    if gauge in REMOVED_GAUGES:
        raise UsageError(f"method {name!r}: the gauge {gauge} was removed: {REMOVED_GAUGES[gauge]}")
    _require_known("gauge", gauge, GAUGES)
    if not row.lora or row.core or row.client_state == "B" or (row.reinitialises and not row.client_state):
        reason = (
            "its factors are frozen"
            if row.core
            else "its clients share one A"
            if row.client_state
            else "its adapter is drawn anew, with a product of zero"
            if row.reinitialises
            else "there are no factors"
        )
        raise UsageError(f"method {method} has no gauge to choose, because {reason}: write {method} alone")
    if row.client_state and gauge in ALIGNED:
        raise UsageError(
            f"{gauge} aligns factors with averaged ones, and clients of {method} see their own only: use balanced or orthonormal-a"
        )
    return replace(row, name=name, gauge=gauge)


def _require_known(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1)
        raise UsageError(f"unknown {what} {name!r}: " + (f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"))
