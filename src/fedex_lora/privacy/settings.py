"""What of a configuration does not go with private training, and why."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from fedex_lora.aggregation import METHODS, get_method
from fedex_lora.config import Config
from fedex_lora.errors import ConfigError

FREE: Final = frozenset(
    "learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon optim optim_args lr_scheduler_type lr_scheduler_kwargs warmup_steps "
    "num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps bf16 tf32 use_cpu "
    "full_determinism torch_empty_cache_steps dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor".split()
)
"""Fields of `[training]` that only see what is noised, or are of the plan. All others are refused."""

HOOKS, BATCHES, DEVICES = "the gradients of single rows come by hooks", "Poisson sampling draws the batches", "training is one process"
REFUSED: Final[Mapping[str, tuple[tuple[Any, ...], str]]] = {
    "max_grad_norm": ((0, 1), "privacy.clip_norm is what gradients are clipped to"),
    "fp16": ((False,), "it scales losses, and so what is clipped: take bf16"),
    "label_smoothing_factor": ((0,), "the loss of a row is its own cross entropy"),
    "neftune_noise_alpha": ((None, 0), "its noise depends on how long the other rows of a batch are"),
    "gradient_checkpointing": ((None, False), f"{HOOKS}, and it runs modules twice"),
    "activation_checkpointing": ((None, False), f"{HOOKS}, and it runs modules twice"),
    "torch_compile": ((False,), HOOKS),
    "torch_compile_backend": ((None,), HOOKS),
    "torch_compile_mode": ((None,), HOOKS),
    "use_liger_kernel": ((False,), HOOKS),
    "debug": (("", []), "it stops at a row whose numbers overflow"),
    "auto_find_batch_size": ((False,), "it trains again, beyond what is accounted for"),
    "train_sampling_strategy": (("random",), BATCHES),
    "dataloader_drop_last": ((False,), BATCHES),
    "accelerator_config": ((None,), DEVICES),
    "parallelism_config": ((None,), DEVICES),
    "fsdp": ((None, "", [], False), DEVICES),
    "deepspeed": ((None,), DEVICES),
}
"""Other field of `[training]` -> its values that change nothing here, and what others would do."""

UNKNOWN: Final = ((), "nobody has looked at what it does to privacy: leave it out")

REFUSED_LOCAL: Final = {
    "trainer": "another's loop clips and adds noise where it likes",
    "head_rounds": "nobody has looked at what it does to privacy",
}

FOLLOWS_LOSS: Final = ("reduce_lr_on_plateau", "greedy")  # schedules
OPTIMIZERS: Final = frozenset(
    "adamw_torch adamw_torch_fused adamw_anyprecision adamw_torch_4bit adamw_torch_8bit adamw_bnb_8bit adamw_8bit paged_adamw_32bit "
    "paged_adamw_8bit adafactor adagrad sgd rmsprop rmsprop_bnb rmsprop_bnb_8bit rmsprop_bnb_32bit ademamix ademamix_8bit "
    "paged_ademamix_32bit paged_ademamix_8bit lion_8bit lion_32bit paged_lion_8bit paged_lion_32bit stable_adamw".split()
)
"""Those that see nothing but the noised gradient. LOMO and layer-wise ones step in the backward pass, before there is noise."""


def require_private(config: Config) -> None:
    """The method and the settings of a run go with private training; nothing is said of a run that has none.

    Raises:
        ConfigError: they do not: all that is wrong, in one line.

    Example:
        >>> from fedex_lora.config import parse_config
        >>> tables = {"base": {"model": "demo"}, "task": {"name": "demo"}, "privacy": {"epsilon": 3}, "training": {"fp16": True}}
        >>> require_private(parse_config(tables))
        Traceback (most recent call last):
        fedex_lora.errors.ConfigError: private training does not go with training.fp16 = True (it scales losses, ...
    """
    if config.privacy.is_on and (wrong := list(_wrong(config))):
        raise ConfigError(f"private training does not go with {'; nor with '.join(wrong)}: change that, or remove privacy.epsilon")


def _wrong(config: Config) -> Iterator[str]:
    if get_method(config.method).private == "no":
        able = ", ".join(name for name, row in METHODS.items() if row.private == "yes")
        yield f"method = {config.method!r} (use one of {able})"
    yield from (f"local.{key} ({reason})" for key, reason in REFUSED_LOCAL.items() if getattr(config.local, key))
    if config.base.quantization == "int8":
        yield "base.quantization = 'int8' (it computes a row's outliers from the whole batch: use 'nf4')"
    if config.clients.data and config.task.train_rows is not None:
        yield "task.train_rows (one row more or less would draw others: name files of the rows to train on)"
    if config.task.needs_labels:
        yield "classes that the rows decide (name them all in task.labels)"
    for key, value in config.training.items():
        harmless, reason = REFUSED.get(key, UNKNOWN)
        if key not in FREE and value not in harmless:
            yield f"training.{key} = {value!r} ({reason})"
    if (name := str(config.training.get("optim", "sgd"))) not in OPTIMIZERS:
        yield f"training.optim = {name!r} (it may step before there is noise: use adamw_torch, adafactor or sgd)"
    if (name := str(config.training.get("lr_scheduler_type", ""))) in FOLLOWS_LOSS:
        yield f"training.lr_scheduler_type = {name!r} (it follows the loss of the rows)"
