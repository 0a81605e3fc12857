"""The frozen base `W0 + D`: D folded into the weight where that is exact, or kept beside it where it is not."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fedex_lora.aggregation.lowrank import same_bits
from fedex_lora.errors import ModelError
from fedex_lora.exactness.algebra import relative_error, worst
from fedex_lora.exactness.measure import Realised
from fedex_lora.models.fingerprint import fingerprint
from fedex_lora.models.layers import Layer, disable_cpu_repacking, is_quantised, like_weight, oriented
from fedex_lora.models.lora import lora_layers
from fedex_lora.models.pristine import PristineWeights
from fedex_lora.storage.peft_rules import PREFIX
from fedex_lora.types import Delta, Dense

Where: TypeAlias = Literal["auto", "fold", "side"]


class FrozenBase:
    """The weights under a PEFT model's adapters, and what they have gained.

    A delta has two homes. *Folded* into the weight, `W = W0 + D`, always from the pristine W0, so that setting the same D twice is setting
    it once: exact to rounding in float32, and free at run time. Or as a *side* path, `W0 x + U (V x)`, a frozen low-rank product whose
    factors stay float32: for weights of 16 bits or quantised, where folding would lose most of D, and for weights that another module
    shares (tied embeddings), where folding would change both.

    Args:
        model: a PEFT model; changed in place.
        where: "auto" folds float32 weights of their own, and keeps the others' deltas beside them; "fold" and "side" say it for all.

    Raises:
        ModelError: to be folded into a weight that is not float32, or is shared.
    """

    def __init__(self, model: nn.Module, where: Where = "auto") -> None:
        self._model = model
        self._layers = lora_layers(model)
        disable_cpu_repacking(model)
        owners = _owners(model)
        checkpoint = PristineWeights(getattr(model, "config", None))
        self._homes: dict[str, _MergedDelta | _SideDelta] = {}
        for name, layer in self._layers.items():
            why_not = _why_not_fold(layer, owners)
            if where == "fold" and why_not:
                raise ModelError(f"{name} {why_not}: set base.delta = 'auto' or 'side'")
            side = where == "side" or (where == "auto" and why_not is not None)
            self._homes[name] = _SideDelta(layer) if side else _MergedDelta(layer, checkpoint)
        self._now: dict[str, Delta] = {}
        self._unsure = set[str]()  # modules whose delta could not be set, for lack of memory say

    @torch.no_grad()
    def set(self, base_delta: Mapping[str, Delta]) -> None:
        """Make the base `W0 + base_delta`.

        Raises:
            ModelError: a module that the model does not have, or another shape.
        """
        for name, delta in base_delta.items():
            if name not in self._homes:
                raise ModelError(f"the base delta has a module {name} that this model has no adapter on: is it another base model?")
            if (shape := self._layers[name].shape) != delta.shape:
                raise ModelError(f"the base delta of {name} is {delta.shape}, the model's weight {shape}: is it another base model?")
        for name, home in self._homes.items():
            if name in self._unsure or not same_bits(self._now.get(name), base_delta.get(name)):
                self._unsure.add(name)
                home.set(base_delta.get(name))
        self._unsure.clear()
        self._now = dict(base_delta)

    @contextmanager
    def holding(self, base_delta: Mapping[str, Delta]) -> Iterator[None]:
        """The base with another base delta, within; afterwards what it had gained is there again, to the bit."""
        now = self._now
        self.set(base_delta)
        try:
            yield
        finally:
            self.set(now)

    @property
    def homes(self) -> dict[str, int]:
        """How many modules' deltas are folded, and how many stay beside."""
        side = sum(isinstance(home, _SideDelta) for home in self._homes.values())
        return {"fold": len(self._homes) - side, "side": side}

    def fingerprint(self) -> str:
        """The base's name: see `fedex_lora.models.fingerprint`. Taken when it is first asked for."""
        return self._fingerprint

    @property
    def name(self) -> str:
        """What all parties of a federation must have alike: the fingerprint, and the precision and quantisation of what is under adapters.

        >>> FrozenBase(model).name                                                         # doctest: +SKIP
        '5f2c...e1 bfloat16 none'
        """
        layers = sorted(self._layers.values(), key=lambda layer: not is_quantised(layer.base))
        weight = layers[0].base.weight if layers else next(self._model.parameters())
        kinds = {"Params4bit": getattr(weight, "quant_type", ""), "Int8Params": "int8"}
        dtype = getattr(self._model, "dtype", torch.float32) if type(weight).__name__ in kinds else weight.dtype
        return f"{self.fingerprint()} {str(dtype).removeprefix('torch.')} {kinds.get(type(weight).__name__, 'none')}"

    def pristine(self, name: str) -> Tensor:
        """A module's W0, `out x in`, on the CPU; of a quantised one its values."""
        return self._homes[name].w0()

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._model, {name: home.w0 for name, home in self._homes.items()})

    @property
    def side_error(self) -> float:
        """The worst module's `|what its side path adds - D x| / |D x|` on random inputs, D as last set; the path runs as in the model.

        Rounding to the output's precision comes after it, so this shows in 16 bits, too, whether D is there. Zero without side paths.
        """
        errors = [
            home.added_error(self._now[name]) for name, home in self._homes.items() if isinstance(home, _SideDelta) and name in self._now
        ]
        return worst(errors)

    @torch.no_grad()
    def realised(self, ideal: Mapping[str, Delta]) -> Realised:
        """What the model's own layers compute, against `W0 + ideal` in fp64 (W0 as stored: dequantised, upcast).

        Of a folded module the weight is read, `W + s B A`. A module with a side path is run, in its own precision, on random inputs.
        """
        error, size, rounding = dict[str, float](), dict[str, float](), dict[str, float]()
        for name, delta in ideal.items():
            error[name], size[name], rounding[name] = self._homes[name].realised(delta, getattr(self._model, "dtype", torch.float32))
        return Realised(error=error, ideal=size, rounding=rounding)


class _MergedDelta:
    """`W = W0 + D`, added on the CPU. W0 is read again from the checkpoint where that holds it bit for bit, else it is a copy."""

    def __init__(self, layer: Layer, checkpoint: PristineWeights) -> None:
        self._layer, self._pristine = layer, checkpoint.source(layer.name, layer.base.weight)

    def set(self, delta: Delta | None) -> None:
        new = self._pristine() if delta is None else like_weight(self._layer.base, self.w0() + delta.dense(torch.float32))
        self._layer.base.weight.copy_(new)

    def w0(self) -> Tensor:
        """The pristine weight as a matrix, on the CPU; as is that of a side path."""
        return oriented(self._layer.base, self._pristine())

    def realised(self, ideal: Delta, compute: torch.dtype) -> tuple[float, float, float]:
        target = self.w0().double() + ideal.dense()
        got = self._layer.weight().cpu().double() + self._layer.pair().delta()
        norm = torch.linalg.matrix_norm
        return float(norm(got - target)), float(norm(ideal.dense())), torch.finfo(torch.float32).eps * float(norm(target))


class _SideDelta:
    """`W0 x + U (V x)`: a frozen product in float32 that the layer itself carries, outside its state dict."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        if not hasattr(layer.base, "base_delta"):
            layer.base.base_delta = SidePath(layer)
            layer.base.register_forward_hook(layer.base.base_delta.added)
        layer.base.base_delta.hold(None)

    def set(self, delta: Delta | None) -> None:
        self._layer.base.base_delta.hold(delta)

    def w0(self) -> Tensor:
        return self._layer.weight().cpu()

    def _probe(self, compute: torch.dtype) -> Tensor:
        """An input, on the CPU."""
        x = self._layer.probe(torch.Generator().manual_seed(0))
        return x.to(compute) if x.is_floating_point() else x

    @torch.no_grad()
    def added_error(self, delta: Delta) -> float:
        x = self._probe(torch.float32)
        want = self._layer.apply(x.double() if x.is_floating_point() else x, [delta.dense()])
        device = self._layer.base.weight.device
        nothing = torch.zeros(want.shape, dtype=torch.float32, device=device)
        got = self._layer.base.base_delta.added(self._layer.base, (x.to(device),), nothing).cpu()
        return relative_error(float(torch.linalg.vector_norm(got - want)), float(torch.linalg.vector_norm(want)))

    def realised(self, ideal: Delta, compute: torch.dtype) -> tuple[float, float, float]:
        x = self._probe(compute)
        training = self._layer.peft.training
        got = self._layer.peft.eval()(x.to(self._layer.base.weight.device)).cpu().double()
        self._layer.peft.train(training)
        x, matrix = x.double() if x.is_floating_point() else x, ideal.dense()
        change, target = (self._layer.apply(x, [W]) for W in (matrix, self.w0().double() + matrix))
        if getattr(self._layer.base, "bias", None) is not None:
            bias = self._layer.base.bias.detach().cpu().double()
            target = target + bias.reshape(-1, *[1] * (target.ndim - 2)) if self._layer.layout.kernel else target + bias
        norm = torch.linalg.vector_norm
        eight_bits = type(self._layer.base.weight).__name__ == "Int8Params"  # its inputs are quantised too, by 1 / 127
        return float(norm(got - target)), float(norm(change)), float(norm(target)) * (1 / 127 if eight_bits else torch.finfo(compute).eps)


class SidePath(nn.Module):
    """What a layer's output gains from its base delta: computed and added in float32, then rounded to the output's precision.

    It is in no state dict, so a model that is saved with `save_pretrained` lacks it, merged or not: that warns.
    """

    warned = False

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self._layer = layer
        self.hold(None)

    def hold(self, delta: Delta | None) -> None:
        """Take factors, a matrix, or nothing."""
        device = self._layer.base.weight.device
        parts = (None, None) if delta is None else (None, delta.W) if isinstance(delta, Dense) else (delta.V, delta.U)
        for name, part in zip(("first", "last"), parts, strict=True):
            self.register_buffer(name, None if part is None else part.detach().float().to(device), persistent=False)

    def added(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The forward hook: `output + D x`."""
        matrices = [part for part in (self.first, self.last) if isinstance(part, Tensor)]
        if not matrices:
            return output
        gained = self._layer.apply(args[0], matrices)
        return (output.to(gained.dtype) + gained).to(output.dtype)

    def _save_to_state_dict(self, *args: Any, **options: Any) -> None:
        super()._save_to_state_dict(*args, **options)
        if self.last is not None and not SidePath.warned:
            SidePath.warned = True
            warnings.warn(
                "the base delta beside this model's weights is not in its state dict, so what is saved lacks it: use fedex-lora export",
                stacklevel=2,
            )


def _owners(model: nn.Module) -> dict[int, dict[int, str]]:
    """Address of a weight -> the modules that use it, by identity, with their names."""
    owners: dict[int, dict[int, str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter.data_ptr(), {})[id(module)] = name.removeprefix(PREFIX)
    return owners


def _why_not_fold(layer: Layer, owners: Mapping[int, Mapping[int, str]]) -> str | None:
    weight = layer.base.weight
    if is_quantised(layer.base):
        return f"is quantised ({type(weight).__name__}), and folding would lose the base delta"
    if weight.dtype != torch.float32:
        return f"is {weight.dtype}, and folding is exact in float32 only"
    others = [name for module, name in owners[weight.data_ptr()].items() if module != id(layer.base)]
    return f"shares its weight with {others[0]}, and folding would change both" if others else None
