"""The server's state over rounds: after each, the global model is the mean of the participants' models."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests import oracle
from tests.conftest import make_pair, make_updates

from fedex_lora import METHODS, LoRAPair, measure, server
from fedex_lora.aggregation.lowrank import add, core, factorise, frobenius, signed_sum
from fedex_lora.errors import AggregationError
from fedex_lora.types import Dense, LowRank


def trained(state, k, round):
    """k clients that moved away from the state's adapter, as training does."""
    updates = make_updates(k, seed=round)
    frozen = METHODS[state.method].trains == "B"
    return [
        replace(
            update,
            adapter={
                name: LoRAPair(
                    A=state.adapter[name].A + (0 if frozen else 0.1) * pair.A, B=state.adapter[name].B + 0.1 * pair.B, scaling=pair.scaling
                )
                for name, pair in update.adapter.items()
            },
        )
        for update in updates
    ]


def start(method):
    first = make_updates(1, seed=99)[0]
    return server.init(
        {name: LoRAPair(A=pair.A, B=torch.zeros_like(pair.B), scaling=2.0) for name, pair in first.adapter.items()}, first.other, method
    )


@pytest.mark.parametrize("method", ["fedex", "ffa", "fedit"])
def test_the_state_after_each_round_is_the_mean_of_the_models(method):
    """W0 + D_v + s Bbar Abar = sum p_i (W0 + D_{v-1} + s_i B_i A_i), in fp64 from the plain formula; fedit misses it."""
    state, drift = start(method), {name: 0.0 for name in start(method).adapter}
    for round in range(1, 6):
        updates = trained(state, k=round % 3 + 2, round=round)
        p = oracle.shares([update.num_examples for update in updates])
        ideal = {name: drift[name] + oracle.ideal([update.adapter[name] for update in updates], p) for name in drift}
        before, (state, result) = state, server.step(state, updates)
        worst = 0.0
        for name, want in ideal.items():
            delta = state.base_delta.get(name)
            drift[name] = (
                0.0
                if delta is None
                else oracle.numpy64(delta.U) @ oracle.numpy64(delta.V)
                if isinstance(delta, LowRank)
                else oracle.numpy64(delta.W)
            )
            worst = max(worst, oracle.relative(drift[name] + oracle.product(state.adapter[name]), want))
        assert (worst < 1e-6) == METHODS[method].exact
        audited = measure.audit(before, updates, result.weights, state).max_relative_error
        assert audited == pytest.approx(worst, rel=1e-3, abs=1e-12)
        assert state.round == round


def test_step_changes_nothing_in_place():
    state = start("fedex")
    updates = trained(state, 3, 1)
    kept = {name: (pair.A.clone(), pair.B.clone()) for update in updates for name, pair in update.adapter.items()}
    server.step(state, updates)
    assert state.round == 0
    assert not state.base_delta
    for name, pair in updates[-1].adapter.items():
        assert torch.equal(pair.A, kept[name][0])
        assert torch.equal(pair.B, kept[name][1])


def test_the_global_adapter_keeps_its_scaling():
    state = start("fedex")
    updates = [
        replace(update, adapter={n: replace(p, scaling=3.0 + i) for n, p in update.adapter.items()})
        for i, update in enumerate(trained(state, 3, 1))
    ]
    after, result = server.step(state, updates)
    assert {pair.scaling for pair in after.adapter.values()} == {2.0}
    p = [result.weights[update.client_id] for update in updates]
    for name in after.adapter:
        assert oracle.relative(oracle.total(result, name), oracle.ideal([update.adapter[name] for update in updates], p)) < 1e-6


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"m0": make_pair(0)}, "does not continue module m1"),
        ({**make_updates(1)[0].adapter, "m0": make_pair(0, rank=2)}, "does not continue module m0"),
        ({**make_updates(1)[0].adapter, "extra": make_pair(0)}, "modules that the global adapter does not have"),
    ],
)
def test_updates_must_continue_the_state(adapter, message):
    state = start("fedex")
    with pytest.raises(AggregationError, match=message):
        server.step(state, [replace(trained(state, 1, 1)[0], adapter=adapter)])


def test_ffa_refuses_a_changed_a():
    with pytest.raises(AggregationError, match="changed A"):
        server.step(start("ffa"), trained(start("fedex"), 2, 1))


def low_rank(seed, out=12, inner=20, rank=3):
    pair = make_pair(seed, out, inner, rank, scaling=1.0)
    return LowRank(U=pair.B, V=pair.A)


def test_sums_stay_factors_until_the_matrix_is_smaller():
    delta, want = None, np.zeros((12, 20))
    for seed in range(6):
        gain = low_rank(seed)
        delta, want = add(delta, gain), want + oracle.numpy64(gain.U) @ oracle.numpy64(gain.V)
        assert oracle.relative(oracle.numpy64(delta.dense()), want) < 3e-7
        assert isinstance(delta, Dense) == (3 * (seed + 1) * (12 + 20) >= 12 * 20)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_frobenius_and_spectrum_of_factors(rank):
    delta = low_rank(3, 60, 50, rank)
    dense = oracle.numpy64(delta.U) @ oracle.numpy64(delta.V)
    assert frobenius(delta) == pytest.approx(np.linalg.norm(dense), rel=1e-12)
    assert np.allclose(torch.linalg.svdvals(core(delta))[:rank], np.linalg.svd(dense, compute_uv=False)[:rank], rtol=1e-10)
    assert oracle.relative(oracle.numpy64(factorise(Dense(W=torch.from_numpy(dense).float())).dense()), dense) < 1e-6


def test_cancelling_factors_are_zero_to_fp64():
    delta = low_rank(4, 200, 100, 3)
    assert frobenius(signed_sum([(1.0, delta), (-1.0, delta)])) < 1e-13 * frobenius(delta)
