"""A tree of aggregates: regional servers between the clients and the global one, in any shape and order, change nothing but rounding."""

import random
from dataclasses import replace

import pytest
import torch
from tests import oracle
from tests.conftest import make_updates

from fedex_lora import LoRAPair, aggregate
from fedex_lora.aggregation import merge
from fedex_lora.aggregation import server_state as server
from fedex_lora.errors import AggregationError, UsageError

ROUNDING = 5e-7  # relative: a few times the 6e-8 of one fp32 operation; 2.7e-7 is the worst of 200 random trees


def tree(updates, choose, method="fedex"):
    """(aggregate, total weight) of a random tree over these updates."""
    if len(updates) <= 2 or choose.random() < 0.3:
        return aggregate(updates, method), sum(update.num_examples for update in updates)
    choose.shuffle(updates)
    cuts = sorted(choose.sample(range(1, len(updates)), choose.randint(1, min(3, len(updates) - 1))))
    branches = [tree(updates[a:b], choose, method) for a, b in zip([0, *cuts], [*cuts, len(updates)], strict=True)]
    choose.shuffle(branches)
    return merge([part for part, _ in branches], [total for _, total in branches]), sum(total for _, total in branches)


@pytest.mark.parametrize("seed", range(8))
def test_any_tree_in_any_order_gives_the_ideal(seed):
    updates = make_updates(9, seed, scalings=[2.0, 1.0, 4.0] * 3)
    result, _ = tree(list(updates), random.Random(seed))
    p = oracle.shares([update.num_examples for update in updates])
    for module in updates[0].adapter:
        want = oracle.ideal([update.adapter[module] for update in updates], p)
        assert oracle.relative(oracle.total(result, module), want) < ROUNDING
        assert oracle.relative(oracle.product(result.adapter[module]), want) > 0.1  # without the residual it is nowhere near
        assert result.residual[module].rank == 8 * 3  # (k-1) r, as in one flat round
    assert result.weights == pytest.approx({update.client_id: weight for update, weight in zip(updates, p, strict=True)}, abs=1e-15)
    want = sum(weight * oracle.numpy64(update.other["head.weight"]) for update, weight in zip(updates, p, strict=True))
    assert oracle.relative(oracle.numpy64(result.other["head.weight"]), want) < ROUNDING


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6])
def test_small_residuals_keep_their_digits(spread):
    """R itself, not only M, is right where clients nearly agree: differences come first between regions too."""
    base = make_updates(1)[0].adapter
    noise = make_updates(6, 7)
    updates = [
        replace(
            update,
            adapter={
                module: LoRAPair(pair.A + spread * update.adapter[module].A, pair.B + spread * update.adapter[module].B, pair.scaling)
                for module, pair in base.items()
            },
        )
        for update in noise
    ]
    result = merge([aggregate(updates[:2]), aggregate(updates[2:5]), aggregate(updates[5:])], [30, 120, 60])
    p = oracle.shares([update.num_examples for update in updates])
    for module in base:
        pairs = [update.adapter[module] for update in updates]
        want = oracle.ideal(pairs, p) - oracle.product_of_means(pairs, p)
        got = oracle.numpy64(result.residual[module].U) @ oracle.numpy64(result.residual[module].V)
        # Means of the regions are rounded to fp32 before the regions are compared: eps / spread, where a flat round has 1e-7
        assert oracle.relative(got, want) < 1e-6 + 1e-6 / spread


@pytest.mark.parametrize("method", ["fedex", "fedit", "reinit", "ffa"])
def test_regional_servers_between(method):
    """Two rounds of a federation with three regional servers: the global model is that of two flat rounds."""
    flat = deep = server.init(make_updates(1)[0].adapter, make_updates(1)[0].other, method, seed=3)
    for round in range(2):
        updates = make_updates(6, 10 + round)
        if method == "ffa":
            shared = make_updates(1)[0].adapter
            mine = [{name: LoRAPair(shared[name].A, pair.B, 2.0) for name, pair in update.adapter.items()} for update in updates]
            updates = [replace(update, adapter=adapter) for update, adapter in zip(updates, mine, strict=True)]
        flat, _ = server.step(flat, updates)
        regions = [updates[4:], updates[:1], updates[1:4]]
        parts = [server.step(deep, region)[1] for region in regions]
        totals = [sum(update.num_examples for update in region) for region in regions]
        deep = server.following(deep, merge(parts, totals))
    assert deep.round == 2
    for module in flat.adapter:
        got, want = (
            oracle.product(state.adapter[module]) + (oracle.numpy64(state.base_delta[module].dense()) if module in state.base_delta else 0)
            for state in (deep, flat)
        )
        assert oracle.relative(got, want) < ROUNDING


@pytest.mark.parametrize("method", ["fedex-best", "fedex-svd", "keep", "hetlora", "fedex+balanced", "fedsa"])
def test_methods_without_partial_aggregates(method):
    parts = [aggregate(make_updates(2), method), aggregate(make_updates(3)[2:], method)]
    with pytest.raises(UsageError, match="do not add up"):
        merge(parts, [2, 1])


def test_what_does_not_fit_is_refused():
    one, other = aggregate(make_updates(2)), aggregate(make_updates(3)[2:])
    with pytest.raises(AggregationError, match="client-0 is in more than one"):
        merge([one, one], [1, 1])
    with pytest.raises(AggregationError, match="different methods"):
        merge([one, aggregate(make_updates(3)[2:], "fedit")], [1, 1])
    with pytest.raises(AggregationError, match="at least one"):
        merge([], [])
    with pytest.raises(AggregationError, match="3 weights"):
        merge([one, other], [1, 1, 1])
    alone = merge([one], [7])
    assert all(torch.equal(alone.residual[module].U, one.residual[module].U) for module in one.residual)
