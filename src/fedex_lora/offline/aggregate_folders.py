"""Adapters from elsewhere: aggregate PEFT folders exactly, with no model, no training and no server."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedex_lora import __version__
from fedex_lora.aggregation import Method, aggregate, get_method, normalised_weights
from fedex_lora.aggregation import server_state as server
from fedex_lora.aggregation.engine import in_order, require_same_structure
from fedex_lora.aggregation.truncation import without_blocks
from fedex_lora.config import Truncation
from fedex_lora.errors import UsageError
from fedex_lora.exactness import measure
from fedex_lora.exactness.streaming_audit import Audit, How
from fedex_lora.offline.streaming import StreamJob, audit_is_cheap, streamable, write_streamed
from fedex_lora.offline.together import (
    distinct_names,
    frozen_of,
    one_base,
    one_naming,
    one_revision,
    one_task,
    require_apart,
    require_fits,
    require_marks,
    require_same_frozen,
    require_several,
)
from fedex_lora.storage.adapter_folder import AdapterHeader, Format, describe_adapter_folders
from fedex_lora.storage.handout import OF_BASE, for_parties
from fedex_lora.storage.result import StoredResult, read_result, write_result
from fedex_lora.types import ClientUpdate, LowRank, ServerState

UNMARKED = "no adapter says what its base had gained: if one was not trained on the model of --state, this error does not show it"


@dataclass(frozen=True, eq=False)
class AggregationJob:
    """What is aggregated, after every check that needs no numbers.

    Attributes:
        row: the method.
        files: client -> its adapter.
        weights: one a client; None: uniform.
        format, facts: how the result is written, and what its manifest says.
        previous: the result that the adapters were trained on top of.
        out, keep_updates, audit: see `aggregate_folders`.
        blockless: what the base gains has no client's block in its factors.
    """

    row: Method
    files: Mapping[str, AdapterHeader]
    weights: Sequence[float] | None
    format: Format
    facts: Mapping[str, Any]
    previous: StoredResult | None
    out: Path
    keep_updates: bool
    audit: How
    blockless: bool


def aggregate_folders(
    folders: Sequence[Path],
    out: Path,
    method: str = "fedex",
    weights: Sequence[float] | None = None,
    previous: Path | None = None,
    truncation: Truncation | None = None,
    keep_updates: bool = True,
    audit: How = "auto",
    parties: Path | None = None,
    base: str | None = None,
    blockless: bool = False,
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
            `handout.for_parties`). What the base gains has then no client's block in its factors (`truncation.without_blocks`).
        base: the base of all adapters, where they name it differently (see `together.one_base`).
        blockless: what the base gains is as with `parties`, which are handed it later.

    Returns:
        Method, weights, ranks, and the exactness error in fp64 (`error_estimated`: on random directions; None where it was not measured).

    Raises:
        FedexLoraError: an adapter that is broken or does not fit the others; nothing is written then.
    """
    row = get_method(method)
    _require_global_model(row, truncation)
    require_apart([*folders, *([previous] if previous else [])], out, parties)
    if parties is not None:
        require_several([1.0] * len(folders) if weights is None else weights)
    if previous is not None and row.client_state:
        raise UsageError(f"method {method} with --state needs every client's own last factors, which result folders do not hold: use fedex")
    if previous is not None and row.core:
        raise UsageError(
            f"method {method} with --state needs cores, and adapter folders hold B = U C: go on with method ffa, which averages B"
        )
    before = None if previous is None else read_result(previous / "final" if (previous / "final").is_dir() else previous)
    described, like = _described(folders, base, before)
    marks, below = [one.folder.mark for one in described], before.mark if before else None
    require_marks(folders, marks, below)
    unmarked = [UNMARKED] if below and not any(marks) else []
    names = distinct_names(folders)
    files = dict(zip(names, described, strict=True))
    blockless, facts = blockless or parties is not None, _facts(folders, weights, like, before)
    job = AggregationJob(row, files, weights, like, facts, before, out, keep_updates, audit, blockless)
    with for_parties(out, parties):
        outcome = _from_files(job) if before is None and streamable(row, described) else _in_memory(job, truncation)
    return {
        "method": method,
        "exact_method": row.exact,
        "base_model": like.config["base_model_name_or_path"],
        **outcome,
        "weights": {name: outcome["weights"][name] for name in names},
        "notes": [one.rule.told(str(folder)) for folder, one in zip(folders, described, strict=True) if one.rule] + unmarked,
        "out": str(out),
        **({"for_parties": str(parties)} if parties else {}),
    }


def _described(folders: Sequence[Path], base: str | None, before: StoredResult | None) -> tuple[list[AdapterHeader], Format]:
    """The adapters, which belong together, by the names of the earlier result or of the first one; and how their mean is written."""
    described = describe_adapter_folders(folders)
    base_model = one_base(folders, [one.folder.base_model for one in described], base)
    if base:
        require_fits(folders, described, base)
    configs = [one.folder.config for one in described]
    speaker = one_task(folders, configs)
    if any(not config.get("task_type") for config in configs):
        described = describe_adapter_folders(folders, configs[speaker].get("task_type"))
    rules = one_naming([one.folder for one in described], before)
    described = [one.renamed(rule) if rule else one for one, rule in zip(described, rules, strict=True)]
    config = rule.config(configs[speaker]) if (rule := rules[speaker]) else configs[speaker]
    require_same_frozen(folders, [one.folder.format.frozen for one in described], lambda index, name: described[index].tensor(name))
    settings = {**config, "base_model_name_or_path": base_model, "revision": one_revision(folders, configs, base)}
    frozen = frozen_of(folders[0], described[0], before)
    return described, replace(described[0].folder.format, config=settings, frozen=frozen)


def _facts(folders: Sequence[Path], weights: Sequence[float] | None, like: Format, before: StoredResult | None) -> dict[str, Any]:
    """What the manifest says beside the method and the inputs; of the base what the earlier result says."""
    return {
        "base_model": like.config["base_model_name_or_path"],
        "task_type": like.config.get("task_type"),
        **({key: before.manifest[key] for key in OF_BASE if key in before.manifest} if before else {}),
        **({"frozen": sorted(like.frozen)} if like.frozen else {}),
        "sources": [str(folder) for folder in folders],
        "total_weight": float(
            len(folders) if weights is None else math.fsum(weights) if math.isfinite(sum(weights)) else math.inf
        ),  # which is refused
        "versions": {"fedex-lora": __version__},
    }


def _measured(errors: measure.Exactness | None, deviation: measure.Exactness | None) -> dict[str, float | None]:
    """The errors of the result, and of plain averaging, against the ideal in fp64; None: not measured."""
    return {
        "max_relative_error": errors.max_relative_error if errors else None,
        "total_relative_error": errors.total_relative_error if errors else None,
        "deviation": deviation.total_relative_error if deviation else None,
    }


def _from_files(job: AggregationJob) -> dict[str, Any]:
    """From files to files: the numbers of the result."""
    started = time.perf_counter()
    updates = [ClientUpdate(name, one.folder.adapter, 1, one.folder.other) for name, one in job.files.items()]
    ordered, p = in_order(updates, normalised_weights(updates, "uniform" if job.weights is None else job.weights))
    require_same_structure(ordered, job.row)
    round = StreamJob(job.row, [job.files[update.client_id] for update in ordered], ordered, p, job.format)
    audit = None if job.audit == "none" else Audit(exact=job.audit == "exact" or (job.audit == "auto" and audit_is_cheap(round)))
    write_streamed(job.out, round, job.facts, job.keep_updates, audit, job.blockless)
    return {
        "weights": round.weights,
        "modules": len(round.adapter),
        "trainable_rank": max(pair.rank for pair in round.adapter.values()),
        "residual_rank": max(min(round.rest_rank(module), *pair.shape) for module, pair in round.adapter.items()),
        **_measured(audit.errors() if audit else None, audit.errors(plain=True) if audit else None),
        "seconds": time.perf_counter() - started,
        "audit_seconds": audit.seconds if audit else 0.0,
        "dense_modules": sum(round.rest_rank(module) > 0 and round.dense(module) for module in round.adapter),
        "adapter": round.standalone is not None,
        "error_estimated": bool(audit and not audit.exact),
        "tail": 0.0,
        "warning": None,
    }


def _in_memory(job: AggregationJob, truncation: Truncation | None) -> dict[str, Any]:
    """Everything read first: ranks that differ, other layers, truncation, an earlier result."""
    started = time.perf_counter()
    read = {name: file.read() for name, file in job.files.items()}
    updates = [ClientUpdate(name, one.adapter, 1, one.other) for name, one in read.items()]
    brought = next(iter(read.values())).format.frozen
    format = replace(job.format, frozen={name: brought[name] if one.is_meta else one for name, one in job.format.frozen.items()})
    rule: Any = "uniform" if job.weights is None else list(job.weights)
    held: measure.Held = {}
    if job.previous is None:
        before = server.init(updates[0].adapter, updates[0].other, job.row.name)
        result = aggregate(updates, job.row.name, rule, truncation)
        after = replace(before, round=1, adapter=result.adapter, base_delta=dict(result.residual), other=result.other)
    else:
        before = server.init(job.previous.adapter, job.previous.other, job.row.name)
        before = replace(before, round=int(job.previous.manifest["round"]), base_delta=job.previous.base_delta)
        after, result = server.step(before, updates, rule, truncation)
        held = {update.client_id: _held(before, update) for update in updates}
    if job.blockless:  # of earlier rounds, too, whose blocks a plain result holds
        whole = {module: without_blocks(delta) if isinstance(delta, LowRank) else delta for module, delta in after.base_delta.items()}
        after = replace(after, base_delta=whole)
    measured = time.perf_counter()
    audited = job.audit != "none"
    errors = measure.audit(before, updates, result.weights, after, held) if audited else None
    deviation = measure.deviation(result, updates) if audited else None
    audit_seconds = time.perf_counter() - measured
    kept = job.files if job.keep_updates else {}
    write_result(job.out, after, updates, result.weights, format, job.facts, before.base_delta, held=held, standalone=True, kept=kept)
    return {
        "weights": result.weights,
        "modules": len(after.adapter),
        "trainable_rank": max(pair.rank for pair in after.adapter.values()),
        "residual_rank": max((gain.rank for gain in result.residual.values()), default=0),
        **_measured(errors, deviation),
        "seconds": time.perf_counter() - started,
        "audit_seconds": audit_seconds,
        "dense_modules": 0,
        "adapter": True,
        "error_estimated": False,
        "tail": measure.tail(result),
        "warning": measure.useless_truncation(result),
    }


def _require_global_model(row: Method, truncation: Truncation | None) -> None:
    if not row.lora or row.centralised:
        raise UsageError(f"method {row.name} trains nothing that adapters hold: use fedex, say")
    if row.exactness == "personalised":
        raise UsageError(f"method {row.name} has no global model to write: each client goes on with its own; use fedex, say")
    if truncation not in (None, Truncation()) and row.residual_policy != "truncate":
        raise UsageError(f"--truncate is for fedex-svd, and the method is {row.name}")


def _held(before: ServerState, update: ClientUpdate) -> dict[str, LowRank]:
    """What a client of lower rank held frozen while it trained: the other components of the global adapter."""
    if not get_method(before.method).holds_tail:
        return {}
    live = before.adapter
    return {module: live[module].after(pair.rank) for module, pair in update.adapter.items() if pair.rank < live[module].rank}
