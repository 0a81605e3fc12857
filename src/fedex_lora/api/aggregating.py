"""`fedex_lora.aggregate`: of updates in memory, or of adapter folders."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, overload

import numpy as np
from torch import nn
from transformers import PreTrainedModel

from fedex_lora.aggregation import engine
from fedex_lora.config import Truncation
from fedex_lora.errors import UsageError, counted
from fedex_lora.models.build import load_model
from fedex_lora.offline.aggregate_folders import aggregate_folders
from fedex_lora.offline.together import require_apart, require_several
from fedex_lora.storage import handout
from fedex_lora.storage.files import MANIFEST, atomic_folder, read_manifest
from fedex_lora.types import Aggregate, ClientUpdate, ServerState


class AggregatedFolders:
    """The mean of adapters in folders.

    Attributes:
        folders: of the adapters, in the order given.
        numbers: what `fedex-lora aggregate --json` prints: method, weights, ranks, `max_relative_error` in fp64.

    Example: see `fedex_lora.aggregate`, which gives one.
    """

    def __init__(self, folders: Sequence[Path], **options: Any) -> None:
        self.folders = list(folders)
        self._read = [*self.folders, *([options["previous"]] if options.get("previous") else [])]
        self._here = TemporaryDirectory(prefix="fedex-lora-")
        self.numbers = aggregate_folders(self.folders, Path(self._here.name) / "out", **options, blockless=True)
        for file in Path(self._here.name).rglob("*"):
            if file.is_file() and file.stat().st_nlink > 1:  # a link to an adapter's own file, which may be written again
                shutil.copyfile(file, aside := file.with_name(f"{file.name}.copy"))
                aside.replace(file)

    def __repr__(self) -> str:
        said, error = self.numbers, self.numbers["max_relative_error"]
        found = "not measured" if error is None else f"{error:.0e}"
        ranks = f"rank {said['trainable_rank']} + {said['residual_rank']}"
        return f"<{said['method']} of {counted(len(self.folders), 'adapter')}: {said['modules']} modules, {ranks}, error {found}>"

    def model(self, base: str | Path | PreTrainedModel) -> nn.Module:
        """The base with the mean in it; see `load_model`."""
        return load_model(Path(self._here.name) / "out", base)

    def save(self, out: str | Path, for_parties: str | Path | None = None) -> "AggregatedFolders":
        """Write the result folder that `fedex-lora aggregate --for-parties` writes, of the adapters as they were when they were aggregated.

        `verify` checks it, `export` and `load_model` open it.

        Args:
            out: must not exist, or be empty.
            for_parties: a folder to write beside it, for the parties to go on from: nothing of single adapters is in it.

        Raises:
            UsageError: a folder that holds something or lies in one that is read; or `for_parties` of fewer than two adapters that count.
        """
        target, parties, here = Path(out), None if for_parties is None else Path(for_parties), Path(self._here.name) / "out"
        require_apart(self._read, target, parties)
        if parties is not None:
            require_several(self.numbers["weights"].values())
        facts = read_manifest(here)
        sums = facts.pop("files")
        with handout.for_parties(target, parties), atomic_folder(target, facts, sums) as folder:
            shutil.copytree(here, folder, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True)
        return self


@overload
def aggregate(
    updates: Sequence[ClientUpdate],
    method: str = ...,
    weights: engine.WeightRule | Mapping[str, float] | None = ...,
    truncation: Truncation | None = ...,
    state: ServerState | None = ...,
) -> Aggregate: ...


@overload
def aggregate(
    updates: Sequence[str | Path],
    method: str = ...,
    weights: Literal["uniform"] | Sequence[float] | Mapping[str, float] | None = ...,
    truncation: Truncation | None = ...,
    state: str | Path | None = ...,
    base: str | Path | None = ...,
) -> AggregatedFolders: ...


def aggregate(
    updates: Sequence[Any],
    method: str = "fedex",
    weights: Any = None,
    truncation: Truncation | None = None,
    state: Any = None,
    base: Any = None,
) -> Any:
    """The exact mean of LoRA adapters: of `ClientUpdate`s, or of PEFT folders that were trained anywhere.

    Without `state`, an exact method gives `s B A + residual = sum_i p_i s_i B_i A_i` per module (FedEx-LoRA, eq. 7-9), to fp32 rounding.

    Args:
        updates: one `ClientUpdate` a client, or one adapter folder.
        method: a name in `METHODS`, or METHOD+GAUGE.
        weights: one number each, in their order or by name (a client's id, a folder's name); or "uniform" (the default of folders), or of
            updates "num_examples" (their default).
        truncation: of the residual, for `fedex-svd`.
        state: of updates the `ServerState` that the clients went on from; of folders the result folder that they were trained on top of.
        base: of folders: the base of all adapters, where they name it differently.

    Returns:
        An `Aggregate` of updates, an `AggregatedFolders` of folders.

    Raises:
        FedexLoraError: a broken or unfitting adapter, impossible weights, an unknown method, or arguments that are for the other kind.

    Example:
        >>> aggregate(["north", "south"], weights=[120, 80]).save("out")                  # doctest: +SKIP
        <fedex of 2 adapters: 60 modules, rank 8 + 8, error 3e-08>
    """
    updates = [updates] if isinstance(updates, str | Path) else list(updates)
    kinds = {"folder" if isinstance(one, str | Path) else "update" if isinstance(one, ClientUpdate) else "other" for one in updates}
    if kinds - {"folder"} and kinds - {"update"}:
        raise UsageError("give ClientUpdates, or adapter folders, all of one kind")
    if kinds != {"folder"}:
        if base is not None:
            raise UsageError("base= is for adapter folders: leave it out for ClientUpdates")
        if isinstance(weights, Mapping):
            weights = _shares("update", [update.client_id for update in updates], weights)
        return engine.aggregate(updates, method, "num_examples" if weights is None else weights, truncation, state)
    folders = [Path(folder) for folder in updates]
    names = [folder.resolve().name for folder in folders]
    shares = None if weights is None or isinstance(weights, str) else _shares("folder", names, weights)
    if isinstance(weights, str) and weights != "uniform":
        raise UsageError(f"weights = {weights!r}: folders do not say how many rows they were trained on: give one number a folder")
    before, below = None if state is None else Path(state), None if base is None else str(base)
    return AggregatedFolders(folders, method=method, weights=shares, previous=before, truncation=truncation, base=below)


def _shares(kind: str, names: Sequence[str], weights: Sequence[float] | Mapping[str, float]) -> list[float]:
    """One weight for each of the folders or updates of these names, in their order."""
    numbers = list(weights.values()) if isinstance(weights, Mapping) else weights
    if not isinstance(numbers, Sequence | np.ndarray) or not all(isinstance(one, int | float | np.number) for one in numbers):
        said = " ".join(repr(weights).split())[:80]
        raise UsageError(f"weights = {said}: give one number a {kind}, in their order or by the {kind}'s name")
    if not isinstance(weights, Mapping):
        return [float(weight) for weight in weights]
    if len(names) != len(weights) or set(names) != set(weights):
        given, wanted = (", ".join(sorted(map(str, one))) for one in (weights, names))
        raise UsageError(f"weights name {given}, and the {kind}s are {wanted}: name each {kind} once")
    return [float(weights[name]) for name in names]
