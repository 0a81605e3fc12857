"""The shapes of what a run trains, without the base's weights: a model on no device, whose tensors hold no numbers."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fedex_lora.aggregation import get_method
from fedex_lora.config import Config
from fedex_lora.models.loading import Kind, load_base
from fedex_lora.models.lora import add_lora, read_model, set_trained, trainable_parameters
from fedex_lora.models.start import adapted_as, read_start
from fedex_lora.types import LoRAPair


class Outline(NamedTuple):
    """What a run trains.

    Attributes:
        adapter: at its start, drawn as PEFT draws it (its numbers are another run's); of a `base.start` that one's own.
        trained: how many numbers: of the round in which most are.
    """

    adapter: dict[str, LoRAPair]
    trained: int


def outline(config: Config, kind: Kind, model_config: Mapping[str, Any]) -> Outline:
    """Of a run; checkpoints are opened for the names in them, and no weight is read.

    Args:
        config: the run.
        kind: of model.
        model_config: of its task.

    Raises:
        ModelError, AdapterError: no such model, or no such adapter for it.
    """
    method, names = get_method(config.method), list(model_config.get("id2label", {}).values())
    base = config.base.model_copy(update={"quantization": "none"})
    loaded = load_base(base, kind, device_map="meta", **model_config)
    if config.base.start is None:
        model: nn.Module = add_lora(loaded, config.lora, kind)
        generator = torch.Generator().manual_seed(config.seed)
        adapter = {name: _drawn(pair, generator) for name, pair in read_model(model).items()}
    else:
        start = read_start(config.base.start, kind, config.base.model, method, config.lora, names)
        model, adapter = adapted_as(start, loaded, config.lora), dict(start.adapter)
    trained = 0
    for part in method.trained_schedule:
        set_trained(model, part)
        trained = max(trained, trainable_parameters(model)[0])
    return Outline(adapter, trained)


def _drawn(pair: LoRAPair, generator: torch.Generator) -> LoRAPair:
    """As PEFT begins: A by Kaiming's rule, B zero."""
    made = torch.empty(pair.A.shape)
    nn.init.kaiming_uniform_(made, a=math.sqrt(5), generator=generator)
    return LoRAPair(A=made, B=torch.zeros(pair.B.shape), scaling=pair.scaling)
