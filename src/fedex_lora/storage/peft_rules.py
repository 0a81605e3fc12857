"""PEFT's own rules: what the tensors of an adapter file are, and which settings leave an update plain, `s B A`."""

import math
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from fedex_lora.errors import AdapterError

PREFIX = "base_model.model."
MARK = "fedex_lora_base_delta"
"""The key of `adapter_config.json` that says on which base delta an adapter stands: the checksum of its file."""
FACTOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB])$")
HEADS = {  # what PEFT trains whole of its own accord, and before 0.10 did not write down
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
HARMLESS = set(
    """alpha_pattern auto_mapping base_model_name_or_path bias corda_config eva_config exclude_modules fan_in_fan_out inference_mode
    init_lora_weights layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout lora_ga_config megatron_core modules_to_save
    peft_type peft_version qalora_group_size r rank_pattern revision runtime_config target_modules task_type unsloth_fixed use_rslora
    """.split()
)
"""Keys that may be set: what they do shows in the tensors and scalings, or ended with the training."""
INITIALISATIONS = ("gaussian", "orthogonal", "eva")  # those that leave the base as it is
T = TypeVar("T")


def named(tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors of an adapter file by their names in the base model.

    Where PEFT has wrapped a module, its own weight (`X.base_layer.weight`) is `X.weight`; of a module that was trained whole the trained
    weight counts (files hold it as `X.weight`, as `X.modules_to_save.weight`, or as both), and the one it had before does not.
    """
    plain = {key: key.removeprefix(PREFIX) for key in tensors if ".original_module." not in key}
    stripped = {key: re.sub(r"\.modules_to_save(\.default)?\.|\.base_layer\.", ".", name) for key, name in plain.items()}
    exact = [key for key in plain if plain[key] == stripped[key]]
    return {stripped[key]: tensors[key] for key in [*(key for key in plain if key not in exact), *exact]}


def require_known(names: Iterable[str], where: str) -> None:
    """Refuse by name what is neither a factor nor a weight.

    Raises:
        AdapterError: another tensor of an adapter (DoRA's magnitude, a bias, a third factor), or a name as PEFT has it in memory.
    """
    for name in names:
        if FACTOR.match(name) or not re.search(r"(^|\.)(lora_\w+|token_adapter|trainable_tokens\w*)(\.|$)", name):
            continue
        if re.search(r"\.lora_[AB]\.[^.]+\.weight$|\.lora_embedding_[AB]\.[^.]+$", name):
            raise AdapterError(f"{where}: {name} is a name inside PEFT, not of its files: load the model, and save it with save_pretrained")
        raise AdapterError(
            f"{where}: {name} is no factor of plain LoRA (but of DoRA, KaSA, a LoRA bias, single tokens or the like), and the mean of such "
            "updates is not to be had from their factors: train without it"
        )


def trained_whole(name: str, config: Mapping[str, Any]) -> bool:
    """PEFT's rule: is the tensor of a module whose path ends with a name in `modules_to_save`, or of a head of the task's type?"""
    wanted = tuple(config.get("modules_to_save") or ()) + HEADS.get(config.get("task_type") or "", ())
    parts = name.split(".")
    return any(".".join(parts[:count]).endswith(wanted) for count in range(1, len(parts)))


def require_plain_lora(config: Mapping[str, Any], where: str) -> None:
    """Refuse by name what changes the algebra (another base, another product, a third factor), and what is not known.

    Raises:
        AdapterError: such a setting.
    """
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{where}: peft_type is {config.get('peft_type')}: only LORA adapters can be aggregated")
    _require_numbers(config, where)
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{where}: bias={config['bias']!r} trains biases of the base, which are not carried over: train with bias='none'"
        )
    initialisation = config.get("init_lora_weights", True)
    if isinstance(initialisation, str) and initialisation.lower() not in INITIALISATIONS:
        raise AdapterError(f"{where}: init_lora_weights={initialisation!r} changes the base as well: train with the default initialisation")
    for key in sorted(config.keys() - HARMLESS - {MARK}):
        if config[key]:
            raise AdapterError(
                f"{where}: {key} is set, and the sum of updates with it is not known to be the sum of their factors: train without it"
            )


def _require_numbers(config: Mapping[str, Any], where: str) -> None:
    """alpha is a number, names are texts, and the patterns map regular expressions to numbers."""
    if not isinstance(alpha := config.get("lora_alpha", 8), int | float) or (isinstance(alpha, int) and abs(alpha) > sys.float_info.max):
        raise AdapterError(f"{where}: lora_alpha is {str(alpha)[:40]}, not a number that float64 has")
    for key in ("base_model_name_or_path", "task_type", "revision"):
        if not isinstance(config.get(key), str | None):
            raise AdapterError(f"{where}: {key} must be a text, or null")
    names = config.get("modules_to_save") or []
    if not isinstance(names, list | tuple | set) or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"{where}: modules_to_save must be a list of names")
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
