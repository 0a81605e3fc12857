"""Exact aggregation of LoRA adapters: the whole of it in pure torch, without a model, a file or a network."""

from fedex_lora.aggregation._aggregate import WeightRule, aggregate, in_order, mean_of, normalised_weights, require_same_structure
from fedex_lora.aggregation._engine import Part, splits
from fedex_lora.aggregation._merge import merge, mergeable, require_mergeable
from fedex_lora.aggregation._naming import get_method
from fedex_lora.aggregation._stacking import Batch, rescaled, shape_batches
from fedex_lora.aggregation.factors import derive_seed, init_lora_a
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
    "get_method",
    "in_order",
    "init_lora_a",
    "mean_of",
    "merge",
    "mergeable",
    "normalised_weights",
    "regauged",
    "require_mergeable",
    "require_same_structure",
    "rescaled",
    "shape_batches",
    "splits",
]
