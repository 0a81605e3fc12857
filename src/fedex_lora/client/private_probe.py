"""Whether everything that a run trains has a sound gradient of every single row, tried before anything is written."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedex_lora.client.example_gradients import losses_of, owners, per_example_gradients, quieten
from fedex_lora.errors import ModelError
from fedex_lora.models.lora import lora_layers, set_trained
from fedex_lora.storage.peft_rules import PREFIX
from fedex_lora.tasks._rows import some

BUFFERS = "it keeps buffers, which rows would change"
BESIDE = "its gradient of a row depends on the rows beside it"
CALLED = "it is not called as a module, so nothing sees its rows"
FOREIGN = "Opacus cannot differentiate it row by row"
SHAPE = "it sees tokens, or something else, where rows should be"
RANDOM = "it is random, even without dropout, so that one row would shift the numbers of others"
UNUSED = "the loss does not depend on it"

Batch = Callable[[list[dict[str, Any]]], Any]
"""Rows -> a batch on the model's device."""


def require_sound(model: nn.Module, rows: list[dict[str, Any]], batch: Batch, kind: str, schedule: tuple[str, ...]) -> None:
    """Each trained tensor's gradients, by Opacus' hooks on a batch, are those of autograd on each row alone, whatever rows are beside it.

    Args:
        model: on its device; afterwards it is as it was, with the first factors of the schedule trained.
        rows: two or three, of different lengths; nothing of them is in what is raised.
        batch: of rows.
        kind: of the task.
        schedule: the factors that are trained, round after round.

    Raises:
        ModelError: they are not: every such module, and why, in one line.
    """
    found: dict[str, str] = {}
    with _as_it_was(model):
        for factors in dict.fromkeys(schedule):
            set_trained(model, factors)
            found |= _changing(model, batch(rows)) | _unsound(model, rows, batch, kind)
    set_trained(model, schedule[0])
    if found:
        reasons = {reason: sorted({_module(name) for name, why in found.items() if why == reason}) for reason in found.values()}
        told = "; ".join(f"{some(names)} ({reason})" for reason, names in reasons.items())
        raise ModelError(
            f"private training needs the gradient of every single row, and has none for {told}: choose others by lora.target_modules and "
            "lora.modules_to_save"
        )


def _module(name: str) -> str:
    """The path, in the base model, of the module that a parameter belongs to."""
    path = name.removeprefix(PREFIX).replace(".modules_to_save.default", "").replace(".base_layer", "")
    return path.partition(".lora_")[0] if ".lora_" in path else path.rpartition(".")[0] or path


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Inside, no B is zero, or A would have no gradient to compare; afterwards all numbers and modes are those of before."""
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    parameters = [layer.parameter(part) for layer in lora_layers(model).values() for part in layer.parts.replace("U", "")]
    factors = {parameter: parameter.detach().clone() for parameter in parameters}
    try:
        with torch.no_grad():
            for factor in factors:
                factor.add_(0.02 * torch.randn_like(factor))
        yield
    finally:
        with torch.no_grad():
            for tensor, kept in [*factors.items(), *buffers.items()]:
                tensor.copy_(kept)
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def _changing(model: nn.Module, batch: Any) -> dict[str, str]:
    """The modules that training changes beside what it trains: their numbers would not be private."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    model(**{name: value for name, value in dict(batch).items() if name != "labels"})
    return {name: BUFFERS for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}


def _unsound(model: nn.Module, rows: list[dict[str, Any]], batch: Batch, kind: str) -> dict[str, str]:
    model.eval()  # no dropout: both passes must see the same
    with_buffers = [module for module in owners(model) if any(True for _ in module.buffers())]
    held = {id(one) for module in with_buffers for one in module.parameters(recurse=False) if one.requires_grad}
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    found = {name: BUFFERS for name, one in trained.items() if id(one) in held}
    for name in found:  # Opacus would refuse to begin
        trained.pop(name).requires_grad_(False)
    try:
        if _is_random(model, batch(rows), kind):
            return found | dict.fromkeys(trained, RANDOM)
        alone = [_gradients(model, trained, batch([row]), kind) for row in rows]
        try:
            with per_example_gradients(model):
                quieten(model)
                losses_of(model, batch(rows), kind).sum().backward()  # type: ignore[no-untyped-call]
                samples = {name: getattr(one, "grad_sample", None) for name, one in trained.items()}
        except Exception as error:  # of whatever a module's own code makes of it
            if isinstance(error, torch.OutOfMemoryError):
                raise
            odd = [module for module in owners(model) if not isinstance(module, nn.Linear)]
            names = [name for name, one in trained.items() if any(one is own for module in odd for own in module.parameters(recurse=False))]
            return found | dict.fromkeys(names or trained, FOREIGN)
    finally:
        model.zero_grad()
        model.eval()
        for name in found:
            model.get_parameter(name).requires_grad_(True)
    exact = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    wrong = {name: _wrong(samples[name], [one[name] for one in alone], 1e-2 if exact else 0.2) for name in trained}
    return found | {name: reason for name, reason in wrong.items() if reason}


@torch.no_grad()
def _is_random(model: nn.Module, batch: Any, kind: str) -> bool:
    """As it is trained, does it give other losses for the same rows?"""
    quieten(model)
    seen, state = [], torch.get_rng_state()
    for seed in range(4):
        torch.manual_seed(seed)
        seen.append(losses_of(model, batch, kind))
    torch.set_rng_state(state)
    model.eval()
    return not all(torch.allclose(seen[0], one, rtol=1e-3, equal_nan=True) for one in seen)


def _gradients(model: nn.Module, trained: dict[str, nn.Parameter], batch: Any, kind: str) -> dict[str, Tensor | None]:
    loss = losses_of(model, batch, kind).sum()
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=True), strict=True))


def _wrong(samples: Any, alone: list[Tensor | None], tolerance: float) -> str:
    if all(one is None for one in alone):
        return UNUSED
    if not isinstance(samples, Tensor):
        return CALLED
    if len(samples) != len(alone):
        return SHAPE
    expected = torch.stack([torch.zeros_like(samples[0]) if one is None else one for one in alone]).float()
    finite = expected.flatten(start_dim=1).isfinite().all(dim=1)  # what is not counts as zero, and says nothing here
    expected, off = expected[finite], (samples.float() - expected)[finite].flatten(start_dim=1).norm(dim=1)
    return BESIDE if len(off) and not bool((off <= tolerance * expected.flatten(start_dim=1).norm(dim=1).max() + 1e-7).all()) else ""
