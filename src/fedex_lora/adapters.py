"""Adapters from elsewhere: aggregate PEFT folders exactly, with no model, no training and no server."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedex_lora import __version__, measure, server
from fedex_lora.aggregation import Method, aggregate, method_named
from fedex_lora.config import Truncation
from fedex_lora.errors import AggregationError, UsageError
from fedex_lora.peft_io import AdapterFolder, read_adapter_folder, read_result, write_result
from fedex_lora.types import ClientUpdate, LowRank, ServerState


def aggregate_folders(
    folders: Sequence[Path],
    out: Path,
    method: str,
    weights: Sequence[float] | None,
    previous: Path | None,
    truncation: Truncation | None = None,
) -> dict[str, Any]:
    """Aggregate PEFT LoRA adapters that were trained on one base model, and write a result folder.

    Args:
        folders: one adapter a client; the folder's name is the client's id.
        out: must not exist, or be empty. It gets `trainable/` with `base_delta.safetensors` (what clients go on with), and `adapter/`,
            one stand-alone adapter with all of the update.
        method: a name in `METHODS`, or METHOD+GAUGE.
        weights: one a folder; None: uniform.
        previous: the result folder that the adapters were trained on top of.
        truncation: of the residual, for fedex-svd.

    Returns:
        Method, weights, ranks, and the exactness error in fp64.

    Raises:
        FedexLoraError: an adapter that is broken or does not fit the others; nothing is written then.
    """
    row = method_named(method)
    _require_global_model(row, truncation)
    if any(out.resolve().is_relative_to(folder.resolve()) for folder in folders):
        raise UsageError(f"{out} lies in one of the adapters: give another -o")
    read = [read_adapter_folder(folder) for folder in folders]
    _require_one_base(folders, read)
    updates = [
        ClientUpdate(client_id=name, adapter=one.adapter, num_examples=1, other=one.other)
        for name, one in zip(_names(folders), read, strict=True)
    ]
    before = _state(previous, method, updates)
    rule: Any = "uniform" if weights is None else list(weights)
    held: measure.Held = {}
    if previous is None:
        result = aggregate(updates, method, rule, truncation)
        after = ServerState(method=method, round=1, adapter=result.adapter, base_delta=dict(result.residual), other=result.other)
    else:
        after, result = server.step(before, updates, rule, truncation)
        held = {update.client_id: _held(before, update) for update in updates}
    audit = measure.audit(before, updates, result.weights, after, held)
    facts = {
        "base_model": read[0].base_model,
        "task_type": read[0].config.get("task_type"),
        "sources": [str(folder) for folder in folders],
        "versions": {"fedex-lora": __version__},
    }
    write_result(out, after, updates, result.weights, read[0].format, facts, previous_delta=before.base_delta, standalone=True, held=held)
    return {
        "method": method,
        "exact_method": row.exact,
        "weights": dict(result.weights),
        "modules": len(after.adapter),
        "trainable_rank": max(pair.rank for pair in after.adapter.values()),
        "residual_rank": max((gain.rank for gain in result.residual.values()), default=0),
        "max_relative_error": audit.max_relative_error,
        "total_relative_error": audit.total_relative_error,
        "tail": measure.tail(result),
        "warning": measure.useless_truncation(result),
        "deviation": measure.deviation(result, updates).total_relative_error,
        "out": str(out),
    }


def _require_global_model(row: Method, truncation: Truncation | None) -> None:
    if not row.lora or row.pooled:
        raise UsageError(f"method {row.name} trains nothing that adapters hold: use fedex, say")
    if row.exactness == "personalised":
        raise UsageError(f"method {row.name} has no global model to write: each client goes on with its own; use fedex, say")
    if truncation not in (None, Truncation()) and row.rest != "truncate":
        raise UsageError(f"--truncate is for fedex-svd, and the method is {row.name}")


def _normal(name: str | None) -> str | None:
    """Two spellings of one local folder are one base."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their whole paths where two have one name.

    Raises:
        UsageError: one folder twice.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise UsageError("the same adapter folder is given twice: to count it twice, give it once with twice the weight")
    names = [folder.name for folder in resolved]
    return names if len(set(names)) == len(names) else ["_".join(folder.parts[1:]) for folder in resolved]


def _require_one_base(folders: Sequence[Path], read: Sequence[AdapterFolder]) -> None:
    for folder, one in zip(folders, read, strict=True):
        if _normal(one.base_model) != _normal(read[0].base_model):
            raise AggregationError(
                f"{folders[0]} was trained on {read[0].base_model}, {folder} on {one.base_model}: adapters of different bases have no mean"
            )
        if one.config.get("task_type") != read[0].config.get("task_type"):
            raise AggregationError(f"{folders[0]} and {folder} have different task types: aggregate adapters of one task")
        for name in {*one.frozen, *read[0].frozen}:
            if not (name in one.frozen and name in read[0].frozen and torch.equal(one.frozen[name], read[0].frozen[name])):
                raise AggregationError(
                    f"{folders[0]} and {folder} differ in {name}, which is not in modules_to_save: their bases have other embeddings"
                )


def _state(previous: Path | None, method: str, updates: Sequence[ClientUpdate]) -> ServerState:
    """The state that the adapters were trained from; without one, a base that has gained nothing."""
    if previous is None:
        return server.init(updates[0].adapter, updates[0].other, method)
    if method_named(method).own:
        raise UsageError(f"method {method} with --state needs every client's own last factors, which result folders do not hold: use fedex")
    result = read_result(previous / "final" if (previous / "final").is_dir() else previous)
    state = server.init(result.adapter, result.other, method)
    return replace(state, round=int(result.manifest["round"]), base_delta=result.base_delta)


def _held(before: ServerState, update: ClientUpdate) -> dict[str, LowRank]:
    """What a client of lower rank held frozen while it trained: the other components of the global adapter."""
    if not method_named(before.method).frozen_side:
        return {}
    live = before.adapter
    return {module: live[module].after(pair.rank) for module, pair in update.adapter.items() if pair.rank < live[module].rank}
