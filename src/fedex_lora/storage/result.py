"""Result folders: what a round, `final/` and `fedex-lora aggregate` leave behind, and what of it a party is handed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedex_lora.aggregation import METHODS
from fedex_lora.aggregation.lowrank import concat_adapter
from fedex_lora.errors import AggregationError, StorageError
from fedex_lora.exactness.measure import Held
from fedex_lora.storage.adapter_folder import AdapterFolder, AdapterHeader, Format, read_adapter_folder, write_adapter_folder
from fedex_lora.storage.files import FINAL, MANIFEST, atomic_folder, read_manifest
from fedex_lora.storage.motion import motion_tensors, read_motion
from fedex_lora.storage.renaming import Renaming, find_renaming, shapes_of
from fedex_lora.storage.run_folder import run_rounds_of
from fedex_lora.storage.tensors import Tensors, delta_tensors, load_delta, load_tensors, not_finite, save_delta, save_tensors
from fedex_lora.storage.updates import UPDATES, keep_adapters, read_updates, save_update
from fedex_lora.storage.updates import safe_name as safe_name
from fedex_lora.types import Adapter, ClientUpdate, Delta, LoRAPair, Motion, ServerState

TRAINABLE, STANDALONE, HELD = "trainable", "adapter", "held"
DELTA, PREVIOUS, MOTION, WHOLE = (f"{name}.safetensors" for name in ("base_delta", "previous_delta", "motion", "model"))
MOVED = ("adapter", "change", "other", "other_change")  # what a motion has by names of modules and tensors
README = """# Only right on top of the base delta

This rank-{rank} PEFT adapter is what the clients of a federated run ({method}, round {round}) go on with. The run also changed the
frozen base: `../{delta}`. Plain PEFT loads this folder without a word and gives another model.
Load both with `fedex_lora.load_model(FOLDER, BASE)`, FOLDER being the one above this.
"""
PRIVATE = """
Trained by DP-SGD at each party: epsilon {epsilon:g} at delta {delta:g}, of each party's own rows over the whole run; unit: one {unit}.
"""


@dataclass(frozen=True, eq=False)
class StoredResult:
    """What a result folder holds.

    Attributes:
        adapter, base_delta, other: the state after the round.
        previous_delta: the base delta that the participants started from.
        held: client -> what its base had beside that one.
        motion: what the server's momentum made the round start from; None without momentum.
        updates: the participants' updates, where they were kept.
        weights: client id -> p_i.
        standalone: the whole update as one adapter, where it was written.
        manifest: method, round, inputs, versions, checksum of every file.
        format: how the adapter was written.
    """

    adapter: Mapping[str, LoRAPair]
    base_delta: Mapping[str, Delta]
    other: Mapping[str, Tensor]
    previous_delta: Mapping[str, Delta]
    held: Held
    motion: Motion | None
    updates: Sequence[ClientUpdate]
    weights: Mapping[str, float]
    standalone: AdapterFolder | None
    manifest: Mapping[str, Any]
    format: Format

    @property
    def config(self) -> Mapping[str, Any]:
        return self.format.config

    @property
    def mark(self) -> str | None:
        """What adapters trained on top of it say in their `adapter_config.json`; None where the base gained nothing."""
        return str(self.manifest["files"][DELTA]) if self.base_delta else None

    def renamed(self, rule: Renaming) -> "StoredResult":
        """The same with other names of modules."""
        moved: dict[str, Any] = {key: rule.keys(getattr(self.motion, key)) for key in MOVED if self.motion}
        return replace(
            self,
            **{key: rule.keys(getattr(self, key)) for key in ("adapter", "base_delta", "other", "previous_delta")},
            held={client: rule.keys(delta) for client, delta in self.held.items()},
            motion=self.motion and replace(self.motion, **moved),
            updates=[rule.update(update) for update in self.updates],
            standalone=self.standalone and self.standalone.renamed(rule),
            manifest={**self.manifest, **({"frozen": [*map(rule, self.manifest["frozen"])]} if "frozen" in self.manifest else {})},
            format=self.format.renamed(rule),
        )


def write_result(
    folder: Path,
    state: ServerState,
    updates: Sequence[ClientUpdate],
    weights: Mapping[str, float],
    format: Format,
    facts: Mapping[str, Any],
    previous_delta: Mapping[str, Delta] | None = None,
    held: Held | None = None,
    more: Mapping[str, Tensors] | None = None,
    motion: Motion | None = None,
    standalone: bool = False,
    kept: Mapping[str, AdapterHeader] | None = None,
) -> None:
    """Write a result folder in one step.

    Args:
        folder: must not exist, or be empty.
        state: after the round.
        updates: the participants', so that `verify` can recompute the ideal.
        weights: client id -> p_i.
        format: how adapters are written.
        facts: for the manifest.
        previous_delta: the base delta before the round.
        held: what single participants held beside the previous delta.
        more: file name -> what else the folder holds.
        motion: what the server's momentum made the round start from.
        standalone: also write `adapter/`, the whole update as one stacked PEFT adapter.
        kept: client -> the adapter folder that it came in, which is kept as it is (`keep_adapters`); None: the updates are written.

    Raises:
        AggregationError: a result that is not finite. Nothing is left behind then.
    """
    _require_no_overflow({**_named(state.adapter, state.other), **delta_tensors(state.base_delta)})
    whole = concat_adapter(state.adapter, state.base_delta) if standalone else {}
    _require_no_overflow(_named(whole, {}))
    sums: dict[str, str] = {}
    with atomic_folder(folder, manifest_of(state.method, state.round, updates, weights) | dict(facts), sums) as temporary:
        if state.adapter:
            write_adapter_folder(temporary / TRAINABLE, state.adapter, state.other, format)
            write_readme(temporary / TRAINABLE, state.adapter, state.method, state.round, facts.get("privacy"))
        else:
            save_tensors(temporary / WHOLE, state.other, {"format": "pt"})
        save_delta(temporary / DELTA, state.base_delta)
        if previous_delta:
            save_delta(temporary / PREVIOUS, previous_delta)
        sums |= keep_adapters(temporary, kept or {})
        for update in updates if kept is None or kept else ():
            file = f"{safe_name(update.client_id)}.safetensors"
            if kept is None:
                save_update(temporary / UPDATES / file, update)
            if held and held.get(update.client_id):
                save_delta(temporary / HELD / file, held[update.client_id])
        if motion is not None:
            save_tensors(temporary / MOTION, *motion_tensors(motion))
        for name, content in (more or {}).items():
            save_tensors(temporary / name, *content)
        if standalone:
            write_adapter_folder(temporary / STANDALONE, whole, state.other, format)


def _require_no_overflow(tensors: Mapping[str, Tensor]) -> None:
    if odd := not_finite(tensors):
        raise AggregationError(f"the result holds NaN or infinity in {odd}: some client's numbers overflow; leave it out")


def _named(adapter: Adapter, other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{part}": getattr(pair, part) for module, pair in adapter.items() for part in "AB"} | dict(other)


def manifest_of(method: str, round: int, updates: Sequence[ClientUpdate], weights: Mapping[str, float]) -> dict[str, Any]:
    """What every result folder's manifest says first."""
    inputs = [
        {
            "client": update.client_id,
            "weight": weights[update.client_id],
            "num_examples": update.num_examples,
            "scaling": sorted({pair.scaling for pair in update.adapter.values()}),
        }
        for update in updates
    ]
    return {"method": method, "round": round, "inputs": inputs}


def write_readme(
    trainable: Path, adapter: Mapping[str, LoRAPair], method: str, round: int, privacy: Mapping[str, Any] | None = None
) -> None:
    """Beside an adapter that is only right on top of a base delta: that it is; and what a private run promised."""
    rank = max(pair.rank for pair in adapter.values())
    text = README.format(rank=rank, method=method, round=round, delta=DELTA)
    text += PRIVATE.format(**privacy) if privacy else ""
    (trainable / "README.md").write_text(text, encoding="utf-8")


def read_result(folder: Path, check: bool = True) -> StoredResult:
    """Read a result folder, after comparing checksums.

    Raises:
        StorageError: something is missing, altered or not finite.
    """
    manifest = read_manifest(folder, check)
    if "format" in manifest and not (folder / TRAINABLE).is_dir():
        raise StorageError(f"{folder} is an export ({manifest['format']}) and no result: give the run, or its final/")
    inputs = manifest.get("inputs", [])  # none in a folder for parties
    if (
        str(manifest.get("method")).partition("+")[0] not in METHODS
        or not isinstance(inputs, list)
        or not isinstance(manifest.get("round"), int)
        or not all(isinstance(entry, dict) and {"client", "weight"} <= entry.keys() for entry in inputs)
    ):
        raise StorageError(f"{folder} is not the result of an aggregation: give a round folder, final/ or the OUT of aggregate")
    if (folder / TRAINABLE).is_dir():
        trainable = read_adapter_folder(folder / TRAINABLE)
        adapter, other, format = trainable.adapter, trainable.other, trainable.format
    else:
        adapter, format = {}, Format(config={})
        other, _ = load_tensors(folder / WHOLE)
    previous = folder / PREVIOUS
    weights = {entry["client"]: entry["weight"] for entry in inputs}
    updates = [_named_alike(update, adapter, other) for update in read_updates(folder, weights)]
    if updates and {update.client_id for update in updates} != weights.keys():
        raise StorageError(f"{folder} names other clients in its manifest than in its updates: copy the folder again")
    if not all(isinstance(weight, int | float) and math.isfinite(weight) and weight >= 0 for weight in weights.values()):
        raise StorageError(f"{folder / MANIFEST} has a weight that is no number from zero up: copy the folder again")
    result = StoredResult(
        adapter=adapter,
        base_delta=load_delta(folder / DELTA),
        other=other,
        previous_delta=load_delta(previous) if previous.exists() else {},
        held={client: load_delta(path) for client in weights if (path := folder / HELD / f"{safe_name(client)}.safetensors").exists()},
        motion=read_motion(folder / MOTION, adapter),
        updates=updates,
        weights=weights,
        standalone=read_adapter_folder(folder / STANDALONE) if (folder / STANDALONE).is_dir() else None,
        manifest=manifest,
        format=format,
    )
    _require_finite(folder, result)
    return result


def _named_alike(update: ClientUpdate, adapter: Adapter, other: Mapping[str, Tensor]) -> ClientUpdate:
    """An adapter that was kept as it came, by the names of the result."""
    rule = find_renaming(update.adapter, shapes_of(adapter), update.other, other)
    return rule.update(update) if rule else update


def _require_finite(folder: Path, result: StoredResult) -> None:
    parts = {TRAINABLE: _named(result.adapter, result.other), DELTA: delta_tensors(result.base_delta)}
    parts |= {PREVIOUS: delta_tensors(result.previous_delta)}
    parts |= {MOTION: dict(motion_tensors(result.motion)[0])} if result.motion else {}
    parts |= {STANDALONE: _named(result.standalone.adapter, result.standalone.other)} if result.standalone else {}
    parts |= {f"{UPDATES}, {update.client_id}": _named(update.adapter, update.other) for update in result.updates}
    parts |= {f"{HELD}, {client}": delta_tensors(held) for client, held in result.held.items()}
    for part, tensors in parts.items():
        if odd := not_finite(tensors):
            raise StorageError(f"{folder / part} holds NaN or infinity in {odd}: no model is made of that; make the folder again")
    adapters = {TRAINABLE: result.adapter, STANDALONE: result.standalone.adapter if result.standalone else {}}
    adapters |= {f"{UPDATES}, {update.client_id}": update.adapter for update in result.updates}
    for part, module, scaling in ((part, name, pair.scaling) for part, adapter in adapters.items() for name, pair in adapter.items()):
        if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not math.isfinite(scaling) or scaling == 0:
            raise StorageError(
                f"{folder / part} scales {module} by {scaling}: a scaling is a finite number, and not zero; make the folder again"
            )


def result_folders(path: Path) -> tuple[list[Path], Path | None]:
    """The result folders of the rounds below a run folder, and its `final/`, if they are there; else the folder itself."""
    rounds, final = run_rounds_of(path)[::-1], path / FINAL if (path / FINAL).is_dir() else None
    return (rounds, final) if rounds else ([final or path], None)
