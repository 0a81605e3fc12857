"""`verify`: recompute the ideal update in fp64 from the stored updates, and say how far the stored result is from it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedex_lora import measure
from fedex_lora.aggregation import method_named
from fedex_lora.aggregation.lowrank import signed_sum
from fedex_lora.errors import StorageError
from fedex_lora.peft_io import Result, base_for, in_float32, logits, open_model, plain_model, read_result, result_folders, write_model

EXACT_BELOW = 1e-6  # relative; what fp32 factors of an exact method stay under


def verify(path: Path, base: str | None = None) -> dict[str, Any]:
    """The exactness of every round in a run folder, or of one result folder.

    Args:
        path: a run folder, a round folder, or the OUT of `fedex-lora aggregate`.
        base: the pretrained model; with it the weights of the model itself are compared too.

    Returns:
        `max_relative_error` = |trainable + base_delta - ideal| / |ideal| of the worst module and round, from the factors (also of the
        stand-alone adapter, and of the other tensors against their mean); with `base` also
        `realised_error` (from the model's own layers, same denominator) and its `floor`, and the `output_errors` of the last round;
        `rounds`, with errors per module.

    Raises:
        StorageError: nothing to verify, or files that were altered.
    """
    rows = []
    for folder in result_folders(path):
        result = read_result(folder)
        if result.manifest.get("skipped"):
            continue
        if method_named(result.manifest["method"]).exactness == "personalised":
            raise StorageError(f"{folder} is of method {result.manifest['method']}, which has no global model: nothing to verify")
        if not result.updates or not result.adapter:
            raise StorageError(f"{folder} holds no clients' LoRA updates, so the ideal cannot be recomputed: nothing to verify")
        rows.append(_verify_one(folder, result, base))
    if not rows:
        raise StorageError(f"every round in {path} was skipped: nothing to verify")
    worst = max(rows, key=lambda row: row["max_relative_error"])
    summary: dict[str, Any] = {
        "method": worst["method"],
        "exact_method": method_named(worst["method"]).exact,
        "max_relative_error": worst["max_relative_error"],
        "total_relative_error": max(row["total_relative_error"] for row in rows),
    }
    if base:
        summary |= {"realised_error": max(row["realised_error"] for row in rows), "floor": max(row["floor"] for row in rows)}
        last = read_result(Path(rows[-1]["folder"]))
        summary |= output_errors(last, base) | {"base_checked": "base_fingerprint" in last.manifest}
    return summary | {"rounds": rows}


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model answers with its base delta and without, beside the same of the ideal model in fp64.

    Attributes:
        got, got_without: of the model.
        want, want_without: of the base as it is stored (dequantised, upcast), with the ideal update in its weights.
    """

    got: Tensor
    got_without: Tensor
    want: Tensor
    want_without: Tensor

    @property
    def error(self) -> float:
        """`|got - want| / |want - want_without|`: relative to the change that the base delta causes."""
        return self._relative(self.got - self.want)

    @property
    def floor(self) -> float:
        """`|got_without - want_without| / |want - want_without|`: what computing in this precision costs, wherever the delta is."""
        return self._relative(self.got_without - self.want_without)

    @property
    def share(self) -> float:
        """How much of the base delta's effect the model shows: the least-squares factor between its change and the ideal change."""
        change = self.want - self.want_without
        return float(((self.got - self.got_without) * change).sum() / (change * change).sum())

    def _relative(self, difference: Tensor) -> float:
        return float(torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(self.want - self.want_without))


def ideal_answers(result: Result, base: str, rows: int = 4) -> tuple[Tensor, Tensor]:
    """The ideal model's logits in fp64, and the same without the base delta (without the whole update, where the base gained nothing)."""
    ideal = measure.ideal_update(result.previous_delta, result.updates, result.weights, result.held)
    gained = result.base_delta or ideal
    rest = {name: signed_sum([(1.0, delta), (-1.0, gained[name])]) if name in gained else delta for name, delta in ideal.items()}
    want, without = (logits(plain_model(base_for(result, base), update, result.other, torch.float64), rows) for update in (ideal, rest))
    return want, without


def model_answers(result: Result, base: str, float32: bool, rows: int = 4) -> tuple[Tensor, Tensor]:
    """The logits of the model that a result describes, and of the same without the base delta; as it computes, or in float32."""
    model, frozen = open_model(result, base)
    got = logits(in_float32(model) if float32 else model, rows)
    if result.base_delta:
        frozen.set({})
    else:
        write_model(model, {name: replace(pair, B=torch.zeros_like(pair.B)) for name, pair in result.adapter.items()}, result.other)
    return got, logits(model, rows)


def output_errors(result: Result, base: str) -> dict[str, Any]:
    """`Answers.error` and `floor` of a result's model, as it computes and in float32."""
    want = ideal_answers(result, base)
    own, upcast = (Answers(*model_answers(result, base, float32), *want) for float32 in (False, True))
    return {
        "compute_dtype": result.manifest.get("base_dtype", "float32"),
        "output_error": own.error,
        "output_floor": own.floor,
        "output_error_float32": upcast.error,
        "output_floor_float32": upcast.floor,
    }


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
