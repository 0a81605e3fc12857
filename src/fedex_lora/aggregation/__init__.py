"""Exact aggregation of LoRA adapters: the whole of it in pure torch, without a model, a file or a network."""

from fedex_lora.aggregation.batching import Batch, shape_batches
from fedex_lora.aggregation.decompositions import ClientStack
from fedex_lora.aggregation.engine import BatchResult, aggregate, in_order, mean_of, normalised_weights, require_same_structure, splits
from fedex_lora.aggregation.factorizations import ALIGNED, GAUGES
from fedex_lora.aggregation.factors import derive_seed
from fedex_lora.aggregation.hierarchy import merge
from fedex_lora.aggregation.methods import METHODS, Method, get_method

__all__ = [
    "ALIGNED",
    "GAUGES",
    "METHODS",
    "Batch",
    "BatchResult",
    "ClientStack",
    "Method",
    "aggregate",
    "derive_seed",
    "get_method",
    "in_order",
    "mean_of",
    "merge",
    "normalised_weights",
    "require_same_structure",
    "shape_batches",
    "splits",
]
