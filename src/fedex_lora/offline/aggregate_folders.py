"""Adapters from elsewhere: aggregate PEFT folders exactly, with no model, no training and no server."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedex_lora import __version__
from fedex_lora.aggregation import Method, aggregate, get_method, in_order, normalised_weights, require_same_structure
from fedex_lora.aggregation import server_state as server
from fedex_lora.aggregation.truncation import without_blocks
from fedex_lora.config import Truncation
from fedex_lora.errors import UsageError
from fedex_lora.exactness import measure
from fedex_lora.exactness.streaming_audit import Audit, How
from fedex_lora.offline.streaming import Round, audit_is_cheap, streamable, write_streamed
from fedex_lora.offline.together import one_base, one_task, require_fits, require_marks, require_same_frozen, retold
from fedex_lora.storage.adapter_folder import AdapterFolder, AdapterHeader, Format, describe_adapter_folders, read_adapter_folder
from fedex_lora.storage.handout import for_parties
from fedex_lora.storage.result import Result, read_result, write_result
from fedex_lora.types import ClientUpdate, LowRank, ServerState


def aggregate_folders(
    folders: Sequence[Path],
    out: Path,
    method: str,
    weights: Sequence[float] | None,
    previous: Path | None,
    truncation: Truncation | None = None,
    keep_updates: bool = True,
    audit: How = "auto",
    parties: Path | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Aggregate PEFT LoRA adapters that were trained on one base model, and write a result folder.

    The plain case (see `streaming.streamable`, and no `previous`) goes from files to files, one module of all adapters in memory at a time.

    Args:
        folders: one adapter a client; the folder's name is the client's id.
        out: must not exist, or be empty. It gets `trainable/` with `base_delta.safetensors` (what clients go on with), and `adapter/`,
            one stand-alone adapter with all of the update (unless it would be larger than the matrices).
        method: a name in `METHODS`, or METHOD+GAUGE.
        weights: one a folder; None: uniform.
        previous: the result folder that the adapters were trained on top of.
        truncation: of the residual, for fedex-svd.
        keep_updates: keep the adapters in the result, so that `verify` can recompute the ideal.
        audit: measure the error exactly, or on random directions where memory holds one module at a time; "auto": exactly unless that
            would take several times as long as the aggregation.
        parties: a folder to write beside `out`, for the parties to go on from: the same without anything of single adapters (see
            `peft_io.for_parties`). What the base gains has then no client's block in its factors (`aggregation.truncation.without_blocks`).
        base: the base of all adapters, where they name it differently (see `peft_io.one_base`).

    Returns:
        Method, weights, ranks, and the exactness error in fp64 (`error_estimated`: on random directions; None where it was not measured).

    Raises:
        FedexLoraError: an adapter that is broken or does not fit the others; nothing is written then.
    """
    row = get_method(method)
    _require_global_model(row, truncation)
    require_apart(folders, out, parties)
    if parties is not None:
        require_several([1.0] * len(folders) if weights is None else weights)
    described = describe_adapter_folders(folders)
    base_model = one_base(folders, [one.folder.base_model for one in described], base)
    if base:
        require_fits(folders, described, base)
    speaker = described[one_task(folders, [one.folder.config for one in described])].folder
    described = [retold(one, speaker.config) for one in described]
    require_same_frozen(folders, described)
    if previous is not None and row.client_state:
        raise UsageError(f"method {method} with --state needs every client's own last factors, which result folders do not hold: use fedex")
    before = _result(previous)
    marks = [one.folder.mark for one in described]
    require_marks(folders, marks, before.mark if before else None)
    names = distinct_names(folders)
    format = replace(described[0].folder.format, config={**speaker.config, "base_model_name_or_path": base_model})
    facts = {
        "base_model": base_model,
        "task_type": speaker.config.get("task_type"),
        **({"frozen": sorted(format.frozen)} if format.frozen else {}),
        "sources": [str(folder) for folder in folders],
        "total_weight": float(len(folders)) if weights is None else math.fsum(weights),
        "versions": {"fedex-lora": __version__},
    }
    with for_parties(out, parties):
        if previous is None and streamable(row, described):
            result = _streamed(row, described, names, out, weights, format, facts, keep_updates, audit, parties is not None)
        else:
            read = [_read(folder, one) for folder, one in zip(folders, described, strict=True)]
            format = replace(format, frozen=read[0].format.frozen)
            result = _in_memory(row, read, names, out, weights, before, truncation, format, facts, keep_updates, audit, parties is not None)
    return {
        "method": method,
        "exact_method": row.exact,
        "base_model": base_model,
        **result,
        "weights": {name: result["weights"][name] for name in names},
        "out": str(out),
        **({"for_parties": str(parties)} if parties else {}),
    }


def require_apart(inputs: Sequence[Path], out: Path, parties: Path | None) -> None:
    """What is written lies in nothing that is read, nor in anything else that is written.

    Raises:
        UsageError: it does.
    """
    for target, option in ((out, "-o"), (parties, "--for-parties")):
        if target is not None and any(target.resolve().is_relative_to(folder.resolve()) for folder in inputs):
            raise UsageError(f"{target} lies in one of the folders that are aggregated: give another {option}")
    if parties is not None and (_within(parties, out) or _within(out, parties)):
        raise UsageError(f"{parties} and {out} lie in one another: give --for-parties a folder of its own, which holds nobody's adapter")


def require_several(weights: Iterable[float]) -> None:
    """What parties are handed is a mean: of one adapter it would be that adapter, bit for bit.

    Raises:
        UsageError: fewer than two weights are above zero.
    """
    if sum(weight > 0 for weight in weights) < 2:
        raise UsageError("--for-parties would hand out one party's adapter as it is: give two adapters or more a weight above 0")


def _within(inner: Path, outer: Path) -> bool:
    return inner.resolve().is_relative_to(outer.resolve())


def _streamed(
    row: Method,
    described: Sequence[AdapterHeader],
    names: Sequence[str],
    out: Path,
    weights: Sequence[float] | None,
    format: Format,
    facts: Mapping[str, Any],
    keep_updates: bool,
    audit: How,
    blockless: bool,
) -> dict[str, Any]:
    """From files to files."""
    started = time.perf_counter()
    updates = [ClientUpdate(name, one.folder.adapter, 1, one.folder.other) for name, one in zip(names, described, strict=True)]
    files = dict(zip(names, described, strict=True))
    ordered, p = in_order(updates, normalised_weights(updates, "uniform" if weights is None else weights))
    require_same_structure(ordered, row)
    round = Round(row, [files[update.client_id] for update in ordered], ordered, p, format)
    errors = None if audit == "none" else Audit(exact=audit == "exact" or (audit == "auto" and audit_is_cheap(round)))
    write_streamed(out, round, facts, keep_updates, errors, blockless)
    return {
        "weights": {update.client_id: weight for update, weight in zip(ordered, p, strict=True)},
        "modules": len(round.adapter),
        "trainable_rank": max(pair.rank for pair in round.adapter.values()),
        "residual_rank": max(min(round.rest_rank(module), *pair.shape) for module, pair in round.adapter.items()),
        "dense_modules": sum(round.rest_rank(module) > 0 and round.dense(module) for module in round.adapter),
        "adapter": round.standalone() is not None,
        "max_relative_error": errors.exactness().max_relative_error if errors else None,
        "total_relative_error": errors.exactness().total_relative_error if errors else None,
        "error_estimated": bool(errors and not errors.exact),
        "tail": 0.0,
        "warning": None,
        "deviation": errors.deviation().total_relative_error if errors else None,
        "seconds": time.perf_counter() - started,
        "audit_seconds": errors.seconds if errors else 0.0,
    }


def _in_memory(
    row: Method,
    read: Sequence[AdapterFolder],
    names: Sequence[str],
    out: Path,
    weights: Sequence[float] | None,
    previous: Result | None,
    truncation: Truncation | None,
    format: Format,
    facts: Mapping[str, Any],
    keep_updates: bool,
    audit: How,
    blockless: bool,
) -> dict[str, Any]:
    """Everything read first: ranks that differ, other layers, truncation, an earlier result."""
    started = time.perf_counter()
    updates = [
        ClientUpdate(client_id=name, adapter=one.adapter, num_examples=1, other=one.other) for name, one in zip(names, read, strict=True)
    ]
    before = _state(previous, row.name, updates)
    rule: Any = "uniform" if weights is None else list(weights)
    held: measure.Held = {}
    if previous is None:
        result = aggregate(updates, row.name, rule, truncation)
        if blockless:
            result = replace(result, residual={module: without_blocks(gain) for module, gain in result.residual.items()})
        after = ServerState(method=row.name, round=1, adapter=result.adapter, base_delta=dict(result.residual), other=result.other)
    else:
        after, result = server.step(before, updates, rule, truncation)
        held = {update.client_id: _held(before, update) for update in updates}
    measured = time.perf_counter()
    errors = measure.audit(before, updates, result.weights, after, held) if audit != "none" else None
    deviation = measure.deviation(result, updates).total_relative_error if audit != "none" else None
    audited = time.perf_counter() - measured
    kept = updates if keep_updates else ()
    write_result(
        out, after, updates, result.weights, format, facts, previous_delta=before.base_delta, standalone=True, held=held, kept=kept
    )
    return {
        "weights": dict(result.weights),
        "modules": len(after.adapter),
        "trainable_rank": max(pair.rank for pair in after.adapter.values()),
        "residual_rank": max((gain.rank for gain in result.residual.values()), default=0),
        "dense_modules": 0,
        "adapter": True,
        "max_relative_error": errors.max_relative_error if errors else None,
        "total_relative_error": errors.total_relative_error if errors else None,
        "error_estimated": False,
        "tail": measure.tail(result),
        "warning": measure.useless_truncation(result),
        "deviation": deviation,
        "seconds": time.perf_counter() - started,
        "audit_seconds": audited,
    }


def _require_global_model(row: Method, truncation: Truncation | None) -> None:
    if not row.lora or row.centralised:
        raise UsageError(f"method {row.name} trains nothing that adapters hold: use fedex, say")
    if row.exactness == "personalised":
        raise UsageError(f"method {row.name} has no global model to write: each client goes on with its own; use fedex, say")
    if truncation not in (None, Truncation()) and row.residual_policy != "truncate":
        raise UsageError(f"--truncate is for fedex-svd, and the method is {row.name}")


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their whole paths where two have one name.

    Raises:
        UsageError: one folder twice.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise UsageError("the same adapter folder is given twice: to count it twice, give it once with twice the weight")
    names = [folder.name for folder in resolved]
    return names if len(set(names)) == len(names) else ["_".join(folder.parts[1:]) for folder in resolved]


def _read(folder: Path, described: AdapterHeader) -> AdapterFolder:
    """A described adapter with its numbers."""
    read = read_adapter_folder(folder)
    rest = {**read.other, **read.format.frozen}
    other, frozen = ({name: rest[name] for name in names} for names in (described.folder.other, described.folder.format.frozen))
    return AdapterFolder(adapter=read.adapter, other=other, format=replace(read.format, frozen=frozen))


def _result(previous: Path | None) -> Result | None:
    """What `--state` names."""
    return None if previous is None else read_result(previous / "final" if (previous / "final").is_dir() else previous)


def _state(previous: Result | None, method: str, updates: Sequence[ClientUpdate]) -> ServerState:
    """The state that the adapters were trained from; without one, a base that has gained nothing."""
    if previous is None:
        return server.init(updates[0].adapter, updates[0].other, method)
    state = server.init(previous.adapter, previous.other, method)
    return replace(state, round=int(previous.manifest["round"]), base_delta=previous.base_delta)


def _held(before: ServerState, update: ClientUpdate) -> dict[str, LowRank]:
    """What a client of lower rank held frozen while it trained: the other components of the global adapter."""
    if not get_method(before.method).holds_tail:
        return {}
    live = before.adapter
    return {module: live[module].after(pair.rank) for module, pair in update.adapter.items() if pair.rank < live[module].rank}
