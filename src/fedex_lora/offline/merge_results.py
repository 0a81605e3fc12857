"""Results of regional servers, merged: the folder that one `aggregate` of all their adapters would have given, to rounding."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedex_lora import __version__
from fedex_lora.aggregation import get_method, merge, normalised_weights
from fedex_lora.aggregation import server_state as server
from fedex_lora.aggregation.lowrank import linear_combination, smallest
from fedex_lora.aggregation.truncation import without_blocks
from fedex_lora.errors import AggregationError, StorageError
from fedex_lora.exactness import measure
from fedex_lora.offline.aggregate_folders import distinct_names, require_apart, require_several
from fedex_lora.offline.together import one_base
from fedex_lora.storage.handout import for_parties
from fedex_lora.storage.result import Result, read_result, write_result
from fedex_lora.types import Aggregate, ClientUpdate, Delta, Dense, LowRank, ServerState


def merge_folders(
    folders: Sequence[Path], out: Path, weights: Sequence[float] | None, parties: Path | None = None, base: str | None = None
) -> dict[str, Any]:
    """Merge the OUTs of regional `fedex-lora aggregate`s, of disjoint clients of one base, into one result folder.

    Args:
        folders: one a region.
        out: must not exist, or be empty. Its `updates/` are the regions' adapters with what their bases gained, so `verify` works on it.
        weights: one a region; None: what each region's weights summed to (its number of adapters, where it had none).
        parties, base: see `adapters.aggregate_folders`.

    Returns:
        As `adapters.aggregate_folders`; `weights` of the regions, `clients` of all.

    Raises:
        FedexLoraError: regions that do not fit together, or whose method's partial aggregates do not add up. Nothing is written then.
    """
    require_apart(folders, out, parties)
    results = [read_result(folder) for folder in folders]
    names = distinct_names(folders)
    base_model = one_base(folders, [result.manifest.get("base_model") for result in results], base)
    _require_same_frozen(folders, results)
    _require_at_rest(folders, results)
    totals = [_total(folder, result) for folder, result in zip(folders, results, strict=True)] if weights is None else list(weights)
    parts = [_part(name, result) for name, result in zip(names, results, strict=True)]
    adapters = _require_disjoint(folders, results)
    merged = merge(parts, totals)
    if parties is not None:
        require_several(merged.weights.values())
    updates = [ClientUpdate(name, result.adapter, 1, result.other) for name, result in zip(names, results, strict=True)]
    p = normalised_weights(updates, totals)
    base_delta = {}
    for module in merged.adapter:
        terms: list[tuple[float, Delta]] = [(1.0, merged.residual[module])] if module in merged.residual else []
        terms += [(w, result.base_delta[module]) for w, result in zip(p, results, strict=True) if module in result.base_delta]
        if terms:
            gained = _float32(linear_combination(terms))
            base_delta[module] = smallest(without_blocks(gained) if parties and isinstance(gained, LowRank) else gained)
    round = max(int(result.manifest["round"]) for result in results)
    after = ServerState(method=merged.method, round=round, adapter=merged.adapter, base_delta=base_delta, other=merged.other)
    shares, held = dict(zip(names, p, strict=True)), {name: result.base_delta for name, result in zip(names, results, strict=True)}
    audit = measure.audit(server.init(merged.adapter, merged.other, merged.method), updates, shares, after, held)
    facts = {
        "base_model": base_model,
        **{key: results[0].manifest[key] for key in ("task_type", "frozen") if key in results[0].manifest},
        "sources": [str(folder) for folder in folders],
        "adapters": adapters,
        "total_weight": math.fsum(totals),
        "clients": dict(merged.weights),
        "versions": {"fedex-lora": __version__},
    }
    standalone = not any(isinstance(delta, Dense) for delta in base_delta.values())
    with for_parties(out, parties):
        write_result(out, after, updates, shares, results[0].format, facts, standalone=standalone, held=held)
    return {
        "method": merged.method,
        "exact_method": get_method(merged.method).exact,
        "error_against": "the mean of the clients" if get_method(merged.method).exact else "the mean of the regions",
        "weights": shares,
        "clients": dict(merged.weights),
        "modules": len(after.adapter),
        "residual_rank": max((delta.rank for delta in base_delta.values() if isinstance(delta, LowRank)), default=0),
        "adapter": standalone,
        "max_relative_error": audit.max_relative_error,
        "total_relative_error": audit.total_relative_error,
        "out": str(out),
    }


def _part(name: str, result: Result) -> Aggregate:
    """A region's adapter as a partial aggregate; what its base gained may be a matrix, and is added apart."""
    clients = result.manifest.get("clients") or dict(result.weights) or {"": 1.0}
    weights = {f"{name}/{client}": weight for client, weight in clients.items()}
    return Aggregate(adapter=result.adapter, residual={}, other=result.other, weights=weights, method=result.manifest["method"])


def _total(folder: Path, result: Result) -> float:
    total = result.manifest.get("total_weight", math.fsum(entry.get("num_examples", 0) for entry in result.manifest.get("inputs", [])))
    if not isinstance(total, int | float) or not total > 0:
        raise StorageError(f"{folder} does not say what its weights summed to: give --weights, one a region")
    return float(total)


def _require_disjoint(folders: Sequence[Path], results: Sequence[Result]) -> list[str]:
    """The adapters that all regions were made of; none is in two of them."""
    seen = dict[str, Path]()
    for folder, result in zip(folders, results, strict=True):
        for adapter in result.manifest.get("adapters") or result.manifest.get("sources", ()):
            place = str(Path(adapter).resolve())
            if place in seen:
                raise AggregationError(f"{adapter} is in {seen[place]} and in {folder}: count every adapter once")
            seen[place] = folder
    return list(seen)


def _require_at_rest(folders: Sequence[Path], results: Sequence[Result]) -> None:
    """What momentum adds is no part of a mean."""
    if odd := [folder for folder, result in zip(folders, results, strict=True) if result.manifest.get("momentum")]:
        raise AggregationError(
            f"{odd[0]} is of a run with server.momentum or server.learning_rate, which is no mean: merge runs without them"
        )


def _require_same_frozen(folders: Sequence[Path], results: Sequence[Result]) -> None:
    """What the regions' adapters hold of the base, untrained, is the same in all."""
    first = results[0].format.frozen
    for folder, result in zip(folders, results, strict=True):
        frozen = result.format.frozen
        for name in sorted(first.keys() | frozen.keys()):
            if not (name in first and name in frozen and torch.equal(first[name], frozen[name])):
                raise AggregationError(f"{folders[0]} and {folder} differ in {name}, which nobody trained: their bases differ there")


def _float32(delta: Delta) -> Delta:
    return Dense(W=delta.W.float()) if isinstance(delta, Dense) else LowRank(U=delta.U.float(), V=delta.V.float())
