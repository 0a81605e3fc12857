"""From clients' updates to one aggregate: checks, weights, one scaling, then the method, many modules of one shape at a time."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedex_lora.aggregation.batching import batches
from fedex_lora.aggregation.decompositions import ClientStack, factor_means
from fedex_lora.aggregation.factorizations import GAUGES
from fedex_lora.aggregation.factors import Factors
from fedex_lora.aggregation.lowrank import finite
from fedex_lora.aggregation.methods import METHODS, Method, get_method
from fedex_lora.aggregation.truncation import truncate
from fedex_lora.config import Truncation, nearest
from fedex_lora.errors import AggregationError, UsageError, counted
from fedex_lora.types import Aggregate, ClientUpdate, LoRAPair, LowRank, ServerState

WeightRule = Literal["num_examples", "uniform"] | Sequence[float]


@torch.no_grad()
def aggregate(
    updates: Sequence[ClientUpdate],
    method: str = "fedex",
    weights: WeightRule = "num_examples",
    truncation: Truncation | None = None,
    state: ServerState | None = None,
) -> Aggregate:
    """Aggregate clients' updates by one of `METHODS`.

    With `M = sum_i p_i s_i B_i A_i` per module (FedEx-LoRA, eq. 7-9), an exact method without `state` returns an adapter and a
    residual such that `adapter.scaling * B @ A + residual.U @ residual.V = M`, to fp32 rounding. Sums run in the order of `in_order`, so
    the bits do not depend on the order of arrival. Half-precision factors are aggregated in fp32.

    Args:
        updates: one a client; the same modules and shapes in all of them, and the same rank unless the method takes ranks that differ.
        method: a name in `METHODS`, or METHOD+GAUGE.
        weights: "num_examples", "uniform", or one number >= 0 an update, in their order; normalised to sum one.
        truncation: of the residual, for `fedex-svd`; by default to the adapter's rank.
        state: what the clients went on from (see `server_state.step`); None: adapters from anywhere.

    Raises:
        AggregationError: no updates, or they do not fit together, or hold NaN or infinity, or the weights are impossible; or the updates
            do not continue the state.
        UsageError: unknown method or gauge, or a truncation for a method that does not truncate.

    Example:
        >>> import torch
        >>> pair = lambda: LoRAPair(A=torch.randn(4, 16), B=torch.randn(8, 4), scaling=2.0)
        >>> result = aggregate([ClientUpdate("a", {"q": pair()}, 10), ClientUpdate("b", {"q": pair()}, 30)])
        >>> result.residual["q"].rank, dict(result.weights)
        (4, {'a': 0.25, 'b': 0.75})
    """
    row = get_method(method)
    if truncation not in (None, Truncation()) and row.residual_policy != "truncate":
        raise UsageError(f"truncation is for fedex-svd, and the method is {method}: leave it out")
    updates, p = in_order(updates, normalised_weights(updates, weights))
    require_same_structure(updates, row)
    if state is not None:
        require_continues(state, updates, row)
    like = updates[0].adapter
    updates = [replace(update, adapter={module: pair.inner for module, pair in update.adapter.items()}) for update in updates]
    adapter: dict[str, LoRAPair] = {}
    residual: dict[str, LowRank] = {}
    dropped: dict[str, float] = {}
    for part in splits(row, [update.client_id for update in updates], batches(updates, p, row, state)):
        B = part.adapter.B.mT.contiguous()
        adapter |= {
            module: LoRAPair(A=part.adapter.A[index], B=B[index], scaling=part.scaling) for index, module in enumerate(part.modules)
        }
        if part.rest is not None and row.residual_policy == "drop":
            dropped |= {module: abs(part.scaling) * norm for module, norm in zip(part.modules, _norms(part.rest), strict=True)}
        elif part.rest is not None:
            residual.update(_gains(part.modules, part.rest))
    adapter = {module: pair.around(adapter[module]) for module, pair in like.items()}
    if row.residual_policy == "truncate":
        residual, dropped = truncate(residual, truncation or Truncation(), max((pair.rank for pair in adapter.values()), default=1))
    return Aggregate(
        adapter=adapter,
        residual=residual,
        other={name: mean_of((update.other[name] for update in (updates[-1], *updates[:-1])), p, name) for name in updates[0].other},
        weights={update.client_id: weight for update, weight in zip(updates, p, strict=True)},
        method=method,
        dropped=dropped,
    )


def _norms(product: Factors) -> list[float]:
    """The Frobenius norms of a stack of products whose columns are orthogonal, as those of an SVD are."""
    return [float(norm) for norm in (product.A.double().norm(dim=2) * product.B.double().norm(dim=2)).norm(dim=1)]


def in_order(updates: Sequence[ClientUpdate], p: Sequence[float]) -> tuple[list[ClientUpdate], list[float]]:
    """The updates and their weights in the order in which sums are taken: of the weights, and of the ids where those are equal.

    Sums are of differences to the last client. Were that one light, its factors would cancel from large numbers: at 1 % of the weight and
    a hundred times the size of the others it costs two digits.
    """
    order = sorted(range(len(updates)), key=lambda i: (p[i], updates[i].client_id))
    return [updates[i] for i in order], [p[i] for i in order]


def normalised_weights(updates: Sequence[ClientUpdate], weights: WeightRule) -> list[float]:
    """`p_i >= 0` in float64 with sum one, over the participants, in their order."""
    if not updates:
        raise AggregationError("no updates to aggregate: give at least one")
    if isinstance(weights, Mapping):
        raise AggregationError("weights are given by name: give one number an update, in their order")
    if isinstance(weights, str) and weights not in ("num_examples", "uniform"):
        raise AggregationError(f"unknown weights {weights!r}: use 'num_examples', 'uniform' or one number a client")
    given = [1 if weights == "uniform" else update.num_examples for update in updates] if isinstance(weights, str) else weights
    try:
        raw = [float(weight) for weight in given]
    except (TypeError, ValueError, OverflowError):
        said = " ".join(repr(given).split())[:80]
        raise AggregationError(f"weights {said}: give one number for each update (by default its num_examples)") from None
    if len(raw) != len(updates):
        raise AggregationError(f"{counted(len(raw), 'weight')} for {counted(len(updates), 'update')}: give one weight for each adapter")
    if any(not math.isfinite(weight) or weight < 0 for weight in raw):
        raise AggregationError(f"weights {raw} must be finite and not negative: give numbers from zero up")
    total = math.fsum(raw) if math.isfinite(sum(raw)) else math.inf
    if total == 0:
        raise AggregationError("the weights sum to zero: at least one client must count (has every client zero examples?)")
    if not math.isfinite(total):
        raise AggregationError(f"the weights {raw} sum to infinity: scale them down")
    return [weight / total for weight in raw]


def _gains(modules: Sequence[str], gain: Factors) -> dict[str, LowRank]:
    """`s R` per module, without the modules where it is zero."""
    U, V = gain.B.mT, gain.A
    return {
        module: LowRank(U=U[index], V=V[index]) for index, module in enumerate(modules) if V.shape[1] and _any(U[index]) and _any(V[index])
    }


def _any(matrix: Tensor) -> bool:
    """Is anything in it not zero? Looks at one row first, where the answer nearly always is."""
    return bool(matrix[0].any() or matrix.any())


def mean_of(last_first: Iterable[Tensor], p: Sequence[float], name: str) -> Tensor:
    """`sum p_i x_i`, differences to the last first, rounded once to fp32 or better; `last_first` may read them one at a time."""
    tensors = iter(last_first)
    last = next(tensors)
    if not last.is_floating_point():
        raise AggregationError(f"other tensor {name} is {last.dtype}, which has no mean: send floating-point tensors only")
    last = last.to(torch.promote_types(last.dtype, torch.float32))
    total = last.to(torch.float64, copy=True)
    for weight, tensor in zip(p[:-1], tensors, strict=True):
        total.add_(tensor.to(last.dtype) - last, alpha=weight)
    mean = total.to(last.dtype)
    if not finite(mean):
        raise AggregationError(f"other tensor {name} of some client holds NaN or infinity, or overflows: leave that client out")
    return mean


def require_same_structure(updates: Sequence[ClientUpdate], row: Method) -> None:
    """The same modules, shapes, ranks and other tensors in all updates; ids unique; factors not empty; scalings finite and not zero."""
    first, ids = updates[0], [update.client_id for update in updates]
    if len(set(ids)) < len(ids):
        raise AggregationError(f"client ids {ids} are not unique: give every client its own")
    for update in updates:
        who = f"clients {first.client_id} and {update.client_id}"
        _require_same_names(who, "modules", first.adapter, update.adapter)
        _require_same_names(who, "other tensors", first.other, update.other)
        for module, pair in update.adapter.items():
            reference = first.adapter[module]
            if pair.shape != reference.shape or (pair.rank != reference.rank and not row.per_client_ranks):
                mend = "; train all adapters on one model"
                if pair.shape == reference.shape:
                    mend = f", and {row.name} needs one rank: use {', '.join(m.name for m in METHODS.values() if m.per_client_ranks)}"
                raise AggregationError(
                    f"{who} differ in {module}: shape {reference.shape} rank {reference.rank} "
                    f"against shape {pair.shape} rank {pair.rank}{mend}"
                )
            if pair.parts.keys() != reference.parts.keys() or (
                "U" in pair.parts and not torch.equal(pair.parts["U"], reference.parts["U"])
            ):
                raise AggregationError(f"{who} do not share the frozen U of {module}, so their cores have no mean: use method fedex")
            _require_numbers(update.client_id, module, pair)
        for name, tensor in update.other.items():
            if tensor.shape != first.other[name].shape:
                raise AggregationError(f"{who} differ in {name} ({tuple(first.other[name].shape)}, {tuple(tensor.shape)}): train one model")


def _require_numbers(client: str, module: str, pair: LoRAPair) -> None:
    if 0 in (pair.rank, *pair.shape):
        raise AggregationError(f"client {client} has no numbers in {module}: give factors of rank 1 or more")
    if not math.isfinite(pair.scaling) or pair.scaling == 0:
        raise AggregationError(f"client {client} has scaling {pair.scaling} in {module}: it must be finite and not zero")


def require_continues(state: ServerState, updates: Sequence[ClientUpdate], row: Method) -> None:
    """The same modules and shapes as the global adapter's, and its rank, or a lower one where the method takes ranks that differ."""
    if not isinstance(state, ServerState):
        raise UsageError(f"state is of type {type(state).__name__}: give the ServerState that the clients went on from")
    for update in updates:
        for module, pair in state.adapter.items():
            sent = update.adapter.get(module)
            fits = sent is not None and sent.shape == pair.shape and sent.parts.keys() == pair.parts.keys()
            if sent is None or not fits or sent.rank > pair.rank or (sent.rank < pair.rank and not row.per_client_ranks):
                raise AggregationError(
                    f"client {update.client_id} does not continue module {module} of the global adapter: same names, shapes and rank"
                )
        if len(state.adapter) < len(update.adapter):
            raise AggregationError(f"client {update.client_id} sent modules that the global adapter does not have: train its modules only")


def _require_same_names(who: str, what: str, left: Mapping[str, object], right: Mapping[str, object]) -> None:
    if left.keys() != right.keys():
        odd = sorted(left.keys() ^ right.keys())
        near = nearest(odd[0], sorted(right if odd[0] in left else left))
        like = f"; in the other {near} is the nearest" if near else ""
        raise AggregationError(
            f"{who} have different {what} ({odd[0]} and {len(odd) - 1} more in one only{like}): train the same ones everywhere"
        )


class BatchResult(NamedTuple):
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


def splits(row: Method, ids: Sequence[str], batches: Iterable[ClientStack]) -> Iterator[BatchResult]:
    """The method's split of every batch.

    Args:
        row: the method.
        ids: of the clients, in the order in which they are stacked; named in errors.
        batches: of modules.

    Raises:
        AggregationError: NaN or infinity, or factors that the method needs shared and are not.
    """
    for clients in batches:
        modules, scaling = clients.modules, clients.scaling
        if row.refactorises or row.reinitialises:  # the result would not show what came in
            _require_finite(ids, modules, clients, clients.factors)
        adapter, rest = _split(row, clients)
        _require_finite(ids, modules, clients, adapter)
        if rest is not None and row.residual_policy != "drop" and scaling != 1:
            rest.B.mul_(scaling)
        if rest is not None and not finite(*rest):  # factors whose mean is finite may differ by more than their dtype holds
            odd = next(module for index, module in enumerate(modules) if not finite(rest.A[index], rest.B[index]))
            raise AggregationError(
                f"the residual of {odd} overflows: some client's factors are too large; leave it out, or train it with less"
            )
        part = [BatchResult(modules, adapter, rest, scaling)]
        del adapter, rest  # nothing here holds a batch's result while the next one is made
        yield part.pop()


def _split(row: Method, clients: ClientStack) -> tuple[Factors, Factors | None]:
    """The method's split, with the adapter in the method's gauge."""
    if row.trained_schedule != ("AB",) and not any(torch.equal(x, x[:, -1:].expand_as(x)) for x in clients.factors):
        raise AggregationError(
            f"{row.name} needs one A that all clients share (or one B), and theirs differ: freeze one while training, or use method fedex"
        )
    adapter, rest = row.split(clients)
    if row.gauge != "as-is" and not row.client_state:
        means, _ = factor_means(clients)
        adapter = GAUGES[row.gauge](adapter, means, clients.fresh)
    return adapter, rest


def _require_finite(ids: Sequence[str], modules: Sequence[str], clients: ClientStack, factors: Factors) -> None:
    """NaN and infinity survive every sum, so a look at the means finds them in any input; then name who sent them."""
    if finite(*factors):
        return
    for index, client in enumerate(ids):
        for position, module in enumerate(modules):
            if not finite(*(x[position, index] for x in clients.factors)):
                raise AggregationError(f"client {client} sent NaN or infinity in {module}: leave it out, or lower its learning rate")
    raise AggregationError(f"the mean of {modules[0]} overflows: some client's factors are near their dtype's largest number; leave it out")
