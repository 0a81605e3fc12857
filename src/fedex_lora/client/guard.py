"""What training may not change in a model: kept before, compared after, and given back."""

import copy
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig

from fedex_lora.errors import first_of
from fedex_lora.models.lora import lora_layers
from fedex_lora.protocol.dumps import tensors_digest

CONTAINERS = (dict, OrderedDict, defaultdict, list, set)
HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")  # of parameters
CONFIGS = (PretrainedConfig, GenerationConfig, PeftConfig)


class Guard:
    """A model as it was before somebody else's trainer got it.

    What is trained may get other values, and nothing else. Frozen tensors are compared bit for bit, by digests. Whatever a trainer adds to
    modules (adapters, hooks, other methods, flags) or says in configurations is taken away again.

    Args:
        model: of which `requires_grad` says what is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._structure = model, _Structure(model)
        self._parameters = dict(model.named_parameters())
        self._kinds = {name: (tuple(one.shape), one.dtype) for name, one in self._parameters.items()}
        self._start = {name: one.detach().clone() for name, one in self._parameters.items() if one.requires_grad}
        self._trained = frozenset(self._start)
        self._frozen = {name: one for name, one in self._parameters.items() if name not in self._trained} | dict(model.named_buffers())
        self._digests = _digests(self._frozen)
        self._adapters = _adapters(model)
        self._hooks = {name: [dict(getattr(one, kind) or {}) for kind in HOOKS] for name, one in self._parameters.items()}
        self._process = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()

    @torch.no_grad()
    def begin(self) -> str:
        """What is trained has its values and precision again, and no more is trained than was; else what is wrong, in words."""
        if wrong := self._replaced():
            return wrong
        for name, parameter in self._parameters.items():
            if name in self._start:
                start = self._start[name].to(parameter.device)
                if parameter.dtype != start.dtype or not torch.equal(parameter, start):
                    parameter.data = start
            parameter.requires_grad_(parameter.requires_grad and name in self._trained)
        self._start = {}
        return ""

    def end(self, model: object) -> str:
        """Undo what was added, and say what has changed that may not, "" if nothing has.

        Args:
            model: what the trainer trained in the end.
        """
        wrong = "trained another model than it was given" if model is not self._model else self._replaced() or self._others()
        if wrong:
            return wrong
        self._structure.restore()
        dtype, grad, threads = self._process
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        torch.set_num_threads(threads)
        for name, parameter in self._parameters.items():
            parameter.grad = None
            for kind, kept in zip(HOOKS, self._hooks[name], strict=True):
                if there := getattr(parameter, kind):
                    there.clear()
                    there.update(kept)
            parameter.requires_grad_(name in self._trained)
        after = _digests(self._frozen)
        changed = [name for name, digest in self._digests.items() if after[name] != digest]
        return f"changed {first_of(changed)}, which is frozen" if changed else ""

    def _replaced(self) -> str:
        now = dict(self._model.named_parameters())
        gone = [name for name, parameter in self._parameters.items() if now.get(name) is not parameter]
        return f"replaced or removed the parameter {first_of(gone)}" if gone else ""

    def _others(self) -> str:
        """What is trained has its shape, precision, rank and scaling, it is what the model computes with, and nothing else is trained."""
        odd = [name for name, one in self._parameters.items() if (tuple(one.shape), one.dtype) != self._kinds[name]]
        if odd:
            return f"changed shape or precision of {first_of(odd)}"
        more = [name for name, one in self._model.named_parameters() if one.requires_grad and name not in self._parameters]
        if more:
            return f"trained {first_of(more)}, which this run does not train"
        adapters = _adapters(self._model)
        changed = [name for name, said in self._adapters.items() if adapters.get(name) != said]
        return f"changed rank or scaling of {first_of(changed)}, or left it merged, disabled or replaced by another" if changed else ""


def _digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: tensors_digest({name: tensor}) for name, tensor in tensors.items()}


def _adapters(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Module -> what decides what its adapter computes, beside the factors."""
    return {
        name: (layer.rank, layer.scaling, list(layer.peft.active_adapters), layer.peft.disable_adapters, layer.peft.merged)
        for name, layer in lora_layers(model).items()
    }


class _Structure:
    """Modules, parameters, buffers, hooks, attributes and configurations of a model, by reference: everything but the numbers."""

    def __init__(self, model: nn.Module) -> None:
        self._kept: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        configs: dict[int, Any] = {}
        for module in model.modules():
            self._keep(vars(module))
            for value in [*vars(module).values(), *getattr(module, "peft_config", {}).values()]:
                if isinstance(value, CONFIGS):
                    configs[id(value)] = value
        for config in configs.values():
            self._keep(vars(config))

    def _keep(self, attributes: dict[str, Any]) -> None:
        inside = {name: copy.copy(value) for name, value in attributes.items() if type(value) in CONTAINERS}
        self._kept.append((attributes, dict(attributes), inside))

    def restore(self) -> None:
        """All of it as it was kept."""
        for attributes, kept, inside in self._kept:
            attributes.clear()
            attributes.update(kept)
            for name, content in inside.items():
                there = attributes[name]
                there.clear()
                there.extend(content) if isinstance(there, list) else there.update(content)
