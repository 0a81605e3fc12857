"""What checks: against numpy in fp64, however small the difference is; and with nothing of what it checks."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from tests import oracle
from tests.conftest import make_updates

from fedex_lora import aggregate
from fedex_lora.exactness import algebra, measure
from fedex_lora.types import Dense, LowRank

SHAPES = [(30, 40, 3), (40, 30, 3), (12, 50, 11), (50, 12, 20), (8, 8, 30), (64, 48, 1)]


def factors(out, inner, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(out, rank, generator=generator), torch.randn(rank, inner, generator=generator))


def as_numpy(delta):
    return oracle.numpy64(delta.W) if isinstance(delta, Dense) else oracle.numpy64(delta.U) @ oracle.numpy64(delta.V)


@pytest.mark.parametrize("dense", [(), (0,), (1,), (0, 2)])
@pytest.mark.parametrize(("out", "inner", "rank"), SHAPES)
def test_sums_images_and_norms(out, inner, rank, dense):
    """Of factors, of matrices, and of both: the sum, its singular values and its norm, in fp64."""
    terms = [(c, factors(out, inner, rank, seed)) for seed, c in enumerate((1.0, -0.5, 0.25))]
    terms = [(c, Dense(term.dense(torch.float32)) if index in dense else term) for index, (c, term) in enumerate(terms)]
    want = sum(c * as_numpy(term) for c, term in terms)
    got = algebra.summed(terms)
    assert isinstance(got, Dense) == bool(dense)
    assert oracle.relative(as_numpy(got), want) < 1e-14
    assert algebra.norm(got) == pytest.approx(np.linalg.norm(want), rel=1e-13)
    singular = np.linalg.svd(want, compute_uv=False)
    found = torch.linalg.svdvals(algebra.image(got)).numpy()[: len(singular)]
    assert np.allclose(found, singular[: len(found)], rtol=1e-10, atol=1e-12 * singular[0])
    assert len(found) >= min(3 * rank, len(singular))


@pytest.mark.parametrize("size", [1e-3, 1e-7, 1e-11, 0.0])
def test_a_difference_of_factors_that_nearly_cancel(size):
    """`|D - (D + size E)|`: as a Gram matrix would give it, nothing below 1e-8 of |D| could be seen."""
    D, E = factors(60, 80, 4), factors(60, 80, 4, seed=1)
    moved = LowRank(torch.cat([D.U.double(), size * E.U.double()], 1), torch.cat([D.V.double(), E.V.double()]))
    got = algebra.norm(algebra.summed([(1.0, D), (-1.0, moved)]))
    assert got == pytest.approx(size * np.linalg.norm(as_numpy(E)), rel=1e-3, abs=1e-14 * np.linalg.norm(as_numpy(D)))


def test_an_image_is_never_larger_than_what_it_is_of():
    """Memory: `out x q`, or the matrix where that is no larger than the factors are twice."""
    for out, inner, rank in SHAPES:
        delta = factors(out, inner, rank)
        assert algebra.image(delta).numel() <= max(delta.numel, 0) or 2 * rank * (out + inner) >= out * inner
    assert algebra.image(factors(200, 300, 2)).shape == (200, 2)


def test_it_checks_with_nothing_of_what_it_checks():
    """Of `aggregation` only the rows of the methods; and `audits` and `verify` compute with `measure`."""
    root = Path(measure.__file__).parents[1]
    for name in (*root.glob("exactness/*.py"), root / "offline" / "verify.py"):
        nodes = [node for node in ast.walk(ast.parse(name.read_text())) if isinstance(node, ast.ImportFrom)]
        taken = {(node.module, alias.name) for node in nodes if node.module and "aggregation" in node.module for alias in node.names}
        assert taken <= {("fedex_lora.aggregation", "get_method")}, name


def test_a_wrong_aggregate_is_seen():
    """The check can fail: by 1e-5 of one factor, by a lost residual, by plain averaging."""
    updates = make_updates(3)
    result = aggregate(updates)
    ideal = measure.ideal_update({}, updates, result.weights)
    assert measure.exactness(ideal, result.adapter, result.residual).max_relative_error < 1e-6
    assert measure.exactness(ideal, result.adapter, {}).max_relative_error > 1e-2
    moved = {name: LowRank(gain.U * (1 + 1e-5), gain.V) for name, gain in result.residual.items()}
    assert measure.exactness(ideal, result.adapter, moved).max_relative_error > 1e-6
