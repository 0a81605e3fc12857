"""What a client remembers between rounds, and its file: a client that answered and was killed answers the same again, without training."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedex_lora.errors import StorageError
from fedex_lora.protocol.delta_sync import BaseCopy
from fedex_lora.storage.tensors import deltas_of, load_tensors, moving_tensors, write_tensors
from fedex_lora.types import Adapter, Delta, adapter_from, factors_of, scalings_of

MEMORY = "memory.safetensors"


@dataclass(frozen=True, eq=False)
class ClientMemory:
    """One client.

    Attributes:
        base: its base delta.
        adapter: its copy of the global adapter; None: it was sent none yet.
        trained: round -> what it trained in it, where the method has it keep factors.
        optimizer: Adam's moments, where they are kept.
        round: the round that it answered last.
        reply: its answer.
    """

    base: BaseCopy = field(default_factory=BaseCopy)
    adapter: Adapter | None = None
    trained: Mapping[int, Adapter] = field(default_factory=dict)
    optimizer: Mapping[str, Any] | None = None
    round: int = 0
    reply: bytes = b""


def save_memory(path: Path, memory: ClientMemory, whole: bool = False) -> None:
    """Write a client's memory in one step, with the sha256 of its tensors.

    Args:
        path: the file.
        memory: what goes into it.
        whole: write the base also where it has the server's bits; else it is known by its version.
    """
    whole = whole or bool(memory.base.lossy)
    optimizer = memory.optimizer or {}
    moments = {f"{index}|{name}": value for index, values in optimizer.get("state", {}).items() for name, value in values.items()}
    tensors = {"reply": torch.frombuffer(bytearray(memory.reply), dtype=torch.uint8)}
    tensors |= {f"optimizer|{name}": value for name, value in moments.items() if isinstance(value, Tensor)}
    tensors |= {f"base|{name}": tensor for name, tensor in moving_tensors(memory.base.delta).items()} if whole else {}
    for prefix, adapter in (("adapter", memory.adapter or {}), *((f"trained{number}", one) for number, one in memory.trained.items())):
        tensors |= factors_of(prefix, adapter)
    about = {
        "round": memory.round,
        "version": memory.base.version,
        "lossy": sorted(memory.base.lossy),
        "whole": whole,
        "adapter": None if memory.adapter is None else scalings_of(memory.adapter),
        "trained": [[number, scalings_of(adapter)] for number, adapter in memory.trained.items()],
        "optimizer": None if memory.optimizer is None else optimizer["param_groups"],
        "plain": {name: value for name, value in moments.items() if not isinstance(value, Tensor)},
    }
    write_tensors(path, tensors, {"client": json.dumps(about), "sha256": _digest(tensors)})


def load_memory(path: Path, base_of: Callable[[int], Mapping[str, Delta] | None]) -> ClientMemory:
    """The inverse of `save_memory`; `base_of` gives the server's base delta of a version, or None: then the client has the pristine base.

    Raises:
        StorageError: it is missing or broken.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("sha256") != _digest(tensors):
        raise StorageError(f"{path} has changed since it was written: remove it, and the client asks for what it lacks")
    try:
        about = json.loads(metadata["client"])
        lossy = frozenset(about["lossy"])
        base = deltas_of({name.removeprefix("base|"): tensor for name, tensor in tensors.items() if name.startswith("base|")}, path)
        delta = base if about["whole"] else base_of(about["version"])
        return ClientMemory(
            base=BaseCopy() if delta is None else BaseCopy(version=about["version"], delta=delta, lossy=lossy),
            adapter=None if about["adapter"] is None else adapter_from("adapter", about["adapter"], tensors),
            trained={number: adapter_from(f"trained{number}", scalings, tensors) for number, scalings in about["trained"]},
            optimizer=_optimizer(about, tensors),
            round=about["round"],
            reply=tensors["reply"].numpy().tobytes(),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise StorageError(f"{path} is not a client's memory ({error!r}): resume with the version that began the run") from None


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _optimizer(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    if about["optimizer"] is None:
        return None
    values = {name.removeprefix("optimizer|"): tensor for name, tensor in tensors.items() if name.startswith("optimizer|")} | about["plain"]
    state: dict[int, dict[str, Any]] = {}
    for name, value in values.items():
        index, _, key = name.partition("|")
        state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": about["optimizer"]}
