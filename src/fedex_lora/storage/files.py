"""Files: safetensors and JSON, written beside and renamed, with a manifest of sha256 sums."""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedex_lora.aggregation.lowrank import finite, from_parts, parts
from fedex_lora.errors import StorageError, UsageError
from fedex_lora.types import ClientUpdate, Delta, Dense, LoRAPair, LowRank

MANIFEST = "manifest.json"
ROUNDS, FINAL = "rounds", "final"
TEMPORARY = ".fedex-lora-tmp."  # what everything is called that is not yet in its place: a name that nobody else gives
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
Tensors: TypeAlias = tuple[Mapping[str, Tensor], Mapping[str, str]]
"""What a safetensors file holds: tensors and metadata."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    Its name is nobody's and cannot be foretold: what stands beside `path`, a link somewhere else too, is left as it is.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{secrets.token_hex(8)}")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def writing_failed(error: OSError, folder: Path) -> bool:
    """Was it writing into `folder` that failed, or something else that happened meanwhile (a connection, somebody's missing image)?"""
    names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)]
    return any(name.absolute().is_relative_to(folder.absolute()) for name in names) if names else error.errno in DISK


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The first name of a tensor that holds NaN or infinity; None where there is none."""
    return next((name for name, tensor in tensors.items() if not finite(tensor)), None)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file (in a folder that nobody reads yet: see `atomic_folder`)."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata or {}))
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in one step: beside, synced, then renamed over."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_tensors(temporary, tensors, metadata)
            _fsync(temporary)
        _fsync(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from None


def _cannot_write(path: Path, error: Exception) -> StorageError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    return StorageError(f"cannot write {path}: {reason}: is the disk full or read-only?")


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file.

    Raises:
        StorageError: missing, truncated, or not safetensors.
    """
    if not path.is_file():
        raise StorageError(f"{path} is missing: copy the folder again")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise StorageError(f"{path} is truncated or not safetensors ({str(error).splitlines()[0]}): copy it again") from None


def save_delta(path: Path, base_delta: Mapping[str, Delta] | Mapping[str, LowRank]) -> None:
    """`base_delta.safetensors`: `M.U` (`out x q`) and `M.V` (`q x in`) for each module M, or `M.W` (`out x in`) where that is smaller."""
    save_tensors(path, delta_tensors(base_delta), {"format": "pt"})


def delta_tensors(base_delta: Mapping[str, Delta] | Mapping[str, LowRank]) -> dict[str, Tensor]:
    """The tensors of `save_delta`."""
    tensors: dict[str, Tensor] = {}
    for module, delta in base_delta.items():
        tensors |= {f"{module}.W": delta.W} if isinstance(delta, Dense) else {f"{module}.U": delta.U, f"{module}.V": delta.V}
    return tensors


def load_delta(path: Path) -> dict[str, Delta]:
    """The inverse of `save_delta`."""
    tensors, _ = load_tensors(path)
    return deltas_of(tensors, path)


def moving_tensors(base_delta: Mapping[str, Delta]) -> dict[str, Tensor]:
    """`M.PART` for each module M: all that a delta is made of (`aggregation.lowrank.parts`), its velocity included."""
    return {f"{module}.{name}": tensor for module, delta in base_delta.items() for name, tensor in parts(delta).items()}


def deltas_of(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Delta]:
    """The inverse of `delta_tensors` and of `moving_tensors`; `path` is named in errors."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        found.setdefault(module, {})[part] = tensor
    try:
        return {module: from_parts(parts) for module, parts in found.items()}
    except ValueError as error:
        raise StorageError(f"{path} is no base delta: it has tensors of {error}") from None


def load_factors(path: Path) -> dict[str, LowRank]:
    """As `load_delta`, of a file that holds factors only."""
    return {module: delta for module, delta in load_delta(path).items() if isinstance(delta, LowRank)}


def save_update(path: Path, update: ClientUpdate) -> None:
    """A client's update: `M.A`, `M.B`, `other|NAME`, and the rest as metadata."""
    tensors = {f"{module}.{part}": tensor for module, pair in update.adapter.items() for part, tensor in (("A", pair.A), ("B", pair.B))}
    about = {
        "client_id": update.client_id,
        "num_examples": update.num_examples,
        "scalings": {module: pair.scaling for module, pair in update.adapter.items()},
    }
    save_tensors(path, tensors | {f"other|{name}": tensor for name, tensor in update.other.items()}, {"update": json.dumps(about)})


def load_update(path: Path) -> ClientUpdate:
    """The inverse of `save_update`."""
    tensors, metadata = load_tensors(path)
    try:
        about = json.loads(metadata["update"])
        return ClientUpdate(
            client_id=about["client_id"],
            adapter={
                module: LoRAPair(A=tensors[f"{module}.A"], B=tensors[f"{module}.B"], scaling=scaling)
                for module, scaling in about["scalings"].items()
            },
            num_examples=about["num_examples"],
            other={name.removeprefix("other|"): tensor for name, tensor in tensors.items() if name.startswith("other|")},
        )
    except (KeyError, ValueError, TypeError) as error:
        raise StorageError(f"{path} is not a client's update: {error!r}") from None


@contextmanager
def atomic_folder(path: Path, manifest: Mapping[str, Any], sums: Mapping[str, str] | None = None) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    A manifest with the given facts and the sha256 of every file is written last. Facts and sums may still grow while the block runs.
    Of two processes that write one folder, one is refused.

    Args:
        path: must not exist, or be empty.
        manifest: the facts.
        sums: file name -> sha256, where it is known already.

    Raises:
        UsageError: `path` exists and holds something, at the start or at the end.
        StorageError: it cannot be written. Other errors of the block are raised as they are.
    """
    path = path.resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} exists and is not empty: choose another output folder, or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{path.name}.", dir=path.parent))
    except OSError as error:
        raise StorageError(f"cannot write beside {path}: {error.strerror}: choose another folder") from None
    try:
        yield temporary
        names = {str(file.relative_to(temporary)): file for file in sorted(temporary.rglob("*")) if file.is_file()}
        files = {name: (sums or {}).get(name) or sha256(file) for name, file in names.items()}
        write_text(temporary / MANIFEST, json.dumps({**manifest, "files": files}, indent=1) + "\n")
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            _fsync(file)
        temporary.rename(path)  # onto nothing, or onto an empty folder: the system refuses anything else
        _fsync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and str(error.filename2) == str(path):
            raise UsageError(f"{path} was written by another process meanwhile, and is left as it is: choose another folder") from None
        if not writing_failed(error, temporary) and not writing_failed(error, path):
            raise
        raise StorageError(f"cannot write {path}: {error.strerror or error}: is the disk full or read-only?") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_manifest(folder: Path, check: bool = True) -> dict[str, Any]:
    """The manifest of a folder; with `check`, after comparing every file's sha256.

    Raises:
        StorageError: no manifest, or a file is missing or altered.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StorageError(f"{folder} has no {MANIFEST}: give a folder that fedex-lora wrote") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise StorageError(f"{path} is no manifest of fedex-lora: copy the folder again")
    for name, digest in manifest["files"].items() if check else ():
        if not (folder / name).is_file():
            raise StorageError(f"{folder / name} is missing: copy the folder again")
        if sha256(folder / name) != digest:
            raise StorageError(f"{folder / name} has changed since it was written: copy the folder again")
    return manifest


def unlisted(folder: Path) -> Path | None:
    """A file or link below a folder with a manifest that this has no sum of; None where there is none."""
    files = {*read_manifest(folder, check=False)["files"], MANIFEST}
    there = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return next((path for path in there if str(path.relative_to(folder)) not in files), None)


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: beside, then renamed over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_event(path: Path, event: str, **fields: Any) -> None:
    """One JSON object as one line at the end of `events.jsonl`."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(plain_json({"event": event, "time": time.time(), **fields}) + "\n")
    except OSError as error:
        raise _cannot_write(path, error) from None


def plain_json(value: Any) -> str:
    """JSON as the standard has it: numbers that are not finite become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_events(path: Path) -> list[dict[str, Any]]:
    """All events of a run; a torn last line is left out."""
    events = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def followed_events(path: Path, every: float | None) -> Iterator[dict[str, Any] | None]:
    """The events of a run as they are written, until its last one; None each time that there is nothing new.

    Args:
        path: `events.jsonl`.
        every: seconds between looks; None: only what there is now.

    Raises:
        UsageError: the file is not there.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist: give the folder of a run that has begun")
    read = 0
    while True:
        text = path.read_bytes()[read:]
        whole = text[: text.rfind(b"\n") + 1]
        read += len(whole)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if not isinstance(event, dict) or "event" not in event:
                continue
            yield event
            if event["event"] == "run_done":
                return
        if every is None:
            return
        yield None
        time.sleep(every)


def run_rounds_of(out: Path) -> list[Path]:
    """The round folders of a run, the newest first."""
    return sorted((folder for folder in (out / ROUNDS).glob("*") if folder.name.isdigit()), reverse=True)


def round_folder(out: Path, number: int) -> Path:
    """Where a round's result is."""
    return out / ROUNDS / f"{number:04d}"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
