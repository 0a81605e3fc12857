"""The client updates of a result folder: a file each, as runs store them, or the adapter folders that were aggregated."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedex_lora.aggregation.flatten import scalings_of
from fedex_lora.errors import StorageError
from fedex_lora.storage.adapter_folder import CONFIG, WEIGHTS, AdapterHeader, read_adapter_folder
from fedex_lora.storage.files import checksum
from fedex_lora.storage.tensors import load_tensors, save_tensors
from fedex_lora.types import ClientUpdate, LoRAPair

UPDATES = "updates"


def safe_name(client_id: str) -> str:
    """A client id as a file name; ids with odd characters get a hash, so that no two of them share a name."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", client_id).lstrip(".")[:100]
    return plain if plain == client_id != "" else f"{plain}-{hashlib.sha256(client_id.encode()).hexdigest()[:12]}"


def save_update(path: Path, update: ClientUpdate) -> None:
    """A client's update: `M.A`, `M.B`, `other|NAME`, and the rest as metadata."""
    tensors = {f"{module}.{part}": getattr(pair, part) for module, pair in update.adapter.items() for part in "AB"}
    tensors |= {f"other|{name}": tensor for name, tensor in update.other.items()}
    about = {"client_id": update.client_id, "num_examples": update.num_examples, "scalings": scalings_of(update.adapter)}
    save_tensors(path, tensors, {"update": json.dumps(about)})


def load_update(path: Path) -> ClientUpdate:
    """The inverse of `save_update`."""
    tensors, metadata = load_tensors(path)
    try:
        about = json.loads(metadata["update"])
        return ClientUpdate(
            client_id=about["client_id"],
            adapter={name: LoRAPair(tensors[f"{name}.A"], tensors[f"{name}.B"], scaling) for name, scaling in about["scalings"].items()},
            num_examples=about["num_examples"],
            other={name.removeprefix("other|"): tensor for name, tensor in tensors.items() if name.startswith("other|")},
        )
    except (KeyError, ValueError, TypeError) as error:
        raise StorageError(f"{path} is not a client's update: {error!r}") from None


def keep_adapters(result: Path, adapters: Mapping[str, AdapterHeader]) -> dict[str, str]:
    """Adapters as they were read, in `updates/CLIENT/` of a result folder: each file of weights is linked, or copied where it cannot be.

    A link costs no second copy, and alters nothing: files of results are removed and replaced, and never written into.

    Args:
        result: a folder that nobody reads yet.
        adapters: client -> its adapter.

    Returns:
        File -> its checksum.

    Raises:
        StorageError: an adapter has changed since it was described.
    """
    sums = {}
    for client, adapter in adapters.items():
        place = result / UPDATES / safe_name(client)
        place.mkdir(parents=True)
        (place / CONFIG).write_text(json.dumps(adapter.folder.config, indent=1) + "\n", encoding="utf-8")
        try:
            os.link(adapter.path.resolve(), place / WEIGHTS)
        except OSError:  # another disk, or one without links, or somebody else's file
            shutil.copyfile(adapter.path, place / WEIGHTS)
        sums[str((place / WEIGHTS).relative_to(result))] = checksum(place / WEIGHTS)
        adapter.require_unchanged()
    return sums


def read_updates(folder: Path, clients: Iterable[str]) -> list[ClientUpdate]:
    """The updates in a result folder, as they were written, or as adapter folders that were kept.

    Raises:
        StorageError: one is missing, altered or not of these clients.
    """
    names, updates = {safe_name(client): client for client in clients}, []
    for path in sorted((folder / UPDATES).glob("*")):
        if path.suffix == ".safetensors" and path.is_file():
            updates.append(load_update(path))
        elif path.is_dir():
            read = read_adapter_folder(path)
            updates.append(ClientUpdate(names.get(path.name, path.name), read.adapter, 1, read.other))
    return updates
