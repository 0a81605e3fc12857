"""Exact aggregation of LoRA adapters: the whole of it in pure torch, without a model, a file or a network."""

from fedex_lora.aggregation.batching import Batch, rescaled, shape_batches
from fedex_lora.aggregation.decompositions import Clients
from fedex_lora.aggregation.engine import Part, WeightRule, aggregate, in_order, mean_of, normalised_weights, require_same_structure, splits
from fedex_lora.aggregation.factorizations import ALIGNED, GAUGES, regauged
from fedex_lora.aggregation.factors import derive_seed, init_lora_a
from fedex_lora.aggregation.hierarchy import merge, mergeable, require_mergeable
from fedex_lora.aggregation.methods import METHODS, Method, get_method

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
