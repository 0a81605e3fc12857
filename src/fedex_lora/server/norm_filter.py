"""Screening a round's updates by size: what is far larger than the round's median is left out of the mean. Pure, fp64.

This bounds what one party can do to the model; it does not find poison of ordinary size.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from fedex_lora.exactness.algebra import worst
from fedex_lora.types import Adapter, ClientUpdate, LoRAPair

VOTERS = 3  # fewer updates have no median that says who is odd
LARGEST = 1e15  # norm of a tensor, beyond which the products of fp32 factors may overflow


class Size(NamedTuple):
    """How far an update is from what the client started from (Frobenius norms, over all modules and tensors)."""

    product: float
    factors: float
    other: float


NAMES = ("the weights (|s B A - s B0 A0|)", "the factors (|A - A0|, |B - B0|)", "the other trained tensors")  # of `Size`


def size_of(update: ClientUpdate, start: Adapter, other: Mapping[str, Tensor]) -> Size:
    """The size of an update, without forming `B A` where factors are cheaper.

    Args:
        update: as trained.
        start: module path -> the factors that the client started from.
        other: the other tensors that it started from.
    """
    moved, apart = list[float](), list[float]()
    for module, pair in update.adapter.items():
        product, factors = _moved(pair, start[module])
        moved.append(product)
        apart.append(factors)
    rest = [_distance(tensor, other[name]) for name, tensor in update.other.items()]
    return Size(math.hypot(*moved), math.hypot(*apart), math.hypot(*rest))


def _moved(pair: LoRAPair, start: LoRAPair) -> tuple[float, float]:
    """`|s B A - s0 B0 A0|` and `|(A - A0, B - B0)|`.

    Differences first, `(s B - s0 B0) A + s0 B0 (A - A0) = U V`, and `|U V|^2 = <U^T U, V V^T>`: half of fp64's digits are kept, and a
    bound needs fewer.
    """
    A, A0, B, B0 = pair.A.double(), start.A.double(), pair.B.double(), start.B.double()
    dA = A - A0
    U = torch.cat([pair.scaling * B - start.scaling * B0, start.scaling * B0], dim=1)
    V = torch.cat([A, dA])
    square = float(((U.T @ U) * (V @ V.T)).sum())
    return math.sqrt(max(square, 0.0)), math.hypot(float(torch.linalg.vector_norm(dA)), _distance(B, B0))


def _distance(left: Tensor, right: Tensor) -> float:
    return float(torch.linalg.vector_norm(left.double() - right.double()))


def screened(
    updates: Sequence[ClientUpdate],
    starts: Mapping[str, Adapter],
    other: Mapping[str, Tensor],
    factor: float | None,
    earlier: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> tuple[list[ClientUpdate], dict[str, str]]:
    """The updates that may be averaged, in the order of client ids, and client -> why its update may not.

    An update is refused when a norm is so large that the mean could overflow; and of the others when one of its sizes is above `factor`
    times their median of that size, where there are at least `VOTERS` of them and the median is not zero.
    The result does not depend on the order of the updates.

    Args:
        updates: valid by themselves.
        starts: client -> module path -> the factors that it started from.
        other: the other tensors that all started from.
        factor: times the median; None or 0: no bound.
        earlier: client -> the other tensors, of those that started from those of an earlier round.

    Example:
        >>> pair = lambda size: LoRAPair(A=torch.ones(1, 2), B=torch.full((2, 1), size))
        >>> updates = [ClientUpdate(name, {"q": pair(size)}, 1) for name, size in (("a", 1.0), ("b", 1.1), ("c", 50.0))]
        >>> accepted, refused = screened(updates, {name: {"q": pair(0.0)} for name in "abc"}, {}, 10)
        >>> [update.client_id for update in accepted], list(refused)
        (['a', 'b'], ['c'])
    """
    ordered = sorted(updates, key=lambda update: update.client_id)
    sizes = {
        update.client_id: size_of(update, starts[update.client_id], (earlier or {}).get(update.client_id, other)) for update in ordered
    }
    refused = {
        client: "its numbers are too large to be averaged: lower its training.learning_rate"
        for client, size in sizes.items()
        if not worst(size[1:]) <= LARGEST
    }
    sizes = {client: size for client, size in sizes.items() if client not in refused}
    if factor and len(sizes) >= VOTERS:
        for kind, name in enumerate(NAMES):
            middle = median(size[kind] for size in sizes.values())
            for client, size in sizes.items():
                if middle > 0 and size[kind] > factor * middle:
                    reason = f"its change of {name} has norm {size[kind]:.3g}, the round's median is {middle:.3g}"
                    refused.setdefault(client, f"{reason}: above messages.norm_bound = {factor:g} times")
    return [update for update in ordered if update.client_id not in refused], refused
