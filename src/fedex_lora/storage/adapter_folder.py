"""PEFT adapter folders (`adapter_config.json`, `adapter_model.safetensors`) to our types and back, without a model."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedex_lora.errors import AdapterError, AggregationError, StorageError, UnreadableError
from fedex_lora.storage.layout import LINEAR, Layout
from fedex_lora.storage.peft_rules import FACTOR, MARK, PREFIX, named, require_known, require_plain_lora, scaling_of, trained_whole
from fedex_lora.storage.renaming import Renaming
from fedex_lora.storage.safetensors_io import Entry, TensorTable, file_identity, read_table, read_tensor
from fedex_lora.storage.tensors import load_tensors, save_tensors
from fedex_lora.types import Adapter, LoRAPair

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, eq=False)
class Format:
    """How an adapter is written.

    Attributes:
        config: its PEFT configuration, as plain JSON values.
        layouts: of modules that are not linear.
        frozen: what of the base is written with it, untrained: the embeddings of a vocabulary that was resized, say.
    """

    config: Mapping[str, Any]
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    frozen: Mapping[str, Tensor] = field(default_factory=dict)

    def renamed(self, rule: Renaming) -> "Format":
        """For modules of other names."""
        return Format(config=rule.config(self.config), layouts=rule.keys(self.layouts), frozen=rule.keys(self.frozen))


@dataclass(frozen=True, eq=False)
class AdapterFolder:
    """A PEFT LoRA adapter as read from its folder.

    Attributes:
        adapter: module path -> LoRA factors with their scaling.
        other: what was trained whole (`modules_to_save`, heads among them), named as in the model.
        format: how it was written: `adapter_config.json`, and tensors of the base that PEFT saved with it.
    """

    adapter: dict[str, LoRAPair]
    other: dict[str, Tensor]
    format: Format

    @property
    def config(self) -> Mapping[str, Any]:
        return self.format.config

    @property
    def base_model(self) -> str | None:
        return self.config.get("base_model_name_or_path") or None

    @property
    def mark(self) -> str | None:
        """The base delta that it says it stands on."""
        return self.config.get(MARK) or None

    def renamed(self, rule: Renaming) -> "AdapterFolder":
        """The same with other names."""
        return AdapterFolder(adapter=rule.keys(self.adapter), other=rule.keys(self.other), format=self.format.renamed(rule))


def read_adapter_folder(folder: Path) -> AdapterFolder:
    """Read a PEFT LoRA adapter.

    Raises:
        StorageError: a file is missing or broken.
        AdapterError: it is not plain LoRA.
    """
    return _parsed(folder, _read_config(folder), load_tensors(folder / WEIGHTS)[0])


@dataclass(frozen=True, eq=False)
class AdapterHeader:
    """A PEFT LoRA adapter in a file, its tensors unread.

    Attributes:
        path: of the file.
        folder: as `read_adapter_folder` gives it, with tensors that have a shape and no numbers.
        entries: where each tensor lies, by its name in the model.
        identity: of the file when it was described (`safetensors_io.file_identity`).
        rule: what has given other names to the file's; its configuration stays as it is.
    """

    path: Path
    folder: AdapterFolder
    entries: Mapping[str, Entry]
    identity: tuple[int, ...] | None = None
    rule: Renaming | None = None

    def renamed(self, rule: Renaming) -> "AdapterHeader":
        """The same file, read by other names."""
        folder = self.folder.renamed(rule)
        kept = replace(folder, format=replace(folder.format, config=self.folder.config))
        return replace(self, folder=kept, entries=rule.keys(self.entries), rule=rule)

    def factor(self, module: str, part: str) -> Entry:
        """A or B of a linear layer."""
        return self.entries[f"{module}.lora_{part}.weight"]

    def tensor(self, name: str) -> Tensor:
        """One tensor, read."""
        return read_tensor(self.path, self.entries[name])

    def read(self) -> AdapterFolder:
        """All of it, read."""
        read = _parsed(self.path.parent, self.folder.config, load_tensors(self.path)[0])
        return read.renamed(self.rule) if self.rule else read

    def require_unchanged(self) -> None:
        """What has been read since is what was described.

        Raises:
            StorageError: somebody wrote to the file.
        """
        if file_identity(self.path) != self.identity:
            raise StorageError(f"{self.path} has changed while it was read: aggregate again when nobody writes to it")


def describe_adapter_folders(folders: Sequence[Path], task_type: str | None = None) -> list[AdapterHeader]:
    """What `read_adapter_folder` would read, from headers alone; folders that look alike share one table.

    Args:
        folders: of the adapters.
        task_type: of those that name none; its heads are trained.

    Raises:
        StorageError, AdapterError: as `read_adapter_folder`.
    """
    tables: dict[bytes, TensorTable] = {}
    alike: dict[tuple[str, bytes], AdapterHeader] = {}
    described = []
    for folder in folders:
        config = _read_config(folder)
        config |= {"task_type": task_type} if task_type and not config.get("task_type") else {}
        path = folder / WEIGHTS
        identity, table = file_identity(path), read_table(path, tables)
        key = (json.dumps(config, sort_keys=True), table.raw)
        if key not in alike:
            empty = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in table.entries.items()}
            alike[key] = AdapterHeader(path, _parsed(folder, config, empty), named(table.entries))
        described.append(replace(alike[key], path=path, identity=identity))
    return described


def _parsed(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterFolder:
    factors: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    found = named(tensors)
    require_known(found, str(folder))
    for name, tensor in found.items():
        match = FACTOR.match(name)
        if tensor.numel() == 0 or (match and tensor.ndim < 2):
            raise AdapterError(
                f"{folder}: {name} is empty: DeepSpeed ZeRO-3 or FSDP saved it before its parts were gathered; save it again after that "
                "(zero3_save_16bit_model, or summon_full_params)"
            )
        if match is None:
            rest[name] = tensor
        else:
            factors.setdefault(match["module"], {})[match["part"]] = tensor
    adapter: dict[str, LoRAPair] = {}
    layouts: dict[str, Layout] = {}
    for module, parts in factors.items():
        try:
            layouts[module], A, B = Layout.read(parts)
            adapter[module] = LoRAPair(A=A, B=B, scaling=scaling_of(config, module, A.shape[0]))
        except (AdapterError, AggregationError) as error:
            raise AdapterError(f"{folder}: module {module}: {error}") from None
    if not adapter:
        raise AdapterError(f"{folder} has no LoRA factors: is it an adapter of another kind?")
    other = {name: tensor for name, tensor in rest.items() if trained_whole(name, config)}
    frozen = {name: tensor for name, tensor in rest.items() if name not in other}
    return AdapterFolder(adapter=adapter, other=other, format=Format(config=config, layouts=layouts, frozen=frozen))


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration of plain LoRA, whose weights can be read."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StorageError(f"{folder} is not a PEFT adapter: it has no {CONFIG}{_remedy(folder)}") from None
    except OSError as error:
        raise UnreadableError(f"{folder / CONFIG} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{folder / CONFIG} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise StorageError(f"{folder / CONFIG} is not a JSON object")
    require_plain_lora(config, str(folder))
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise StorageError(f"{folder} holds a pickled adapter_model.bin, which is never opened here: save it as safetensors with PEFT")
    return config


def _remedy(folder: Path) -> str:
    """Where the adapter is, if a trainer's or a hub's folder was given."""
    inner = sorted(path.parent for path in folder.glob(f"*/{CONFIG}"))
    if inner:
        return f"; give one of the {len(inner)} folders in it that do: {inner[-1]}, say"
    if not folder.exists() and len(folder.parts) == 2:
        return f"; if it is a name on the hub, fetch it first: hf download {folder} --local-dir {folder.name}"
    return "" if folder.exists() else ", and is not there at all: give a folder that PEFT's save_pretrained wrote"


KEPT = "base_model_name_or_path bias ensure_weight_tying fan_in_fan_out lora_dropout modules_to_save revision task_type".split()
"""Of one adapter's configuration, what that of a mean has too; nothing else of it travels."""


def adapter_config(adapter: Adapter, like: Mapping[str, Any]) -> dict[str, Any]:
    """`adapter_config.json` for these factors: ranks and alphas as the tensors and scalings say, everything else as in `like`."""
    ranks = {module: pair.rank for module, pair in adapter.items()}
    alphas = {module: pair.scaling * pair.rank for module, pair in adapter.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        **{key: like[key] for key in KEPT if key in like},
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {_pattern(module, adapter): value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {_pattern(module, adapter): value for module, value in alphas.items() if value != alpha},
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(adapter),  # all of them, so nothing is left to
        "exclude_modules": _left_out(adapter, like),
        **dict.fromkeys(("layers_to_transform", "layers_pattern")),
    }


def _left_out(adapter: Adapter, like: Mapping[str, Any]) -> str | None:
    """By PEFT's rule, which looks at the ends of paths, a module at the model's root names those inside that end so, too: an expression
    for these, where settings of which this is not true (an expression, or what they leave out) may have chosen the modules."""
    roots = [re.escape(module) for module in adapter if "." not in module]
    chosen = isinstance(like.get("target_modules"), str) or like.get("exclude_modules") or like.get("layers_to_transform") is not None
    return rf"(?!({'|'.join(map(re.escape, adapter))})$).*\.({'|'.join(roots)})" if roots and chosen else None


def _pattern(module: str, adapter: Adapter) -> str:
    """What PEFT's rule, which looks at the ends of paths, finds this module by and no other."""
    return "^" * any(name.endswith(f".{module}") for name in adapter) + re.escape(module)


def _commonest(values: Mapping[str, Any]) -> Any:
    return max(sorted(set(values.values())), key=list(values.values()).count)


def write_adapter_folder(folder: Path, adapter: Adapter, other: Mapping[str, Tensor], like: Format) -> None:
    """Write a folder that plain PEFT loads (into a folder that nobody reads yet)."""
    tensors = {
        f"{PREFIX}{module}.{part}": tensor
        for module, pair in adapter.items()
        for part, tensor in like.layouts.get(module, LINEAR).stored(pair).items()
    }
    whole = {f"{PREFIX}{name}": tensor for name, tensor in other.items()}
    kept = {frozen_key(name, adapter): tensor for name, tensor in like.frozen.items()}
    save_tensors(folder / WEIGHTS, tensors | whole | kept, {"format": "pt"})
    write_adapter_config(folder, adapter, like)


def frozen_key(name: str, adapter: Adapter) -> str:
    """What PEFT calls a tensor of the base in its files."""
    module, _, leaf = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{leaf}" if module in adapter else f"{PREFIX}{name}"


def write_adapter_config(folder: Path, adapter: Adapter, like: Format) -> None:
    """`adapter_config.json`; of the factors only ranks and scalings count."""
    (folder / CONFIG).write_text(json.dumps(adapter_config(adapter, like.config), indent=1, sort_keys=True) + "\n", encoding="utf-8")
