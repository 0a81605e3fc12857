"""Noise and batches are of the operating system's generator: the right distribution, and nothing of torch's or numpy's generators."""

import math
import secrets
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from torch import nn
from transformers import set_seed

from fedex_lora.client.private import PoissonBatches, PrivateOptimizer
from fedex_lora.privacy.accounting import Mechanism
from fedex_lora.privacy.secret_numbers import secret_normals, secret_uniforms

COUNT = 200_000


def noised(count=6, dtype=torch.float32, start=0.0, sigma=2.0, clip=0.5):
    """The gradient of a step of no rows, divided by 4, and then of one whose sum is `start`."""
    parameter = nn.Parameter(torch.zeros(count, dtype=dtype))
    optimizer = PrivateOptimizer(torch.optim.SGD([parameter], lr=1.0), noise_multiplier=sigma, max_grad_norm=clip, expected_batch_size=4)
    parameter.grad_sample = torch.full((1, count), start, dtype=dtype)
    optimizer.step()
    return parameter.grad


def test_numbers_are_normal_and_uniform():
    normal, uniform = secret_normals(COUNT), secret_uniforms(COUNT)
    assert kstest(normal, "norm").pvalue > 1e-6
    assert kstest(uniform, "uniform").pvalue > 1e-6
    assert kstest(1.01 * normal + 0.02, "norm").pvalue < 1e-6  # so the test sees a hundredth
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        spread = math.sqrt({1: 1, 2: 2, 3: 15, 4: 96}[power] / COUNT)  # of the mean of so many such powers
        assert abs(float((normal**power).mean()) - moment) < 6 * spread
    assert abs(float(np.corrcoef(normal[:-1], normal[1:])[0, 1])) < 6 / math.sqrt(COUNT)
    assert len(np.unique(normal)) == COUNT


def test_tails_are_there_to_the_last_digit(monkeypatch):
    """Where the upper 64 bits are all zero, the lower ones still count; the sign is a bit of its own."""
    for low in (0, 1, 2, 3, 2**63):
        monkeypatch.setattr(secrets, "token_bytes", lambda count, low=low: bytes(count // 2) + (count // 16) * low.to_bytes(8, "little"))
        (number,) = secret_normals(1)
        assert number == pytest.approx((1 if low % 2 else -1) * NormalDist().inv_cdf((low + 1) / 2**129), rel=1e-9)
        assert secret_uniforms(1)[0] == (low + 1) / 2**128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_is_the_expected_function_of_the_system_s_bytes(monkeypatch, dtype):
    """And so of nothing else: by Python's own inverse of the distribution function, and one rounding of the sum."""
    fixed = np.random.default_rng(3).bytes(16 * 6)
    monkeypatch.setattr(secrets, "token_bytes", lambda count: fixed[:count])
    words = [int.from_bytes(fixed[at : at + 8], "little") for at in range(0, 96, 8)]
    wide = [(high << 64) + low + 1 for high, low in zip(words[:6], words[6:], strict=True)]
    normal = [(1 if low % 2 else -1) * NormalDist().inv_cdf(whole / 2**129) for whole, low in zip(wide, words[6:], strict=True)]
    for start in (0.0, 0.125):
        expected = torch.tensor([start + 2.0 * 0.5 * one for one in normal], dtype=torch.float64).to(dtype) / 4
        assert torch.equal(noised(dtype=dtype, start=start), expected)
    assert np.allclose(secret_uniforms(6), [whole / 2**128 for whole in wide], rtol=1e-15, atol=0)


def test_no_generator_of_torch_or_numpy_has_a_part_in_it(monkeypatch):
    """The same seed gives other noise and other batches, and the generators stand where they stood."""

    def drawn():
        set_seed(11)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        found = noised(), list(PoissonBatches(200, Mechanism(1.0, 0.5, 2)))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])
        return found

    def refused(*args, **options):
        raise AssertionError("a generator that can be solved")

    for module, name in ((torch, "normal"), (torch, "randn"), (torch, "rand"), (torch, "Generator"), (np.random, "default_rng")):
        monkeypatch.setattr(module, name, refused)
    (noise, batches), (other, others) = drawn(), drawn()
    assert not bool((noise == other).any())
    assert batches != others


def test_the_sum_is_not_rounded_before_its_noise():
    """In 16 bits a sum of ten rows would be off by more than a hundredth of the clip norm, which noise is not made for."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = PrivateOptimizer(torch.optim.SGD([parameter], lr=1.0), noise_multiplier=0.0, max_grad_norm=1.03, expected_batch_size=1)
    parameter.grad_sample = torch.ones(10, 1, dtype=torch.bfloat16) * 9
    optimizer.signal_skip_step(True)
    optimizer.pre_step()
    assert parameter.summed_grad.item() == pytest.approx(10.3, abs=1e-4)


def test_batches_are_drawn_row_by_row():
    """Their sizes have the mean and variance of a binomial, each row its share, and two rows are together as often as they should."""
    rows, rate, steps = 12, 0.3, 20_000
    batches = PoissonBatches(rows, Mechanism(1.0, rate, steps))
    drawn = list(batches)
    assert len(drawn) == len(batches) == steps
    sizes, variance = np.array([len(batch) for batch in drawn]), rows * rate * (1 - rate)
    assert abs(sizes.mean() - rows * rate) < 5 * math.sqrt(variance / steps)
    assert abs(sizes.var() / variance - 1) < 6 * math.sqrt(2 / steps)
    counts = np.bincount([row for batch in drawn for row in batch], minlength=rows) / steps
    assert np.all(abs(counts - rate) < 6 * math.sqrt(rate * (1 - rate) / steps))
    together = sum(0 in batch and 11 in batch for batch in drawn) / steps
    assert abs(together - rate**2) < 6 * math.sqrt(rate**2 / steps)
    assert list(PoissonBatches(3, Mechanism(1.0, 1.0, 2))) == [[0, 1, 2]] * 2
