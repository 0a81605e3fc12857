"""A name for a base model: what it is made of, in 64 digits."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedex_lora.storage.peft_rules import PREFIX

COMPARED = tuple(  # what may differ between models whose weights have the same shapes
    "model_type hidden_act hidden_activation activation_function num_attention_heads num_key_value_heads n_head".split()
    + "layer_norm_eps layer_norm_epsilon rms_norm_eps rope_parameters tie_word_embeddings".split()
)
OURS = (".lora_", ".modules_to_save.", ".original_module.", ".base_delta.")
ADAPTED, REST = 256, 16  # values of each weight under an adapter, and of each other parameter


def fingerprint(model: nn.Module, pristine: Mapping[str, Callable[[], Tensor]]) -> str:
    """sha256 of what makes a base.

    Of its config what shapes do not say (heads, activations, ..); of every frozen parameter its name, shape and a sample of its values,
    at places that its size determines. What is trained whole is left out, for it changes.

    Args:
        model: the PEFT model.
        pristine: module path -> what gives the weight under its adapter, as it was before it gained anything, dequantised. Only one such
            weight at a time is in memory.
    """
    config = getattr(model, "config", None)
    digest = hashlib.sha256(json.dumps({key: getattr(config, key, None) for key in COMPARED}, sort_keys=True, default=str).encode())
    for name in sorted(pristine):
        _add(digest, name, pristine[name](), ADAPTED)
    under = {f"{name}.weight" for name in pristine}
    rest = {name.removeprefix(PREFIX).replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
    frozen = {name: parameter for name, parameter in rest.items() if name not in under and not any(part in f".{name}" for part in OURS)}
    for name in sorted(frozen):
        _add(digest, name, frozen[name].detach(), REST)
    return digest.hexdigest()


def tokenizer_digest(processor: Any) -> str:
    """Of what makes tokens of text: its vocabulary, special tokens and chat template; "" of anything else. Merges are not looked at."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return ""
    said = [tokenizer.get_vocab(), tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()[:16]


def frozen_samples(model: nn.Module) -> dict[str, bytes]:
    """Of every frozen parameter, and of running statistics, by its name: some of its values now. What changes one was training, or alike.

    So few numbers are read that it costs nothing beside a training; weights of which a few rows change (embeddings) may escape.
    """
    there = [*model.named_parameters(), *(named for named in model.named_buffers() if ".running_" in named[0])]
    return {name: _sample(one.detach(), ADAPTED) for name, one in there if not one.requires_grad and ".lora_" not in name}


def _add(digest: "hashlib._Hash", name: str, values: Tensor, count: int) -> None:
    digest.update(f"{name}{tuple(values.shape)}".encode() + _sample(values, count))


def _sample(values: Tensor, count: int) -> bytes:
    places = torch.randint(max(1, values.numel()), (count,), generator=torch.Generator().manual_seed(values.numel()))
    sample = values.reshape(-1)[places.to(values.device)] if values.is_contiguous() else values[torch.unravel_index(places, values.shape)]
    return bytes(sample.cpu().float().contiguous().numpy().tobytes())
