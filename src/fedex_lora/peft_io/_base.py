"""The frozen base: `W = W0 + D`, always from the pristine W0, so that setting the same D twice is setting it once."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedex_lora.errors import ModelError
from fedex_lora.measure import Exactness, fp32_floor
from fedex_lora.peft_io._model import lora_layers, read_model
from fedex_lora.types import Delta


class FoldedBase:
    """The weights under a PEFT model's adapters, with the base delta folded into them (fp32 only).

    W0 is not kept in memory where the model came from a safetensors checkpoint whose bytes equal the loaded weight: it is read again
    from the memory-mapped file. A weight that the file does not hold as it is (random, converted) is kept as a copy.

    Raises:
        ModelError: the base is not fp32, or a target's weight is shared with another module (folding would change both).
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = {name: layer.get_base_layer() for name, layer in lora_layers(model).items()}
        targets = {id(layer) for layer in self._layers.values()}
        elsewhere = {
            parameter.data_ptr(): name
            for name, module in model.named_modules(remove_duplicate=False)
            if id(module) not in targets
            for parameter in module.parameters(recurse=False)
        }
        for name, layer in self._layers.items():
            if layer.weight.dtype != torch.float32:
                raise ModelError(
                    f"the base weight {name} is {layer.weight.dtype}: folding is exact in float32 only; set base.dtype = 'float32'"
                )
            if layer.weight.data_ptr() in elsewhere:
                raise ModelError(f"{name} shares its weight with {elsewhere[layer.weight.data_ptr()]}: leave it out of lora.target_modules")
        checkpoint = _Checkpoint(getattr(getattr(model, "config", None), "_name_or_path", ""))
        self._pristine = {name: checkpoint.source(name, layer.weight) for name, layer in self._layers.items()}
        self._changed: set[str] = set()

    @torch.no_grad()
    def set(self, base_delta: Mapping[str, Delta]) -> None:
        """Make the base `W0 + base_delta`.

        Raises:
            ModelError: a module that the model does not have, or another shape.
        """
        for name in self._changed - base_delta.keys():
            self._layers[name].weight.copy_(self._pristine[name]())
        for name, delta in base_delta.items():
            if name not in self._layers:
                raise ModelError(f"the base delta has a module {name} that this model has no adapter on: is it another base model?")
            weight = oriented(self._layers[name])
            if weight.shape != delta.shape:
                raise ModelError(
                    f"the base delta of {name} is {delta.shape}, the model's weight {tuple(weight.shape)}: is it another base model?"
                )
            weight.copy_(self._w0(name) + delta.dense(torch.float32).to(weight.device))
        self._changed = set(base_delta)

    def fingerprint(self) -> str:
        """sha256 of the kind of model and of the pristine weights under the adapters: their names, shapes, and 256 values of each."""
        digest = hashlib.sha256(str(getattr(getattr(self._model, "config", None), "model_type", "")).encode())
        for name in sorted(self._layers):
            weight = self._w0(name).cpu()
            sample = weight.reshape(-1)[:: max(1, weight.numel() // 256)][:256].float().contiguous()
            digest.update(f"{name}{tuple(weight.shape)}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()

    def realised(self, ideal: Mapping[str, Delta]) -> tuple[Exactness, float]:
        """The model's own weights, `W + s B A`, against `W0 + ideal` in fp64, and the floor `eps |W| / |ideal|` of the worst module."""
        error, size, floor = {}, {}, 0.0
        adapter = read_model(self._model)
        for name, delta in ideal.items():
            target = self._w0(name).double().cpu() + delta.dense()
            got = oriented(self._layers[name]).double().cpu() + adapter[name].delta()
            error[name] = float(torch.linalg.matrix_norm(got - target))
            size[name] = float(torch.linalg.matrix_norm(delta.dense()))
            floor = max(floor, fp32_floor(float(torch.linalg.matrix_norm(target)), size[name]))
        return Exactness(error=error, ideal=size), floor

    def _w0(self, name: str) -> Tensor:
        w0 = self._pristine[name]()
        return w0.T if isinstance(self._layers[name], Conv1D) else w0


def oriented(layer: nn.Module) -> Tensor:
    """The layer's weight as `out x in`: a view, transposed for GPT-2's Conv1D, which stores `in x out`."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator, assignment]
    return weight.T if isinstance(layer, Conv1D) else weight


class _Checkpoint:
    """Where pristine weights can be read again."""

    def __init__(self, folder: str) -> None:
        self._where: dict[str, Path] = {}
        for path in sorted(Path(folder).glob("*.safetensors")) if folder and Path(folder).is_dir() else []:
            with safe_open(path, framework="pt") as file:
                self._where |= {key: path for key in file.keys()}  # noqa: SIM118 (not a dict)

    def source(self, name: str, weight: Tensor) -> Callable[[], Tensor]:
        """A function that gives W0: from the file if it is there bit for bit, else from a copy made now."""
        for key in self._where:
            if key.endswith(".weight") and (name.endswith(key.removesuffix(".weight")) or key.removesuffix(".weight").endswith(name)):
                read = _reader(self._where[key], key)
                if read().shape == weight.shape and read().dtype == weight.dtype and torch.equal(read(), weight.detach().cpu()):
                    return lambda: read().to(weight.device)
        copy = weight.detach().clone()
        return lambda: copy


def _reader(path: Path, key: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor

    return read
