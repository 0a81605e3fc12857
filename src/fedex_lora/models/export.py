"""`export`: the model of a run or result as folders that plain transformers, PEFT and vLLM load, checked before they are called done."""

import contextlib
import math
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from fedex_lora import __version__
from fedex_lora.aggregation.truncation import truncate
from fedex_lora.config import Base, Truncation
from fedex_lora.errors import ModelError, UsageError
from fedex_lora.exactness.algebra import norm
from fedex_lora.models.build import base_for, build_model, fitted, model_kind, new_tokens, read_global
from fedex_lora.models.loading import is_encoder
from fedex_lora.models.lora import write_model
from fedex_lora.models.merge import in_float32, logits, plain_model
from fedex_lora.models.processor import load_processor, save_processor
from fedex_lora.storage.adapter_folder import concat_adapter, write_adapter_folder
from fedex_lora.storage.files import atomic_folder, write_text
from fedex_lora.storage.layout import LINEAR
from fedex_lora.storage.result import StoredResult
from fedex_lora.storage.run_folder import best_round
from fedex_lora.types import Adapter, LoRAPair

FORMS = ("merged", "adapter", "base+adapter")
SAME = 1e-5  # of the largest logit: what fp32 rounding of another order of sums stays under
TINY = 1e-7  # of the largest logit: an update that changes less cannot be told from rounding in float32
SAME_INT8 = 5e-2  # int8 layers quantise their inputs too, and a plain model does not: the number is printed
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vllm.config.lora.MaxLoRARanks
BASE, ADAPTER = "base", "adapter"


def export(source: Path, form: str, out: Path, base: str | None = None, rank: int | None = None) -> dict[str, Any]:
    """Write the model of a run or result folder in a form that needs nothing of ours, reload it, and compare logits.

    Args:
        source: a run folder, a round folder, `final/`, or the OUT of `fedex-lora aggregate`.
        form: "merged": one model; "adapter": one PEFT adapter with all of the update, for the untouched base; "base+adapter": the base with
            the base delta in it, and the rank-r adapter to go on with. Bases are written dequantised, in float32; tied weights of which one
            gained something are untied.
        out: must not exist, or be empty.
        base: the pretrained model; None: as the folder says.
        rank: cut the adapter to its best approximation of this rank (of the same rank in every module).

    Returns:
        `output_error` = max |logits - the run's| / max |the run's|, both computed in float32; `change_error`, the same difference relative
        to the change of logits that the whole update makes; `update_error` = |cut update - update| / |update| for a cut; rank; the round,
        and the `best_round` of a run that is done; `tokens`, where the adapter needs a base resized to so many; what vLLM makes of it.

    Raises:
        UsageError: no such form, a rank above the total, a rank for a form without a stacked adapter.
        ModelError: there is no global model, or the reloaded one is not the run's. Nothing is left behind then.
    """
    result = _exportable(source, form, rank)
    name = base or str(result.manifest.get("base_model"))
    result, said = fitted(result, name)
    whole = concat_adapter(result.adapter, result.base_delta)
    adapter, update_error = (whole, 0.0) if rank is None else _cut(whole, rank)
    facts = {
        "format": form,
        "method": result.manifest["method"],
        "round": result.manifest["round"],
        "base_model": name,
        **{key: result.manifest[key] for key in ("base_dtype", "base_quantization") if key in result.manifest},
        "fedex-lora": __version__,
    }
    want, bare = _logits_with_and_without(result, name)
    change = float((want - bare).abs().max())
    with atomic_folder(out, facts) as folder:
        got = _write(folder, form, result, adapter, name)
        error, off = float((got - want).abs().max() / want.abs().max()), float((got - want).abs().max())
        numbers: dict[str, Any] = {
            "output_error": error,
            "change_error": off / change if change else 0.0,
            "update_error": update_error,
            "rank": _rank(result.adapter if form == "base+adapter" else adapter),
            "tokens": new_tokens(result, name) if form == "adapter" else None,
        }
        write_text(folder / "README.md", _card(facts, numbers, result))
        same = SAME_INT8 if form != "adapter" and result.manifest.get("base_quantization") == "int8" else SAME
        if not math.isfinite(error) or (rank is None and not (error < same and (off < 0.1 * change or error < TINY))):
            raise ModelError(f"the {form} export gives other logits than the run, by {error:.1e} of the largest: is {name} the run's base?")
    vllm = _vllm(form, int(numbers["rank"]), result, name, out)
    rounds = {"round": result.manifest["round"], "best_round": best_round(source)}
    return {"as": form, "out": str(out), "base_model": name, **numbers, **rounds, "vllm": vllm, "notes": [said] if said else []}


def _logits_with_and_without(result: StoredResult, name: str) -> tuple[Tensor, Tensor]:
    """The run's logits, and those of its base with the same heads, both computed in float32."""
    model, frozen = build_model(result, name)
    want = logits(in_float32(model))
    if not result.adapter:
        return want, logits(base_for(result, name))
    frozen.set({})
    write_model(model, {module: replace(pair, B=torch.zeros_like(pair.B)) for module, pair in result.adapter.items()}, result.other)
    return want, logits(model)


def _exportable(source: Path, form: str, rank: int | None) -> StoredResult:
    """What the source holds, if it can be had in that form."""
    if form not in FORMS:
        raise UsageError(f"--as {form!r}: give {', '.join(FORMS)}")
    if rank is not None and form != "adapter":
        raise UsageError(f"--rank cuts the stand-alone adapter, and the form is {form}: use --as adapter")
    result = read_global(source)
    if not result.adapter and form != "merged":
        raise UsageError(f"{source} holds a whole model, no adapter: use --as merged")
    return result


def _write(folder: Path, form: str, result: StoredResult, adapter: Adapter, name: str) -> Tensor:
    """Write the form into a folder, and return the float32 logits of what plain transformers and PEFT load from there."""
    config = {**result.config, "base_model_name_or_path": name if form == "adapter" else BASE}
    format = replace(result.format, config=config, frozen=result.format.frozen if form == "adapter" else {})
    base = base_for(result, name)
    if form == "adapter":
        _save_processor(result, name, folder)
        write_adapter_folder(folder, adapter, result.other, format)
        return logits(PeftModel.from_pretrained(in_float32(base), folder))  # type: ignore[arg-type]
    gained = {module: pair.low_rank() for module, pair in adapter.items()} if form == "merged" else result.base_delta
    whole: Any = plain_model(base, gained, result.other, tied=not result.adapter)
    where = folder if form == "merged" else folder / BASE
    whole.save_pretrained(where)
    _save_processor(result, name, where)
    reloaded = type(whole).from_pretrained(where)
    if form == "merged":
        return logits(reloaded)
    write_adapter_folder(folder / ADAPTER, result.adapter, result.other, format)
    _save_processor(result, name, folder / ADAPTER)
    return logits(PeftModel.from_pretrained(reloaded, folder / ADAPTER))


def _save_processor(result: StoredResult, name: str, folder: Path) -> None:
    """The tokenizer with its chat template, or the image processor; a base without one is exported without."""
    with contextlib.suppress(ModelError):
        save_processor(load_processor(Base(model=name), model_kind(result, name)), Base(model=name), folder)


def _cut(whole: Adapter, rank: int) -> tuple[dict[str, LoRAPair], float]:
    """The best approximation of every module's update, and `|cut - update| / |update|` over all."""
    total = {module: pair.low_rank() for module, pair in whole.items()}
    most = max(update.rank for update in total.values())
    if not 1 <= rank <= most:
        raise UsageError(f"--rank {rank}: give 1 to {most}, the rank of the total update")
    kept, dropped = truncate(total, Truncation(rank=rank), rank)
    cut = {module: LoRAPair(A=kept[module].V, B=kept[module].U) if module in kept else whole[module].first(1) for module in whole}
    size = math.hypot(*(norm(update) for update in total.values()))
    return cut, math.hypot(*dropped.values()) / size if size else 0.0


def _rank(adapter: Adapter) -> int:
    return max((pair.rank for pair in adapter.values()), default=0)


def _vllm(form: str, rank: int, result: StoredResult, name: str, out: Path) -> str:
    """How vLLM serves it, or why not (vLLM: causal LMs, ranks of MaxLoRARanks, linear layers of the body, no modules_to_save)."""
    if model_kind(result, name) not in ("causal-lm", "features") or is_encoder(Base(model=name)):
        return "not a causal LM: vLLM serves such models merged, as far as it knows their architecture"
    if form == "merged":
        return (
            f"vllm serve {shlex.quote(str(out))} --dtype float32 (other dtypes round the weights: the default for this export is float16)"
        )
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
    dtype = result.manifest.get("base_dtype", "float32") if form == "adapter" else "float32"
    served = shlex.quote(Base(model=name).source if form == "adapter" else str(out / BASE))
    served += f" --dtype {dtype}" + (" --quantization bitsandbytes" if form == "adapter" and stored == "nf4" else "")
    return f"vllm serve {served} --enable-lora --max-lora-rank {fits} --lora-modules {shlex.quote(f'fedex={where}')}"


def _card(facts: Mapping[str, Any], numbers: Mapping[str, Any], result: StoredResult) -> str:
    inputs = "\n".join(f"- {entry['client']}: weight {entry['weight']:.4g}" for entry in result.manifest.get("inputs", []))
    participants = f"\nParticipants of the last round:\n\n{inputs}\n" if inputs else ""
    grown = f" First `base.resize_token_embeddings({numbers['tokens']})`: the adapter has tokens of its own." if numbers["tokens"] else ""
    cut = (
        f" It is cut to rank {numbers['rank']}: {numbers['update_error']:.2e} of the update is missing." if numbers["update_error"] else ""
    )
    dtype, quantization = facts.get("base_dtype", "float32"), facts.get("base_quantization", "none")
    kept = ", and is for the base stored so" if facts["format"] == "adapter" else "; this export holds it as float32"
    stored = "" if (dtype, quantization) == ("float32", "none") else f" (trained on it in {dtype}, quantization {quantization}{kept})"
    library = "transformers" if facts["format"] == "merged" else "peft"
    return f"""---
base_model: {facts["base_model"]}
library_name: {library}
---
# {facts["format"]} export of a federated LoRA run

Method {facts["method"]}, round {facts["round"]}, base {facts["base_model"]}{stored}, by fedex-lora {facts["fedex-lora"]}.{cut}{grown}
Reloaded after writing: its logits, computed in float32, differ from the run's by {numbers["output_error"]:.1e} of the largest.
`manifest.json` has a checksum of every file.
{participants}"""
