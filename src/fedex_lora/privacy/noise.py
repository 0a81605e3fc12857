"""What the noise of private training makes of a model: in a client's factors, in the mean of the products, in the residual."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from fedex_lora.types import Adapter

NUMBERS = 4096  # a standard deviation of so many is right to one in ninety
Stepping: TypeAlias = Callable[[nn.Parameter], tuple[Optimizer, Callable[[], None]]]
"""(what is trained) -> its optimiser, and what moves the learning rate on after a step."""


def noise_of_training(stepping: Stepping, steps: int, std: float) -> float:
    """Standard deviation of a trained number after steps whose gradient is noise and nothing else.

    DP-SGD adds N(0, (sigma C)^2) to each number of a sum of clipped gradients, and divides by the expected batch b: the gradient of a
    record that says nothing is N(0, (sigma C / b)^2). What an optimiser makes of it (Adam: about its learning rate a step, however
    small the noise is) is measured, by `NUMBERS` of them.

    Args:
        stepping: makes the optimiser of these numbers, which begin at zero.
        steps: how many.
        std: sigma C / b.

    Example:
        >>> sgd = lambda numbers: (torch.optim.SGD([numbers], lr=0.1), lambda: None)
        >>> round(noise_of_training(sgd, steps=100, std=2.0), 1)  # 0.1 * 2 * sqrt(100)
        2.0
    """
    numbers = nn.Parameter(torch.zeros(NUMBERS))
    optimizer, on = stepping(numbers)
    generator = torch.Generator().manual_seed(0)  # a measurement, which protects nobody
    for _ in range(steps):
        numbers.grad = (std * torch.randn(NUMBERS, generator=generator)).to(numbers.device)
        optimizer.step()
        on()
    return float(numbers.detach().double().square().mean().sqrt())


class UpdateNoise(NamedTuple):
    """Frobenius norms, over all adapted modules, of what clients' noise makes of a round's update; root mean squares.

    Attributes:
        first: noise in one factor times the other factor; every method that trains both has it.
        products: noise times noise in the mean of the clients' products, the ideal.
        means: noise times noise in the product of the mean factors.
        residual: noise times noise in the residual, which is the difference of these two.
    """

    first: float
    products: float
    means: float
    residual: float


def noise_of_update(adapter: Adapter, deviations: Sequence[float], weights: Sequence[float]) -> UpdateNoise:
    """The noise in a round's update, of clients that started from one adapter and trained both of its factors.

    Client i has `A + t_i E_i` and `B + t_i F_i`, with E_i and F_i of standard normal numbers, weight p_i, and scaling s. In the mean of
    products, in the product of means, and in the residual, noise times noise is `s sum_ij c_ij t_i t_j F_i E_j` with c = diag(p), p p^T
    and diag(p) - p p^T. The terms are uncorrelated, and `E |F_i E_j|^2 = m n r` for a module of m x n and rank r. So

        E |noise times noise|^2 = s^2 m n r sum_ij (c_ij t_i t_j)^2

    which is `s t^2 sqrt(m n r (k-1)) / k` in the residual of k clients that weigh and vary alike: it grows with m n, while what all
    numbers of both factors can say grows with m + n only. To first order, `E |.|^2 = s^2 (m |A|^2 + n |B|^2) sum_i (p_i t_i)^2`.

    Args:
        adapter: what the round started from.
        deviations: t_i of each client (`noise_of_training`).
        weights: p_i, which sum to one.

    Example:
        >>> from fedex_lora.types import LoRAPair
        >>> start = {"q": LoRAPair(A=torch.ones(1, 4), B=torch.zeros(9, 1), scaling=2.0)}
        >>> noise_of_update(start, deviations=[0.5, 0.5], weights=[0.5, 0.5]).residual  # 2 * 0.25 * sqrt(9 * 4) / 2
        1.5
    """
    t, p = (torch.tensor(list(values), dtype=torch.float64) for values in (deviations, weights))
    coefficients = {"products": torch.diag(p), "means": torch.outer(p, p), "residual": torch.diag(p) - torch.outer(p, p)}
    sizes = sum(pair.scaling**2 * math.prod(pair.shape) * pair.rank for pair in adapter.values())
    own = sum(
        pair.scaling**2 * (pair.shape[0] * float(pair.A.double().square().sum()) + pair.shape[1] * float(pair.B.double().square().sum()))
        for pair in adapter.values()
    )
    second = {name: math.sqrt(sizes * float((c * torch.outer(t, t)).square().sum())) for name, c in coefficients.items()}
    return UpdateNoise(first=math.sqrt(own * float((p * t).square().sum())), **second)
