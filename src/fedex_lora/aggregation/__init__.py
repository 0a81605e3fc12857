"""Exact aggregation of LoRA adapters: the whole of it in pure torch, without a model, a file or a network."""

from fedex_lora.aggregation._aggregate import WeightRule, aggregate, normalised_weights
from fedex_lora.aggregation._merge import merge
from fedex_lora.aggregation._naming import method_named
from fedex_lora.aggregation._stacking import on_scaling
from fedex_lora.aggregation.factors import derive_seed, fresh_a
from fedex_lora.aggregation.gauges import ALIGNED, GAUGES, regauged
from fedex_lora.aggregation.methods import METHODS, Method

__all__ = [
    "ALIGNED",
    "GAUGES",
    "METHODS",
    "Method",
    "WeightRule",
    "aggregate",
    "derive_seed",
    "fresh_a",
    "merge",
    "method_named",
    "normalised_weights",
    "on_scaling",
    "regauged",
]
