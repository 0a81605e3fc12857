"""Server momentum: eight rounds of every method against the recurrence of effective weights, in fp64 numpy."""

import numpy as np
import pytest
import torch
from tests import oracle

from fedex_lora import METHODS, LoRAPair
from fedex_lora.aggregation import get_method
from fedex_lora.aggregation import server_state as server
from fedex_lora.aggregation.lowrank import from_parts, parts, same_bits
from fedex_lora.aggregation.momentum import gained, halted, last_change
from fedex_lora.config import ServerOptimizer
from fedex_lora.types import ClientUpdate, LowRank, MovingDense, MovingLowRank

MOVING = [name for name, row in METHODS.items() if row.momentum]
SHAPES = {"stays low-rank": (160, 120), "becomes a matrix": (20, 24)}
SCALING, RANK, ROUNDS = 2.0, 3, 8
PACES = {
    "b": ServerOptimizer(momentum=0.5),
    "h": ServerOptimizer(learning_rate=2.0),
    "b and h": ServerOptimizer(momentum=0.3, learning_rate=0.7),
}


def trained(state, round):
    """Three clients, who go on from the global adapter."""
    part = get_method(state.method).trained(round)
    generator = torch.Generator().manual_seed(round)
    for index, rows in enumerate((10, 30, 15)):
        adapter = {}
        for module, pair in state.adapter.items():
            dA, dB = (0.1 * torch.randn(x.shape, generator=generator) for x in (pair.A, pair.B))
            adapter[module] = LoRAPair(pair.A + dA * ("A" in part), pair.B + dB * ("B" in part), pair.scaling)
        yield ClientUpdate(f"c{index}", adapter, rows, {"head": torch.randn(3, generator=generator)})


def effective(state, module):
    """`W - W0` in fp64."""
    delta = state.base_delta.get(module)
    return oracle.product(state.adapter[module]) + (0 if delta is None else oracle.numpy64(delta.dense()))


def first(method, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        name: LoRAPair(torch.randn(RANK, inner, generator=generator) / inner**0.5, torch.zeros(out, RANK), SCALING)
        for name, (out, inner) in SHAPES.items()
    }
    return server.init(pairs, {"head": torch.zeros(3)}, method)


def what_the_method_makes(state, updates, module):
    """`E - W0`: the mean of the clients' models; of FedIT the model with the mean factors."""
    p = oracle.shares([update.num_examples for update in updates])
    base = effective(state, module) - oracle.product(state.adapter[module])
    pairs = [update.adapter[module] for update in updates]
    if not get_method(state.method).exact:
        A, B = (sum(w * oracle.numpy64(getattr(pair, part)) for w, pair in zip(p, pairs, strict=True)) for part in "AB")
        return base + SCALING * B @ A
    return base + sum(w * oracle.product(pair) for w, pair in zip(p, pairs, strict=True))


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("method", [*MOVING, "fedex+balanced", "fedit+balanced", "fedex+procrustes"])
def test_every_round_is_the_recurrence(method, pace):
    b, h = PACES[pace].momentum, PACES[pace].learning_rate
    states = [first(method)]
    for round in range(1, ROUNDS + 1):
        before, updates = states[-1], list(trained(states[-1], round))
        if round == 5:
            states.append(server.skip(before))
            assert all(np.array_equal(effective(states[-1], module), effective(before, module)) for module in SHAPES)
            continue
        after, _ = server.step(before, updates, pace=PACES[pace])
        for module in SHAPES:
            X, older = effective(before, module), effective(states[-2] if len(states) > 1 else before, module)
            want = X + h * (what_the_method_makes(before, updates, module) - X) + b * (X - older)
            assert np.linalg.norm(effective(after, module) - want) < 1e-6 * np.linalg.norm(want), (module, round)
        states.append(after)
    last = {module: states[-1].base_delta[module] for module in SHAPES}
    assert isinstance(last["becomes a matrix"], MovingDense if b else type(last["becomes a matrix"]))
    assert isinstance(last["stays low-rank"], MovingLowRank)


@pytest.mark.parametrize("method", ["fedex", "fedit", "reinit"])
def test_the_rank_grows_by_a_round_at_a_time(method):
    state, ranks = first(method), []
    for round in range(1, 5):
        state, _ = server.step(state, list(trained(state, round)), pace=ServerOptimizer(momentum=0.5))
        ranks.append(state.base_delta["stays low-rank"].right.shape[0])
    step = {"fedex": 2 * RANK + RANK, "fedit": RANK, "reinit": 3 * RANK}[method]
    assert ranks == [step * round for round in range(1, 5)]


def test_without_momentum_old_products_vanish():
    state = first("fedex")
    for round in range(1, 5):
        state, _ = server.step(state, list(trained(state, round)), pace=ServerOptimizer(learning_rate=2.0))
    assert state.base_delta["stays low-rank"].right.shape[0] == 4 * 2 * RANK + RANK  # residuals, and the present product


def test_factors_and_heads_move_by_themselves():
    pace = ServerOptimizer(momentum=0.5, learning_rate=0.8, momentum_on="all", momentum_of="factors")
    states = [first("fedit")]
    for round in range(1, 5):
        before, older, updates = states[-1], states[max(0, len(states) - 2)], list(trained(states[-1], round))
        after, _ = server.step(before, updates, pace=pace)
        p = oracle.shares([update.num_examples for update in updates])
        for get in (
            lambda one: one.adapter["stays low-rank"].A,
            lambda one: one.adapter["stays low-rank"].B,
            lambda one: one.other["head"],
        ):
            mean = sum(w * oracle.numpy64(get(update)) for w, update in zip(p, updates, strict=True))
            x, y = oracle.numpy64(get(before)), oracle.numpy64(get(older))
            assert np.allclose(oracle.numpy64(get(after)), x + 0.8 * (mean - x) + 0.5 * (x - y), atol=1e-6)
        assert not after.base_delta
        states.append(after)
    assert server.skip(states[-1]).velocity == {}


def test_heads_stay_by_default():
    state = first("fedex")
    for round in (1, 2):
        updates = list(trained(state, round))
        state, result = server.step(state, updates, pace=ServerOptimizer(momentum=0.5))
        assert torch.equal(state.other["head"], result.other["head"])


def test_what_was_gained_and_changed_last():
    states = [first("fedex")]
    for round in range(1, ROUNDS):
        states.append(server.step(states[-1], list(trained(states[-1], round)), pace=ServerOptimizer(momentum=0.5))[0])
    after, before = states[-1], states[-2]
    gain = gained(before.base_delta, after.base_delta)
    for module in SHAPES:
        D = [oracle.numpy64(state.base_delta[module].dense()) for state in (after, before)]
        assert np.linalg.norm(oracle.numpy64(gain[module].dense()) - (D[0] - D[1])) < 1e-6 * np.linalg.norm(D[0])
        change = effective(after, module) - effective(before, module)
        assert np.linalg.norm(oracle.numpy64(last_change(after.base_delta[module]).dense()) - change) < 1e-6 * np.linalg.norm(change)
        assert last_change(halted(after.base_delta)[module]) is None
        assert same_bits(from_parts(parts(after.base_delta[module])), after.base_delta[module])
        assert not same_bits(halted(after.base_delta)[module], after.base_delta[module])
    assert last_change(LowRank(torch.ones(2, 1), torch.ones(1, 2))) is None


def test_parts_that_do_not_fit_are_refused():
    U, V = torch.ones(4, 2), torch.ones(2, 5)
    for found in (
        {"U": U},
        {"U": U, "V": V.T},
        {"left": U, "right": V, "coefficients": torch.ones(2), "velocity": torch.ones(3)},
        {"W": torch.ones(2)},
    ):
        with pytest.raises(ValueError, match="it must be"):
            from_parts(found)
