"""The model that a result folder describes: the base, with what it gained, under the adapter."""

from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, set_seed

from fedex_lora.aggregation import method_named
from fedex_lora.config import IMAGES, Base
from fedex_lora.errors import ModelError
from fedex_lora.peft_io._base import FrozenBase
from fedex_lora.peft_io._folders import adapter_config
from fedex_lora.peft_io._model import Kind, has_modules, load_base, takes_images, wrap, write_model
from fedex_lora.peft_io._result import Result, read_result

IMAGE_TASK = "IMAGE_CLS"  # what a manifest calls image classification, for which PEFT has no task type


def load_model(folder: str | Path, base: str | Path | PreTrainedModel) -> nn.Module:
    """The model that a folder describes: the base with the base delta in it (folded, or beside it: see `FrozenBase`), and the adapter.

    Args:
        folder: a run folder, a round folder, `final/`, or the OUT of `fedex-lora aggregate`.
        base: the pretrained model: its name or folder, loaded in the precision that `folder` says (float32 where it says none), or a
            model object, in the precision of the run (any, for aggregated adapters), which is changed in place.

    Returns:
        A `PeftModel` in evaluation mode (for full fine-tuning, the model itself). Where the base delta stays beside the weights (see
        `FrozenBase`), `save_pretrained` lacks it, merged or not: use `fedex-lora export`.

    Raises:
        StorageError: the folder is broken.
        ModelError: the base does not fit.

    Example:
        >>> model = load_model("runs/mrpc", "roberta-base")                              # doctest: +SKIP
    """
    folder = Path(folder)
    result = read_result(folder / "final" if (folder / "final").is_dir() else folder)
    if method_named(result.manifest["method"]).exactness == "personalised":
        raise ModelError(
            f"{folder} is of method {result.manifest['method']}, whose clients' models differ: load clients/CLIENT/adapter with PEFT"
        )
    model, _ = open_model(result, base)
    return model


def open_model(result: Result, base: str | Path | PreTrainedModel) -> tuple[nn.Module, FrozenBase]:
    """As `load_model`, from a result in memory; also the frozen base, which knows the pristine weights."""
    if isinstance(base, nn.Module) and (not isinstance(base, PreTrainedModel) or any(isinstance(one, LoraLayer) for one in base.modules())):
        raise ModelError(
            f"a {type(base).__name__} with adapters, or not of transformers, is no base: give its name or folder, or load it anew"
        )
    model: Any = base if isinstance(base, PreTrainedModel) else base_for(result, str(base))
    if result.adapter:
        config = adapter_config(result.adapter, result.config) | {"inference_mode": False}
        try:
            model = wrap(model, LoraConfig(**{key: value for key, value in config.items() if key in LoraConfig.__dataclass_fields__}))
        except ValueError as error:
            raise ModelError(
                f"this base has not the modules of the adapter: {str(error).splitlines()[0][:200]}: is it another model?"
            ) from None
    frozen = FrozenBase(model)
    known = result.manifest.get("base_fingerprint")
    if known is not None and result.adapter and known != frozen.fingerprint():
        name = base if isinstance(base, str | Path) else "the model given"
        raise ModelError(
            f"{name} is not the base of this result: its weights differ from those of {result.manifest.get('base_model')}; give that one"
        )
    frozen.set(result.base_delta)
    write_model(model, result.adapter, result.other)
    return model.eval(), frozen


def kind_of(result: Result, name: str) -> Kind:
    """The kind of model that the result was trained as; where it does not say, the kind of the base `name` that has its modules.

    Raises:
        ModelError: none of ours.
    """
    kinds: dict[str | None, Kind] = {"SEQ_CLS": "classification", "CAUSAL_LM": "causal-lm", IMAGE_TASK: IMAGES}
    task_type = (result.config.get("task_type") if result.adapter else None) or result.manifest.get("task_type")
    if task_type in kinds:
        return kinds[task_type]
    if task_type is not None:
        raise ModelError(f"no head for task type {task_type}: load the base yourself and pass the model to fedex_lora.load_model")
    if _head_rows(result) and takes_images(Base(model=name)):
        return IMAGES
    candidates: tuple[Kind, ...] = ("features", "causal-lm", "classification")
    return next((kind for kind in candidates if has_modules(Base(model=name), kind, result.adapter)), "features")


def _head_rows(result: Result) -> list[int]:
    heads = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
    return [tensor.shape[0] for key, tensor in result.other.items() if key in heads]


def base_for(result: Result, name: str) -> PreTrainedModel:
    """The base with the head that the result was trained with."""
    kind, options, rows = kind_of(result, name), dict[str, Any](), _head_rows(result)
    if kind in ("classification", IMAGES):
        options = {"num_labels": rows[0]} if rows else {}
    if labels := dict(enumerate(result.manifest.get("labels", []))):
        options = {"num_labels": len(labels), "id2label": labels, "label2id": {label: index for index, label in labels.items()}}
    precision = {key: result.manifest[f"base_{key}"] for key in ("dtype", "quantization") if f"base_{key}" in result.manifest}
    seed = result.manifest.get("base_random_seed")
    if seed is not None:
        set_seed(seed)
    return load_base(Base(model=name, random_weights=seed is not None, **precision), kind, **options).model
