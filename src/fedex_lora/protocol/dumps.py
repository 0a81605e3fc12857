"""What a server or a client knows, as the bytes of one safetensors file with a checksum, and back."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedex_lora.errors import StorageError


def pack(kind: str, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """One file's bytes: the tensors, and what is said of them as JSON.

    Example:
        >>> unpack("client", pack("client", {"x": torch.ones(2)}, {"round": 3}))
        ({'x': tensor([1., 1.])}, {'round': 3})
    """
    plain = apart(tensors)
    total = _digest(plain, blake3(json.dumps(about).encode()))
    return save(plain, metadata={kind: json.dumps({"blake3": total, "about": about})})  # one key: their order would be any


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a safetensors file can have them: on the CPU, contiguous, none of them in another's memory."""
    plain, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        there = tensor.detach().cpu().contiguous()
        plain[name] = there.clone() if there.untyped_storage().data_ptr() in seen else there
        seen.add(there.untyped_storage().data_ptr())
    return plain


def unpack(kind: str, payload: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The inverse of `pack`.

    Raises:
        StorageError: it is no dump of that kind, or has changed since it was written.
    """
    try:
        tensors, header = load(payload), json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        metadata = header["__metadata__"]
        said = json.loads(metadata[kind])
        about = said.get("about", said)
    except (SafetensorError, AttributeError, KeyError, ValueError, TypeError) as error:
        raise StorageError(f"it is no dump of a {kind} ({type(error).__name__}): give what dump() returned") from None
    old = metadata.get("sha256")  # of older versions: of the tensors alone
    digest, total = (blake3(json.dumps(about).encode()), said.get("blake3")) if old is None else (hashlib.sha256(), old)
    if _digest(tensors, digest) != total:
        raise StorageError("it has changed since it was written: remove it, and what it held is asked for anew")
    return tensors, about


def tensors_digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """Of a text and of all bits of named tensors, in 32 hexadecimal digits."""
    return _digest({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, blake3(text.encode()))[:32]


def _digest(tensors: Mapping[str, Tensor], digest: Any) -> str:
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return str(digest.hexdigest())
