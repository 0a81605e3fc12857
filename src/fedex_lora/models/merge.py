"""A plain Transformers model of given weights: `W0 + delta` without adapters, side paths or quantisation; and what models answer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedex_lora.errors import ModelError
from fedex_lora.models.layers import is_quantised, like_weight, stored_weight
from fedex_lora.models.processor import image_shape
from fedex_lora.types import Delta


@torch.no_grad()
def plain_model(
    base: PreTrainedModel, delta: Mapping[str, Delta], other: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, tied: bool = False
) -> PreTrainedModel:
    """The base on the CPU with all its weights in `dtype`, dequantised, and in them what they have gained.

    A tied weight that gained something is untied, for the other module did not gain it.

    Args:
        base: as loaded; changed in place.
        delta: module path -> what its weight gains, `out x in`, summed in fp64.
        other: name -> tensor, of parameters that were trained whole.
        dtype: of the result.
        tied: the parameters in `other` were trained tied, as in full fine-tuning, and stay so.

    Raises:
        ModelError: a module or parameter that the base does not have.
    """
    stored = {name: stored_weight(module).cpu() for name, module in base.named_modules() if is_quantised(module)}
    if stored:
        base = base.dequantize()
    nn.Module.to(base, "cpu")  # where there is float64
    for name, weight in stored.items():
        base.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    for name, gained in delta.items():
        module = _found(base, name)
        total = (stored_weight(module).double() + gained.dense()).to(dtype)  # rounded once, to the dtype asked for
        module.weight = nn.Parameter(like_weight(module, total).contiguous(), requires_grad=False)
    nn.Module.to(base, dtype)
    for name, tensor in other.items():
        path, _, leaf = name.rpartition(".")
        module = _found(base, path)
        if tied:
            getattr(module, leaf).copy_(tensor)
            continue
        setattr(module, leaf, nn.Parameter(tensor.to(getattr(module, leaf)), requires_grad=False))
    _say_untied(base)
    return base.eval()


def _found(base: nn.Module, name: str) -> Any:
    try:
        return base.get_submodule(name)
    except AttributeError:
        raise ModelError(f"this base has no module {name}: is it another model?") from None


def _say_untied(base: PreTrainedModel) -> None:
    """The config of a model whose embeddings are not tied any more must not ask for it."""
    ends: Any = base.get_input_embeddings(), base.get_output_embeddings()
    if None in ends or ends[0].weight is ends[1].weight:
        return
    for config in {id(one): one for one in (base.config, base.config.get_text_config())}.values():
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def in_float32(model: nn.Module) -> nn.Module:
    """The same model computing in float32; quantised weights stay, and are dequantised to float32 as they are used."""
    nn.Module.float(model)
    for module in model.modules():
        if hasattr(module, "compute_dtype") and is_quantised(module):
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32  # type: ignore[assignment, union-attr]
    return model


@torch.no_grad()
def logits(model: nn.Module, rows: int = 4) -> Tensor:
    """The model's first output on fixed random tokens, `rows` x 16, or on so many fixed random images; as fp64, on the CPU."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        pixels = torch.randn(rows, *image_shape(config), generator=generator)
        inputs = {"pixel_values": pixels.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))}
    else:
        tokens = torch.randint(config.get_text_config().vocab_size, (rows, 16), generator=generator)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    device = next(model.parameters()).device
    output: Tensor = model.eval()(**{name: tensor.to(device) for name, tensor in inputs.items()})[0]
    return output.cpu().double()
