"""Where the weights of a base can be read again as they were, so that no second copy of them is kept in memory."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedex_lora.models.layers import copied


class PristineWeights:
    """The files of a model that is in memory: of its folder, or, where it came by name, of the hub's cache on this machine.

    Args:
        config: the model's; it says where the model came from.
    """

    def __init__(self, config: Any) -> None:
        self._where: dict[str, Path] = {}
        folder = cached_folder(getattr(config, "_name_or_path", ""), getattr(config, "_commit_hash", None))
        for path in sorted(folder.glob("*.safetensors")) if folder else []:
            with contextlib.suppress(OSError, SafetensorError), safe_open(path, framework="pt") as file:  # a stray file is none of them
                self._where |= {key: path for key in file.keys()}  # noqa: SIM118 (not a dict)

    def source(self, name: str, weight: Tensor) -> Callable[[], Tensor]:
        """A function that gives W0 on the CPU: from the file if it is there bit for bit (as the model was given it), else from a copy."""
        for key in self._where:
            if key.endswith(".weight") and (name.endswith(key.removesuffix(".weight")) or key.removesuffix(".weight").endswith(name)):
                read = _reader(self._where[key], key, weight.dtype)
                stored = read()
                if stored.shape == weight.shape and torch.equal(stored, weight.detach().cpu()):
                    return read
        copy = copied(weight)
        return lambda: copy


def cached_folder(name: str, commit: str | None = None) -> Path | None:
    """The folder of a model on this machine: its own, or the cached snapshot of a model of the hub (of the commit that was loaded)."""
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=commit)
    except HFValidationError:  # the path of a folder that is gone
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _reader(path: Path, key: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key).to(dtype)
            return tensor

    return read
