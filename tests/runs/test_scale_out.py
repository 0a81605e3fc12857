"""The simulation of many clients: its bytes against messages that are really made, its costs and trees against small cases by hand."""

import pytest
from benchmarks import scale_out

TINY = scale_out.Model({(24, 16): 3}, 2, (), ((24, 16), 1))  # N = 40, out x in = 384


@pytest.mark.parametrize("name", scale_out.NAMES)
@pytest.mark.parametrize("k", [3, 12])
def test_messages_have_the_bytes_of_the_formulas(name, k):
    """12 clients of rank 2 have more numbers than the matrix, so there the whole base delta travels."""
    found = scale_out.counted(name, k, shape=(24, 16), rank=2, modules=2)
    assert found["down"] == found["down_formula"]
    assert found["up"] == found["up_formula"]


def test_the_floor_is_met():
    """k r N; the paper's is (k + 1) r N."""
    unit = 4 * 4 * (768 + 768) * 2  # bytes, rank, N, modules
    assert scale_out.counted("fedex", 3)["down"] == 3 * unit


def test_operations_by_hand():
    """Of 4 clients of rank 2: no dense product, QR of 24 x 8 and 16 x 8, the product of their cores, its SVD."""
    assert scale_out.flops("fedex", 4, (24, 16), 2) == 0
    assert scale_out.flops("fedex", 12, (24, 16), 2) == 2 * 24 * 16 * 22  # (k - 1) r = 22 columns of N = 40 are more than 384
    qr = 2 * 24 * 8**2 - 2 / 3 * 8**3 + 2 * 16 * 8**2 - 2 / 3 * 8**3
    assert scale_out.flops("flexlora", 4, (24, 16), 2) == qr + 2 * 8 * 8 * 8 + 20 * 8**3


def test_a_flat_server_by_hand():
    cost = scale_out.Cost(a=1.0, b=0.001, c=0.0, points=[], check=1.0)
    row = scale_out.scaled("fedex", 4, TINY, cost, decode=0.5)
    unit = 3 * 4 * 2 * 40  # modules, bytes, rank, N
    assert (row["down_bytes"], row["up_bytes"]) == (4 * unit, unit)
    assert row["decoding_seconds"] == 4 * unit * 0.5
    assert row["aggregation_seconds"] == pytest.approx(3 * (1 + 0.001 * 4 * 2 * 40))
    assert row["memory_bytes"] == 4 * unit + 4 * unit  # the updates; Abar, Bbar and (k - 1) r ranks of residual


def test_a_tree_by_hand():
    """Four clients, two a region: each region sends r N and (2 - 1) r N; the root sends the whole message twice, not four times."""
    cost = scale_out.Cost(a=0.0, b=0.0, c=0.0, points=[], check=1.0)
    row = scale_out.tree(4, 2, TINY, cost, decode=1.0)
    unit = 3 * 4 * 2 * 40
    assert (row["levels"], row["servers"]) == (2, 3)
    assert row["tree"]["in_bytes"] == row["flat"]["in_bytes"] == 4 * unit  # exact partial aggregates are no smaller
    assert row["flat"]["out_bytes"] == 4 * 4 * unit
    assert row["tree"]["out_bytes"] == 2 * 4 * unit
    assert row["tree"]["seconds"] == 2 * unit + 2 * 2 * unit  # decoding two clients, then two regions


def test_costs_are_fitted_to_what_is_measured(monkeypatch):
    """A clock that follows the model is found again, and predicts the point that was left out."""

    def clock(name, shape, k, rank):
        return 1e-3 + 2e-8 * scale_out.numbers_in(k, shape, rank) + 3e-10 * scale_out.flops(name, k, shape, rank)

    monkeypatch.setattr(scale_out, "measured_seconds", clock)
    cost = scale_out.fitted("fedex", scale_out.MODELS["RoBERTa-base q, v, r=4"])
    assert (cost.a, cost.b, cost.c) == pytest.approx((1e-3, 2e-8, 3e-10))
    assert cost.check == pytest.approx(1.0)
