"""What an adapter brings of its base: a vocabulary of another size, embeddings that are not the checkpoint's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedex_lora.errors import ModelError
from fedex_lora.models.layers import is_quantised


def resized(model: PreTrainedModel, frozen: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> PreTrainedModel:
    """The base with as many tokens as the adapter has embeddings for, and with what the adapter holds of it untrained.

    Args:
        model: as loaded; changed in place.
        frozen: name -> tensor of the base, in the place of the checkpoint's.
        other: name -> tensor that was trained whole; of it only the number of tokens counts here.

    Raises:
        ModelError: the model has no such tensor, or more tokens are asked for than there are embeddings of.
    """
    brought = {**other, **frozen}
    embeddings = _embeddings(model)
    rows, has = {len(brought[name]) for name in embeddings if name in brought}, {len(weight) for weight in embeddings.values()}
    if rows - has:
        if len(rows) > 1 or not embeddings.keys() <= brought.keys():
            raise ModelError(
                f"the adapter has embeddings of {max(rows)} tokens, the base of {max(has)}, and the adapter holds not all of them: give "
                "the base that was resized, as its folder, by --base"
            )
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in frozen.items():
        if name not in parameters or parameters[name].shape != tensor.shape or is_quantised(model.get_submodule(name.rpartition(".")[0])):
            raise ModelError(f"the adapter brings {name} of its base, and this base has not the like: is it another model?")
        with torch.no_grad():
            parameters[name].copy_(tensor)
    return model


def _embeddings(model: PreTrainedModel) -> dict[str, Tensor]:
    """Name -> weight, of the input and output embeddings of tokens; one where they are tied, none in a model of images."""
    if model.main_input_name != "input_ids":
        return {}
    ends: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    wanted = {id(end.weight) for end in ends if isinstance(end, nn.Embedding | nn.Linear)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in wanted}
