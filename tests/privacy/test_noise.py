"""Noise in an update: the formulas against drawn noise and plain products, Adam's against Adam written by hand."""

import math

import pytest
import torch

from fedex_lora.privacy.noise import noise_of_training, noise_of_update
from fedex_lora.types import LoRAPair

SHAPES = {"wide": (6, 9, 2), "tall": (11, 5, 3)}  # out, in, rank
DRAWS = 4000


@pytest.fixture(scope="module")
def start():
    generator = torch.Generator().manual_seed(0)
    return {
        name: LoRAPair(torch.randn(r, n, generator=generator, dtype=torch.float64), torch.randn(m, r, generator=generator).double(), 1.5)
        for name, (m, n, r) in SHAPES.items()
    }


@pytest.mark.parametrize(("p", "t"), [((1 / 3,) * 3, (0.4,) * 3), ((0.6, 0.3, 0.1), (0.2, 0.5, 0.9))])
def test_noise_times_noise_and_first_order(start, p, t):
    """Each norm's mean square over many draws of the clients' factors, by the plain formula of each."""
    generator, found = torch.Generator().manual_seed(1), dict.fromkeys(("first", "products", "means", "residual"), 0.0)
    for pair in start.values():
        shape = (DRAWS, len(p))
        noise_a = torch.randn(*shape, *pair.A.shape, generator=generator, dtype=torch.float64) * torch.tensor(t).view(1, -1, 1, 1)
        noise_b = torch.randn(*shape, *pair.B.shape, generator=generator, dtype=torch.float64) * torch.tensor(t).view(1, -1, 1, 1)
        weight = torch.tensor(p, dtype=torch.float64).view(1, -1, 1, 1)
        a, b = pair.A + noise_a, pair.B + noise_b
        mean_a, mean_b = (weight * a).sum(1), (weight * b).sum(1)
        residual = (weight * (b @ a)).sum(1) - mean_b @ mean_a  # of the whole factors: what all share drops out of it
        parts = {
            "first": (weight * (noise_b @ pair.A + pair.B @ noise_a)).sum(1),
            "products": (weight * (noise_b @ noise_a)).sum(1),
            "means": (weight * noise_b).sum(1) @ (weight * noise_a).sum(1),
            "residual": residual,
        }
        for name, value in parts.items():
            found[name] += float((pair.scaling * value).square().sum((1, 2)).mean())
    said = noise_of_update(start, t, p)._asdict()
    assert {name: math.sqrt(value) for name, value in found.items()} == pytest.approx(said, rel=0.02)
    assert said["residual"] > 1.2 * said["means"]  # the formulas differ by more than the draws do


def test_the_formula_of_alike_clients(start):
    for k in (2, 5, 20):
        plain = math.sqrt(sum((1.5 * 0.3**2) ** 2 * m * n * r for m, n, r in SHAPES.values()) * (k - 1)) / k
        assert noise_of_update(start, [0.3] * k, [1 / k] * k).residual == pytest.approx(plain, rel=1e-12)
    assert noise_of_update(start, [0.3], [1.0]).residual == 0.0


def adam(steps, rate, deviation, seed=5):
    """Adam with a rate that falls to zero, in plain formulas, on noise alone."""
    generator = torch.Generator().manual_seed(seed)
    x, first, second = (torch.zeros(20_000, dtype=torch.float64) for _ in range(3))
    for step in range(steps):
        gradient = deviation * torch.randn(20_000, generator=generator, dtype=torch.float64)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        by = rate * (1 - step / steps)
        x = x - by * (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    return float(x.std())


def test_adam_moves_by_its_rate_however_small_the_noise_is():
    def stepping(numbers):
        optimizer = torch.optim.Adam([numbers], lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 40)
        return optimizer, schedule.step

    small, large = (noise_of_training(stepping, 40, deviation) for deviation in (1e-3, 1e3))
    assert small == pytest.approx(large, rel=1e-3)
    assert small == pytest.approx(adam(40, 1e-2, 1.0), rel=0.04)
    assert adam(40, 1e-2, 1.0) == pytest.approx(adam(40, 1e-2, 1.0, seed=6), rel=0.02)
