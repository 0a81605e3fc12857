"""Whatever holds a model: a run, a round, an aggregate, an export, a PEFT adapter, a model of Transformers."""

import json
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftConfig, PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel, set_seed

from fedex_lora.config import Base, read_config
from fedex_lora.errors import AdapterError, ModelError, StorageError
from fedex_lora.models.build import build_model, model_kind, read_global, renaming_onto, require_revision
from fedex_lora.models.loading import config_of, load_base
from fedex_lora.models.processor import load_processor
from fedex_lora.models.resized import resized
from fedex_lora.storage.adapter_folder import WEIGHTS, adapter_config, read_adapter_folder
from fedex_lora.storage.files import FINAL, MANIFEST, read_manifest
from fedex_lora.storage.peft_rules import MARK
from fedex_lora.storage.result import DELTA
from fedex_lora.storage.run_folder import CONFIG as RUN
from fedex_lora.tasks import Task

BASE = "base"  # in place of a model: what the one that is measured was trained from


class Opened(NamedTuple):
    """A model in evaluation mode, its tokenizer or image processor, and the name of its base."""

    model: nn.Module
    processor: Any
    base: str


def open_source(source: str, kind: Any, base: str | None = None, **config: Any) -> Opened:
    """The model that a folder or a hub name stands for.

    Args:
        source: a run folder, a round folder, `final/`, the OUT of `aggregate` or of `export`, a PEFT adapter folder, a model.
        kind: which head the task needs.
        base: the pretrained model below an adapter or a result; by default as the folder says.
        config: what a model's config needs for the task (`num_labels`, `problem_type`).

    Raises:
        ModelError: it cannot be loaded, is of another kind, or has a head that was never trained, or for other classes.
        StorageError: the folder is broken.
    """
    folder = Path(source)
    if (folder / "final").is_dir():
        folder = folder / "final"
    if folder.name == "trainable" and (folder.parent / DELTA).exists():
        raise ModelError(f"{source} is right only on top of the base delta beside it: give {folder.parent}")
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        opened = _export(folder, manifest, kind, base, config) if "format" in manifest else _result(folder, kind, base)
    elif (folder / "config.toml").is_file():
        raise StorageError(f"{source} has no final model yet: go on with the run by --resume, or give one of its rounds/NNNN")
    elif (folder / "adapter_config.json").is_file():
        opened = _adapter(folder, kind, base, config)
    else:
        opened = _plain(str(source), kind, config)
    wanted, has = config.get("num_labels"), opened.model.config.num_labels  # type: ignore[union-attr]
    if wanted is not None and wanted != has:
        raise ModelError(f"{source} tells {has} classes apart, and the task has {wanted}: give a model of this task")
    names, own = list(config.get("id2label", {}).values()), labels_of(source) or _named(folder)
    if names and own and names != own:
        told = f"{source} tells {', '.join(own)} apart, in this order, and the task {', '.join(names)}"
        raise ModelError(f"{told}: set task.labels to the model's, or id2label in its config.json to the task's")
    opened.model.eval()
    return opened


def open_base(source: str, task: Task, base: str | None = None) -> Opened:
    """What the model of a folder was trained from. A new head is the one that the run began with, drawn from its seed.

    Args:
        source: a run folder, one of its parts, a result, an adapter, or an export.
        task: says which head it needs.
        base: its name; by default as the folder says.

    Raises:
        ModelError: the folder does not say what its base is, or is of no run, and the base has no head for the task.
    """
    runs, options = run_folders(source), task.model_config
    if not runs:
        name = base or _facts_of(Path(source)).get("base_model")
        if not name:
            raise ModelError(f"{source} does not say what its base is: give that one by --beside MODEL")
        return _plain(str(name), task.kind, dict(options))
    config = read_config(runs[0] / RUN)
    if config.base.start is not None:
        raise ModelError(f"{runs[0]} went on from a result: give that one by --beside {config.base.start}")
    table = config.base.model_copy(update={"model": base}) if base else config.base
    set_seed(config.seed)
    model = load_base(table, task.kind, **options).model.eval()
    return Opened(model, load_processor(table, task.kind), table.model)


def run_folders(source: str) -> list[Path]:
    """The folder of the run that a folder is, or is in; none for others."""
    folder = Path(source)
    return [one for one in (folder, folder.parent, folder.parent.parent) if folder.exists() and (one / RUN).is_file()]


def labels_of(source: str) -> list[str] | None:
    """The names of a model's classes, in their order, as its folder has them; None where it does not say."""
    return _facts_of(Path(source)).get("labels")


def _named(folder: Path) -> list[str]:
    """The same of a model of Transformers; nothing where its names are those that Transformers makes up."""
    names = [str(name) for name in getattr(config_of(Base(model=str(folder))), "id2label", {}).values()]
    return [] if names == [f"LABEL_{number}" for number in range(len(names))] else names


def _facts_of(folder: Path) -> dict[str, Any]:
    """What a folder's manifest says, or of an adapter its configuration."""
    for one in (folder / FINAL, folder):
        if (one / MANIFEST).is_file():
            return read_manifest(one, check=False)
    if (folder / "adapter_config.json").is_file():
        return {"base_model": json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")}
    return {}


def _result(folder: Path, kind: Any, base: str | None) -> Opened:
    result = read_global(folder)
    name = base or str(result.manifest.get("base_model"))
    found = model_kind(result, name)
    if found != kind:
        raise ModelError(f"{folder} is a model for {found}, and the task needs {kind}: give a task of the model's kind")
    return Opened(build_model(result, name)[0], load_processor(Base(model=name), kind), name)


def _export(folder: Path, manifest: Any, kind: Any, base: str | None, config: dict[str, Any]) -> Opened:
    form = manifest["format"]
    if form == "merged":
        return _plain(str(folder), kind, config)
    if form == "base+adapter":
        return _adapter(folder / "adapter", kind, str(folder / "base"), config)
    return _adapter(folder, kind, base or str(manifest["base_model"]), config)


def _adapter(folder: Path, kind: Any, base: str | None, config: dict[str, Any]) -> Opened:
    said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if said.get(MARK):
        raise ModelError(f"{folder} is right only on top of what its base had gained: aggregate it, with --state, and give the result")
    name = base or said.get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{folder} does not say what its base is: give it by --base")
    require_revision(said, name)
    if not (folder / WEIGHTS).is_file():
        raise StorageError(f"{folder} has no {WEIGHTS}; a pickled adapter_model.bin is never opened here: save it as safetensors with PEFT")
    under, fresh = load_base(Base(model=name), kind, **config)
    settings, names = _named_as(under, folder)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(under, str(folder), config=settings, key_mapping=names)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"{folder} does not fit {name}: {str(error).splitlines()[0][:200]}") from None
    if any("missing adapter keys" in str(one.message) for one in told):  # they would be as they began: the base alone is measured
        raise ModelError(f"{folder} does not fit {name}: it has no factors for modules that it adapts there: give its own base by --base")
    brought = tuple(f"{path}." for path, module in under.named_modules() if isinstance(module, ModulesToSaveWrapper))
    if random := [path for path in fresh if not f"{path}.".startswith(brought)]:
        raise ModelError(f"{folder} has no trained {random[0]}, and {name} none either: save it with the adapter (PEFT's modules_to_save)")
    return Opened(model, load_processor(Base(model=name), kind), name)


def _named_as(model: PreTrainedModel, folder: Path) -> tuple[PeftConfig, dict[str, str] | None]:
    """An adapter's configuration, and a pattern for its keys where it names the model's modules as another version of transformers does.

    The model gets as many tokens as the adapter has embeddings for.
    """
    settings = PeftConfig.from_pretrained(str(folder))
    try:
        read = read_adapter_folder(folder)
    except (AdapterError, StorageError):  # of a kind or a file that is not averaged
        return settings, None
    rule = renaming_onto(dict(model.named_modules()), read.adapter, {**read.other, **read.format.frozen})
    if rule is None:
        resized(model, read.format.frozen, read.other)
        return settings, None
    read = read.renamed(rule)
    resized(model, read.format.frozen, read.other)
    named = adapter_config(read.adapter, rule.config(settings.to_dict()))
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save"):
        setattr(settings, key, named.get(key))
    old, new = (f"{part}." if part else "" for part in (rule.old, rule.new))
    return settings, {f"^{re.escape(old)}": new}


def _plain(name: str, kind: Any, config: dict[str, Any]) -> Opened:
    loaded = load_base(Base(model=name), kind, **config)
    if loaded.fresh:
        raise ModelError(f"{name} has no trained {loaded.fresh[0]}: give a model that was trained for the task, or a run")
    return Opened(loaded.model, load_processor(Base(model=name), kind), name)
