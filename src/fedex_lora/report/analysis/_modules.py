"""Data frames of modules: how far averaging the factors is from the ideal, by layer, by projection and across rounds."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from fedex_lora.errors import StorageError
from fedex_lora.exactness import algebra, measure
from fedex_lora.report.analysis._runs import Run
from fedex_lora.storage.events import Modules, RoundDone, of_kind
from fedex_lora.storage.files import read_manifest
from fedex_lora.storage.result import DELTA
from fedex_lora.storage.run_folder import round_folder, run_rounds_of
from fedex_lora.storage.tensors import load_delta
from fedex_lora.storage.updates import UPDATES, read_updates
from fedex_lora.types import Aggregate, ClientUpdate, Delta

COLUMNS = ["round", "module", "layer", "projection", "deviation", "ideal", "relative", "scaled", "effective_rank"]


def parse_module_paths(modules: Iterable[str]) -> dict[str, tuple[int, str]]:
    """Module path -> (layer, projection): its number in the stack (-1 outside of one), and the shortest name that tells it apart.

    Nested stacks (stages of blocks) are counted through. Where two stacks have modules of the same names (an encoder and a decoder), the
    projection begins with the stack's.

    Example:
        >>> modules = ["bert.layer.0.query", "bert.layer.1.query", "bert.layer.1.out.dense", "bert.layer.1.mlp.dense", "head"]
        >>> found = parse_module_paths(modules)
        >>> list(found.values())
        [(0, 'query'), (1, 'query'), (1, 'out.dense'), (1, 'mlp.dense'), (-1, 'head')]
        >>> list(parse_module_paths(["model.encoder.layers.0.q_proj", "model.decoder.layers.0.q_proj"]).values())
        [(0, 'encoder.q_proj'), (0, 'decoder.q_proj')]
    """
    places: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for module in modules:
        parts = module.split(".")
        last = max((index for index, part in enumerate(parts) if part.isdigit()), default=-1)
        places[module] = tuple(int(part) for part in parts if part.isdigit()), tuple(parts[last + 1 :]) or (parts[-1],)
    suffixes = {suffix for _, suffix in places.values()}
    nested = any(len(numbers) > 1 for numbers, _ in places.values())
    order = {numbers: index for index, numbers in enumerate(sorted({numbers for numbers, _ in places.values() if numbers}))}

    def layer(numbers: tuple[int, ...]) -> int:
        return -1 if not numbers else order[numbers] if nested else numbers[0]

    def shortest(suffix: tuple[str, ...]) -> str:
        tails = (suffix[-length:] for length in range(1, len(suffix) + 1))
        return ".".join(next((tail for tail in tails if sum(other[-len(tail) :] == tail for other in suffixes) == 1), suffix))

    stacks = _stacks(places) if len(set(places.values())) < len(places) else {}
    return {module: (layer(numbers), stacks.get(module, "") + shortest(suffix)) for module, (numbers, suffix) in places.items()}


def _stacks(modules: Iterable[str]) -> dict[str, str]:
    """Module -> the part of its stack's path that other stacks do not have, with a dot."""
    paths = {}
    for module in modules:
        parts = module.split(".")
        if numbers := [index for index, part in enumerate(parts) if part.isdigit()]:
            paths[module] = tuple(part for part in parts[: numbers[-1]] if not part.isdigit())
    shared = set.intersection(*(set(path) for path in paths.values()))
    return {module: "".join(f"{part}." for part in path if part not in shared) for module, path in paths.items()}


def modules(run: Run) -> pd.DataFrame:
    """A row a round and LoRA module: what averaging the factors alone loses there, whatever the run's method did.

    Columns: `round`, `module`, `layer`, `projection`; `deviation` |s Bbar Abar - M| (Frobenius), `ideal` |M|, `relative` their ratio;
    `scaled`, the deviation divided by sqrt(out in): the root mean square over the weight's entries, so that modules of different sizes
    compare (the paper says "scaled" and its text does not say by what); `effective_rank` of what is lost, `algebra.effective_rank`.

    From the events; for runs whose events lack it, from the clients' updates in the round folders that are still there.
    """
    done = of_kind(run.events, RoundDone)
    return module_frame({event.round: event.modules or _recomputed(round_folder(run.folder, event.round)) for event in done})


def module_frame(rounds: Mapping[int, Modules | None]) -> pd.DataFrame:
    """`modules` from what a `round_done` event says of them, by round; without an effective rank where it is not said."""
    said = {number: columns.model_dump(exclude_unset=True) for number, columns in rounds.items() if columns and columns.module}
    parts = [pd.DataFrame(columns).assign(round=number) for number, columns in said.items()]
    if not parts:
        return pd.DataFrame(columns=COLUMNS)
    measured = ["deviation", "ideal", "scaled", "effective_rank"]
    frame = pd.concat(parts, ignore_index=True).reindex(columns=["round", "module", *measured])
    frame[measured] = frame[measured].astype(float).replace([np.inf, -np.inf], np.nan)
    places = parse_module_paths(frame["module"].unique())
    return frame.assign(
        layer=frame["module"].map({name: layer for name, (layer, _) in places.items()}),
        projection=frame["module"].map({name: projection for name, (_, projection) in places.items()}),
        relative=(frame["deviation"] / frame["ideal"]).where(frame["ideal"] > 0, 0.0),
    )[COLUMNS]


def _recomputed(folder: Path) -> Modules | None:
    """A round's columns from its stored updates; None where they are gone, or have no LoRA factors."""
    result, updates = _stored(folder)
    return Modules(**measure.per_module(measure.deviation(result, updates), result.adapter)) if result else None


def _stored(folder: Path) -> tuple[Aggregate | None, list[ClientUpdate]]:
    if not (folder / UPDATES).is_dir():
        return None, []
    manifest = read_manifest(folder, check=False)
    weights = {entry["client"]: entry["weight"] for entry in manifest["inputs"]}
    updates = sorted(read_updates(folder, weights), key=lambda update: update.client_id)
    adapter = updates[0].adapter if updates else {}
    return (Aggregate(adapter, {}, {}, weights, manifest["method"]) if adapter else None), updates


def across_rounds(frame: pd.DataFrame, value: str = "relative") -> pd.DataFrame:
    """A column of `modules` by round (paper, figures 3 and 6-9): the first layer's first projection, and the mean over all modules.

    Returns:
        Columns `round`, `first` and `mean`; the name of the module behind `first` is in `attrs["first"]`.
    """
    if frame.empty:
        return pd.DataFrame(columns=["round", "first", "mean"])
    layers = frame[frame["layer"] >= 0] if (frame["layer"] >= 0).any() else frame
    first = layers.sort_values(
        ["layer", "projection"], key=lambda column: column.map(_queries_first) if column.name == "projection" else column
    )
    module = first["module"].iloc[0]
    means = frame.groupby("round")[value].mean()
    single = frame[frame["module"] == module].set_index("round")[value]
    made = pd.DataFrame({"first": single, "mean": means}).rename_axis("round").reset_index()
    made.attrs["first"] = module
    return made


def _queries_first(projection: str) -> tuple[int, str]:
    return (0 if is_query(projection) else 1, projection)


def is_query(projection: str) -> bool:
    """Is this the attention's query?"""
    return projection.rpartition(".")[2].lower() in ("q", "q_proj", "query", "q_lin", "wq")


def is_value(projection: str) -> bool:
    """Is this the attention's value?"""
    return projection.rpartition(".")[2].lower() in ("v", "v_proj", "value", "v_lin", "wv")


def spectrum(folder: Path, of: Literal["residual", "base delta"] = "residual", limit: int | None = None) -> pd.DataFrame:
    """The singular values of what averaging lost in one round, or of all that the base has gained by then, by module.

    Args:
        folder: a run folder (its last round), a round folder, or `final/`.
        of: "residual" M - s Bbar Abar, from the stored updates; "base delta" D.
        limit: at most so many modules, of all depths; None: all.

    Returns:
        Columns `module`, `layer`, `projection`, `index` (from 1), `value`, `energy` (the share of the first `index` values' squares),
        `effective_rank` (of the module).

    Raises:
        StorageError: the folder does not hold what this needs.
    """
    if found := run_rounds_of(folder):
        folder = found[0]
    rows = []
    deltas = _residuals(folder) if of == "residual" else load_delta(folder / DELTA)
    places = parse_module_paths(deltas)
    for module in _spread(places, limit):
        delta = deltas[module]
        small = algebra.image(delta)
        values = torch.linalg.svdvals(small)
        values = values[values > values[0] * 1e-12] if len(values) else values
        shares = (values**2).cumsum(0) / (values**2).sum()
        rank = algebra.effective_rank(small)
        for index, (value, share) in enumerate(zip(values.tolist(), shares.tolist(), strict=True), 1):
            rows.append((module, *places[module], index, value, share, rank))
    return pd.DataFrame(rows, columns=["module", "layer", "projection", "index", "value", "energy", "effective_rank"])


def _spread(places: Mapping[str, tuple[int, str]], limit: int | None) -> list[str]:
    """The modules, or `limit` of them: from first to last layer in equal steps, the projections of a layer together."""
    if limit is None or len(places) <= limit:
        return list(places)
    layers = sorted({layer for layer, _ in places.values()})
    first = sorted((module for module in places if places[module][0] == layers[0]), key=lambda module: _queries_first(places[module][1]))
    kinds = [places[module][1] for module in first][: max(1, limit // 3)]
    steps = max(1, min(len(layers), limit // len(kinds)))
    chosen = {layers[round(index * (len(layers) - 1) / max(1, steps - 1))] for index in range(steps)}
    return [module for module, (layer, kind) in places.items() if layer in chosen and kind in kinds]


def _residuals(folder: Path) -> dict[str, Delta]:
    result, updates = _stored(folder)
    if result is None:
        raise StorageError(f"{folder} holds no clients' LoRA updates: the residual's spectrum needs them (see keep_rounds)")
    return {module: delta for module, delta in measure.residual(result, updates).items() if algebra.norm(delta) > 0}
