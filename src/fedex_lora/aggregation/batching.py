"""Updates to stacks: many modules of one shape at a time, all clients on one scaling, in memory that is used again."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from fedex_lora.aggregation.decompositions import ClientStack
from fedex_lora.aggregation.factors import Factors, derive_seed
from fedex_lora.aggregation.methods import Method
from fedex_lora.types import Adapter, ClientUpdate, LoRAPair, ServerState

BATCH_BYTES = 2 * 2**20  # of clients' factors that one call of a method works on: hides call overhead, stays in the cache
Space: TypeAlias = dict[str, Tensor]
"""Memory that one batch after the other is stacked in."""


def rescaled(pair: LoRAPair, scaling: float) -> LoRAPair:
    """The same product on another scaling: `B <- (s_i / s) B` (of a core, C), in fp64 and back in a dtype of at least fp32."""
    if pair.scaling == scaling:
        return pair
    inner = pair.inner
    dtype = torch.promote_types(inner.B.dtype, torch.float32)
    return pair.around(LoRAPair(A=inner.A, B=(inner.B.double() * (pair.scaling / scaling)).to(dtype), scaling=scaling))


def shape_batches(updates: Sequence[ClientUpdate], state: ServerState | None = None) -> Iterator[list[str]]:
    """The modules, those of one shape, ranks and scaling together, in portions of `BATCH_BYTES`."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for module, pair in updates[0].adapter.items():
        ranks = tuple(update.adapter[module].rank for update in updates)
        live = state.adapter[module] if state else pair
        alike.setdefault((pair.shape, ranks, live.rank, live.scaling), []).append(module)
    for modules in alike.values():
        pair = updates[0].adapter[modules[0]]
        size = max(1, BATCH_BYTES // (4 * len(updates) * (pair.A.numel() + pair.B.numel())))
        yield from (modules[start : start + size] for start in range(0, len(modules), size))


def batches(updates: Sequence[ClientUpdate], p: Sequence[float], row: Method, state: ServerState | None) -> Iterator[ClientStack]:
    """What a split sees of updates in memory, on the scaling of the global adapter, else of the first client; valid until the next one."""
    adapters, space = [update.adapter for update in updates], Space()
    for modules in shape_batches(updates, state):
        first = modules[0]
        live = state.adapter[first] if state else adapters[0][first]
        ranks = [adapter[first].rank for adapter in adapters]
        rank = max([*ranks, live.rank] if row.per_client_ranks else ranks)
        stacked = _stacked(adapters, modules, rank, live.scaling, space)
        yield ClientStack(
            A=stacked.A,
            B=stacked.B,
            p=stacked.A.new_tensor(p),
            modules=modules,
            seed=derive_seed(state.seed, state.round + 1, "fresh") if state else 0,
            scaling=live.scaling,
            frozen=_frozen(state.adapter, modules, p, ranks) if state and row.holds_tail and min(ranks) < rank else None,
            origins=_origins(state.personal, updates, modules, rank, live.scaling) if state and row.client_state else None,
        )


def _frozen(live: Adapter, modules: Sequence[str], p: Sequence[float], ranks: Sequence[int]) -> Factors:
    """`U diag(sum_{i: r_i <= l} p_i) V`: component l of the global adapter, as far as clients of lower rank hold it (l from 0)."""
    pairs = [live[module] for module in modules]
    held = torch.tensor([math.fsum(w for w, r in zip(p, ranks, strict=True) if r <= component) for component in range(pairs[0].rank)])
    B = torch.stack([pair.B.mT for pair in pairs])
    return Factors(A=torch.stack([pair.A for pair in pairs]), B=held.to(B)[:, None] * B)


def _origins(
    personal: Mapping[str, Adapter], updates: Sequence[ClientUpdate], modules: Sequence[str], rank: int, scaling: float
) -> Factors | None:
    """The factors that each client started from: zeros for one that starts for the first time, None when all do."""
    if not any(update.client_id in personal for update in updates):
        return None
    started = [personal.get(update.client_id) or _zeros_like(update.adapter) for update in updates]
    return _stacked(started, modules, rank, scaling, {})


def _zeros_like(adapter: Adapter) -> Adapter:
    return {name: LoRAPair(torch.zeros_like(pair.A), torch.zeros_like(pair.B), pair.scaling) for name, pair in adapter.items()}


def _stacked(adapters: Sequence[Adapter], modules: Sequence[str], rank: int, scaling: float, space: Space) -> Factors:
    """The modules' factors of all clients in one dtype of at least fp32, on one scaling, zeros up to `rank`: a copy, in `space`."""
    pairs = [_padded(rescaled(adapter[module], scaling), rank) for module in modules for adapter in adapters]
    A = _stack(_one_dtype([pair.A for pair in pairs]), space, "A")
    B = _stack(_one_dtype([pair.B for pair in pairs]), space, "B")
    dtype, shape = torch.promote_types(A.dtype, B.dtype), (len(modules), len(adapters))
    return Factors(A=A.to(dtype).unflatten(0, shape), B=B.to(dtype).mT.unflatten(0, shape))


def _padded(pair: LoRAPair, rank: int) -> LoRAPair:
    missing, pad = rank - pair.rank, torch.nn.functional.pad
    return LoRAPair(A=pad(pair.A, (0, 0, 0, missing)), B=pad(pair.B, (0, missing)), scaling=pair.scaling) if missing else pair


def _stack(tensors: list[Tensor], space: Space, part: str) -> Tensor:
    """`torch.stack` into memory that the next batch uses again: fresh memory costs a page fault every 4 KiB, a third of the time."""
    first, size = tensors[0], len(tensors) * tensors[0].numel()
    if part not in space or space[part].numel() < size or space[part].dtype != first.dtype:
        space[part] = first.new_empty(size)
    return torch.stack(tensors, out=space[part][:size].view(len(tensors), *first.shape))


def _one_dtype(tensors: list[Tensor]) -> list[Tensor]:
    """fp32 as it is; anything else in fp64 if some are, else in fp32."""
    dtypes = {tensor.dtype for tensor in tensors}
    if dtypes == {torch.float32}:
        return tensors
    return [tensor.to(torch.float64 if torch.float64 in dtypes else torch.float32) for tensor in tensors]
