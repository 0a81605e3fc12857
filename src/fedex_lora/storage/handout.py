"""What a party is handed of a result folder: enough to go on from it, and nobody else's numbers."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedex_lora.storage.adapter_folder import CONFIG
from fedex_lora.storage.files import atomic_folder, read_manifest
from fedex_lora.storage.result import DELTA, TRAINABLE, WHOLE

OF_BASE = ("base_fingerprint", "base_dtype", "base_quantization", "base_random_seed", "labels")
"""What manifests say of the base and its head, beside its name."""
SHARED = (
    *"method round base_model base_delta task task_type frozen headline greater_is_better momentum privacy start versions".split(),
    *OF_BASE,
)
"""What manifests say to everybody: nothing of single clients."""


@contextmanager
def for_parties(source: Path, target: Path | None, leaves: bool = True) -> Iterator[None]:
    """Write, in one step and after the block, what a party needs to go on from the result folder `source`, which the block may write.

    That is the adapter (or the whole model), the base delta, and a manifest of sums: it loads, verifies and is gone on from as `source`.
    Whose updates were averaged, with which weights, and the updates themselves stay behind.

    Args:
        source: a result folder.
        target: must not exist, or be empty; None: nothing is written.
        leaves: it is meant for other machines, so a base that is a folder here is called by its own name, without a path.

    Raises:
        UsageError, StorageError: see `atomic_folder`.
    """
    if target is None:
        yield
        return
    facts, sums = dict[str, Any](), dict[str, str]()
    with atomic_folder(target, facts, sums) as temporary:
        yield
        manifest = read_manifest(source, check=False)
        facts |= {key: manifest[key] for key in SHARED if key in manifest}
        for name in (file for file in manifest["files"] if is_for_parties(file)):
            (temporary / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, temporary / name)
            sums[name] = manifest["files"][name]
        if leaves and "base_model" in facts:
            facts["base_model"] = _plain_name(facts["base_model"])
        if leaves and (path := temporary / TRAINABLE / CONFIG).is_file():
            config = json.loads(path.read_text(encoding="utf-8"))
            config["base_model_name_or_path"] = _plain_name(config.get("base_model_name_or_path"))
            path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            del sums[f"{TRAINABLE}/{CONFIG}"]


def _plain_name(base: Any) -> Any:
    """A name of the hub as it is; of a folder on one machine its own name only."""
    local = isinstance(base, str) and (base.startswith(("/", ".", "~")) or "\\" in base or base.count("/") > 1 or Path(base).is_dir())
    return re.split(r"[/\\]", base.rstrip("/\\"))[-1] if local else base


def is_for_parties(file: str) -> bool:
    """Does a party need this file of a result folder to go on?"""
    return file in (DELTA, WHOLE) or file.startswith(f"{TRAINABLE}/")


def differs(parties: Path, source: Path) -> str | None:
    """What in a folder for parties is not what `for_parties` makes of `source`: the name of a file or of a fact; None where all is.

    Raises:
        StorageError: a folder that lacks something, or was altered.
    """
    here, there = read_manifest(parties), read_manifest(source, check=False)
    sums = {file: digest for file, digest in there["files"].items() if is_for_parties(file)}
    odd = [file for file in [*here["files"], *sums] if here["files"].get(file) != sums.get(file)]
    return next(iter([*odd, *(key for key in SHARED if here.get(key) != there.get(key))]), None)
