"""A gauge re-writes factors and leaves their product; each is what its definition says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import oracle
from tests.conftest import make_pair, make_updates

from fedex_lora import ClientUpdate, LoRAPair, aggregate
from fedex_lora.aggregation import GAUGES, METHODS, get_method
from fedex_lora.aggregation.factorizations import ALIGNED
from fedex_lora.errors import UsageError

GAUGED = [
    name
    for name, row in METHODS.items()
    if row.lora and not row.centralised and not row.core and row.client_state != "B" and (row.client_state or not row.reinitialises)
]


def updates_sharing(method, k, out, inner, rank, seed):
    """Clients whose frozen factors are shared, whatever the method freezes first."""
    updates = []
    for i in range(k):
        pair = make_pair(seed + i, out, inner, rank)
        first = make_pair(seed, out, inner, rank)
        trained = METHODS[method].trained(1)
        updates.append(ClientUpdate(f"c{i}", {"m": LoRAPair(pair.A if "A" in trained else first.A, pair.B, 2.0)}, i + 1))
    return updates


@pytest.mark.parametrize("gauge", GAUGES)
@pytest.mark.parametrize("method", GAUGED)
@given(shape=st.tuples(st.integers(4, 24), st.integers(4, 24)), k=st.integers(1, 4), rank=st.integers(1, 4), seed=st.integers(0, 9999))
@settings(max_examples=8, deadline=None)
def test_a_gauge_changes_no_product(method, gauge, shape, k, rank, seed):
    updates = updates_sharing(method, k, *shape, rank, seed)
    if METHODS[method].client_state and gauge in ALIGNED:
        return
    plain, gauged = aggregate(updates, f"{method}+as-is"), aggregate(updates, f"{method}+{gauge}")
    assert np.linalg.norm(oracle.total(gauged, "m") - oracle.total(plain, "m")) < 1e-6 * max(
        1e-30, np.linalg.norm(oracle.total(plain, "m"))
    )


def gauged(name, method="fedit"):
    return aggregate(make_updates(3), f"{method}+{name}").adapter["m0"]


def test_balanced_factors_have_equal_diagonal_grams():
    pair = gauged("balanced")
    left, right = oracle.numpy64(pair.A @ pair.A.T), oracle.numpy64(pair.B.T @ pair.B)
    assert np.allclose(left, right, atol=1e-5)
    assert np.allclose(left, np.diag(np.diag(left)), atol=1e-5)
    assert np.all(np.diff(np.diag(left)) <= 0)


def test_orthonormal_a():
    for method in ("fedit+orthonormal-a", "fedsvd"):
        A = aggregate(updates_sharing("fedsvd", 3, 12, 20, 3, 0), method).adapter["m"].A
        assert np.allclose(oracle.numpy64(A @ A.T), np.eye(3), atol=1e-6)


def distance(pair, A, B):
    return np.linalg.norm(oracle.numpy64(pair.A) - A) ** 2 + np.linalg.norm(oracle.numpy64(pair.B) - B) ** 2


def means(updates):
    p = oracle.shares([update.num_examples for update in updates])
    return [sum(w * oracle.numpy64(getattr(u.adapter["m0"], part)) for w, u in zip(p, updates, strict=True)) for part in "AB"]


def test_procrustes_is_the_nearest_rotation():
    """No other rotation of the same factors is nearer to the averaged ones (a thousand random ones), and balanced ones are farther."""
    A, B = means(make_updates(3))
    balanced, turned = gauged("balanced", "fedex-best"), gauged("procrustes", "fedex-best")
    assert distance(turned, A, B) < distance(balanced, A, B)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        Q, _ = np.linalg.qr(rng.standard_normal((3, 3)))
        other = LoRAPair(torch.from_numpy(Q @ oracle.numpy64(turned.A)), torch.from_numpy(oracle.numpy64(turned.B) @ Q.T))
        assert distance(other, A, B) >= distance(turned, A, B) - 1e-6
    assert oracle.relative(oracle.numpy64(gauged("procrustes").A), A) < 1e-5  # FedIT's factors are the averaged ones already


@pytest.mark.parametrize("method", ["fedit+balanced", "fedex-best", "flexlora"])
def test_components_that_are_zero_can_still_be_trained(method):
    """A product of rank one in factors of rank three: the other rows of A are drawn anew, their columns of B are zero."""
    pair = make_pair(1, rank=1)
    padded = LoRAPair(A=torch.cat([pair.A, torch.zeros(2, 20)]), B=torch.cat([pair.B, torch.zeros(12, 2)], dim=1), scaling=pair.scaling)
    result = aggregate([ClientUpdate("a", {"m": padded}, 1)], method)
    got = result.adapter["m"]
    assert oracle.relative(oracle.product(got), oracle.product(pair)) < 1e-6
    assert (got.A.norm(dim=1) > 0.1).all()
    assert torch.equal(got.B[:, 1:], torch.zeros(12, 2))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fedex+balancd", "unknown gauge 'balancd': did you mean 'balanced'"),
        ("fedx+balanced", "unknown method 'fedx': did you mean 'fedex'"),
        ("fedex+gl-aligned", "method 'fedex[+]gl-aligned': the gauge gl-aligned was removed: use procrustes or balanced"),
        ("fedex+", "unknown gauge ''"),
        ("fedsa+balanced", "fedsa has no gauge to choose, because its clients share one A"),
        ("reinit+balanced", "its adapter is drawn anew"),
        ("keep+procrustes", "clients of keep see their own only: use balanced or orthonormal-a"),
        ("full-ft+balanced", "there are no factors"),
    ],
)
def test_names_that_mean_nothing(name, message):
    with pytest.raises(UsageError, match=message):
        get_method(name)
