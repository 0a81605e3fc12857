"""Do folders belong together: each once and apart from what is written, one base, one task, one base delta, the same untrained rest?"""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fedex_lora.errors import AggregationError, UsageError
from fedex_lora.models.fingerprint import COMPARED
from fedex_lora.models.pristine import cached_folder
from fedex_lora.storage.adapter_folder import AdapterFolder, AdapterHeader
from fedex_lora.storage.layout import LINEAR
from fedex_lora.storage.renaming import Renaming, find_renaming, shapes_of
from fedex_lora.storage.result import StoredResult

SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size")
ROWS = 4  # of each tensor that are compared
REMEDY = "if they are one base at several places, or in other bits, say which by --base MODEL"


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their whole paths where two have one name.

    Raises:
        UsageError: one folder twice.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise UsageError("the same adapter folder is given twice: to count it twice, give it once with twice the weight")
    names = [folder.name for folder in resolved]
    return names if len(set(names)) == len(names) else ["/".join(folder.parts[1:]) for folder in resolved]


def require_apart(inputs: Sequence[Path], out: Path, parties: Path | None) -> None:
    """What is written lies in nothing that is read, nor in anything else that is written.

    Raises:
        UsageError: it does.
    """
    for target, option in ((out, "-o"), (parties, "--for-parties")):
        if target is not None and any(_within(target, folder) for folder in inputs):
            raise UsageError(f"{target} lies in one of the folders that are read: give another {option}")
    if parties is not None and (_within(parties, out) or _within(out, parties)):
        raise UsageError(f"{parties} and {out} lie in one another: give --for-parties a folder of its own, which holds nobody's adapter")


def require_several(weights: Iterable[float]) -> None:
    """What parties are handed is a mean: of one adapter it would be that adapter, bit for bit.

    Raises:
        UsageError: fewer than two weights are above zero.
    """
    if sum(weight > 0 for weight in weights) < 2:
        raise UsageError("--for-parties would hand out one party's adapter as it is: give two adapters or more a weight above 0")


def _within(inner: Path, outer: Path) -> bool:
    return inner.resolve().is_relative_to(outer.resolve())


def one_place(name: str | None) -> str | None:
    """Two spellings of one local folder are one base."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name or None


def one_base(folders: Sequence[Path], names: Sequence[str | None], base: str | None = None) -> str | None:
    """The name of the base that all were trained on.

    Who names none (null) contradicts nobody. Different names are one base where both are on this machine and the same (`difference`), or
    where `base` says so; what is on this machine of those is then compared with it.

    Raises:
        AggregationError: different bases, or names of which nobody says that they are one.
    """
    named = [(folder, name) for folder, name in zip(folders, names, strict=True) if name]
    if not named:
        return base
    wanted = base or named[0][1]
    for folder, name in named:
        if one_place(name) == one_place(wanted):
            continue
        whose = f"{folder} was trained on {name}"
        whose += f", and --base is {base}" if base else f", {named[0][0]} on {wanted}"
        places = [cached_folder(one) for one in (wanted, name)]
        odd = difference(places[0], places[1]) if places[0] and places[1] else ""
        if odd:
            raise AggregationError(f"{whose}: they differ in {odd}, and adapters of different bases have no mean")
        if odd is not None and not base:
            raise AggregationError(f"{whose}: adapters of different bases have no mean; {REMEDY}")
    return wanted


def one_revision(folders: Sequence[Path], configs: Sequence[Mapping[str, Any]], base: str | None = None) -> str | None:
    """The revision of a base on the hub that all were trained on; None: the default one ("main"), or `base` says another base.

    Raises:
        AggregationError: they were trained on several, and there is no `base`.
    """
    told = [
        (folder, name, config.get("revision") or "main")
        for folder, config in zip(folders, configs, strict=True)
        if (name := config.get("base_model_name_or_path")) and not Path(name).is_dir()
    ]
    odd = next((one for one in told if one[2] != told[0][2]), None)
    if odd and not base:
        raise AggregationError(
            f"{odd[0]} was trained on revision {odd[2]} of {odd[1]}, {told[0][0]} on {told[0][2]}: adapters of different bases have no "
            f"mean; {REMEDY}"
        )
    kept = told[0][2] if told and not odd and base in (None, told[0][1]) else "main"
    return None if kept == "main" else kept


def difference(one: Path, other: Path) -> str | None:
    """The first thing in which two checkpoints differ; None where there is none, as for a copy; "" where no weight can be compared.

    Compared are the shape in `config.json`, and of every tensor that both hold unpacked some rows, rounded to the coarser of the two
    precisions: so a copy in 4 bits is compared by what it keeps in 16 (embeddings, norms).
    """
    configs = [_config(folder) for folder in (one, other)]
    for key in (*COMPARED, *SIZES):
        left, right = (config.get(key) for config in configs)
        if None not in (left, right) and left != right:
            return f"{key} ({left}, {right})"
    names, compared = [_tensors(folder) for folder in (one, other)], 0
    for name in sorted(names[0].keys() & names[1].keys()):
        rows = [_some(places[name], name) for places in names]
        if rows[0] is not None and rows[1] is not None:
            if rows[0].shape != rows[1].shape or not _equal(rows[0], rows[1]):
                return name
            compared += 1
    return None if compared else ""


def _config(folder: Path) -> dict[str, Any]:
    """What `config.json` says of the text model."""
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return dict(said.get("text_config") or said)
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def require_fits(folders: Sequence[Path], described: Sequence[AdapterHeader], base: str) -> None:
    """Adapters are as large as the layers of the base that they are said to be of, as far as it is on this machine and unpacked.

    Raises:
        AggregationError: a module of another size.
    """
    place = cached_folder(base)
    found = {name: _shape(path, name) for name, path in _tensors(place).items()} if place else {}
    shapes = {name: shape for name, shape in found.items() if shape}
    for folder, one in zip(folders, described, strict=True):
        for module, pair in one.folder.adapter.items():
            like = [shapes[name] for name in shapes if f".{name}".endswith(f".{module}.weight") or f".{module}.weight".endswith(f".{name}")]
            if one.folder.format.layouts[module] == LINEAR and like and pair.shape not in (like[0], like[0][::-1]):
                sizes = [" x ".join(map(str, shape)) for shape in (pair.shape, like[0])]
                raise AggregationError(f"{folder}: {module} is {sizes[0]}, and {sizes[1]} in {base}: give the base that it was trained on")


def _shape(path: Path, name: str) -> tuple[int, ...] | None:
    """None of packed numbers."""
    with safe_open(path, framework="pt") as file:
        part = file.get_slice(name)
        return tuple(part.get_shape()) if part.get_dtype() in ("F64", "F32", "F16", "BF16") else None


def _tensors(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _some(path: Path, name: str) -> Tensor | None:
    """Some rows of a tensor; None where it holds packed numbers."""
    with safe_open(path, framework="pt") as file:
        part = file.get_slice(name)
        shape = part.get_shape()
        if len(shape) < 2:
            whole: Tensor = file.get_tensor(name)
            return whole if whole.is_floating_point() else None
        places = [shape[0] * index // ROWS for index in range(ROWS)]
        rows = torch.cat([part[place : place + 1] for place in places])
        return rows if rows.is_floating_point() else None


def _equal(one: Tensor, other: Tensor) -> bool:
    coarser = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(one.to(coarser), other.to(coarser))


def one_naming(read: Sequence[AdapterFolder | StoredResult], like: StoredResult | None = None) -> list[Renaming | None]:
    """For each adapter what gives its modules the names of `like`, or else of the first one; None where they have them, or none fits."""
    first = like if like and like.adapter else read[0]
    names, known = shapes_of(first.adapter), {**first.other, **first.format.frozen}
    return [find_renaming(one.adapter, names, {**one.other, **one.format.frozen}, known) for one in read]


def one_task(folders: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> int:
    """Which of some adapters says what their common task type is; null, which old and other tools write, is the others' type.

    Raises:
        AggregationError: two types.
    """
    types = [config.get("task_type") or None for config in configs]
    first = next((index for index, kind in enumerate(types) if kind), 0)
    for folder, kind in zip(folders, types, strict=True):
        if kind not in (None, types[first]):
            raise AggregationError(
                f"{folders[first]} is of task type {types[first]}, {folder} of {kind}: different task types; aggregate adapters of one task"
            )
    return first


def require_same_frozen(folders: Sequence[Path], frozen: Sequence[Collection[str]], read: Callable[[int, str], Tensor]) -> None:
    """What adapters hold and do not train is the same in all of them.

    Args:
        folders: of the adapters; named in errors.
        frozen: the names of what each holds and does not train.
        read: one such tensor of one folder.

    Raises:
        AggregationError: it is not.
    """
    for index, folder in enumerate(folders):
        for name in sorted({*frozen[index], *frozen[0]}):
            if index == 0 or (name in frozen[0] and name in frozen[index] and torch.equal(read(0, name), read(index, name))):
                continue
            raise AggregationError(
                f"{folders[0]} and {folder} differ in {name}, which by PEFT's rule was not trained: if it was, name its module in "
                "modules_to_save of their adapter_config.json; if not, their bases have other weights there"
            )


def frozen_of(folder: Path, first: AdapterHeader, before: StoredResult | None) -> dict[str, Tensor]:
    """What is written of the base untrained: what the adapters hold, as the first one's header says it, and what the earlier result does.

    Raises:
        AggregationError: both hold a tensor, and it is not the same.
    """
    here, kept = first.folder.format.frozen, before.format.frozen if before else {}
    for name in sorted(here.keys() & kept.keys()):
        if here[name].shape != kept[name].shape or not _equal(first.tensor(name), kept[name]):
            raise AggregationError(
                f"{folder} and the result of --state differ in {name}, which was not trained: save the adapters from the model that "
                "fedex_lora.load_model gives"
            )
    return {**here, **{name: tensor for name, tensor in kept.items() if name not in first.folder.other}}


def require_marks(folders: Sequence[Path], marks: Sequence[str | None], below: str | None) -> None:
    """Adapters stand on the base delta that they say, if they say one.

    Args:
        folders, marks: of the adapters (`AdapterFolder.mark`).
        below: the mark of the result that `--state` names; None without it, or where its base gained nothing.

    Raises:
        AggregationError: on another, on none, or some say it and others do not.
    """
    for folder, mark in zip(folders, marks, strict=True):
        if mark == below or not any(marks):
            continue
        if below is None:
            raise AggregationError(
                f"{folder} was trained on what the base had gained by then, not on the plain base: give by --state the result folder that "
                "its model was loaded from"
            )
        if mark is None:
            raise AggregationError(f"{folder} does not say what its base had gained, and others do: save it from the model of load_model")
        raise AggregationError(
            f"{folder} was trained on another base delta than that of --state: give the folder its model was loaded from"
        )
