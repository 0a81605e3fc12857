"""How PEFT stores the two factors of each kind of layer; `models.layers` has the table of kinds."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from fedex_lora.errors import AdapterError
from fedex_lora.types import LoRAPair


@dataclass(frozen=True)
class Layout:
    """How PEFT stores the two factors of one module.

    Attributes:
        embedding: as two bare matrices, the other way round.
        kernel: (in, *kernel) of a convolution; empty for linear layers.
    """

    embedding: bool = False
    kernel: tuple[int, ...] = ()

    def stored(self, pair: LoRAPair) -> dict[str, Tensor]:
        """The tensors of a PEFT adapter file, by what follows the module's name."""
        if self.embedding:
            return {"lora_embedding_A": pair.B.T, "lora_embedding_B": pair.A.T}
        A = pair.A.reshape(pair.rank, *self.kernel) if self.kernel else pair.A
        B = pair.B.reshape(*pair.B.shape, *[1] * (len(self.kernel) - 1)) if self.kernel else pair.B
        return {"lora_A.weight": A, "lora_B.weight": B}

    @staticmethod
    def read(tensors: Mapping[str, Tensor]) -> tuple["Layout", Tensor, Tensor]:
        """The layout, A (`r x in`) and B (`out x r`) of the tensors of one module. The inverse of `stored`.

        Raises:
            AdapterError: not two factors of one kind.
        """
        match sorted(tensors):
            case ["lora_embedding_A", "lora_embedding_B"]:
                return Layout(embedding=True), tensors["lora_embedding_B"].T, tensors["lora_embedding_A"].T
            case ["lora_A.weight", "lora_B.weight"]:
                A, B = tensors["lora_A.weight"], tensors["lora_B.weight"]
                if A.ndim != B.ndim or A.ndim < 2 or prod(B.shape[2:]) != 1:
                    raise AdapterError(f"its factors have shapes {tuple(A.shape)} and {tuple(B.shape)}, which make no layer's update")
                if A.ndim > 2 and A.shape[0] != B.shape[1]:
                    raise AdapterError("it is a convolution in groups, whose update is not one matrix product: train without it")
                return Layout(kernel=tuple(A.shape[1:]) if A.ndim > 2 else ()), A.flatten(1), B.flatten(1)
        raise AdapterError("it has only one of its two factors")


LINEAR = Layout()
