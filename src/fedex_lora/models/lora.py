"""Base models, PEFT models, and the tensors in them that are trained."""

import contextlib
import importlib.util
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from fedex_lora.config import IMAGES, Base, Lora
from fedex_lora.errors import AdapterError, ModelError
from fedex_lora.models.layers import ADAPTER, Layer, copied, is_quantised, keep_unpacked, layer_of
from fedex_lora.storage.adapter_folder import Format
from fedex_lora.storage.peft_rules import PREFIX, require_plain_lora
from fedex_lora.types import Adapter, LoRAPair

Kind: TypeAlias = Literal["classification", "causal-lm", "image-classification", "features", "token-classification", "question-answering"]
AUTO = {
    "classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    IMAGES: "AutoModelForImageClassification",
    "features": "AutoModel",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
}
TASK_TYPES: dict[Kind, str | None] = {
    "classification": "SEQ_CLS",
    "causal-lm": "CAUSAL_LM",
    IMAGES: None,
    "features": None,
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
}


class Loaded(NamedTuple):
    """A base model, and the modules in it that its checkpoint does not hold: they are random, so they must be trained and travel."""

    model: PreTrainedModel
    fresh: list[str]


def load_base(base: Base, kind: Kind, **config: Any) -> Loaded:
    """The pretrained model with a head for `kind`; a new head is random, so set the seed first.

    Args:
        base: name or folder, precision.
        kind: which head.
        config: more for the model's config (`num_labels`, `problem_type`).

    Raises:
        ModelError: it is not there, is not readable, or has no such head.
    """
    auto = getattr(transformers, AUTO[kind])
    options = {"trust_remote_code": base.trust_remote_code, **config}
    try:
        with _quiet():
            if base.random_weights:
                shape = transformers.AutoConfig.from_pretrained(base.source, **options)
                fresh = auto.from_config(shape).to(getattr(torch, base.dtype))
                pad(fresh, base)
                return Loaded(_averageable(fresh, base.model), [])
            if getattr(transformers.AutoConfig.from_pretrained(base.source, **options), "quantization_config", None) is not None:
                raise ModelError(f"{base.model} is quantised already: give the plain checkpoint, and set base.quantization")
            options |= {"dtype": getattr(torch, base.dtype), "use_safetensors": True, "output_loading_info": True}
            if kind == IMAGES:
                options["ignore_mismatched_sizes"] = True  # a head for other classes is replaced by a new one
            if base.quantization != "none":
                options["quantization_config"] = _quantization(base, auto, options["dtype"], config)
            model, info = auto.from_pretrained(base.source, **options)
            keep_unpacked(model)
            misfit = {key for key, *_ in info["mismatched_keys"]}
            if odd := sorted(key for key in misfit if key.partition(".")[0] not in heads_of(model)):
                raise ModelError(f"{base.model}: {odd[0]} has another shape in the checkpoint than in config.json: is it whole?")
            pad(model, base)
            return Loaded(_averageable(model, base.model), sorted({key.rpartition(".")[0] for key in {*info["missing_keys"], *misfit}}))
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors, huggingface_hub and the file system each raise their own
        raise ModelError(_why_not(base.model, error)) from error


def pad(model: Any, base: Base) -> None:
    """Give a text model without a padding token that of its tokenizer, or its end token: wherever it is loaded, alike."""
    config = model.config.get_text_config()
    if model.main_input_name != "input_ids" or getattr(config, "pad_token_id", None) is not None:
        return
    end = getattr(config, "eos_token_id", None)
    padding = end[0] if isinstance(end, list) else end
    with contextlib.suppress(ModelError):  # a base without a tokenizer
        padding = load_tokenizer(base).pad_token_id
    model.config.pad_token_id = config.pad_token_id = padding


def _quantization(base: Base, auto: Any, dtype: torch.dtype, config: Mapping[str, Any]) -> Any:
    """bitsandbytes' settings: linear layers only, without heads, tied and output embeddings, and poolers (which may be new)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("base.quantization needs bitsandbytes: pip install '.[quantized]'", "package")
    options = {"trust_remote_code": base.trust_remote_code}
    with torch.device("meta"):
        shape = auto.from_config(transformers.AutoConfig.from_pretrained(base.source, **options, **config), **options)
    poolers = [name for name, _ in shape.named_modules() if name.rpartition(".")[2] == "pooler"]  # whole paths, or their insides are packed
    kept = [*get_keys_to_not_convert(shape), *heads_of(shape), *poolers]
    if base.quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=base.quantization, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=kept
    )


def _averageable(model: Any, name: str) -> Any:
    """The model, if all that training changes in it are parameters, which travel; running statistics do not."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats for module in model.modules()):
        raise ModelError(f"{name} has batch normalisation, whose running statistics are not averaged: use a base with layer normalisation")
    return model


def has_modules(base: Base, kind: Kind, names: Iterable[str]) -> bool:
    """Does a model of this kind, of the base's config, have modules of these paths? (Nothing is loaded.)"""
    try:
        config = transformers.AutoConfig.from_pretrained(base.source, trust_remote_code=base.trust_remote_code)
        with torch.device("meta"):
            model = getattr(transformers, AUTO[kind]).from_config(config, trust_remote_code=base.trust_remote_code)
    except Exception:  # no such head; whoever loads it says why
        return False
    return set(names) <= {name for name, _ in model.named_modules()}


def takes_images(base: Base) -> bool:
    """Can transformers classify images with it?"""
    try:
        config = transformers.AutoConfig.from_pretrained(base.source, trust_remote_code=base.trust_remote_code)
    except Exception:  # whoever loads it says why
        return False
    return type(config) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def is_encoder(base: Base) -> bool:
    """Does it fill in masked words, and write no texts, whatever head transformers could give it?"""
    try:
        config = transformers.AutoConfig.from_pretrained(base.source, trust_remote_code=base.trust_remote_code)
    except Exception:  # whoever loads it says why
        return False
    writes = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())
    return type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not writes


def load_tokenizer(base: Base) -> Any:
    """The tokenizer that belongs to the base; the end token pads where there is no padding token."""
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(base.source, trust_remote_code=base.trust_remote_code)
            config = transformers.AutoConfig.from_pretrained(base.source, trust_remote_code=base.trust_remote_code).get_text_config()
    except Exception as error:
        raise ModelError(_why_not(base.model, error)) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(f"{base.model} has no tokenizer: save it in the same folder, with tokenizer.save_pretrained")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if (positions := getattr(config, "max_position_embeddings", None)) is not None:  # many tokenizers do not say what their model takes
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def _why_not(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if Path(name).exists():
        return f"{name} is a folder, but no model could be loaded from it: {reason}"
    return f"model {name!r} is neither a local folder nor to be had from the hub: give a folder, or check the name and go online ({reason})"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' load report and progress bars; errors still rise."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


HEADS = {"classifier", "score"}  # PEFT trains these by itself for sequence classification


def heads_of(model: PreTrainedModel) -> set[str]:
    """The modules of an image classifier beside its encoder, which is the model's own prefix, or else its largest part."""
    sizes = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in model.named_children()}
    body = model.base_model_prefix if model.base_model_prefix in sizes else max(sizes, key=lambda name: sizes[name])
    return {name for name, size in sizes.items() if size and name != body}


def add_lora(loaded: Loaded, lora: Lora, kind: Kind) -> PeftModel:
    """The model with new adapters (A random, B zero: set the seed first).

    Modules that the checkpoint did not hold (a pooler, say) are trained whole, as the head is.

    Raises:
        AdapterError: no module fits, or one that the algebra does not cover, or a rank above a layer's size.
    """
    heads = heads_of(loaded.model) if kind == IMAGES else set[str]()  # PEFT has no type for images: it is told what the head is
    if kind == IMAGES and not (heads or lora.modules_to_save):
        raise AdapterError("the head of this model cannot be told from its encoder: name it in lora.modules_to_save")
    fresh = [module for module in loaded.fresh if not (heads or HEADS) & set(module.split("."))]
    config = LoraConfig(
        task_type=TASK_TYPES[kind],
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
    """`get_peft_model`, where all that is trained is float32, whatever the base is.

    PEFT sees to the adapters. Modules that are trained whole would stay in 16 bits, where small steps and means are lost: they become
    float32, their inputs with them; and their outputs return to the base's precision unless they are the model's own (a head).
    """
    wrapped = get_peft_model(model, config)
    for name, module in wrapped.named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        trained = module.modules_to_save[ADAPTER]
        if any(parameter.dtype not in (torch.float32, torch.float64) for parameter in trained.parameters()):
            trained.float()
            trained.register_forward_pre_hook(_cast_inputs)
            if "." in name.removeprefix(PREFIX):
                module.register_forward_hook(_cast_outputs)
    return wrapped


def _cast_inputs(trained: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return _cast(args, next(trained.parameters()).dtype)


def _cast_outputs(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return _cast(output, next(module.original_module.parameters()).dtype)  # type: ignore[operator, union-attr]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def set_trained(model: nn.Module, factors: str) -> None:
    """Train the named factors ("AB", "A" or "B") of every adapter, and freeze the others."""
    for layer in lora_layers(model).values():
        for part in "AB":
            layer.parameter(part).requires_grad_(part in factors)


def lora_layers(model: nn.Module) -> dict[str, Layer]:
    """Module path (as in the base model) -> its LoRA layer.

    Raises:
        AdapterError: a kind of layer that the algebra does not cover.
    """
    found = {name.removeprefix(PREFIX): module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name: layer_of(name, module) for name, module in found.items()}


def read_model(model: nn.Module) -> dict[str, LoRAPair]:
    """The adapter in a PEFT model, as copies on the CPU; empty for a model without LoRA."""
    return {name: layer.pair() for name, layer in lora_layers(model).items()}


def format_of(model: nn.Module) -> Format:
    """How a model's adapter is written; an empty configuration without LoRA."""
    if not isinstance(model, PeftModel):
        return Format(config={})
    config = {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in model.peft_config[ADAPTER].to_dict().items()
        if isinstance(value, str | int | float | bool | list | dict | set | None)
    }
    return Format(config=config, layouts={name: layer.layout for name, layer in lora_layers(model).items()})


def other_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every trained parameter that is no LoRA factor, named as in the base model: heads, `modules_to_save`, or the whole model."""
    return {
        name.removeprefix(PREFIX).replace(".modules_to_save.default", "").replace(".base_layer", ""): parameter
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
        raise AdapterError(f"the adapter does not fit the model: {odd[0]} ({len(odd)} such) is in one of them only")
    for name, layer in layers.items():
        if layer.rank != adapter[name].rank:
            layer.resize(adapter[name].rank)
        _copy(name, layer.factor("A"), adapter[name].A)
        _copy(name, layer.factor("B"), adapter[name].B)
        layer.peft.scaling[ADAPTER] = adapter[name].scaling
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


def frozen_bytes(model: nn.Module) -> int:
    """The size of what is not trained, as it is stored."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters() if not parameter.requires_grad)
