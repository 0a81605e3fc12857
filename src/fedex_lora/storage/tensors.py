"""Tensors and base deltas as safetensors files."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fedex_lora.aggregation.lowrank import finite, from_parts
from fedex_lora.errors import StorageError
from fedex_lora.storage.files import cannot_write
from fedex_lora.storage.safetensors_io import opened
from fedex_lora.types import Delta, Dense, LowRank

Tensors: TypeAlias = tuple[Mapping[str, Tensor], Mapping[str, str]]
"""What a safetensors file holds: tensors and metadata."""


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first name of a tensor that holds NaN or infinity; None where there is none."""
    return next((name for name, tensor in tensors.items() if not finite(tensor)), None)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file (in a folder that nobody reads yet: see `atomic_folder`)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata or {}))
    except (OSError, SafetensorError) as error:
        raise cannot_write(path, error) from None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file.

    Raises:
        StorageError: missing, truncated, or not safetensors.
    """
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)


def save_delta(path: Path, base_delta: Mapping[str, Delta] | Mapping[str, LowRank]) -> None:
    """`base_delta.safetensors`: `M.U` (`out x q`) and `M.V` (`q x in`) for each module M, or `M.W` (`out x in`) where that is smaller."""
    save_tensors(path, delta_tensors(base_delta), {"format": "pt"})


def delta_tensors(base_delta: Mapping[str, Delta] | Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The tensors of `save_delta`; none of modules that gained nothing."""
    tensors: dict[str, Tensor] = {}
    for module, delta in base_delta.items():
        if isinstance(delta, LowRank) and not delta.rank:
            continue
        tensors |= {f"{module}.W": delta.W} if isinstance(delta, Dense) else {f"{module}.U": delta.U, f"{module}.V": delta.V}
    return tensors


def load_delta(path: Path) -> dict[str, Delta]:
    """The inverse of `save_delta`."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_tensors(path)[0].items():
        module, _, part = name.rpartition(".")
        found.setdefault(module, {})[part] = tensor
    try:
        return {module: from_parts(parts) for module, parts in found.items()}
    except ValueError as error:
        raise StorageError(f"{path} is no base delta: it has tensors of {error}") from None
