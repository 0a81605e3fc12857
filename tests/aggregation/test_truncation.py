"""Truncated residuals: the best ones by Eckart-Young, with the tail reported."""

import itertools

import numpy as np
import pytest
from pydantic import ValidationError
from tests import oracle
from tests.conftest import make_updates

from fedex_lora import aggregate
from fedex_lora.config import Truncation
from fedex_lora.exactness import measure

UPDATES = make_updates(5)
FULL = aggregate(UPDATES, "fedex")


def spectrum(module):
    return np.linalg.svd(oracle.numpy64(FULL.residual[module].dense()), compute_uv=False)


def tail(module, rank):
    return float(np.sqrt((spectrum(module)[rank:] ** 2).sum()))


def error(result, module):
    return np.linalg.norm(oracle.numpy64(result.residual[module].dense()) - oracle.numpy64(FULL.residual[module].dense()))


@pytest.mark.parametrize("rank", [1, 2, 5, 11])
def test_no_matrix_of_that_rank_is_nearer_and_the_tail_is_reported(rank):
    result = aggregate(UPDATES, "fedex-svd", truncation=Truncation(rank=rank))
    for module, gain in result.residual.items():
        assert gain.rank == rank
        assert error(result, module) == pytest.approx(tail(module, rank), rel=1e-5)
        assert result.dropped[module] == pytest.approx(tail(module, rank), rel=1e-5)


def test_nothing_said_is_the_rank_of_the_adapter():
    assert {gain.rank for gain in aggregate(UPDATES, "fedex-svd").residual.values()} == {3}


def test_a_rank_above_the_residual_drops_nothing():
    result = aggregate(UPDATES, "fedex-svd", truncation=Truncation(rank=100))
    for module in result.residual:
        assert error(result, module) < 1e-6 * np.linalg.norm(oracle.numpy64(FULL.residual[module].dense()))
        assert result.dropped[module] == 0


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999, 1.0])
def test_energy_is_the_smallest_rank_that_keeps_it(share):
    result = aggregate(UPDATES, "fedex-svd", truncation=Truncation(energy=share))
    for module, gain in result.residual.items():
        energy = spectrum(module) ** 2
        kept = np.cumsum(energy) / energy.sum()
        assert kept[gain.rank - 1] >= share - 1e-6
        assert gain.rank == 1 or kept[gain.rank - 2] < share + 1e-6


@pytest.mark.parametrize("budget", [0.1, 0.35, 0.7])
def test_bytes_are_spent_where_they_keep_most(budget):
    """Against all ways to spend the same bytes: what is kept is the best, but for a remainder smaller than one component."""
    sizes = {module: 4 * sum(gain.shape) for module, gain in FULL.residual.items()}
    limit = int(budget * sum(gain.rank * sizes[module] for module, gain in FULL.residual.items()))
    result = aggregate(UPDATES, "fedex-svd", truncation=Truncation(bytes=limit))
    spent = sum(4 * gain.numel for gain in result.residual.values())
    assert spent <= limit < spent + max(sizes.values())
    energies = {module: np.concatenate([[0], np.cumsum(spectrum(module) ** 2)]) for module in sizes}
    best = max(
        sum(energies[module][rank] for module, rank in zip(sizes, ranks, strict=True))
        for ranks in itertools.product(range(13), repeat=3)
        if sum(sizes[module] * rank for module, rank in zip(sizes, ranks, strict=True)) <= spent
    )
    kept = sum(np.linalg.norm(oracle.numpy64(gain.dense())) ** 2 for gain in result.residual.values())
    assert kept == pytest.approx(best, rel=1e-6)


def test_a_budget_too_small_for_anything_is_fedit():
    result = aggregate(UPDATES, "fedex-svd", truncation=Truncation(bytes=1))
    assert not result.residual
    assert all(result.dropped[module] == pytest.approx(tail(module, 0), rel=1e-5) for module in FULL.residual)


def test_one_measure_only():
    with pytest.raises(ValidationError, match="one of rank, energy and bytes"):
        Truncation(rank=2, energy=0.5)


def test_the_tail_of_a_flat_spectrum():
    """Random clients: rank 1 of 12 keeps less than half of the energy, and the share that is dropped is told."""
    result = aggregate(UPDATES, "fedex-svd", truncation=Truncation(rank=1))
    dropped, whole = (np.sqrt(sum(tail(module, rank) ** 2 for module in FULL.residual)) for rank in (1, 0))
    assert measure.tail(result) == pytest.approx(dropped / whole, rel=1e-5)
    assert measure.tail(result) > 0.7
    assert measure.tail(FULL) == 0
