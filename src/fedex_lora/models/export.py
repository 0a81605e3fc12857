"""`export`: the model of a run or result as folders that plain transformers, PEFT and vLLM load, checked before they are called done."""

import contextlib
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from fedex_lora import __version__
from fedex_lora.aggregation.growth import SERVED, growth
from fedex_lora.aggregation.lowrank import concat_adapter
from fedex_lora.aggregation.truncation import truncate
from fedex_lora.config import Base, Truncation
from fedex_lora.errors import ModelError, UsageError
from fedex_lora.exactness.algebra import norm
from fedex_lora.exactness.measure import effective_update
from fedex_lora.models.base_weights import FrozenBase
from fedex_lora.models.build import base_for, build_model, fitted, model_kind, new_tokens, read_global
from fedex_lora.models.card import model_card
from fedex_lora.models.loading import is_encoder, quiet_loading
from fedex_lora.models.lora import trainable_parameters, write_model
from fedex_lora.models.merge import in_float32, logits, plain_model
from fedex_lora.models.processor import load_processor, save_processor
from fedex_lora.models.rounded import dtype_named, logit_bound, require_nearest, require_same_factors
from fedex_lora.storage.adapter_folder import read_adapter_folder, write_adapter_folder
from fedex_lora.storage.files import atomic_folder, write_text
from fedex_lora.storage.layout import LINEAR
from fedex_lora.storage.result import StoredResult
from fedex_lora.storage.run_folder import best_round
from fedex_lora.types import Adapter, LoRAPair

FORMS = ("merged", "adapter", "base+adapter")
SAME = 1e-5  # of the largest logit: what fp32 rounding of another order of sums stays under
TINY = 1e-7  # of the largest logit: an update that changes less cannot be told from rounding in float32
SAME_INT8 = 5e-2  # int8 layers quantise their inputs too, and a plain model does not: the number is printed
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, SERVED)  # vllm.config.lora.MaxLoRARanks
BASE, ADAPTER = "base", "adapter"


class _Stored(NamedTuple):
    """How an export is written: the dtype of its weights, the largest size of a file, and what stands beside it, if not the base's."""

    dtype: torch.dtype
    shard: str
    processor: Any


def export(
    source: Path,
    form: str,
    out: Path,
    base: str | Path | None = None,
    rank: int | None = None,
    dtype: str | None = None,
    shard: str | None = None,
    processor: Any = None,
) -> dict[str, Any]:
    """Write the model of a run or result folder in a form that needs nothing of ours, reload it, and compare logits.

    Args:
        source: a run folder, a round folder, `final/`, or the OUT of `fedex-lora aggregate`.
        form: "merged": one model; "adapter": one PEFT adapter with all of the update, for the untouched base; "base+adapter": the base with
            the base delta in it, and the rank-r adapter to go on with. Bases are written dequantised; tied weights of which one gained
            something are untied.
        out: must not exist, or be empty.
        base: the pretrained model; None: as the folder says.
        rank: cut the adapter to its best approximation of this rank (of the same rank in every module).
        dtype: of what is written, "float32", "bfloat16" or "float16", rounded once, from fp64 sums; None: float32, for the run's base.
        shard: the largest size of a file, as `save_pretrained` takes it ("2GB").
        processor: a tokenizer or image processor to write beside the model; None: the base's.

    Returns:
        `output_error` = max |logits - the run's| / max |the run's|, the run's computed in float32, the export's in its dtype;
        `output_bound`, what rounding to 16 bits explains of that (`logit_bound`); `change_error`, the same difference relative to the
        change of logits that the whole update makes; `update_error` = |cut update - update| / |update| for a cut; rank; `growth`, what
        more rounds do to it; the round, and the `best_round` of a run that is done; `tokens`, where the adapter needs a base resized to
        so many; what vLLM makes of it.

    Raises:
        UsageError: no such form, dtype or size, a rank above the total, a rank for a form without a stacked adapter.
        ModelError: there is no global model, the reloaded one is not the run's, or its weights are not the nearest ones in the dtype.
            Nothing is left behind then.
    """
    result, stored = _exportable(source, form, rank), _stored(form, dtype, shard, processor)
    name = str(base or result.manifest.get("base_model"))
    result, said = fitted(result, name)
    whole = concat_adapter(result.adapter, result.base_delta)
    adapter, update_error = (whole, 0.0) if rank is None else _cut(whole, rank)
    facts = {
        "format": form,
        "dtype": str(stored.dtype).removeprefix("torch."),
        "method": result.manifest["method"],
        "round": result.manifest["round"],
        "base_model": name,
        **{key: result.manifest[key] for key in ("base_dtype", "base_quantization", "labels", "privacy") if key in result.manifest},
        "fedex-lora": __version__,
    }
    want, bare, frozen = _logits_with_and_without(result, name)
    change = float((want - bare).abs().max())
    rounds = {"round": result.manifest["round"], "best_round": best_round(source)}
    with atomic_folder(out, facts) as folder:
        got, bound, size = _write(folder, form, result, adapter, name, stored, frozen)
        error, off = float((got - want).abs().max() / want.abs().max()), float((got - want).abs().max())
        ranks = (result.manifest.get("start", {}).get("base_rank", 0), _rank(whole))
        numbers: dict[str, Any] = {
            "output_error": error,
            "output_bound": bound,
            "change_error": off / change if change else 0.0,
            "update_error": update_error,
            "rank": _rank(result.adapter if form == "base+adapter" else adapter),
            "tokens": new_tokens(result, name) if form == "adapter" else None,
            "growth": growth(result.adapter, result.base_delta, facts["round"], size, *ranks).line() if result.adapter else "",
        }
        write_text(folder / "README.md", model_card(facts, numbers, result, model_kind(result, name)))
        same = SAME_INT8 if form != "adapter" and result.manifest.get("base_quantization") == "int8" else SAME
        exact = rank is None and bound is None
        if not math.isfinite(error) or (exact and not (error < same and (off < 0.1 * change or error < TINY))):
            raise ModelError(f"the {form} export gives other logits than the run, by {error:.1e} of the largest: is {name} the run's base?")
    vllm = _vllm(form, int(numbers["rank"]), result, name, out.absolute(), dtype)
    notes = [said] if said else []
    return {"as": form, "out": str(out), "base_model": name, "dtype": facts["dtype"], **numbers, **rounds, "vllm": vllm, "notes": notes}


def _logits_with_and_without(result: StoredResult, name: str) -> tuple[Tensor, Tensor, FrozenBase]:
    """The run's logits, and those of its base with the same heads, both computed in float32; and the base."""
    model, frozen = build_model(result, name)
    want = logits(in_float32(model))
    if not result.adapter:
        return want, logits(base_for(result, name)), frozen
    frozen.set({})
    write_model(model, {module: replace(pair, B=torch.zeros_like(pair.B)) for module, pair in result.adapter.items()}, result.other)
    return want, logits(model), frozen


def _stored(form: str, dtype: str | None, shard: str | None, processor: Any) -> _Stored:
    if shard is not None and form == "adapter":
        raise UsageError("a shard size is for models, and PEFT writes an adapter as one file: leave it out, or export as merged")
    if shard is not None and not re.fullmatch(r"[1-9]\d*([KMGT]I?B)", str(shard).upper()):
        raise UsageError(f"shard size {shard!r}: write it as 2GB or 500MB")
    return _Stored(dtype_named(dtype), shard or "50GB", processor)


def _exportable(source: Path, form: str, rank: int | None) -> StoredResult:
    """What the source holds, if it can be had in that form."""
    if form not in FORMS:
        raise UsageError(f"there is no export as {form!r}: give {', '.join(FORMS)}")
    if rank is not None and form != "adapter":
        raise UsageError(f"a rank cuts the stand-alone adapter, and the form is {form}: export as adapter")
    result = read_global(source)
    if not result.adapter and form != "merged":
        raise UsageError(f"{source} holds a whole model, no adapter: export as merged")
    return result


def _write(
    folder: Path, form: str, result: StoredResult, adapter: Adapter, name: str, stored: _Stored, frozen: FrozenBase
) -> tuple[Tensor, float | None, int]:
    """Write the form into a folder; what plain transformers and PEFT load from there.

    Returns:
        Its logits, in float32 or in the 16 bits asked for; what rounding to these explains; the numbers of a merged model.
    """
    dtype, config = stored.dtype, {**result.config, "base_model_name_or_path": name if form == "adapter" else BASE, "revision": None}
    format = replace(result.format, config=config, frozen=result.format.frozen if form == "adapter" else {})
    sixteen, where = dtype != torch.float32, folder / BASE if form == "base+adapter" else folder
    served = {**result.manifest, "base_dtype": str(dtype).removeprefix("torch.")} if sixteen and form == "adapter" else result.manifest
    model: Any = base_for(replace(result, manifest=served), name)
    size = trainable_parameters(model)[1]
    if form == "adapter":
        model = model if sixteen else in_float32(model)
    else:
        gained = {module: pair.low_rank() for module, pair in adapter.items()} if form == "merged" else result.base_delta
        model = plain_model(model, gained, result.other, dtype=dtype, tied=not result.adapter)
        with quiet_loading():
            model.save_pretrained(where, max_shard_size=stored.shard)
            model = type(model).from_pretrained(where)
        if sixteen:
            update = effective_update(result.adapter, result.base_delta) if form == "merged" else result.base_delta
            require_nearest(model, frozen, update, result.other, dtype)
    _save_processor(result, name, where, stored.processor)
    bound = logit_bound(model, dtype) if sixteen else None
    if form != "merged":
        inside, factors = folder / ADAPTER if form == "base+adapter" else folder, adapter if form == "adapter" else result.adapter
        factors = {module: replace(pair, A=pair.A.to(dtype), B=pair.B.to(dtype)) for module, pair in factors.items()}
        other = {key: tensor.to(dtype) for key, tensor in result.other.items()}
        write_adapter_folder(inside, factors, other, format)
        require_same_factors(read_adapter_folder(inside).adapter, factors)
        _save_processor(result, name, inside, stored.processor)
        model = PeftModel.from_pretrained(model, inside)
    return logits(model), bound, size


def _save_processor(result: StoredResult, name: str, folder: Path, given: Any) -> None:
    """The tokenizer with its chat template, or the image processor: that given, or the base's; a base without one is exported without."""
    if given is not None:
        save_processor(given, Base(model=getattr(given, "name_or_path", "") or name), folder)
        return
    with contextlib.suppress(ModelError):
        save_processor(load_processor(Base(model=name), model_kind(result, name)), Base(model=name), folder)


def _cut(whole: Adapter, rank: int) -> tuple[dict[str, LoRAPair], float]:
    """The best approximation of every module's update, and `|cut - update| / |update|` over all."""
    total = {module: pair.low_rank() for module, pair in whole.items()}
    most = max(update.rank for update in total.values())
    if not 1 <= rank <= most:
        raise UsageError(f"rank {rank}: give 1 to {most}, the rank of the total update")
    kept, dropped = truncate(total, Truncation(rank=rank), rank)
    cut = {
        module: LoRAPair(A=gain.V, B=gain.U) if gain.rank else LoRAPair(A=whole[module].A[:1], B=gain.U.new_zeros(len(gain.U), 1))
        for module, gain in kept.items()
    }
    size = math.hypot(*(norm(update) for update in total.values()))
    return cut, math.hypot(*dropped.values()) / size if size else 0.0


def _rank(adapter: Adapter) -> int:
    return max((pair.rank for pair in adapter.values()), default=0)


def _vllm(form: str, rank: int, result: StoredResult, name: str, out: Path, dtype: str | None) -> str:
    """How vLLM serves it, or why not (vLLM: causal LMs, ranks of MaxLoRARanks, linear layers of the body, no modules_to_save)."""
    if model_kind(result, name) not in ("causal-lm", "features") or is_encoder(Base(model=name)):
        return "not a causal LM: vLLM serves such models merged, as far as it knows their architecture"
    if form == "merged":
        other = " (other dtypes round the weights: the default for this export is float16)" if dtype in (None, "float32") else ""
        return f"vllm serve {shlex.quote(str(out))} --dtype {dtype or 'float32'}{other}"
    where = out if form == "adapter" else out / ADAPTER
    if result.other:
        return f"not as an adapter: it trains {len(result.other)} tensors whole, and vLLM loads no modules_to_save; use --as merged"
    if result.format.frozen and form == "adapter":
        return f"not as an adapter: it brings {len(result.format.frozen)} tensors of its base; use --as base+adapter or merged"
    stored = result.manifest.get("base_quantization", "none")
    if form == "adapter" and stored not in ("none", "nf4"):
        return f"not as an adapter: vLLM does not load bases in {stored}; use --as merged"
    if form != "adapter" and len({pair.scaling for pair in result.adapter.values()}) > 1:
        return "not as an adapter: its scalings differ between modules, and vLLM may read one for all; use --as adapter or --as merged"
    odd = [module for module in result.adapter if module.endswith("lm_head") or result.format.layouts.get(module, LINEAR) != LINEAR]
    if odd:
        return f"not as an adapter: it adapts {odd[0]}, and vLLM adapts the linear layers of the body only; use --as merged"
    fits = next((most for most in VLLM_RANKS if most >= rank), None)
    if fits is None:
        return f"not as an adapter: rank {rank} is above vLLM's {VLLM_RANKS[-1]}; use --rank, or --as merged"
    dtype = dtype or (result.manifest.get("base_dtype", "float32") if form == "adapter" else "float32")
    served = shlex.quote(Base(model=name).source if form == "adapter" else str(out / BASE))
    served += f" --dtype {dtype}" + (" --quantization bitsandbytes" if form == "adapter" and stored == "nf4" else "")
    return f"vllm serve {served} --enable-lora --max-lora-rank {fits} --lora-modules {shlex.quote(f'fedex={where}')}"
