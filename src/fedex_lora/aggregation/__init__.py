"""Exact aggregation of LoRA adapters: the whole of it in pure torch, without a model, a file or a network."""

from fedex_lora.aggregation._aggregate import WeightRule, aggregate, in_order, mean_of, normalised_weights, require_same_structure
from fedex_lora.aggregation._engine import Part, splits
from fedex_lora.aggregation._merge import merge, mergeable, require_mergeable
from fedex_lora.aggregation._naming import method_named
from fedex_lora.aggregation._stacking import Batch, on_scaling, portions
from fedex_lora.aggregation.factors import derive_seed, fresh_a
from fedex_lora.aggregation.gauges import ALIGNED, GAUGES, regauged
from fedex_lora.aggregation.methods import METHODS, Method
from fedex_lora.aggregation.splits import Clients

__all__ = [
    "ALIGNED",
    "GAUGES",
    "METHODS",
    "Batch",
    "Clients",
    "Method",
    "Part",
    "WeightRule",
    "aggregate",
    "derive_seed",
    "fresh_a",
    "in_order",
    "mean_of",
    "merge",
    "mergeable",
    "method_named",
    "normalised_weights",
    "on_scaling",
    "portions",
    "regauged",
    "require_mergeable",
    "require_same_structure",
    "splits",
]
