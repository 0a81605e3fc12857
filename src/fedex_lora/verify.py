"""`verify`: recompute the ideal update in fp64 from the stored updates, and say how far the stored result is from it."""

from pathlib import Path
from typing import Any

from fedex_lora import measure
from fedex_lora.aggregation import method_named
from fedex_lora.errors import StorageError
from fedex_lora.peft_io import Result, open_model, read_result, result_folders

EXACT_BELOW = 1e-6  # relative; what fp32 factors of an exact method stay under


def verify(path: Path, base: str | None = None) -> dict[str, Any]:
    """The exactness of every round in a run folder, or of one result folder.

    Args:
        path: a run folder, a round folder, or the OUT of `fedex-lora aggregate`.
        base: the pretrained model; with it the weights of the model itself are compared too.

    Returns:
        `max_relative_error` = |trainable + base_delta - ideal| / |ideal| of the worst module and round, from the factors (also of the
        stand-alone adapter, and of the other tensors against their mean); with `base` also
        `realised_error` (from the model's weights, same denominator) and its `floor`; `rounds`, with errors per module.

    Raises:
        StorageError: nothing to verify, or files that were altered.
    """
    rows = []
    for folder in result_folders(path):
        result = read_result(folder)
        if method_named(result.manifest["method"]).exactness == "personalised":
            raise StorageError(f"{folder} is of method {result.manifest['method']}, which has no global model: nothing to verify")
        if not result.updates or not result.adapter:
            raise StorageError(f"{folder} holds no clients' LoRA updates, so the ideal cannot be recomputed: nothing to verify")
        rows.append(_verify_one(folder, result, base))
    worst = max(rows, key=lambda row: row["max_relative_error"])
    summary: dict[str, Any] = {
        "method": worst["method"],
        "exact_method": method_named(worst["method"]).exact,
        "max_relative_error": worst["max_relative_error"],
        "total_relative_error": max(row["total_relative_error"] for row in rows),
    }
    if base:
        summary |= {"realised_error": max(row["realised_error"] for row in rows), "floor": max(row["floor"] for row in rows)}
    return summary | {"rounds": rows}


def _verify_one(folder: Path, result: Result, base: str | None) -> dict[str, Any]:
    ideal = measure.ideal_update(result.previous_delta, result.updates, result.weights, result.held)
    factors = measure.exactness(ideal, result.adapter, result.base_delta)
    per_module = factors.per_module
    if result.standalone:
        whole = measure.exactness(ideal, result.standalone.adapter, {})
        per_module |= {f"adapter/ {module}": error for module, error in whole.per_module.items()}
    per_module |= {f"other {name}": error for name, error in measure.other_errors(result.other, result.updates, result.weights).items()}
    row: dict[str, Any] = {
        "folder": str(folder),
        "method": result.manifest["method"],
        "round": result.manifest["round"],
        "max_relative_error": max(per_module.values()),
        "total_relative_error": factors.total_relative_error,
        "per_module": per_module,
    }
    if base:
        _, folded = open_model(result, base)
        realised, floor = folded.realised(ideal)
        row |= {"realised_error": realised.max_relative_error, "floor": floor}
    return row
