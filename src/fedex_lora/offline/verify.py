"""`verify`: recompute the ideal update in fp64 from the stored updates, and say how far the stored result is from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedex_lora.aggregation import get_method
from fedex_lora.errors import StorageError
from fedex_lora.exactness import algebra, measure
from fedex_lora.models.build import base_for, build_model, fitted
from fedex_lora.models.lora import write_model
from fedex_lora.models.merge import in_float32, logits, plain_model
from fedex_lora.storage.files import MANIFEST, read_manifest, unlisted
from fedex_lora.storage.handout import differs
from fedex_lora.storage.result import StoredResult, read_result, result_folders
from fedex_lora.storage.run_folder import best_round
from fedex_lora.types import Delta

EXACT_BELOW = 1e-6  # relative; what fp32 factors of an exact method stay under
ROUNDING = 100  # floors of float32 that a model may be off by: of narrow layers about one; sums of wide ones may round more, by the CPU


def verify(path: Path, base: str | None = None) -> dict[str, Any]:
    """The exactness of every round in a run folder, or of one result folder.

    A folder for parties names nobody whose update could be averaged again: of it every file's sum is compared, and, with `base`, the model
    with the folder's own factors. A run's `final/` is compared with its last round, bit for bit.

    Args:
        path: a run folder, a round folder, or the OUT of `fedex-lora aggregate`.
        base: the pretrained model; with it the weights of the model itself are compared too.

    Returns:
        `recomputed`: was the ideal there to compare with? `max_relative_error` = |trainable + base_delta - ideal| / |ideal| of the worst
        module and round, from the factors (also of the stand-alone adapter, and of the other tensors against their mean), None where it was
        not; with `base` also `realised_error` (from the model's own layers, same denominator) and its `floor`, and the `output_errors` of
        the last round; `best_round` of a run, and `rounds`, with errors per module. What of it fails, `complaint` says.

    Raises:
        StorageError: nothing to verify, files that were altered, have no sum or are not finite, or a `final/` that is not the last round.
    """
    rows, (folders, final) = list[dict[str, Any]](), result_folders(path)
    before: list[StoredResult] = []
    for folder in folders:
        result = read_result(folder)
        _require_sums(folder)
        if "inputs" in result.manifest:  # a folder for parties does not hold what its round started from
            require_continued(folder, result, before)
        before = [*before[-1:], result]
        if result.manifest.get("skipped"):
            continue
        if get_method(result.manifest["method"]).exactness == "personalised":
            raise StorageError(f"{folder} is of method {result.manifest['method']}, which has no global model: nothing to verify")
        if "inputs" in result.manifest and not (result.updates and result.adapter):
            raise StorageError(f"{folder} holds no clients' LoRA updates, so the ideal cannot be recomputed: nothing to verify")
        last, said = fitted(result, base) if base else (result, None)
        rows.append(_verify_one(folder, last, base))
    if not rows:
        raise StorageError(f"every round in {path} was skipped: nothing to verify")
    if final is not None:
        _require_same(final, folders[-1])
        _require_sums(final)
    recomputed = all(row["recomputed"] for row in rows)  # a folder without inputs stands alone
    largest = {key: algebra.worst(row[key] for row in rows) for key in ("max_relative_error", "total_relative_error")}
    summary: dict[str, Any] = {
        "method": rows[-1]["method"],
        "exact_method": get_method(rows[-1]["method"]).exact,
        "recomputed": recomputed,
        **(largest if recomputed else dict.fromkeys(largest)),
    }
    if base:
        layers = max(rows, key=lambda row: algebra.above(row["realised_error"], row["floor"]))
        summary |= {key: layers[key] for key in ("realised_error", "floor")}
        summary |= output_errors(last, base) | {"base_checked": "base_fingerprint" in last.manifest}
        summary["base_quantization"] = last.manifest.get("base_quantization", "none")
    return summary | {
        "notes": [said] if said else [],
        "final": str(final) if final else None,
        "best_round": best_round(path),
        "rounds": rows,
    }


def export_form(path: Path) -> str | None:
    """The form of an export, every file of which has its sum; None for another folder.

    Raises:
        StorageError: a file of the export is missing or altered.
    """
    if not (path / MANIFEST).is_file() or "format" not in read_manifest(path, check=False):
        return None
    return str(read_manifest(path)["format"])


def complaint(result: Mapping[str, Any]) -> str | None:
    """What is wrong with what `verify` found, in one line; None if nothing is. An error that is no number is as wrong as a large one.

    A model is held to the ideal where rounding alone can part them: in float32, unquantised, and under an exact method or compared with the
    folder's own factors.
    """
    method, error = result["method"], result["max_relative_error"]
    if result["recomputed"] and algebra.failed(error):
        return f"the error of the stored result is {error}: a number in it, or in its updates, is not finite or too large"
    if result["recomputed"] and result["exact_method"] and not error <= EXACT_BELOW:
        return f"method {method} is exact, and the stored result is off by {error:.1e}"
    held = (result.get("compute_dtype"), result.get("base_quantization")) == ("float32", "none")
    held &= result["exact_method"] or not result["recomputed"]
    pairs = {
        "the model's own layers": ("realised_error", "floor", EXACT_BELOW),
        f"the logits in {result.get('compute_dtype')}": ("output_error", "output_floor", 1e-3),
        "the logits in float32": ("output_error_float32", "output_floor_float32", 1e-3),
    }
    for what, (one, floor, beside) in pairs.items():
        if one in result and algebra.failed(result[one], result[floor]):
            return f"the error of {what} is {result[one]}: the base overflows in its precision; give it another base.dtype"
        if held and one in result and result[one] > ROUNDING * result[floor] + beside:
            said = f"the error of {what} is {result[one]:.1e}, and rounding explains {result[floor]:.1e}"
            return f"{said}: the model is not what the result says; is it another base, or another version of peft?"
    return None


def require_continued(folder: Path, result: StoredResult, before: Sequence[StoredResult]) -> None:
    """Under server momentum: did the round start from what the rounds before it left, as far as these are there?

    Args:
        folder: of the round; named in errors.
        result: of the round.
        before: of up to two rounds before it, the last one last; rounds that do not follow each other say nothing.

    Raises:
        StorageError: it did not.
    """
    said, motion, round = result.manifest.get("momentum"), result.motion, int(result.manifest["round"])
    if motion is None or said is None:
        if (motion is None) != (said is None) and not result.manifest.get("skipped"):
            raise StorageError(f"{folder} is of a run with momentum, and does not say what it started from: copy the folder again")
        return
    if (motion.momentum, motion.learning_rate) != (said["momentum"], said["learning_rate"]):
        raise StorageError(f"{folder} was computed with another momentum than its manifest says: copy the folder again")
    rounds = {int(one.manifest["round"]): one for one in before}
    last, older = rounds.get(round - 1), rounds.get(round - 2)
    nothing_before = round == 1 or (last is not None and last.manifest.get("skipped"))
    if nothing_before and any(algebra.norm(change) for change in motion.change.values()):  # a change of zero is none
        raise StorageError(f"{folder} repeats a change, and there was none before it: copy the folder again")
    if last is None:
        return
    alike = all(
        torch.equal(pair.A, last.adapter[name].A) and torch.equal(pair.B, last.adapter[name].B) for name, pair in motion.adapter.items()
    )
    if not alike or not _same_deltas(result.previous_delta, last.base_delta):
        raise StorageError(f"{folder} did not start from what round {round - 1} left: copy the folder again")
    if older is None or last.manifest.get("skipped") or not motion.momentum:
        return
    here, there = (measure.effective_update(one.adapter, one.base_delta) for one in (last, older))
    for name, error in measure.change_error(there, here, motion.change).items():
        if not error <= EXACT_BELOW:
            raise StorageError(f"{folder} repeats a change of {name} that is off by {error:.1e} from the one of round {round - 1}")


def _same_deltas(left: Mapping[str, Delta], right: Mapping[str, Delta]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(delta.dense(), right[name].dense()) for name, delta in left.items())


def _require_same(final: Path, last: Path) -> None:
    """Has `final/` the bits of the last round, its facts, and nothing else?"""
    if odd := differs(final, last):
        raise StorageError(f"{final / odd} is not what the last round left in {last}: go on with the run by --resume, which makes it anew")


def _require_sums(folder: Path) -> None:
    """Has every file below the folder a sum, beside those that have been compared?"""
    if odd := unlisted(folder):
        raise StorageError(f"{odd} has no sum in {folder / MANIFEST}, so it cannot be verified: move it away, or copy the folder again")


def ideal_logits(result: StoredResult, base: str, rows: int = 4) -> tuple[Tensor, Tensor]:
    """The ideal model's logits in fp64, and the same without the base delta (without the whole update, where the base gained nothing)."""
    ideal = _ideal(result)
    gained = result.base_delta or ideal
    rest = {name: algebra.summed([(1.0, delta), (-1.0, gained[name])]) if name in gained else delta for name, delta in ideal.items()}
    want, without = (logits(plain_model(base_for(result, base), update, result.other, torch.float64), rows) for update in (ideal, rest))
    return want, without


def model_logits(result: StoredResult, base: str, float32: bool, rows: int = 4) -> tuple[Tensor, Tensor]:
    """The logits of the model that a result describes, and of the same without the base delta; as it computes, or in float32."""
    model, frozen = build_model(result, base)
    got = logits(in_float32(model) if float32 else model, rows)
    if result.base_delta:
        frozen.set({})
    else:
        write_model(model, {name: replace(pair, B=torch.zeros_like(pair.B)) for name, pair in result.adapter.items()}, result.other)
    return got, logits(model, rows)


def compared(got: Tensor, got_without: Tensor, want: Tensor, want_without: Tensor) -> dict[str, float]:
    """How far a model's answers are from the ideal model's: with its base delta and without, beside the same in fp64.

    Returns:
        `error`: `|got - want| / |want - want_without|`, relative to the change that the base delta causes; `floor`: the same of the
        answers without it, which is what computing in this precision costs; `share` and `share_floor`: both relative to all that the
        ideal model answers.
    """
    norms = (got - want, want - want_without, got_without - want_without, want, want_without)
    error, change, floor, size, size_without = (float(torch.linalg.vector_norm(one)) for one in norms)
    pairs = {"error": (error, change), "floor": (floor, change), "share": (error, size), "share_floor": (floor, size_without)}
    return {name: algebra.relative_error(*pair) for name, pair in pairs.items()}


def output_errors(result: StoredResult, base: str) -> dict[str, Any]:
    """`compared` of a result's model, as it computes and in float32."""
    want, numbers = ideal_logits(result, base), {"compute_dtype": result.manifest.get("base_dtype", "float32")}
    for suffix, float32 in (("", False), ("_float32", True)):
        found = compared(*model_logits(result, base, float32), *want)
        numbers |= {f"output_{name}{suffix}": value for name, value in found.items()}
    return numbers


def _ideal(result: StoredResult) -> Mapping[str, Delta]:
    """The mean of the participants' models, moved by the server's momentum; where none are there, what the folder's own factors say."""
    if not result.updates:
        return measure.effective_update(result.adapter, result.base_delta)
    ideal = measure.ideal_update(result.previous_delta, result.updates, result.weights, result.held)
    return ideal if result.motion is None else measure.moved_ideal(ideal, result.previous_delta, result.motion)


def _verify_one(folder: Path, result: StoredResult, base: str | None) -> dict[str, Any]:
    ideal, recomputed = _ideal(result), bool(result.updates)
    row: dict[str, Any] = {
        "folder": str(folder),
        "method": result.manifest["method"],
        "round": result.manifest["round"],
        "recomputed": recomputed,
        **(_errors(ideal, result) if recomputed else {"max_relative_error": None, "total_relative_error": None, "per_module": {}}),
    }
    if base:
        _, folded = build_model(result, base)
        row |= dict(zip(("realised_error", "floor"), folded.realised(ideal).worst, strict=True))
    return row


def _errors(ideal: Mapping[str, Delta], result: StoredResult) -> dict[str, Any]:
    """Of the factors, of the stand-alone adapter, and of the other tensors."""
    factors = measure.exactness(ideal, result.adapter, result.base_delta)
    per_module = factors.per_module
    if result.standalone:
        whole = measure.exactness(ideal, result.standalone.adapter, {})
        per_module |= {f"adapter/ {module}": error for module, error in whole.per_module.items()}
    others = measure.other_errors(result.other, result.updates, result.weights, result.motion)
    per_module |= {f"other {name}": error for name, error in others.items()}
    folders = [result.format.frozen, *([result.standalone.format.frozen] if result.standalone else [])]
    for name in result.manifest.get("frozen", []):  # what all adapters brought of their base, untrained, is in both folders
        there = all(name in frozen and torch.equal(frozen[name], folders[0][name]) for frozen in folders)
        per_module[f"frozen {name}"] = 0.0 if there else math.inf
    return {
        "max_relative_error": algebra.worst(per_module.values()),
        "total_relative_error": factors.total_relative_error,
        "per_module": per_module,
    }
