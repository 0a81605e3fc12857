"""The engine: batches of stacked factors, from memory or from files, through a method's split."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedex_lora.aggregation._stacking import Batch
from fedex_lora.aggregation.factors import Factors
from fedex_lora.aggregation.gauges import GAUGES
from fedex_lora.aggregation.lowrank import finite
from fedex_lora.aggregation.methods import Method
from fedex_lora.aggregation.splits import Clients, factor_means
from fedex_lora.errors import AggregationError


class Part(NamedTuple):
    """What a method makes of one batch; valid until the next one is asked for.

    Attributes:
        modules: the g module paths.
        adapter: what the clients go on with, `g x r`.
        rest: `s` times the rest of M where the base gains it, the rest itself where it is dropped; None where there is none.
        scaling: s.
    """

    modules: Sequence[str]
    adapter: Factors
    rest: Factors | None
    scaling: float


def splits(row: Method, ids: Sequence[str], batches: Iterable[Batch]) -> Iterator[Part]:
    """The method's split of every batch.

    Args:
        row: the method.
        ids: of the clients, in the order in which they are stacked; named in errors.
        batches: of modules.

    Raises:
        AggregationError: NaN or infinity, or factors that the method needs shared and are not.
    """
    for modules, clients, scaling in batches:
        if row.refactors or row.draws:  # the result would not show what came in
            _require_finite(ids, modules, clients, clients.factors)
        adapter, rest = _split(row, clients)
        _require_finite(ids, modules, clients, adapter)
        if rest is not None and row.rest != "drop" and scaling != 1:
            rest.B.mul_(scaling)
        if rest is not None:
            _require_no_overflow(modules, rest)
        part = [Part(modules, adapter, rest, scaling)]
        del adapter, rest  # nothing here holds a batch's result while the next one is made
        yield part.pop()


def _split(row: Method, clients: Clients) -> tuple[Factors, Factors | None]:
    """The method's split, with the adapter in the method's gauge."""
    if row.trains != ("AB",) and not any(_shared(x) for x in clients.factors):
        raise AggregationError(
            f"{row.name} needs one A that all clients share (or one B), and theirs differ: freeze one while training, or use method fedex"
        )
    adapter, rest = row.split(clients)
    if row.gauge != "as-is" and not row.own:
        means, _ = factor_means(clients)
        adapter = GAUGES[row.gauge](adapter, means, clients.fresh)
    return adapter, rest


def _shared(x: Tensor) -> bool:
    """Do all clients have the same?"""
    return torch.equal(x, x[:, -1:].expand_as(x))


def _require_finite(ids: Sequence[str], modules: Sequence[str], clients: Clients, factors: Factors) -> None:
    """NaN and infinity survive every sum, so a look at the means finds them in any input; then name who sent them."""
    if finite(*factors):
        return
    for index, client in enumerate(ids):
        for position, module in enumerate(modules):
            if not finite(*(x[position, index] for x in clients.factors)):
                raise AggregationError(f"client {client} sent NaN or infinity in {module}: leave it out, or lower its learning rate")
    raise AggregationError(f"the mean of {modules[0]} overflows: some client's factors are near the largest number of their dtype")


def _require_no_overflow(modules: Sequence[str], rest: Factors) -> None:
    """Factors whose mean is finite may differ by more than their dtype holds, before or after the scaling."""
    if not finite(*rest):
        odd = next(module for index, module in enumerate(modules) if not finite(rest.A[index], rest.B[index]))
        raise AggregationError(f"the residual of {odd} overflows: some client's factors are too large; leave it out, or train it with less")
