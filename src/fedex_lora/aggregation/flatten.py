"""Adapters and deltas as flat tables of tensors, `PREFIX|MODULE|PART`, and back: the one codec of messages, dumps and files."""

from collections.abc import Mapping

from torch import Tensor

from fedex_lora.aggregation.core_pair import CorePair
from fedex_lora.aggregation.lowrank import from_parts, parts
from fedex_lora.types import Adapter, Delta, LoRAPair


def scalings_of(adapter: Adapter) -> dict[str, float]:
    """Module path -> scaling, in the adapter's order."""
    return {module: pair.scaling for module, pair in adapter.items()}


def flatten_adapter(prefix: str, adapter: Adapter, omit: str = "") -> dict[str, Tensor]:
    """The adapter's factors as `PREFIX|MODULE|A` and `PREFIX|MODULE|B` (or U and C, of cores), without those in `omit`.

    Example:
        >>> import torch
        >>> pair = LoRAPair(A=torch.ones(1, 3), B=torch.zeros(2, 1))
        >>> sorted(flatten_adapter("adapter", {"q": pair})), list(flatten_adapter("adapter", {"q": pair}, "A"))
        (['adapter|q|A', 'adapter|q|B'], ['adapter|q|B'])
    """
    return {
        f"{prefix}|{module}|{part}": pair.parts[part]
        for part in "ABUC"
        if part not in omit
        for module, pair in adapter.items()
        if part in pair.parts
    }


def unflatten_adapter(prefix: str, scalings: Mapping[str, float], tensors: Mapping[str, Tensor]) -> dict[str, LoRAPair]:
    """The inverse of `flatten_adapter` and `scalings_of`.

    Raises:
        KeyError: a factor is missing.
        AggregationError: the two of a module do not chain.
    """
    adapter: dict[str, LoRAPair] = {}
    for module, scaling in scalings.items():
        kind, factors = (CorePair, "AUC") if f"{prefix}|{module}|C" in tensors else (LoRAPair, "AB")
        adapter[module] = kind(**{part: tensors[f"{prefix}|{module}|{part}"] for part in factors}, scaling=scaling)
    return adapter


def flatten_deltas(prefix: str, deltas: Mapping[str, Delta]) -> dict[str, Tensor]:
    """Each delta's tensors as `PREFIX|MODULE|PART` (see `aggregation.lowrank.parts`), velocities included."""
    return {f"{prefix}|{module}|{part}": tensor for module, delta in deltas.items() for part, tensor in parts(delta).items()}


def unflatten_deltas(prefix: str, tensors: Mapping[str, Tensor], dotted: bool = False) -> dict[str, Delta]:
    """The inverse of `flatten_deltas`; tensors of other prefixes are left alone.

    Args:
        prefix, tensors: of the table.
        dotted: read `PREFIX|MODULE.PART`, too, as tables of earlier files have it.

    Raises:
        ValueError: tensors that are no delta; the message names the module.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in under(prefix, tensors).items():
        module, _, part = name.rpartition("." if dotted and "|" not in name else "|")
        found.setdefault(module, {})[part] = tensor
    deltas: dict[str, Delta] = {}
    for module, made_of in found.items():
        try:
            deltas[module] = from_parts(made_of)
        except ValueError as error:
            raise ValueError(f"{prefix}|{module} has {error}") from None
    return deltas


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `PREFIX|`, without that."""
    return {name.removeprefix(f"{prefix}|"): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}|")}
