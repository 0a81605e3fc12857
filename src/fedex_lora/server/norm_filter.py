"""Screening a round's updates by size: what is far larger than the round's median is left out of the mean. Pure, fp64.

This bounds what one party can do to the model; it does not find poison of ordinary size.
"""

import math
from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from fedex_lora.errors import WireError
from fedex_lora.exactness.algebra import worst
from fedex_lora.protocol.messages import Download
from fedex_lora.types import Adapter, ClientUpdate, LoRAPair

VOTERS = 3  # fewer updates have no median that says who is odd
MOST_NORM = 1e15  # norm of a tensor, beyond which the products of fp32 factors may overflow


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
    moved = [_moved(pair, start[module]) for module, pair in update.adapter.items()]
    rest = [_distance(tensor, other[name]) for name, tensor in update.other.items()]
    return Size(math.hypot(*(product for product, _ in moved)), math.hypot(*(factors for _, factors in moved)), math.hypot(*rest))


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


def norm_rejected(sizes: Mapping[str, Size], factor: float | None) -> dict[str, str]:
    """Client -> why its update may not be averaged, by its size alone.

    An update is rejected when a norm is so large that the mean could overflow; and of the others when one of its sizes is above `factor`
    times their median of that size, where there are at least `VOTERS` of them and the median is not zero.
    The result does not depend on the order of the updates.

    Args:
        sizes: client -> the size of its update, which is valid by itself.
        factor: times the median; None or 0: no bound.

    Example:
        >>> list(norm_rejected({"a": Size(1.0, 1.0, 0.0), "b": Size(1.1, 1.0, 0.0), "c": Size(50.0, 1.0, 0.0)}, 10))
        ['c']
    """
    rejected = {
        client: "its numbers are too large to be averaged: lower its training.learning_rate"
        for client, size in sizes.items()
        if not worst(size[1:]) <= MOST_NORM
    }
    sound = {client: size for client, size in sizes.items() if client not in rejected}
    if factor and len(sound) >= VOTERS:
        for kind, name in enumerate(NAMES):
            middle = median(size[kind] for size in sound.values())
            for client, size in sound.items():
                if middle > 0 and size[kind] > factor * middle:
                    reason = f"its change of {name} has norm {size[kind]:.3g}, the round's median is {middle:.3g}"
                    rejected.setdefault(client, f"{reason}: above messages.norm_bound = {factor:g} times")
    return rejected


def require_frozen(update: ClientUpdate, start: Adapter, sent: Download, head_rounds: int) -> None:
    """What `local.head_rounds` freezes in a round comes back as it was: the norm bound cannot see it, for its median is zero.

    Raises:
        WireError: it does not.
    """
    if sent.request.round <= head_rounds:
        pairs = [(factor, start[module].parts[name]) for module, pair in update.adapter.items() for name, factor in pair.parts.items()]
    else:
        pairs = [(tensor, sent.body.other[name]) for name, tensor in update.other.items()]
    if not all(torch.equal(*pair) for pair in pairs):
        raise WireError("it changed what local.head_rounds freezes in this round")
