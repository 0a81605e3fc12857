"""Who was among a party's rows? A published attack finds them without privacy, and at epsilon 1 no more than epsilon allows."""

import numpy as np
import pytest
from benchmarks.membership import advantage, bound, measured

SEEDS = range(2)


@pytest.fixture(scope="module")
def plain():
    return measured("ffa", None, SEEDS, epochs=24)


def test_without_privacy_members_are_found(plain):
    for name, least in (("final model", 0.3), ("server", 0.1)):
        value, error = plain[name]
        assert value - 2 * error > least, name


def test_at_epsilon_1_what_is_found_is_within_the_bound(plain):
    assert bound(1.0) == pytest.approx(0.463, abs=1e-3)
    found = measured("ffa", 1.0, SEEDS, epochs=24)
    for name, (value, error) in found.items():
        assert value - 2 * error <= bound(1.0), name
    assert found["final model"][0] < plain["final model"][0]


def test_the_attack_has_no_luck_of_its_own():
    """On scores that say nothing it finds nothing, though a threshold chosen on the same runs would; on those that say all, all."""
    rng = np.random.default_rng(0)
    members = [rng.random(60) < 0.5 for _ in range(16)]
    value, error = advantage([rng.normal(size=60) for _ in members], members)
    assert abs(value) < 3 * error
    assert advantage([one + 0.1 * rng.normal(size=60) for one in members], members)[0] > 0.99
