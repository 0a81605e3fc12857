"""PEFT adapter folders (`adapter_config.json`, `adapter_model.safetensors`) to our types and back, without a model."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fedex_lora.aggregation.lowrank import concatenate, factorise
from fedex_lora.errors import AdapterError, AggregationError, StorageError
from fedex_lora.peft_io._layers import LINEAR, Layout
from fedex_lora.storage import load_tensors, save_tensors
from fedex_lora.tensor_files import Entry, Table, meta, read_table, stamp
from fedex_lora.types import Adapter, Delta, LoRAPair

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB])$")


@dataclass(frozen=True, eq=False)
class Format:
    """How an adapter is written: its PEFT configuration as plain JSON values, and the layout of modules that are not linear."""

    config: Mapping[str, Any]
    layouts: Mapping[str, Layout] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class AdapterFolder:
    """A PEFT LoRA adapter as read from its folder.

    Attributes:
        adapter: module path -> LoRA factors with their scaling.
        other: what was trained whole (`modules_to_save`, heads among them), named as in the model.
        frozen: tensors of the base that PEFT saved with it (embeddings).
        format: how it was written, `adapter_config.json` within.
    """

    adapter: dict[str, LoRAPair]
    other: dict[str, Tensor]
    frozen: dict[str, Tensor]
    format: Format

    @property
    def config(self) -> Mapping[str, Any]:
        return self.format.config

    @property
    def base_model(self) -> str | None:
        return self.config.get("base_model_name_or_path")


def read_adapter_folder(folder: Path) -> AdapterFolder:
    """Read a PEFT LoRA adapter.

    Raises:
        StorageError: a file is missing or broken.
        AdapterError: it is not plain LoRA.
    """
    config = _read_config(folder)
    _require_weights(folder, config)
    tensors, _ = load_tensors(folder / WEIGHTS)
    return _parsed(folder, config, tensors)


@dataclass(frozen=True, eq=False)
class Description:
    """A PEFT LoRA adapter in a file, its tensors unread.

    Attributes:
        path: of the file.
        folder: as `read_adapter_folder` gives it, with tensors that have a shape and no numbers.
        entries: where each tensor lies, by its name in the model.
        stamp: of the file when it was described (`tensor_files.stamp`).
    """

    path: Path
    folder: AdapterFolder
    entries: Mapping[str, Entry]
    stamp: tuple[int, ...] = ()

    def factor(self, module: str, part: str) -> Entry:
        """A or B of a linear layer."""
        return self.entries[f"{module}.lora_{part}.weight"]


def describe_adapter_folders(folders: Sequence[Path]) -> list[Description]:
    """What `read_adapter_folder` would read, from headers alone; folders that look alike share one table.

    Raises:
        StorageError, AdapterError: as `read_adapter_folder`.
    """
    tables: dict[bytes, Table] = {}
    alike: dict[tuple[str, bytes], Description] = {}
    described = []
    for folder in folders:
        config = _read_config(folder)
        _require_weights(folder, config)
        found = stamp(folder / WEIGHTS)
        table = read_table(folder / WEIGHTS, tables)
        key = (json.dumps(config, sort_keys=True), table.raw)
        if key not in alike:
            parsed = _parsed(folder, config, {name: meta(entry) for name, entry in table.entries.items()})
            entries = {name.removeprefix(PREFIX): entry for name, entry in table.entries.items()}
            alike[key] = Description(folder / WEIGHTS, parsed, entries)
        described.append(replace(alike[key], path=folder / WEIGHTS, stamp=found))
    return described


def _require_weights(folder: Path, config: Mapping[str, Any]) -> None:
    require_plain_lora(config, str(folder))
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise StorageError(f"{folder} holds a pickled adapter_model.bin, which is never opened here: save it as safetensors with PEFT")


def _parsed(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterFolder:
    factors: dict[str, dict[str, Tensor]] = {}
    other: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _FACTOR.match(name)
        if match is None:
            other[name] = tensor
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
    frozen = {name: tensor for name, tensor in other.items() if not _trained_whole(name, config)}
    other = {name: tensor for name, tensor in other.items() if name not in frozen}
    return AdapterFolder(adapter=adapter, other=other, frozen=frozen, format=Format(config=config, layouts=layouts))


def _trained_whole(name: str, config: Mapping[str, Any]) -> bool:
    """Does a tensor belong to `modules_to_save` (PEFT lists heads there)? Embeddings that PEFT saves of its own accord do not."""
    return any(f".{module}." in f".{name}" for module in config.get("modules_to_save") or [])


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StorageError(f"{folder} is not a PEFT adapter: it has no {CONFIG}") from None
    except (OSError, ValueError) as error:
        raise StorageError(f"{folder / CONFIG} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise StorageError(f"{folder / CONFIG} is not a JSON object")
    return config


def require_plain_lora(config: Mapping[str, Any], where: str) -> None:
    """Refuse by name what changes the algebra (another base, another product, a third factor)."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{where}: peft_type is {config.get('peft_type')}: only LORA adapters can be aggregated")
    _require_numbers(config, where)
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{where}: bias={config['bias']!r} trains biases of the base, which are not carried over: train with bias='none'"
        )
    initialisation = config.get("init_lora_weights", True)
    if isinstance(initialisation, str) and initialisation.lower() not in ("gaussian", "orthogonal"):
        raise AdapterError(f"{where}: init_lora_weights={initialisation!r} changes the base as well: train with the default initialisation")
    for key in (
        "use_dora",
        "lora_bias",
        "target_parameters",
        "alora_invocation_tokens",
        "trainable_token_indices",
        "use_qalora",
        "layer_replication",
        "velora_config",
        "monteclora_config",
        "use_bdlora",
        "arrow_config",
        "ensure_weight_tying",
    ):
        if config.get(key):
            raise AdapterError(f"{where}: {key} is set, and the sum of such updates is not the sum of their factors: train without it")


def _require_numbers(config: Mapping[str, Any], where: str) -> None:
    """alpha is a number, and the patterns map regular expressions to numbers."""
    if not isinstance(config.get("lora_alpha", 8), int | float):
        raise AdapterError(f"{where}: lora_alpha is {config['lora_alpha']!r}, not a number")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(isinstance(value, int | float) for value in patterns.values()):
        raise AdapterError(f"{where}: alpha_pattern must map module patterns to numbers")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise AdapterError(f"{where}: alpha_pattern {pattern!r} is no regular expression: {error}") from None


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA; alpha from `alpha_pattern` where it names the module (PEFT's rule)."""
    alpha = next(
        (value for pattern, value in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)),
        config.get("lora_alpha", 8),
    )
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def adapter_config(adapter: Adapter, like: Mapping[str, Any]) -> dict[str, Any]:
    """`adapter_config.json` for these factors: ranks and alphas as the tensors and scalings say, everything else as in `like`."""
    ranks = {module: pair.rank for module, pair in adapter.items()}
    alphas = {module: pair.scaling * pair.rank for module, pair in adapter.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    return {
        **like,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {re.escape(module): value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(module): value for module, value in alphas.items() if value != alpha},
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(adapter),
    }


def _commonest(values: Mapping[str, Any]) -> Any:
    return max(sorted(set(values.values())), key=list(values.values()).count)


def write_adapter_folder(folder: Path, adapter: Adapter, other: Mapping[str, Tensor], like: Format) -> None:
    """Write a folder that plain PEFT loads (into a folder that nobody reads yet)."""
    tensors = {
        f"{PREFIX}{module}.{part}": tensor
        for module, pair in adapter.items()
        for part, tensor in like.layouts.get(module, LINEAR).stored(pair).items()
    }
    save_tensors(folder / WEIGHTS, tensors | {f"{PREFIX}{name}": tensor for name, tensor in other.items()}, {"format": "pt"})
    write_config(folder, adapter, like)


def write_config(folder: Path, adapter: Adapter, like: Format) -> None:
    """`adapter_config.json`; of the factors only ranks and scalings count."""
    (folder / CONFIG).write_text(json.dumps(adapter_config(adapter, like.config), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def stacked(adapter: Adapter, base_delta: Mapping[str, Delta]) -> dict[str, LoRAPair]:
    """One stand-alone adapter, `s B A + D = [s B, U] [A; V]`: all of the update, with scaling one."""
    total: dict[str, LoRAPair] = {}
    for module, pair in adapter.items():
        terms = [pair.low_rank()] + ([factorise(base_delta[module])] if module in base_delta else [])
        whole = concatenate(terms)
        total[module] = LoRAPair(A=whole.V, B=whole.U, scaling=1.0)
    return total
