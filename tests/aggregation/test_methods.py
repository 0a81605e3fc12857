"""Every method against the fp64 oracle: the defining property, and what it implies. A new row of METHODS is tested by itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import oracle
from tests.conftest import make_pair, make_updates

from fedex_lora import METHODS, ClientUpdate, LoRAPair, aggregate
from fedex_lora.aggregation import get_method
from fedex_lora.aggregation import server_state as server
from fedex_lora.errors import AggregationError
from fedex_lora.exactness import measure

EXACT = 1e-6
LORA = [name for name, method in METHODS.items() if method.lora and not method.centralised]
EXACT_METHODS = [name for name in LORA if METHODS[name].exact]
INEXACT_METHODS = [name for name in LORA if METHODS[name].exactness == "inexact"]


def updates_for(method: str, k: int, out: int, inner: int, rank: int, seed: int, spread: float, scalings) -> list[ClientUpdate]:
    """k clients around a common start, `spread` apart; the factors that the method freezes in its first round are shared."""
    generator = torch.Generator().manual_seed(seed)
    start_A, start_B = torch.randn(rank, inner, generator=generator), torch.randn(out, rank, generator=generator)
    updates = []
    for i in range(k):
        A = start_A + spread * torch.randn(rank, inner, generator=generator)
        B = start_B + spread * torch.randn(out, rank, generator=generator)
        A = A if "A" in METHODS[method].trained(1) else start_A
        updates.append(ClientUpdate(f"c{i:02d}", {"m": LoRAPair(A=A, B=B, scaling=scalings[i % len(scalings)])}, num_examples=i + 1))
    return updates


def pairs_and_shares(updates):
    return [update.adapter["m"] for update in updates], oracle.shares([update.num_examples for update in updates])


shapes = st.tuples(st.integers(4, 40), st.integers(4, 40), st.integers(1, 4))
cases = st.tuples(st.integers(1, 10), shapes, st.integers(0, 2**16), st.sampled_from([1.0, 0.1, 1e-3]))


@pytest.mark.parametrize("method", EXACT_METHODS)
@given(case=cases, scalings=st.sampled_from([(1.0,), (2.0,), (8 / 3,), (0.5, 2.0, 16 / 4**0.5)]))
@settings(max_examples=60, deadline=None)
def test_exact_methods_give_the_mean_of_products(method, case, scalings):
    """Reference: s B A + U V = sum p_i s_i B_i A_i (paper, eq. 7-9), for any shape, number of clients, weights and scalings."""
    k, (out, inner, rank), seed, spread = case
    updates = updates_for(method, k, out, inner, rank, seed, spread, scalings)
    result = aggregate(updates, method)
    assert oracle.relative(oracle.total(result, "m"), oracle.ideal(*pairs_and_shares(updates))) < EXACT


@pytest.mark.parametrize("method", INEXACT_METHODS)
@given(case=cases.filter(lambda case: case[0] > 1 and case[3] == 1.0))
@settings(max_examples=30, deadline=None)
def test_inexact_methods_measurably_miss_it(method, case):
    """The check above can fail: with the same inputs, an inexact method is off by more than a thousand times the bound."""
    k, (out, inner, rank), seed, spread = case
    updates = updates_for(method, k, out, inner, rank, seed, spread, (2.0,))
    result = aggregate(updates, method)
    assert oracle.relative(oracle.total(result, "m"), oracle.ideal(*pairs_and_shares(updates))) > 1000 * EXACT


def test_fedavg_is_another_name_of_fedit():
    assert get_method("fedavg") is get_method("fedit")
    assert get_method("fedavg+balanced") == get_method("fedit+balanced")


def test_fedit_is_the_product_of_means():
    updates = make_updates(4)
    result, p = aggregate(updates, "fedit"), oracle.shares([10, 20, 30, 40])
    for module in updates[0].adapter:
        pairs = [update.adapter[module] for update in updates]
        assert oracle.relative(oracle.total(result, module), oracle.product_of_means(pairs, p)) < EXACT


@pytest.mark.parametrize("spread", [1.0, 1e-1, 1e-2, 1e-3, 1e-4])
def test_residual_keeps_its_digits_however_close_the_clients_are(spread):
    """R itself, not R beside the adapter. In fp32 the subtractive formula has lost it at spread 1e-3 (the last lines), in fp64 at 1e-6."""
    updates = updates_for("fedex", 3, 64, 48, 4, seed=1, spread=spread, scalings=(1.0,))
    pairs, p = pairs_and_shares(updates)
    gain = aggregate(updates).residual["m"]
    want = oracle.ideal(pairs, p) - oracle.product_of_means(pairs, p)
    assert oracle.relative(oracle.numpy64(gain.U) @ oracle.numpy64(gain.V), want) < 3e-7
    if spread <= 1e-3:
        w = [np.float32(share) for share in p]
        M = sum(share * (pair.B.numpy() @ pair.A.numpy()) for share, pair in zip(w, pairs, strict=True))
        Bbar, Abar = (sum(share * getattr(pair, name).numpy() for share, pair in zip(w, pairs, strict=True)) for name in "BA")
        assert oracle.relative(M - Bbar @ Abar, want) > 1e-2


@pytest.mark.parametrize("method", LORA)
def test_one_client_is_returned_as_it_is(method):
    """Its product for every method; its factors, bit for bit, where they are not re-written."""
    update = updates_for(method, 1, 10, 14, 3, seed=2, spread=1.0, scalings=(2.0,))
    result = aggregate(update, method)
    assert oracle.relative(oracle.total(result, "m"), oracle.product(update[0].adapter["m"])) < EXACT
    if METHODS[method].refactorises or METHODS[method].reinitialises:
        return
    assert not result.residual
    assert oracle.relative(oracle.numpy64(result.adapter["m"].A), oracle.numpy64(update[0].adapter["m"].A)) < EXACT
    if method != "hetlora":
        assert torch.equal(result.adapter["m"].A, update[0].adapter["m"].A)
        assert torch.equal(result.adapter["m"].B, update[0].adapter["m"].B)


def test_flexlora_is_the_best_approximation_of_the_ideal():
    """Eckart-Young: the error is the tail of the ideal's singular values, and it is reported."""
    updates = make_updates(4)
    result, p = aggregate(updates, "flexlora"), oracle.shares([10, 20, 30, 40])
    for module in updates[0].adapter:
        ideal = oracle.ideal([update.adapter[module] for update in updates], p)
        tail = np.sqrt((np.linalg.svd(ideal, compute_uv=False)[3:] ** 2).sum())
        assert np.linalg.norm(oracle.total(result, module) - ideal) == pytest.approx(tail, rel=1e-5)
        assert result.dropped[module] == pytest.approx(tail, rel=1e-5)


def test_fedex_best_leaves_the_smallest_possible_residual():
    updates, p = make_updates(4), oracle.shares([10, 20, 30, 40])
    best, mean = aggregate(updates, "fedex-best"), aggregate(updates, "fedex")
    for module in updates[0].adapter:
        ideal = oracle.ideal([update.adapter[module] for update in updates], p)
        tail = np.sqrt((np.linalg.svd(ideal, compute_uv=False)[3:] ** 2).sum())
        sizes = [np.linalg.norm(oracle.numpy64(result.residual[module].dense())) for result in (best, mean)]
        assert sizes[0] == pytest.approx(tail, rel=1e-5)
        assert sizes[0] < sizes[1]


def test_hetlora_pads_and_weighs_by_norms():
    """Ranks 1, 3 and 4 in one module: zeros up to rank 4, weights in proportion to p_i |B_i A_i|."""
    pairs = [make_pair(seed, rank=rank) for seed, rank in ((1, 1), (2, 3), (3, 4))]
    result = aggregate([ClientUpdate(f"c{i}", {"m": pair}, 5 * i + 1) for i, pair in enumerate(pairs)], "hetlora")
    norms = np.array([(5 * i + 1) * np.linalg.norm(oracle.product(pair)) for i, pair in enumerate(pairs)])
    A = sum(w * np.pad(oracle.numpy64(pair.A), ((0, 4 - pair.rank), (0, 0))) for w, pair in zip(norms / norms.sum(), pairs, strict=True))
    B = sum(w * np.pad(oracle.numpy64(pair.B), ((0, 0), (0, 4 - pair.rank))) for w, pair in zip(norms / norms.sum(), pairs, strict=True))
    assert oracle.relative(oracle.product(result.adapter["m"]), 2.0 * B @ A) < EXACT


def test_hetlora_leaves_no_component_dead():
    """When only clients of low rank take part, the components beyond them get a new A, which B = 0 can grow from."""
    live = {"m": make_pair(0, rank=6)}
    state = server.init(live, {}, "hetlora")
    state, _ = server.step(state, [ClientUpdate("a", {"m": make_pair(1, rank=2)}, 1), ClientUpdate("b", {"m": make_pair(2, rank=4)}, 1)])
    assert (state.adapter["m"].A.norm(dim=1) > 0.1).all()
    assert not state.adapter["m"].B[:, 4:].any()


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_modules_of_one_shape_and_other_live_ranks(order):
    """Two modules alike but for the rank of the global adapter, participants of the lower rank in both: each keeps its own."""
    pairs = {"a": make_pair(1, rank=4), "b": make_pair(2, rank=2)}
    live = {name: pairs[name] for name in order}
    state = server.init(live, {}, "fedex-best")
    sent = {name: make_pair(5 + ord(name), rank=2) for name in order}
    after, _ = server.step(state, [ClientUpdate("c", sent, 1)])
    for name, pair in live.items():
        want = oracle.product(sent[name]) + oracle.product(pair) - oracle.product(pair.first(2))
        got = oracle.product(after.adapter[name]) + (after.base_delta[name].dense().numpy() if name in after.base_delta else 0)
        assert after.adapter[name].rank == pair.rank
        assert oracle.relative(got, want) < EXACT


def test_factors_that_start_anew_do_so_from_the_seed():
    """reinit: A as PEFT draws it (uniform in +-1/sqrt(in)), another one each round and module, B zero, and all of M in the base."""
    updates = make_updates(2, shapes=((64, 400), (64, 400)))
    state = server.init(updates[0].adapter, updates[0].other, "reinit", seed=3)
    first, again = aggregate(updates, "reinit", state=state), aggregate(updates, "reinit", state=state)
    later = aggregate(updates, "reinit", state=replace(state, round=1))
    A = first.adapter["m0"].A
    assert torch.equal(A, again.adapter["m0"].A)
    assert not torch.equal(A, later.adapter["m0"].A)
    assert not torch.equal(A, first.adapter["m1"].A)
    assert A.abs().max() <= 400**-0.5
    assert A.std() == pytest.approx((400 * 3) ** -0.5, rel=0.1)
    assert not first.adapter["m0"].B.any()
    assert first.residual["m0"].rank == 6


@pytest.mark.parametrize("method", [name for name in LORA if METHODS[name].per_client_ranks and METHODS[name].exact])
@given(ranks=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_ranks_may_differ(method, ranks, seed):
    pairs = [make_pair(seed + i, rank=rank, scaling=1.0 + i) for i, rank in enumerate(ranks)]
    result = aggregate([ClientUpdate(f"c{i}", {"m": pair}, i + 1) for i, pair in enumerate(pairs)], method)
    want = oracle.ideal(pairs, oracle.shares([i + 1 for i in range(len(pairs))]))
    assert oracle.relative(oracle.total(result, "m"), want) < EXACT
    assert result.adapter["m"].rank == max(ranks)


@pytest.mark.parametrize("method", [name for name in LORA if not METHODS[name].per_client_ranks])
def test_ranks_that_differ_are_refused_where_they_cannot(method):
    updates = [ClientUpdate(name, {"m": make_pair(rank, rank=rank)}, 1) for name, rank in (("a", 2), ("b", 3))]
    with pytest.raises(AggregationError, match="needs one rank: use fedex-best"):
        aggregate(updates, method)


@pytest.mark.parametrize("method", EXACT_METHODS)
def test_untrained_factors_have_an_ideal_of_zero(method):
    """B = 0 everywhere: nothing to gain, and a factor A that can still be trained."""
    updates = [ClientUpdate(name, {"m": LoRAPair(A=make_pair(0).A, B=torch.zeros(12, 3), scaling=2.0)}, 1) for name in ("a", "b")]
    result = aggregate(updates, method)
    assert not oracle.total(result, "m").any()
    assert not result.residual
    assert result.adapter["m"].A.norm(dim=1).min() > 0.1


@pytest.mark.parametrize("equal", ["A", "B", "both"])
def test_equal_factors_leave_no_residual(equal):
    """R is a covariance of A and B: it is zero when either does not vary."""
    updates = make_updates(3)
    first = updates[0].adapter
    same = [
        ClientUpdate(
            update.client_id,
            {
                module: LoRAPair(
                    A=first[module].A if equal in ("A", "both") else pair.A,
                    B=first[module].B if equal in ("B", "both") else pair.B,
                    scaling=2.0,
                )
                for module, pair in update.adapter.items()
            },
            update.num_examples,
        )
        for update in updates
    ]
    assert not aggregate(same).residual


@given(k=st.integers(2, 8), rank=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_residual_has_rank_at_most_k_minus_one_times_r(k, rank):
    updates = updates_for("fedex", k, 40, 36, rank, seed=k, spread=1.0, scalings=(2.0,))
    gain = aggregate(updates).residual["m"]
    assert gain.rank == (k - 1) * rank
    dense = oracle.numpy64(gain.U) @ oracle.numpy64(gain.V)
    assert np.linalg.matrix_rank(dense, tol=1e-6 * np.linalg.norm(dense)) <= (k - 1) * rank


@pytest.mark.parametrize("method", LORA)
def test_order_of_arrival_does_not_change_a_bit(method):
    updates = updates_for(method, 5, 12, 16, 3, seed=3, spread=0.5, scalings=(2.0,))
    first, second = aggregate(updates, method), aggregate(updates[::-1], method)
    assert torch.equal(first.adapter["m"].A, second.adapter["m"].A)
    assert torch.equal(first.adapter["m"].B, second.adapter["m"].B)
    assert first.residual.keys() == second.residual.keys()
    for module, gain in first.residual.items():
        assert torch.equal(gain.U, second.residual[module].U)
        assert torch.equal(gain.V, second.residual[module].V)


@pytest.mark.parametrize("method", EXACT_METHODS)
@given(factor=st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_scaling_all_weights_changes_nothing(method, factor):
    updates = updates_for(method, 4, 12, 16, 3, seed=4, spread=0.5, scalings=(2.0,))
    raw = [1.0, 2.0, 0.5, 7.0]
    totals = [oracle.total(aggregate(updates, method, weights), "m") for weights in (raw, [factor * weight for weight in raw])]
    assert oracle.relative(*totals) < EXACT


@pytest.mark.parametrize("method", EXACT_METHODS)
def test_a_gauge_change_shared_by_all_leaves_the_update(method):
    """(B G, G^-1 A) is the same product."""
    updates = updates_for(method, 4, 12, 16, 3, seed=5, spread=0.5, scalings=(2.0,))
    G = torch.eye(3, dtype=torch.float64) + 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = []
    for update in updates:
        pair = update.adapter["m"]
        other = LoRAPair(A=torch.linalg.solve(G, pair.A.double()), B=pair.B.double() @ G, scaling=2.0)
        turned.append(ClientUpdate(update.client_id, {"m": other}, update.num_examples))
    assert oracle.relative(oracle.total(aggregate(turned, method), "m"), oracle.total(aggregate(updates, method), "m")) < EXACT


def test_duplicate_clients_and_zero_weights():
    updates = updates_for("fedex", 3, 12, 16, 3, seed=6, spread=0.5, scalings=(2.0,))
    twin = ClientUpdate("twin", updates[0].adapter, updates[0].num_examples)
    pairs = [update.adapter["m"] for update in [*updates, twin]]
    weights = [1.0, 0.0, 2.0, 1.0]
    result = aggregate([*updates, twin], weights=weights)
    assert oracle.relative(oracle.total(result, "m"), oracle.ideal(pairs, oracle.shares(weights))) < EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors_are_aggregated_in_fp32(dtype):
    updates = [
        ClientUpdate(
            update.client_id,
            {name: LoRAPair(A=pair.A.to(dtype), B=pair.B.to(dtype), scaling=pair.scaling) for name, pair in update.adapter.items()},
            update.num_examples,
        )
        for update in updates_for("fedex", 3, 12, 16, 3, seed=7, spread=0.5, scalings=(2.0,))
    ]
    result = aggregate(updates)
    assert result.adapter["m"].A.dtype == torch.float32
    assert oracle.relative(oracle.total(result, "m"), oracle.ideal(*pairs_and_shares(updates))) < EXACT


def test_other_tensors_in_half_precision_keep_their_mean():
    updates = [replace(update, other={"head": update.other["head.weight"].bfloat16()}) for update in make_updates(3)]
    result, p = aggregate(updates), oracle.shares([10, 20, 30])
    want = sum(weight * oracle.numpy64(update.other["head"]) for weight, update in zip(p, updates, strict=True))
    assert oracle.relative(oracle.numpy64(result.other["head"]), want) < EXACT
    assert measure.other_errors(result.other, updates, result.weights)["head"] < EXACT
    assert measure.other_errors({"head": 1.01 * result.other["head"]}, updates, result.weights)["head"] > 1000 * EXACT


def test_other_tensors_are_averaged_with_the_same_weights():
    updates = make_updates(3)
    want = sum(p * oracle.numpy64(update.other["head.weight"]) for p, update in zip(oracle.shares([10, 20, 30]), updates, strict=True))
    assert oracle.relative(oracle.numpy64(aggregate(updates).other["head.weight"]), want) < EXACT


@pytest.mark.parametrize("method", ["fedex", "ffa"])
@pytest.mark.parametrize("k", [16, 17, 250])
def test_independent_clients_however_many(k, method):
    """Factors without a common start cancel in the mean, to 1/sqrt(k) of their size: rounding must not stay behind at their size."""
    updates = updates_for(method, k, 64, 96, 4, seed=1, spread=1e4, scalings=(2.0,))
    pairs, p = pairs_and_shares(updates)
    assert oracle.relative(oracle.total(aggregate(updates, method), "m"), oracle.ideal(pairs, p)) < 3e-7


@pytest.mark.parametrize(("out", "inner"), [(2048, 64), (64, 2048)])
def test_large_factors_are_those_of_small_ones(out, inner):
    """Factors that are transposed in blocks."""
    updates = updates_for("fedex", 3, out, inner, 32, seed=2, spread=1e-3, scalings=(2.0,))
    pairs, p = pairs_and_shares(updates)
    result = aggregate(updates)
    assert oracle.relative(oracle.total(result, "m"), oracle.ideal(pairs, p)) < 2e-7
    gain, want = result.residual["m"], oracle.ideal(pairs, p) - oracle.product_of_means(pairs, p)
    assert oracle.relative(oracle.numpy64(gain.U) @ oracle.numpy64(gain.V), want) < 2e-7


@pytest.mark.parametrize(("weights", "size"), [((99.0, 99.0, 1.0), 100.0), ((1.0, 1.0, 0.0), 1e4), ((1.0, 1.0, 1e-6), 1e4)])
@pytest.mark.parametrize("place", [0, 2])
def test_a_light_client_of_another_size_costs_no_digits(weights, size, place):
    """Whatever its id: differences are to the heaviest client."""
    rng = np.random.default_rng(5)
    scale = [1.0, 1.0, size]
    factors = [(rng.normal(size=(4, 96)) * s, rng.normal(size=(64, 4)) * s) for s in scale]
    factors = [(A.astype(np.float32), B.astype(np.float32)) for A, B in factors]
    names = {0: ["b", "c", "a"], 2: ["a", "b", "c"]}[place]
    updates = [
        ClientUpdate(n, {"m": LoRAPair(torch.from_numpy(A), torch.from_numpy(B), 2.0)}, 1) for n, (A, B) in zip(names, factors, strict=True)
    ]
    result = aggregate(updates, weights=list(weights))
    p = np.array(weights) / sum(weights)
    ideal = sum(share * 2.0 * B.astype(np.float64) @ A.astype(np.float64) for share, (A, B) in zip(p, factors, strict=True))
    pair, gain = result.adapter["m"], result.residual["m"]
    got = pair.scaling * pair.B.double().numpy() @ pair.A.double().numpy() + gain.U.double().numpy() @ gain.V.double().numpy()
    assert np.linalg.norm(got - ideal) < 3e-7 * np.linalg.norm(ideal)


def test_other_tensors_of_any_precision_are_averaged_and_left_alone():
    heads = [0.0, 3.0, 9.0]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        updates = [ClientUpdate(f"c{i}", {}, 1, {"head": torch.full((2, 2), value, dtype=dtype)}) for i, value in enumerate(heads)]
        result = aggregate(updates, weights="uniform")
        assert torch.equal(result.other["head"].double(), torch.full((2, 2), 4.0, dtype=torch.float64))
        assert [update.other["head"][0, 0].item() for update in updates] == heads


def test_parameters_of_a_model_are_averaged_as_their_values():
    """As PEFT's layers hold them: with gradients, of which the result has none."""
    plain = make_updates(2)
    trained = [
        replace(
            one,
            adapter={m: LoRAPair(torch.nn.Parameter(pair.A), torch.nn.Parameter(pair.B), pair.scaling) for m, pair in one.adapter.items()},
            other={name: torch.nn.Parameter(tensor) for name, tensor in one.other.items()},
        )
        for one in plain
    ]
    ours, theirs = aggregate(trained), aggregate(plain)
    made = [*ours.other.values(), *(tensor for pair in ours.adapter.values() for tensor in pair.parts.values())]
    assert not any(tensor.requires_grad for tensor in made)
    assert all(torch.equal(ours.adapter[module].B, pair.B) for module, pair in theirs.adapter.items())
    assert all(torch.equal(ours.other[name], tensor) for name, tensor in theirs.other.items())
