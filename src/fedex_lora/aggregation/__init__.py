"""Exact aggregation of LoRA adapters: the whole of it in pure torch, without a model, a file or a network."""

from fedex_lora.aggregation.decompositions import ClientStack
from fedex_lora.aggregation.engine import aggregate, normalised_weights
from fedex_lora.aggregation.factorizations import GAUGES
from fedex_lora.aggregation.factors import derive_seed
from fedex_lora.aggregation.hierarchy import merge
from fedex_lora.aggregation.methods import METHODS, Method, get_method

__all__ = [
    "GAUGES",
    "METHODS",
    "ClientStack",
    "Method",
    "aggregate",
    "derive_seed",
    "get_method",
    "merge",
    "normalised_weights",
]
