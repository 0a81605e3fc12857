"""Exact aggregation of LoRA adapters: the whole of it in pure torch, without a model, a file or a network."""

from fedex_lora.aggregation._aggregate import WeightRule, aggregate, method_named, normalised_weights, on_scaling
from fedex_lora.aggregation.methods import METHODS, Method

__all__ = ["METHODS", "Method", "WeightRule", "aggregate", "method_named", "normalised_weights", "on_scaling"]
