"""The gradient of each example by itself, by Opacus' hooks on a model that is otherwise as it was."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opacus.grad_sample import prepare_module
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, pad

from fedex_lora.tasks import IGNORED

LEFT = ("grad_sample", "summed_grad", "_forward_counter", "_current_grad_sample", "_norm_sample")  # on parameters, by Opacus


def example_losses(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """The loss of each example by itself.

    Args:
        logits: (examples, classes), (examples, 1) for scores, or (examples, tokens, vocabulary).
        labels: (examples,); for a causal LM (examples, tokens), with `IGNORED` where nothing is learnt.
        kind: of the task.

    Returns:
        (examples,), in float32: cross entropy, squared error, or the mean over the example's own tokens, 0 where it has none.

    Example:
        >>> import torch
        >>> example_losses(torch.zeros(1, 3, 8), torch.tensor([[IGNORED, IGNORED, IGNORED]]), "causal-lm")
        tensor([0.])
    """
    logits = logits.float()
    if kind == "causal-lm":
        ahead = pad(labels, (0, 1), value=IGNORED)[:, 1:]
        losses = cross_entropy(logits.flatten(0, 1), ahead.flatten(), ignore_index=IGNORED, reduction="none").view(ahead.shape)
        return losses.sum(dim=1) / (ahead != IGNORED).sum(dim=1).clamp(min=1)
    if logits.shape[-1] == 1:
        return mse_loss(logits.squeeze(-1), labels.float(), reduction="none")
    return cross_entropy(logits, labels, reduction="none")


def losses_of(model: nn.Module, batch: Any, kind: str) -> Tensor:
    """`example_losses` of a batch as the collators make it."""
    inputs = dict(batch)
    labels = inputs.pop("labels")
    return example_losses(model(**inputs).logits, labels, kind)


def owners(model: nn.Module) -> list[nn.Module]:
    """The modules that have a trained parameter of their own."""
    return [module for module in model.modules() if any(one.requires_grad for one in module.parameters(recurse=False))]


def quieten(model: nn.Module) -> None:
    """No dropout, and nothing else that is random: one row more would shift the masks of all others, and so move the sum without bound."""
    model.eval()
    for module in owners(model):
        module.training = True  # Opacus' hooks look


def forget(model: nn.Module) -> None:
    """Leave out what Opacus' hooks kept of a pass that was not finished."""
    for module in owners(model):
        for name in ("activations", "max_batch_len"):
            vars(module).pop(name, None)
        for parameter in module.parameters(recurse=False):
            parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
            vars(parameter).pop("_current_grad_sample", None)
            if hasattr(parameter, "_forward_counter"):
                parameter._forward_counter = 0


@contextmanager
def per_example_gradients(model: nn.Module) -> Iterator[None]:
    """Backward passes leave each example's gradient in `grad_sample` of what is trained; afterwards nothing of it is left.

    Args:
        model: already on its device, with its adapters. The loss that is differentiated must be a sum over examples.
    """
    hooks = None
    try:
        hooks = prepare_module(model, "hooks", wrap_model=False, loss_reduction="sum")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing")  # as it must, where the inputs of a module are data
            yield
    finally:
        if hooks is not None:
            hooks.cleanup()
        for handle in vars(model).pop("autograd_grad_sample_hooks", []):
            handle.remove()
        for module in owners(model):
            for name in ("activations", "max_batch_len", "ft_compute_sample_grad"):
                vars(module).pop(name, None)
        for parameter in model.parameters():
            parameter.grad = None
            for name in LEFT:
                vars(parameter).pop(name, None)
