"""The kinds of layer that LoRA adapts, each seen as one `out x in` matrix: the only place that knows how they differ.

============  =======================  ==================  ==========================================
layer         its weight               seen as             PEFT's factors, seen as `B` (out x r), `A` (r x in)
============  =======================  ==================  ==========================================
Linear        out x in                 itself              lora_B, lora_A
Conv1D        in x out                 its transpose       lora_B, lora_A
Conv1d/2d/3d  out x in x kernel        out x (in kernel)   lora_B, lora_A flattened the same way
Embedding     vocabulary x dimension   itself              lora_embedding_A^T, lora_embedding_B^T
============  =======================  ==================  ==========================================

Quantised linear layers (bitsandbytes, 4 and 8 bits) are linear layers whose weight is read dequantised and never written.

A model may be on any device. What is read from it is on the CPU before it is anything but the model's own numbers (some devices have no
float64), and what is written into it goes to its parameters' device.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fedex_lora.aggregation.core_pair import CorePair
from fedex_lora.errors import AdapterError
from fedex_lora.models.core import Core
from fedex_lora.storage.layout import LINEAR, Layout
from fedex_lora.types import LoRAPair

ADAPTER = "default"
CONVOLUTIONS: dict[int, Any] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


class Layer:
    """One LoRA layer of a PEFT model; factors are views as matrices, so writing into them writes into the model.

    Args:
        name: the module's path in the base model.
        peft: PEFT's layer.
        base: the layer that it wraps.
        adapter: PEFT's name of the adapter in it that is active.
    """

    factors = ("lora_A", "lora_B")

    def __init__(self, name: str, peft: Any, base: Any, adapter: str) -> None:
        self.name, self.peft, self.base, self.adapter = name, peft, base, adapter

    @property
    def layout(self) -> Layout:
        return LINEAR

    @property
    def rank(self) -> int:
        return int(self.peft.r[self.adapter])

    @property
    def scaling(self) -> float:
        return float(self.peft.scaling[self.adapter])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight as a matrix."""
        return (self.base.out_features, self.base.in_features) if is_quantised(self.base) else tuple(self.weight().shape)  # type: ignore[return-value]

    @property
    def parts(self) -> str:
        """What its factors are made of: see `LoRAPair.parts`."""
        held = getattr(self.peft, self.factors[1])
        return "AUC" if self.adapter in held and isinstance(held[self.adapter], Core) else "AB"

    def hold_core(self) -> None:
        """From now on B is `U C`, with the present B as U, and C zero.

        Raises:
            AdapterError: the layer is not linear.
        """
        if self.layout != LINEAR:
            kind = type(self.base).__name__
            raise AdapterError(f"{self.name} is a {kind}, and cores are for linear layers: leave it out of lora.target_modules")
        if self.parts == "AB":
            self.peft.lora_B[self.adapter] = Core(self.factor("B").clone())

    def parameter(self, part: str) -> nn.Parameter:
        """The parameter that holds A, B or C."""
        holder = getattr(self.peft, self.factors[part != "A"])[self.adapter]
        return holder if isinstance(holder, nn.Parameter) else holder.inner.weight if part == "C" else holder.weight

    def factor(self, part: str) -> Tensor:
        """A, `r x in`, or B, `out x r`; of a layer with a core A, U or C."""
        if part not in self.parts:
            raise AdapterError(f"the adapter does not fit the model: {self.name} is made of {', '.join(self.parts)}, and not of {part}")
        held: Tensor = self.peft.lora_B[self.adapter].outer if part == "U" else self.parameter(part)
        return held.detach()

    def pair(self) -> LoRAPair:
        """The factors, as copies on the CPU."""
        kind = CorePair if "C" in self.parts else LoRAPair
        return kind(**{part: copied(self.factor(part)) for part in self.parts}, scaling=self.scaling)

    def weight(self) -> Tensor:
        """The base's weight, `out x in`: a view, or its dequantised values."""
        return stored_weight(self.base)

    def resize(self, rank: int) -> None:
        """Another rank: new factors of zeros in the place of the old ones, trained or frozen as those were."""
        A, B = (getattr(self.peft, name)[self.adapter] for name in self.factors)
        A.weight = nn.Parameter(A.weight.new_zeros(rank, *A.weight.shape[1:]), A.weight.requires_grad)
        B.weight = nn.Parameter(B.weight.new_zeros(B.weight.shape[0], rank, *B.weight.shape[2:]), B.weight.requires_grad)
        self._count(A, B, rank)
        self.peft.r[self.adapter] = rank

    @staticmethod
    def _count(A: Any, B: Any, rank: int) -> None:
        A.out_features = B.in_features = rank

    def apply(self, x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """`W x` for the layer's input: of one matrix W (`out x in`), or of two whose product it is, V (`q x in`) and then U (`out x q`)."""
        x = x.to(matrices[0].dtype)
        for matrix in matrices:
            x = functional.linear(x, matrix)
        return x

    def probe(self, generator: torch.Generator) -> Tensor:
        """An input: Gaussian, 64 vectors."""
        return torch.randn(64, self.shape[1], generator=generator)


class Convolution(Layer):
    """A convolution without groups, dilation or special padding."""

    @property
    def layout(self) -> Layout:
        return Layout(kernel=tuple(self.base.weight.shape[1:]))

    def factor(self, part: str) -> Tensor:
        held = super().factor(part)
        if not held.is_contiguous():  # channels_last, of which `flatten` would give a copy
            self.parameter(part).data = held = held.contiguous()
        return held.flatten(1)

    @staticmethod
    def _count(A: Any, B: Any, rank: int) -> None:
        A.out_channels = B.in_channels = rank

    def apply(self, x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        (first, *rest), kernel = matrices, self.layout.kernel
        convolve = CONVOLUTIONS[len(kernel) - 1]
        x = convolve(x.to(first.dtype), first.reshape(-1, *kernel), None, self.base.stride, self.base.padding)
        for matrix in rest:
            x = convolve(x, matrix.reshape(*matrix.shape, *[1] * (len(kernel) - 1)))
        return x

    def probe(self, generator: torch.Generator) -> Tensor:
        channels, *kernel = self.layout.kernel
        return torch.randn(4, channels, *[2 * size + 1 for size in kernel], generator=generator)


class Embedding(Layer):
    """An embedding: its input picks rows of the weight, so U (or W) is looked up, and V multiplies from the right."""

    factors = ("lora_embedding_B", "lora_embedding_A")

    @property
    def layout(self) -> Layout:
        return Layout(embedding=True)

    def factor(self, part: str) -> Tensor:
        return super().factor(part).T

    def resize(self, rank: int) -> None:
        for part, old in (("A", self.parameter("A")), ("B", self.parameter("B"))):
            shape = (old.shape[0], rank) if part == "A" else (rank, old.shape[1])
            getattr(self.peft, self.factors["AB".index(part)])[self.adapter] = nn.Parameter(old.new_zeros(shape), old.requires_grad)
        self.peft.r[self.adapter] = rank

    def apply(self, x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        looked_up, *rest = reversed(matrices)
        rows = functional.embedding(x, looked_up)
        for matrix in rest:
            rows = rows @ matrix
        scale = getattr(self.base, "embed_scale", None)  # Gemma's embeddings multiply what they look up
        return rows if scale is None else rows * scale

    def probe(self, generator: torch.Generator) -> Tensor:
        return torch.randint(self.shape[0], (256,), generator=generator)


def layer_of(name: str, peft: Any, adapter: str = ADAPTER) -> Layer:
    """The layer's kind.

    Raises:
        AdapterError: a kind whose update is not one matrix product.
    """
    base = peft.get_base_layer()
    if isinstance(base, nn.Linear | Conv1D):
        return Layer(name, peft, base, adapter)
    if isinstance(base, nn.Embedding):
        return Embedding(name, peft, base, adapter)
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        odd = [
            text
            for text, there in (
                (f"{base.groups} groups", base.groups > 1),
                (f"dilation {base.dilation}", set(base.dilation) != {1}),
                (f"{base.padding_mode} padding", base.padding_mode != "zeros"),
            )
            if there
        ]
        if not odd:
            return Convolution(name, peft, base, adapter)
        raise AdapterError(
            f"module {name} is a {type(base).__name__} with {' and '.join(odd)}, where PEFT's update is no convolution of the same form: "
            "leave it out of lora.target_modules"
        )
    raise AdapterError(
        f"module {name} is a {type(base).__name__}; linear layers, convolutions and embeddings are covered: leave it out of "
        "lora.target_modules"
    )


def copied(tensor: Tensor) -> Tensor:
    """What leaves a model: a copy on the CPU, where all that is no model computes."""
    return tensor.detach().to("meta" if tensor.is_meta else "cpu", copy=True)


def is_quantised(layer: nn.Module) -> bool:
    """Are the layer's weights packed in 4 or 8 bits (bitsandbytes)?"""
    return type(getattr(layer, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def disable_cpu_repacking(model: nn.Module) -> None:
    """Stop bitsandbytes from packing 4-bit weights anew when it infers on a CPU: they cannot be trained on then, and are 0.8 % off."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


@torch.no_grad()
def stored_weight(layer: Any) -> Tensor:
    """A layer's weight as one matrix, `out x in`: a view where it is plain, float32 values where it is quantised."""
    if not is_quantised(layer):
        return oriented(layer, layer.weight.detach())
    state = getattr(layer.weight, "quant_state", None) or SimpleNamespace(dtype=None)  # of 4 bits only
    dtype, state.dtype = state.dtype, torch.float32  # what is stored, a code times a float32 scale, needs float32
    try:
        return dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)).detach().float()
    finally:
        state.dtype = dtype


def oriented(layer: nn.Module, weight: Tensor) -> Tensor:
    """A plain weight of a layer's shape as `out x in`: a view, but for convolutions in another memory format (channels_last)."""
    return weight.T if isinstance(layer, Conv1D) else weight.flatten(1)


def like_weight(layer: Any, matrix: Tensor) -> Tensor:
    """An `out x in` matrix in the shape of a layer's plain weight."""
    return oriented(layer, matrix).reshape(layer.weight.shape)
