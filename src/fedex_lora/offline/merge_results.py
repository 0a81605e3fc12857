"""Results of regional servers, merged: the folder that one `aggregate` of all their adapters would have given, to rounding."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedex_lora import __version__
from fedex_lora.aggregation import get_method, merge, normalised_weights
from fedex_lora.aggregation import server_state as server
from fedex_lora.aggregation.lowrank import linear_combination, smallest
from fedex_lora.aggregation.truncation import without_blocks
from fedex_lora.errors import AggregationError, StorageError
from fedex_lora.exactness import measure
from fedex_lora.offline.together import (
    REMEDY,
    distinct_names,
    one_base,
    one_naming,
    one_revision,
    require_apart,
    require_same_frozen,
    require_several,
)
from fedex_lora.storage.adapter_folder import WEIGHTS
from fedex_lora.storage.handout import OF_BASE, for_parties
from fedex_lora.storage.renaming import Renaming
from fedex_lora.storage.result import StoredResult, read_result, write_result
from fedex_lora.storage.updates import UPDATES
from fedex_lora.types import Aggregate, ClientUpdate, Delta, Dense, LowRank


def merge_folders(
    folders: Sequence[Path], out: Path, weights: Sequence[float] | None, parties: Path | None = None, base: str | None = None
) -> dict[str, Any]:
    """Merge the OUTs of regional `fedex-lora aggregate`s, of disjoint clients of one base, into one result folder.

    Args:
        folders: one a region.
        out: must not exist, or be empty. Its `updates/` are the regions' adapters with what their bases gained, so `verify` works on it.
        weights: one a region; None: what each region's weights summed to (its number of adapters, where it had none).
        parties, base: see `aggregate_folders`.

    Returns:
        As `aggregate_folders`; `weights` of the regions, `clients` of all.

    Raises:
        FedexLoraError: regions that do not fit together, or whose method's partial aggregates do not add up. Nothing is written then.
    """
    require_apart(folders, out, parties)
    results, names = [read_result(folder) for folder in folders], distinct_names(folders)
    base_model = one_base(folders, [result.manifest.get("base_model") for result in results], base)
    revision = one_revision(folders, [result.config for result in results], base)
    rules = one_naming(results)
    said = _of_base([result.manifest for result in results], rules, base)
    results = [result.renamed(rule) if rule else result for result, rule in zip(results, rules, strict=True)]
    require_same_frozen(folders, [one.format.frozen for one in results], lambda index, name: results[index].format.frozen[name])
    _require_at_rest(folders, results)
    totals = [_total(folder, result) for folder, result in zip(folders, results, strict=True)] if weights is None else list(weights)
    adapters = _require_disjoint(folders, results)
    merged = merge([_part(name, result) for name, result in zip(names, results, strict=True)], totals)
    if parties is not None:
        require_several(merged.weights.values())
    updates = [ClientUpdate(name, result.adapter, 1, result.other) for name, result in zip(names, results, strict=True)]
    shares = dict(zip(names, normalised_weights(updates, totals), strict=True))
    held = {name: result.base_delta for name, result in zip(names, results, strict=True)}
    before = server.init(merged.adapter, merged.other, merged.method)
    round = max(int(result.manifest["round"]) for result in results)
    after = replace(before, round=round, base_delta=_gained(merged, held, shares, parties is not None))
    errors = measure.audit(before, updates, shares, after, held)
    facts = {
        "base_model": base_model,
        **said,
        **{key: results[0].manifest[key] for key in ("task_type", "frozen") if key in results[0].manifest},
        "sources": [str(folder) for folder in folders],
        "adapters": adapters,
        "total_weight": math.fsum(totals),
        "clients": dict(merged.weights),
        "versions": {"fedex-lora": __version__},
    }
    standalone = not any(isinstance(delta, Dense) for delta in after.base_delta.values())
    config = {**results[0].config, "revision": revision, **({"base_model_name_or_path": base} if base else {})}
    format = replace(results[0].format, config=config)
    with for_parties(out, parties):
        write_result(out, after, updates, shares, format, facts, standalone=standalone, held=held)
    exact = get_method(merged.method).exact
    return {
        "method": merged.method,
        "exact_method": exact,
        "error_against": "the mean of the clients" if exact else "the mean of the regions",
        "weights": shares,
        "clients": dict(merged.weights),
        "modules": len(after.adapter),
        "residual_rank": max((delta.rank for delta in after.base_delta.values() if isinstance(delta, LowRank)), default=0),
        "adapter": standalone,
        "max_relative_error": errors.max_relative_error,
        "total_relative_error": errors.total_relative_error,
        "notes": [rule.told(str(folder)) for folder, rule in zip(folders, rules, strict=True) if rule],
        "out": str(out),
        **({"for_parties": str(parties)} if parties else {}),
    }


def _gained(merged: Aggregate, held: measure.Held, shares: Mapping[str, float], blockless: bool) -> dict[str, Delta]:
    """What the base gains: the residual of the regions' adapters, and the mean of what their bases had gained, rounded to fp32."""
    gained: dict[str, Delta] = {}
    for module in merged.adapter:
        terms: list[tuple[float, Delta]] = [(1.0, merged.residual[module])] if module in merged.residual else []
        terms += [(share, held[name][module]) for name, share in shares.items() if module in held[name]]
        if terms:
            total = linear_combination(terms)
            delta: Delta = Dense(W=total.W.float()) if isinstance(total, Dense) else LowRank(U=total.U.float(), V=total.V.float())
            gained[module] = smallest(without_blocks(delta) if blockless and isinstance(delta, LowRank) else delta)
    return gained


def _part(name: str, result: StoredResult) -> Aggregate:
    """A region's adapter as a partial aggregate; what its base gained may be a matrix, and is added apart."""
    clients = result.manifest.get("clients") or dict(result.weights) or {"": 1.0}
    weights = {f"{name}/{client}": weight for client, weight in clients.items()}
    return Aggregate(adapter=result.adapter, residual={}, other=result.other, weights=weights, method=result.manifest["method"])


def _total(folder: Path, result: StoredResult) -> float:
    total = result.manifest.get("total_weight", math.fsum(entry.get("num_examples", 0) for entry in result.manifest.get("inputs", [])))
    if not isinstance(total, int | float) or not total > 0:
        raise StorageError(f"{folder} does not say what its weights summed to: give --weights, one a region")
    return float(total)


def _of_base(manifests: Sequence[Mapping[str, Any]], rules: Sequence[Renaming | None], base: str | None) -> dict[str, Any]:
    """What the regions say of their base, alike; where `base` says that they have one, what they say otherwise is left out, but classes."""
    facts = dict[str, Any]()
    for key in OF_BASE:
        named = [one for one, rule in zip(manifests, rules, strict=True) if not rule or key != "base_fingerprint"]  # which holds names
        told = [one[key] for one in named if key in one]
        if all(one == told[0] for one in told):
            facts |= {key: told[0]} if told else {}
        elif key == "labels" or not base:
            mend = "merge regions of the same classes" if key == "labels" else REMEDY
            raise AggregationError(f"the regions differ in {key}, so they have no mean: {mend}")
    return facts


def _require_disjoint(folders: Sequence[Path], results: Sequence[StoredResult]) -> dict[str, str]:
    """The adapters that all regions were made of, see `_made_of`; none is in two of them."""
    seen, adapters = dict[str, Path](), dict[str, str]()
    for folder, result in zip(folders, results, strict=True):
        for key, name in _made_of(result.manifest).items():
            if key in seen:
                raise AggregationError(f"{name} is in {seen[key]} and in {folder}: count every adapter once")
            seen[key], adapters[key] = folder, name
    return adapters


def _made_of(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The sum of each adapter's weights, or where it was not kept its path -> its name."""
    if adapters := manifest.get("adapters"):
        return dict(adapters) if isinstance(adapters, Mapping) else dict(zip(adapters, adapters, strict=True))  # of older versions a list
    kept = {digest: path.parent.name for file, digest in manifest["files"].items() if (path := Path(file)).match(f"{UPDATES}/*/{WEIGHTS}")}
    return kept or {str(Path(source).resolve()): source for source in manifest.get("sources", ())}


def _require_at_rest(folders: Sequence[Path], results: Sequence[StoredResult]) -> None:
    """What momentum adds is no part of a mean."""
    if odd := [folder for folder, result in zip(folders, results, strict=True) if result.manifest.get("momentum")]:
        raise AggregationError(
            f"{odd[0]} is of a run with server.momentum or server.learning_rate, which is no mean: merge runs without them"
        )
