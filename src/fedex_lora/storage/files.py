"""Files and folders, written beside and renamed, with a manifest of checksums."""

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from blake3 import blake3

from fedex_lora.errors import StorageError, UnreadableError, UnwritableError, UsageError

MANIFEST = "manifest.json"
ROUNDS, FINAL = "rounds", "final"
TEMPORARY = ".fedex-lora-tmp."  # what everything is called that is not yet in its place: a name that nobody else gives
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@contextmanager
def _temporary(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """What `make` makes beside `path`, under a name that is nobody's; it is gone afterwards, also if an interrupt comes as it is made."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}.{secrets.token_hex(8)}")
    theirs = os.path.lexists(temporary)
    try:
        make(temporary)
        yield temporary
    finally:
        with suppress(OSError):  # what was raised counts, of a name that is too long for instance
            if not theirs:
                shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def _new_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700)
    except OSError as error:
        raise UnwritableError(f"cannot write beside {path}: {error.strerror}: choose another folder") from None


def copy_whole(folder: Path, path: Path) -> None:
    """A copy of a folder is `path`, or nothing is there when that fails."""
    with _temporary(path, _new_folder) as temporary:
        shutil.copytree(folder, temporary, dirs_exist_ok=True)
        temporary.rename(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    Its name is nobody's and cannot be foretold: what stands beside `path`, a link somewhere else too, is left as it is.
    """
    with _temporary(path, lambda new: new.touch(exist_ok=False)) as temporary:
        yield temporary
        temporary.replace(path)


def writing_failed(error: OSError, folder: Path) -> bool:
    """Was it writing into `folder` that failed, or something else that happened meanwhile (a connection, somebody's missing image)?"""
    names = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)]
    return any(name.absolute().is_relative_to(folder.absolute()) for name in names) if names else error.errno in DISK


def cannot_write(path: Path, error: Exception) -> UnwritableError:
    """The error that says so."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
    return UnwritableError(f"cannot write {path}: {reason}: is the disk full or read-only?")


@contextmanager
def atomic_folder(path: Path, manifest: Mapping[str, Any], sums: Mapping[str, str] | None = None) -> Iterator[Path]:
    """A temporary folder beside `path` that becomes `path` when the block ends well, and vanishes when it does not.

    A manifest with the given facts and the checksum of every file is written last. Facts and sums may still grow while the block runs.
    Of two processes that write one folder, one is refused.

    Args:
        path: must not exist, or be empty.
        manifest: the facts.
        sums: file name -> checksum, where it is known already.

    Raises:
        UsageError: `path` exists and holds something, at the start or at the end.
        UnwritableError: it cannot be written. Other errors of the block are raised as they are.
    """
    path = path.resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} exists and is not empty: choose another output folder, or remove it")
    with _temporary(path, _new_folder) as temporary:
        try:
            yield temporary
            names = {str(file.relative_to(temporary)): file for file in sorted(temporary.rglob("*")) if file.is_file()}
            files = {name: (sums or {}).get(name) or checksum(file) for name, file in names.items()}
            write_text(temporary / MANIFEST, json.dumps({**manifest, "files": files}, indent=1) + "\n")
            temporary.chmod(0o755)
            for file in (*temporary.rglob("*"), temporary):
                fsync(file)
            temporary.rename(path)  # onto nothing, or onto an empty folder: the system refuses anything else
            fsync(path.parent)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and str(error.filename2) == str(path):
                raise UsageError(f"{path} was written by another process meanwhile, and is left as it is: choose another folder") from None
            if not writing_failed(error, temporary) and not writing_failed(error, path):
                raise
            raise cannot_write(path, error) from None


def read_manifest(folder: Path, check: bool = True) -> dict[str, Any]:
    """The manifest of a folder; with `check`, after comparing every file's checksum.

    Raises:
        StorageError: no manifest, or a file is missing or altered.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not folder.exists():
            raise StorageError(f"{folder} does not exist: give a folder that fedex-lora wrote") from None
        if (folder / "adapter_config.json").exists():
            raise StorageError(f"{folder} is a PEFT adapter and no result: make one by fedex-lora aggregate {folder} -o OUT") from None
        raise StorageError(f"{folder} has no {MANIFEST}: give a folder that fedex-lora wrote") from None
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} cannot be read: {error}") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise StorageError(f"{path} is no manifest of fedex-lora: copy the folder again")
    for name, digest in manifest["files"].items() if check else ():
        if not (folder / name).is_file():
            raise StorageError(f"{folder / name} is missing: copy the folder again")
        if checksum(folder / name, str(digest)) != digest:
            raise StorageError(f"{folder / name} has changed since it was written: copy the folder again")
    return manifest


def unlisted(folder: Path) -> Path | None:
    """A file or link below a folder with a manifest that this has no sum of; None where there is none."""
    files = {*read_manifest(folder, check=False)["files"], MANIFEST}
    there = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return next((path for path in there if str(path.relative_to(folder)) not in files), None)


def checksum(path: Path, like: str = "blake3:") -> str:
    """Of a file, `blake3:HEX`; or as an older version wrote the one that it is like: a plain sha256."""
    if like.startswith("blake3:"):
        return f"blake3:{blake3().update_mmap(path).hexdigest()}"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step: beside, then renamed over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step: beside, synced, then renamed over.

    Raises:
        UnwritableError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)
            fsync(temporary)
        fsync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None


def fsync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite_json(value: Any) -> str:
    """JSON as the standard has it: numbers that are not finite become null."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None))
