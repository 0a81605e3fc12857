"""The model that a result folder describes: the base, with what it gained, under the adapter."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedex_lora.aggregation import get_method
from fedex_lora.config import IMAGES, Base, nearest
from fedex_lora.errors import ModelError
from fedex_lora.models.base_weights import FrozenBase
from fedex_lora.models.loading import Kind, load_base, modules_of, pad, takes_images
from fedex_lora.models.lora import TASK_TYPES, wrap, write_model
from fedex_lora.models.resized import resized
from fedex_lora.storage.adapter_folder import adapter_config
from fedex_lora.storage.files import FINAL
from fedex_lora.storage.renaming import Renaming, find_renaming
from fedex_lora.storage.result import StoredResult, read_result
from fedex_lora.types import Adapter

KINDS: dict[str | None, Kind] = {name: kind for kind, name in TASK_TYPES.items()}


@dataclass
class Grounded(LoraConfig):
    """PEFT's settings of an adapter that is right only on top of a base delta; `save_pretrained` writes them, the mark among them.

    Attributes:
        fedex_lora_base_delta: the mark (`StoredResult.mark`); "" on the plain base.
    """

    fedex_lora_base_delta: str = ""


def load_model(folder: str | Path, base: str | Path | PreTrainedModel) -> nn.Module:
    """The model that a folder describes: the base with the base delta in it (folded, or beside it: see `FrozenBase`), and the adapter.

    Args:
        folder: a run folder, a round folder, `final/`, or the OUT of `fedex-lora aggregate`.
        base: the pretrained model: its name or folder, loaded in the precision that `folder` says (float32 where it says none), or a
            model object, in the precision of the run (any, for aggregated adapters), which is changed in place.

    Returns:
        A `PeftModel` in evaluation mode (for full fine-tuning, the model itself). An adapter that is saved from it says on which base
        delta it stands, so that `aggregate` asks for the `--state` that fits. Where the base delta stays beside the weights (see
        `FrozenBase`), `save_pretrained` lacks it, merged or not: use `fedex-lora export`.

    Raises:
        StorageError: the folder is broken.
        ModelError: the base does not fit, or the method has no global model (fedsa).

    Example:
        >>> model = load_model("runs/mrpc", "roberta-base")                              # doctest: +SKIP
    """
    return build_model(read_global(Path(folder)), base)[0]


def read_global(folder: Path) -> StoredResult:
    """The result in a folder, see `load_model`; of a run, that of its end.

    Raises:
        StorageError: the folder is broken.
        ModelError: the clients' models differ, so there is no global one.
    """
    result = read_result(folder / FINAL if (folder / FINAL).is_dir() else folder)
    if get_method(method := result.manifest["method"]).exactness == "personalised":
        raise ModelError(f"{folder} is of method {method}, which has no global model: load clients/CLIENT/adapter with PEFT")
    return result


def build_model(result: StoredResult, base: str | Path | PreTrainedModel) -> tuple[nn.Module, FrozenBase]:
    """As `load_model`, from a result in memory; also the frozen base, which knows the pristine weights."""
    if isinstance(base, nn.Module) and (not isinstance(base, PreTrainedModel) or any(isinstance(one, LoraLayer) for one in base.modules())):
        raise ModelError(
            f"a {type(base).__name__} with adapters, or not of transformers, is no base: give its name or folder, or load it anew"
        )
    result, said = fitted(result, base if isinstance(base, PreTrainedModel) else str(base))
    if said:
        warnings.warn(said, stacklevel=3)
    if isinstance(base, PreTrainedModel):
        pad(base, Base(model=base.config._name_or_path or "a model"))
        model: Any = resized(base, result.format.frozen, result.other)
    else:
        model = base_for(result, str(base))
    if result.adapter:
        config = adapter_config(result.adapter, result.config) | {"inference_mode": False}
        known = {key: value for key, value in config.items() if key in LoraConfig.__dataclass_fields__}
        try:
            model = wrap(model, Grounded(**known, fedex_lora_base_delta=result.mark or ""))
        except ValueError as error:
            why = f"{str(error).splitlines()[0][:200]}: is it another model?{_nearest(model, result.adapter)}"
            raise ModelError(f"this base has not the modules of the adapter: {why}") from None
    frozen = FrozenBase(model)
    fingerprint = result.manifest.get("base_fingerprint")
    if fingerprint is not None and result.adapter and fingerprint != frozen.fingerprint():
        name = base if isinstance(base, str | Path) else "the model given"
        if said:
            used = result.manifest.get("versions", {}).get("transformers", "that the run had")
            raise ModelError(f"{said}; whether {name} is the base of this run can be told only by its own names: use transformers {used}")
        raise ModelError(
            f"{name} is not the base of this result: its weights differ from those of {result.manifest.get('base_model')}; give that one"
        )
    frozen.set(result.base_delta)
    write_model(model, result.adapter, result.other)
    return model.eval(), frozen


def model_kind(result: StoredResult, name: str) -> Kind:
    """The kind of model that the result was trained as; where it does not say, the kind of the base `name` that has its modules.

    Raises:
        ModelError: none of ours.
    """
    task_type = (result.config.get("task_type") if result.adapter else None) or result.manifest.get("task_type")
    if task_type in KINDS:
        return KINDS[task_type]
    if task_type is not None:
        raise ModelError(f"no head for task type {task_type}: load the base yourself and pass the model to fedex_lora.load_model")
    if head_rows(result) and takes_images(Base(model=name)):
        return IMAGES
    candidates: tuple[Kind, ...] = ("features", "causal-lm", "classification")
    return next((kind for kind in candidates if result.adapter.keys() <= modules_of(Base(model=name), kind).keys()), "features")


def fitted(result: StoredResult, base: str | PreTrainedModel) -> tuple[StoredResult, str | None]:
    """A result by the names that a base has for its modules, where the two differ by a wrapper only; and what is to be said of that."""
    if not result.adapter:
        return result, None
    if isinstance(base, str):
        require_revision(result.config, base)
    found = modules_of(Base(model=base), model_kind(result, base)) if isinstance(base, str) else dict(base.named_modules())
    rule = renaming_onto(found, result.adapter, {**result.other, **result.format.frozen})
    return (result.renamed(rule), rule.told("the result")) if rule else (result, None)


def require_revision(config: Mapping[str, Any], base: str) -> None:
    """By its name on the hub a base is loaded in its default revision.

    Raises:
        ModelError: the adapter with this configuration was trained on another one.
    """
    revision = config.get("revision") or "main"
    if revision != "main" and base == config.get("base_model_name_or_path") and not Path(base).is_dir():
        raise ModelError(
            f"the adapter was trained on revision {revision} of {base}: hf download {base} --revision {revision} --local-dir FOLDER, and "
            "give FOLDER as the base"
        )


def renaming_onto(modules: Mapping[str, nn.Module], adapter: Adapter, others: Collection[str]) -> Renaming | None:
    """What a base's modules are called, where an adapter names them otherwise; see `find_renaming`."""
    sizes = {name: _sizes(module) for name, module in modules.items()}
    known = {f"{name}.{leaf}" for name, module in modules.items() for leaf, _ in module.named_parameters(recurse=False)}
    return find_renaming(adapter, sizes, others, known, all_of_them=False)


def _nearest(model: nn.Module, adapter: Adapter) -> str:
    names = [name for name, _ in model.named_modules()]
    odd = next((name for name in adapter if name not in names), "")
    return f" (the nearest to {odd} is {near})" if (near := nearest(odd, names)) else ""


def _sizes(module: Any) -> list[tuple[int, int]]:
    """What shapes an update of a module may have: as it stores its weight, or the other way round; of packed weights as they were."""
    weight = getattr(module, "weight", None)
    if hasattr(module, "out_features") and hasattr(module, "in_features"):
        out, inner = int(module.out_features), int(module.in_features)
    elif isinstance(weight, Tensor) and weight.ndim > 1:
        out, inner = len(weight), weight[0].numel()
    else:
        return []
    return [(out, inner), (inner, out)]


def head_rows(result: StoredResult) -> list[int]:
    """How many classes, or scores, the heads that were trained whole have."""
    heads = ("classifier.weight", "score.weight", "classifier.out_proj.weight", "qa_outputs.weight")
    return [tensor.shape[0] for key, tensor in result.other.items() if key in heads]


def base_for(result: StoredResult, name: str) -> PreTrainedModel:
    """The base with the head that the result was trained with."""
    kind, options, rows = model_kind(result, name), dict[str, Any](), head_rows(result)
    if kind in ("classification", IMAGES, "token-classification", "question-answering"):
        options = {"num_labels": rows[0]} if rows else {}
    if labels := dict(enumerate(result.manifest.get("labels", []))):
        options = {"num_labels": len(labels), "id2label": labels, "label2id": {label: index for index, label in labels.items()}}
    precision = {key: result.manifest[f"base_{key}"] for key in ("dtype", "quantization") if f"base_{key}" in result.manifest}
    seed = result.manifest.get("base_random_seed")
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        model = load_base(Base(model=name, random_weights=seed is not None, **precision), kind, **options).model
    return resized(model, result.format.frozen, result.other)


def new_tokens(result: StoredResult, name: str) -> int | None:
    """How many tokens the base has with the result's embeddings, where the base `name` has another number; else None."""
    config = transformers.AutoConfig.from_pretrained(Base(model=name).source).get_text_config()
    ends = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "lm_head.weight")
    rows = {len(tensor) for key, tensor in {**result.other, **result.format.frozen}.items() if key.endswith(ends)}
    return max(rows) if rows - {getattr(config, "vocab_size", None)} else None
