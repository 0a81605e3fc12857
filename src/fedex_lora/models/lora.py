"""Base models, PEFT models, and the tensors in them that are trained."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedex_lora.config import IMAGES, Lora, nearest
from fedex_lora.errors import AdapterError
from fedex_lora.models.layers import Layer, copied, is_quantised, layer_of
from fedex_lora.models.loading import CLASS_HEADS, Kind, Loaded, head_modules
from fedex_lora.storage.adapter_folder import Format, adapter_config
from fedex_lora.storage.peft_rules import PREFIX, require_plain_lora
from fedex_lora.types import Adapter, LoRAPair

TASK_TYPES: dict[Kind, str] = {
    "classification": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
    IMAGES: "IMAGE_CLS",  # what a manifest calls it; PEFT has no task type for it
    "features": "FEATURE_EXTRACTION",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
}


def add_lora(loaded: Loaded, lora: Lora, kind: Kind) -> PeftModel:
    """The model with new adapters (A random, B zero: set the seed first).

    Modules that the checkpoint did not hold (a pooler, say) are trained whole, as the head is.

    Raises:
        AdapterError: no module fits, or one that the algebra does not cover, or a rank above a layer's size.
    """
    heads = head_modules(loaded.model) if kind == IMAGES else set[str]()  # PEFT has no type for images: it is told what the head is
    if kind == IMAGES and not (heads or lora.modules_to_save):
        raise AdapterError("the head of this model cannot be told from its encoder: name it in lora.modules_to_save")
    fresh = [module for module in loaded.fresh if not (heads or CLASS_HEADS) & set(module.split("."))]
    config = LoraConfig(
        task_type=None if kind == IMAGES else TASK_TYPES[kind],
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type] # PEFT divides it only
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        use_rslora=lora.rslora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        modules_to_save=sorted({*(lora.modules_to_save or []), *fresh, *heads}) or None,
    )
    _require_names(loaded.model, lora)
    try:
        wrapped = wrap(loaded.model, config)
    except (ValueError, TypeError, re.error) as error:
        linear = {name.rpartition(".")[2] for name, module in loaded.model.named_modules() if isinstance(module, nn.Linear)}
        known = f" (its linear layers are called {', '.join(sorted(linear))})" if linear else ""
        raise AdapterError(f"no LoRA for this model: {str(error).splitlines()[0]}: set lora.target_modules{known}") from None
    require_plain_lora(config.to_dict(), "lora")
    adapter = read_model(wrapped)
    for target in [] if isinstance(lora.target_modules, str) else lora.target_modules or []:  # one that is trained whole is passed over
        if not any(f".{name}".endswith(f".{target}") for name, _ in wrapped.named_modules()):
            raise AdapterError(f"lora.target_modules: no module is called {target!r}: correct it, or remove it")
    for key, patterns in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in patterns:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapter):
                raise AdapterError(f"lora.{key}: no adapted module is called {pattern!r}: correct it, or remove it")
    for name, pair in adapter.items():
        if pair.rank > min(pair.shape):
            raise AdapterError(
                f"rank {pair.rank} is above the size of module {name}, {pair.shape[0]} x {pair.shape[1]}: lower lora.r, or set its rank in "
                "lora.rank_pattern"
            )
    return wrapped


def _require_names(model: PreTrainedModel, lora: Lora) -> None:
    """`modules_to_save` names modules that can be trained whole, and patterns are regular expressions."""
    for key in (*lora.rank_pattern, *lora.alpha_pattern):
        try:
            re.compile(key)
        except re.error as error:
            raise AdapterError(f"lora.rank_pattern or alpha_pattern: {key!r} is no regular expression: {error}") from None
    for wanted in lora.modules_to_save or []:
        modules = [module for name, module in model.named_modules() if name == wanted or name.endswith(f".{wanted}")]
        if not modules:
            raise AdapterError(f"lora.modules_to_save names no module called {wanted}: see model.named_modules()")
        if any(is_quantised(inner) for module in modules for inner in module.modules()):
            raise AdapterError(f"{wanted} is quantised and cannot be trained whole: leave it out of lora.modules_to_save")


def wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """`get_peft_model`, where all that is trained is float32, whatever the base is."""
    wrapped = get_peft_model(model, config)
    train_in_float32(wrapped)
    return wrapped


def train_in_float32(model: nn.Module) -> None:
    """Let all that is trained be float32: 16 bits would lose small steps, and the mean that a server sends.

    PEFT makes adapters so, unless it is told not to. Modules that are trained whole become float32, their inputs with them; and their
    outputs return to the base's precision unless they are the model's own (a head).

    Raises:
        AdapterError: something else is trained in 16 bits.
    """
    for layer in lora_layers(model).values():
        for part in layer.parts.replace("U", ""):
            layer.parameter(part).data = _wide(layer.parameter(part))
    for name, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or module.active_adapters[0] not in module.modules_to_save:
            continue
        trained = module.modules_to_save[module.active_adapters[0]]
        if any(_wide(parameter) is not parameter for parameter in trained.parameters()):
            trained.float()
            trained.register_forward_pre_hook(_cast_inputs)
            if "." in name.removeprefix(PREFIX):
                module.register_forward_hook(_cast_outputs)
    if odd := [name for name, parameter in other_parameters(model).items() if _wide(parameter) is not parameter]:
        raise AdapterError(f"{odd[0]} is trained in 16 bits, where a mean is rounded: load the model in float32, or freeze it")


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _cast_inputs(trained: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return _cast(args, next(trained.parameters()).dtype)


def _cast_outputs(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return _cast(output, next(module.original_module.parameters()).dtype)  # type: ignore[operator, union-attr]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def set_trained(model: nn.Module, factors: str) -> None:
    """Train the named factors ("AB", "A", "B" or "C") of every adapter, and freeze the others."""
    for layer in lora_layers(model).values():
        for part in layer.parts.replace("U", ""):  # which is no parameter
            layer.parameter(part).requires_grad_(part in factors)


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """What is trained among them is not meanwhile."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def lora_layers(model: nn.Module) -> dict[str, Layer]:
    """Module path (as in the base model) -> its LoRA layer.

    Raises:
        AdapterError: a kind of layer that the algebra does not cover, or more than one adapter that is active.
    """
    found = {name.removeprefix(PREFIX): module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    active = {name for module in found.values() for name in module.active_adapters}
    if len(active) > 1:
        raise AdapterError(
            f"the model has {len(active)} active adapters ({', '.join(sorted(active))}), and one is trained: use set_adapter"
        )
    return {name: layer_of(name, module, next(iter(active))) for name, module in found.items() if active & module.r.keys()}


def read_model(model: nn.Module) -> dict[str, LoRAPair]:
    """The adapter in a PEFT model, as copies on the CPU; empty for a model without LoRA."""
    return {name: layer.pair() for name, layer in lora_layers(model).items()}


def format_of(model: nn.Module) -> Format:
    """How a model's adapter is written; an empty configuration without LoRA."""
    if not isinstance(model, PeftModel):
        return Format(config={})
    config = {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in model.peft_config[model.active_adapter].to_dict().items()
        if isinstance(value, str | int | float | bool | list | dict | set | None)
    }
    return Format(config=config, layouts={name: layer.layout for name, layer in lora_layers(model).items()})


def other_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every trained parameter that is no LoRA factor, named as in the base model: heads, `modules_to_save`, or the whole model."""
    return {
        re.sub(r"\.modules_to_save\.[^.]+|\.base_layer", "", name.removeprefix(PREFIX)): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    }


def read_other(model: nn.Module) -> dict[str, Tensor]:
    """Copies of `other_parameters`, on the CPU."""
    return {name: copied(parameter) for name, parameter in other_parameters(model).items()}


@torch.no_grad()
def write_model(model: nn.Module, adapter: Adapter, other: Mapping[str, Tensor]) -> None:
    """Put an adapter (with its ranks and scalings) and the other trained tensors into a model with the same modules, on its device.

    Raises:
        AdapterError: names or shapes differ.
    """
    layers, parameters = lora_layers(model), other_parameters(model)
    if layers.keys() != adapter.keys() or parameters.keys() != other.keys():
        odd = sorted((layers.keys() ^ adapter.keys()) | (parameters.keys() ^ other.keys()))
        near = nearest(odd[0], sorted({*layers, *parameters, *adapter, *other} - {odd[0]}))
        like = f"; the nearest is {near}" if near else ""
        raise AdapterError(f"the adapter does not fit the model: {odd[0]} ({len(odd)} such) is in one of them only{like}")
    odd_ranks = {name: adapter[name].rank for name, layer in layers.items() if layer.rank != adapter[name].rank}
    for name, layer in layers.items():
        if name in odd_ranks:
            layer.resize(odd_ranks[name])
        if "C" in adapter[name].parts:
            layer.hold_core()
        for part, tensor in adapter[name].parts.items():
            _copy(name, layer.factor(part), tensor)
        layer.peft.scaling[layer.adapter] = adapter[name].scaling
    if odd_ranks and isinstance(model, PeftModel):  # else what PEFT saves has other ranks than its weights
        said = adapter_config(adapter, {})
        for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"):
            setattr(model.peft_config[model.active_adapter], key, said[key])
    for name, parameter in parameters.items():
        _copy(name, parameter, other[name])


def _copy(name: str, target: Tensor, source: Tensor) -> None:
    if target.shape != source.shape:
        raise AdapterError(f"the adapter does not fit the model: {name} is {tuple(source.shape)}, the model has {tuple(target.shape)}")
    target.copy_(source)


def trainable_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers that are trained, and all numbers (two in a byte of 4-bit weights)."""
    per_element = {"Params4bit": 2}
    sizes = [(per_element.get(type(p).__name__, 1) * p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)
