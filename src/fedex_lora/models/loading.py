"""Base models and tokenizers as Transformers loads them."""

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from fedex_lora.config import IMAGES, Base
from fedex_lora.errors import ModelError
from fedex_lora.models.layers import disable_cpu_repacking

Kind: TypeAlias = Literal["classification", "causal-lm", "image-classification", "features", "token-classification", "question-answering"]
CLASS_HEADS = {"classifier", "score"}  # PEFT trains these by itself for sequence classification
AUTO = {
    "classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    IMAGES: "AutoModelForImageClassification",
    "features": "AutoModel",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
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
        with quiet_loading():
            if base.random_weights:
                shape = transformers.AutoConfig.from_pretrained(base.source, **options)
                fresh = auto.from_config(shape).to(getattr(torch, base.dtype))
                pad(fresh, base)
                return Loaded(averageable(fresh, base.model), [])
            if getattr(transformers.AutoConfig.from_pretrained(base.source, **options), "quantization_config", None) is not None:
                raise ModelError(f"{base.model} is quantised already: give the plain checkpoint, and set base.quantization")
            options |= {"dtype": getattr(torch, base.dtype), "use_safetensors": True, "output_loading_info": True}
            if kind == IMAGES:
                options["ignore_mismatched_sizes"] = True  # a head for other classes is replaced by a new one
            if base.quantization != "none":
                options["quantization_config"] = quantization_settings(base, kind, **config)
            model, info = auto.from_pretrained(base.source, **options)
            disable_cpu_repacking(model)
            misfit = {key for key, *_ in info["mismatched_keys"]}
            if odd := sorted(key for key in misfit if key.partition(".")[0] not in head_modules(model)):
                raise ModelError(f"{base.model}: {odd[0]} has another shape in the checkpoint than in config.json: is it whole?")
            pad(model, base)
            return Loaded(averageable(model, base.model), sorted({key.rpartition(".")[0] for key in {*info["missing_keys"], *misfit}}))
    except ModelError:
        raise
    except Exception as error:  # transformers, safetensors, huggingface_hub and the file system each raise their own
        raise ModelError(why_not_loaded(base.model, error)) from error


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


def quantization_settings(base: Base, kind: Kind, **config: Any) -> Any:
    """bitsandbytes' settings: linear layers only, without heads, tied and output embeddings, and poolers (which may be new)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("base.quantization needs bitsandbytes: pip install '.[quantized]'", "package")
    auto, options = getattr(transformers, AUTO[kind]), {"trust_remote_code": base.trust_remote_code}
    with torch.device("meta"):
        shape = auto.from_config(transformers.AutoConfig.from_pretrained(base.source, **options, **config), **options)
    poolers = [name for name, _ in shape.named_modules() if name.rpartition(".")[2] == "pooler"]  # whole paths, or their insides are packed
    kept = sorted({*get_keys_to_not_convert(shape), *head_modules(shape), *poolers})
    if base.quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=base.quantization, bnb_4bit_compute_dtype=base.dtype, llm_int8_skip_modules=kept
    )


def averageable(model: Any, name: str) -> Any:
    """The model, if all that training changes in it are parameters, which travel; running statistics do not."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats for module in model.modules()):
        raise ModelError(f"{name} has batch normalisation, whose running statistics are not averaged: use a base with layer normalisation")
    return model


def config_of(base: Base) -> Any:
    """The base's config; None where there is none, for whoever loads the base says why."""
    try:
        return transformers.AutoConfig.from_pretrained(base.source, trust_remote_code=base.trust_remote_code)
    except Exception:
        return None


def modules_of(base: Base, kind: Kind) -> dict[str, nn.Module]:
    """The modules of a model of this kind, of the base's config, by their paths; nothing is loaded, and they hold no numbers."""
    try:
        with torch.device("meta"):
            model = getattr(transformers, AUTO[kind]).from_config(config_of(base), trust_remote_code=base.trust_remote_code)
    except Exception:  # no such head; whoever loads it says why
        return {}
    return dict(model.named_modules())


def takes_images(base: Base) -> bool:
    """Can transformers classify images with it?"""
    return type(config_of(base)) in transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def is_encoder(base: Base) -> bool:
    """Does it fill in masked words, and write no texts, whatever head transformers could give it?"""
    config = config_of(base)
    writes = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in getattr(config, "architectures", None) or ())
    return type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not writes


def load_tokenizer(base: Base) -> Any:
    """The tokenizer that belongs to the base; the end token pads where there is no padding token."""
    try:
        with quiet_loading():
            tokenizer = transformers.AutoTokenizer.from_pretrained(base.source, trust_remote_code=base.trust_remote_code)
            config = transformers.AutoConfig.from_pretrained(base.source, trust_remote_code=base.trust_remote_code).get_text_config()
    except Exception as error:
        raise ModelError(why_not_loaded(base.model, error)) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(f"{base.model} has no tokenizer: save it in the same folder, with tokenizer.save_pretrained")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if (positions := getattr(config, "max_position_embeddings", None)) is not None:  # many tokenizers do not say what their model takes
        tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def why_not_loaded(name: str, error: Exception) -> str:
    """What to say where Transformers could not load something."""
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    if reason.startswith("Unrecognized configuration class"):
        return f"{name} is no model for this kind of task: give base.model one that is"
    if Path(name).exists():
        return f"{name} is a folder, but no model could be loaded from it: {reason}"
    return f"model {name!r} is neither a local folder nor to be had from the hub: give a folder, or check the name and go online ({reason})"


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' load report and progress bars; errors still rise."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def head_modules(model: PreTrainedModel) -> set[str]:
    """The modules of an image classifier beside its encoder, which is the model's own prefix, or else its largest part."""
    sizes = {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in model.named_children()}
    body = model.base_model_prefix if model.base_model_prefix in sizes else max(sizes, key=lambda name: sizes[name])
    return {name for name, size in sizes.items() if size and name != body}
