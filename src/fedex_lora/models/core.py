"""LoRA with a core: `B = U C`, where only the `r x r` matrix C is trained, inside PEFT's own layers (LoRA-XS, arXiv 2405.17604)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedex_lora.aggregation.core_pair import CorePair
from fedex_lora.types import Adapter

MORE, POWERS = 16, 10  # of the randomised SVD: directions beside twice the rank, and power iterations
SEED = 0


class Core(nn.Module):
    """What stands in the place of a layer's `lora_B`: `U (C x)`, with C in a plain `nn.Linear`.

    Args:
        U: `out x r`; frozen.

    Example:
        >>> core = Core(torch.eye(5, 2))
        >>> core.weight.shape, [name for name, _ in core.named_parameters()]
        (torch.Size([5, 2]), ['inner.weight'])
    """

    outer: Tensor

    def __init__(self, U: Tensor) -> None:
        super().__init__()
        self.register_buffer("outer", U)
        self.inner = nn.Linear(U.shape[1], U.shape[1], bias=False, device=U.device, dtype=U.dtype)
        nn.init.zeros_(self.inner.weight)

    @property
    def weight(self) -> Tensor:
        """B, which PEFT merges."""
        return self.outer @ self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        """`U (C x)` for `x` of `.. x r`."""
        return functional.linear(self.inner(x), self.outer)


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first `rank` singular vectors of a weight: U (`out x rank`, orthonormal columns) and V (`rank x in`, orthonormal rows), fp32.

    By power iterations in fp64 from a fixed seed; the largest number of each row of V is positive. Another machine's may differ in the last
    digits, or in vectors whose singular values are equal, so they are sent, and never made twice.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        U, _, V = torch.svd_lowrank(weight.double(), q=min(2 * rank + MORE, *weight.shape), niter=POWERS)
    U, V = U[:, :rank], V[:, :rank].mT
    signs = V.gather(1, V.abs().argmax(dim=1, keepdim=True)).sign()
    return (U * signs.mT).float().contiguous(), (V * signs).float().contiguous()


def core_start(weight_of: Callable[[str], Tensor], adapter: Adapter) -> dict[str, CorePair]:
    """An adapter whose model is the base: U and A from the truncated SVD of each weight, and C zero.

    Args:
        weight_of: module path -> its weight, `out x in`, one at a time; of a quantised one its values.
        adapter: whose modules, ranks and scalings it has.
    """
    start = {}
    for module, pair in adapter.items():
        U, A = truncated_svd(weight_of(module), pair.rank)
        start[module] = CorePair(A=A, U=U, C=torch.zeros(pair.rank, pair.rank), scaling=pair.scaling)
    return start
