"""The model that a run starts from, where it is not the pristine base: that of a result folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from fedex_lora.aggregation.methods import Method
from fedex_lora.config import Lora
from fedex_lora.errors import AdapterError, ModelError
from fedex_lora.models.build import model_kind, read_global, require_revision
from fedex_lora.models.loading import Kind, Loaded
from fedex_lora.models.lora import wrap, write_model
from fedex_lora.models.resized import resized
from fedex_lora.storage.adapter_folder import adapter_config
from fedex_lora.storage.result import StoredResult
from fedex_lora.types import LowRank


def read_start(folder: Path, kind: Kind, name: str, method: Method, lora: Lora, labels: list[str]) -> StoredResult:
    """The result that a run goes on from.

    Args:
        folder: see `load_model`.
        kind: of model that the run trains.
        name: of its base.
        method: the run's.
        lora: what is set of it must be so in the result.
        labels: names of the run's classes, in their order; none where they have no names.

    Raises:
        StorageError: the folder is broken.
        ModelError: another kind of model, trained in another way, or with other classes; a method whose clients keep models of their own.
    """
    result = read_global(folder)
    require_revision(result.config, name)
    if result.base_delta and method.exactness == "personalised":
        raise ModelError(f"method {method.name} keeps adapters for the untouched base, and that of base.start {folder} gained something")
    if method.core:
        raise ModelError(f"method {method.name} takes its factors from the base's own weights: remove base.start, or use another method")
    if bool(result.adapter) != method.lora:
        one, other = ("whole", "adapters") if method.lora else ("by adapters", "the whole model")
        raise ModelError(f"base.start {folder} was trained {one}, and this method trains {other}: give a start of the same kind")
    if (found := model_kind(result, name)) != kind:
        raise ModelError(f"base.start {folder} is a model for {found}, and the task needs {kind}: give a task of its kind")
    if (known := list(result.manifest.get("labels", []))) and labels and known != labels:
        raise ModelError(f"base.start {folder} tells {', '.join(known)} apart, in this order: set task.labels to them")
    alphas = [pair.rank * pair.scaling for pair in result.adapter.values()]
    for key, said, values in (("r", lora.r, [pair.rank for pair in result.adapter.values()]), ("alpha", lora.alpha, alphas)):
        if key in lora.model_fields_set and values and not min(values) * (1 - 1e-6) <= said <= max(values) * (1 + 1e-6):
            raise ModelError(f"lora.{key} = {said:g}, and that of base.start {folder} is {max(values):g}: remove the key")
    for key in ("rslora", "rank_pattern", "alpha_pattern"):
        if getattr(lora, key):
            raise ModelError(f"lora.{key} is of new adapters, and that of base.start {folder} goes on as it is: remove the key")
    return result


def require_base(result: StoredResult, fingerprint: str, folder: Path | None) -> None:
    """The base is the one that the result was trained on.

    Raises:
        ModelError: it is not.
    """
    known = result.manifest.get("base_fingerprint")
    if known is not None and known != fingerprint:
        raise ModelError(f"base.model is not the base of base.start {folder}, which is {result.manifest.get('base_model')}: give that one")


def standing(result: StoredResult, folder: Path | None) -> dict[str, Any]:
    """Of the result that a run goes on from: its folder's name, method, round and privacy, and what its base has gained."""
    about, ranks = result.manifest, [delta.rank for delta in result.base_delta.values() if isinstance(delta, LowRank)]
    whole = len(result.base_delta) - len(ranks)
    return {
        "folder": folder.absolute().name if folder else "",
        "method": about["method"],
        "round": about["round"],
        "base_rank": max(ranks, default=0),
        **({"matrices": whole} if whole else {}),
        "privacy": _promised(about),
    }


def _promised(manifest: Mapping[str, Any]) -> str:
    """What a result, and all that it went on from, promised of its rows."""
    own, before = manifest.get("privacy"), manifest.get("start", {}).get("privacy")
    said = "epsilon {epsilon:g} at delta {delta:g}".format(**own) if own else "none"
    return said if before in (None, said) else f"{said}, after {before}"


def adapted_as(result: StoredResult, loaded: Loaded, lora: Lora) -> nn.Module:
    """The base with the adapter of a result, and with what else was trained there; the base delta is not in it yet.

    Raises:
        ModelError: the base has not its modules, or `lora` names others.
    """
    model = resized(loaded.model, result.format.frozen, result.other)
    config = adapter_config(result.adapter, result.config) | {"inference_mode": False, "lora_dropout": lora.dropout}
    _require_modules(model, config, lora)
    try:
        wrapped = wrap(model, LoraConfig(**{key: value for key, value in config.items() if key in LoraConfig.__dataclass_fields__}))
        write_model(wrapped, result.adapter, result.other)
    except (ValueError, AdapterError) as error:
        raise ModelError(f"base.start does not fit this base: {str(error).splitlines()[0][:200]}: is it another model?") from None
    return wrapped


def _require_modules(model: PreTrainedModel, config: Mapping[str, Any], lora: Lora) -> None:
    """What `lora` names of a base is what is trained in the result, by PEFT's own rules.

    Raises:
        ModelError: it is not.
    """
    whole = config.get("modules_to_save") or []
    if odd := next((name for name in lora.modules_to_save or [] if name not in whole), None):
        raise ModelError(f"lora.modules_to_save names {odd}, which base.start does not train whole: remove the key")
    if lora.target_modules is None:
        return
    wanted: Any = LoraConfig(task_type=config.get("task_type"), target_modules=lora.target_modules, modules_to_save=whole or None)
    wanted = _maybe_include_all_linear_layers(wanted, model)
    named = {name for name, _ in model.named_modules() if check_target_module_exists(wanted, name)}
    if odd := min(named ^ set(config["target_modules"]), default=None):
        here, there = ("names", "does not adapt") if odd in named else ("leaves out", "adapts")
        raise ModelError(f"lora.target_modules {here} {odd}, which base.start {there}: remove the key")
