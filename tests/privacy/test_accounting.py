"""Epsilon against `dp-accounting` (Google's, another method and code: privacy loss distributions), and the noise that is chosen for it."""

import math
from types import SimpleNamespace

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from opacus import accountants
from tests.fake import raising

from fedex_lora.config import parse_config
from fedex_lora.errors import ConfigError, PrivacyError
from fedex_lora.privacy.account import Account
from fedex_lora.privacy.accounting import Mechanism, noise_for, privacy_plan, rounds_left, spent
from fedex_lora.privacy.ledger import begin_ledger, read_ledger

SCHEDULES = [
    ([(1.1, 0.01, 1000)], 1e-5),
    ([(0.8, 0.064, 160)], 2e-4),
    ([(2.0, 0.2, 50)], 1e-5),
    ([(30.0, 0.064, 16000)], 1e-5),
    ([(5.0, 1.0, 10)], 1e-5),
    ([(10.0, 0.5, 20)], 1e-5),  # epsilon below one
    ([(1.0, 0.01, 500), (2.0, 0.05, 200)], 1e-5),  # two runs
    ([(0.6, 0.005, 2000), (4.0, 0.1, 100), (1.5, 0.02, 700)], 1e-6),
    ([(1.3, 0.032, 300), (1.3, 0.032, 639), (0.9, 0.032, 20)], 1e-4),  # rounds of one run, then with less noise
    ([(9.0, 0.01, 1000)], 1e-5),  # a tenth
]


def reference(schedule, delta):
    there = PLDAccountant(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for sigma, rate, steps in schedule:
        there.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)), steps)
    return there.get_epsilon(delta)


@pytest.mark.parametrize(("schedule", "delta"), SCHEDULES)
def test_epsilon_is_that_of_another_accountant(schedule, delta):
    """Within a hundredth, and never below; by Rényi divergences it is larger."""
    history, there = [Mechanism(*one) for one in schedule], reference(schedule, delta)
    assert there <= spent(history, delta) <= 1.01 * there
    assert spent(history, delta, "rdp") > 1.05 * there
    assert spent(reversed(history), delta) == spent(history, delta)


def test_a_smaller_noise_and_more_steps_spend_more():
    """So the agreement above is no accident of numbers that are all alike."""
    base = spent([Mechanism(1.1, 0.01, 1000)], 1e-5)
    assert spent([Mechanism(1.05, 0.01, 1000)], 1e-5) > 1.03 * base
    assert spent([Mechanism(1.1, 0.01, 1100)], 1e-5) > 1.03 * base
    assert spent([], 1e-5) == spent([Mechanism(1000, 0.05, 10)], 1e-2) == 0  # not less than nothing
    assert spent([Mechanism(0.0, 0.01, 1)], 1e-5) == float("inf")


@pytest.mark.parametrize(("epsilon", "rate", "steps", "accountant"), [(1, 0.01, 1000, "prv"), (8, 0.2, 50, "prv"), (3, 0.064, 160, "rdp")])
def test_the_noise_is_the_smallest_that_is_enough(epsilon, rate, steps, accountant):
    sigma = noise_for(epsilon, 1e-5, rate, steps, accountant)
    assert spent([Mechanism(sigma, rate, steps)], 1e-5, accountant) <= epsilon
    assert spent([Mechanism(sigma / 1.002, rate, steps)], 1e-5, accountant) > epsilon


def test_an_epsilon_that_no_noise_gives():
    with pytest.raises(ConfigError, match=r"privacy\.epsilon = 1e-09: no noise is enough for 10 steps"):
        noise_for(1e-9, 1e-5, 0.5, 10, "rdp")


def config(**changes):
    tree = {"base": {"model": "demo"}, "task": {"name": "demo"}, "rounds": 4, "training": {"per_device_train_batch_size": 8}}
    privacy = {"epsilon": 3, "delta": 1e-4, "rows": 100, "ledger": "x", "accountant": "rdp"}
    return parse_config({**tree, **changes, "privacy": {**privacy, **changes.get("privacy", {})}})


def test_the_plan_is_a_function_of_the_stated_number():
    plan = privacy_plan(config(training={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_train_epochs": 2}), "a")
    assert (plan.batch, plan.rows, plan.round.rate, plan.round.steps, plan.rounds) == (16, 100, 0.16, 13, 4)
    assert plan.epsilon == spent([plan.round._replace(steps=52)], 1e-4, "rdp") <= 3
    assert privacy_plan(config(training={"max_steps": 7}), "a").round.steps == 7


def test_rounds_that_a_budget_pays_for():
    """The whole plan is paid for by its epsilon; each round of it takes one; less than epsilon pays for fewer, by plain counting."""
    plan = privacy_plan(config(), "a")
    assert [rounds_left([plan.round] * done, plan, 3, "rdp") for done in range(5)] == [4, 3, 2, 1, 0]
    paid = [spent([plan.round] * number, 1e-4, "rdp") <= 2.7 for number in range(1, 5)]
    assert rounds_left([], plan, 2.7, "rdp") == sum(paid)
    assert 0 < sum(paid) < 4


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize(
    "one", [(1e-3, 0.5, 10), (1e-43, 1.0, 1), (0.1, 1.0, 10**6), (1.0, 0.01, 10**8), (0.2, 0.3, 5000), (math.nan, 0.1, 1)]
)
def test_what_is_far_out_is_an_upper_bound_at_once(one, accountant):
    """Such histories took terabytes, or ended in an error of Opacus'; no run may have them, but a ledger can say them."""
    found = spent([Mechanism(*one)], 1e-5, accountant)
    assert found > 100
    if math.isfinite(found):
        assert found >= spent([Mechanism(2 * one[0], *one[1:])], 1e-5, "rdp")
    else:
        assert not one[0] >= 0.1


def test_what_opacus_cannot_compute_is_one_line(monkeypatch):
    real = accountants.create_accountant

    def made(mechanism):
        return SimpleNamespace(get_epsilon=raising(ValueError("two\nlines"))) if mechanism == "prv" else real(mechanism=mechanism)

    monkeypatch.setattr(accountants, "create_accountant", made)
    with pytest.raises(ConfigError, match=r"^epsilon of 7 steps of sigma 1.5 at rate 0.5 at delta 1e-05 cannot .* \(\w+\): set ") as caught:
        spent([Mechanism(1.5, 0.5, 7)], 1e-5)
    assert "\n" not in str(caught.value)


def test_a_delta_that_rounding_could_hide_is_bounded_by_renyi_divergences():
    """Opacus' numerical composition fails there, or, worse, may understate."""
    for history, delta in (([Mechanism(1.0, 0.5, 1)], 1e-30), ([Mechanism(4.0, 0.01, 20_000)], 1e-12)):
        assert 0 < spent(history, delta) == spent(history, delta, "rdp") < 100
    assert spent([Mechanism(4.0, 0.01, 20_000)], 1e-6) < spent([Mechanism(4.0, 0.01, 20_000)], 1e-6, "rdp")


def test_the_largest_epsilon_has_noise():
    """Sigma is a tenth at least, however much may be said."""
    assert noise_for(100, 1e-5, 1e-3, 3) == pytest.approx(0.1, rel=2e-3)
    assert noise_for(100, 1e-5, 1e-3, 3) >= 0.1
    sigma = noise_for(100, 1e-5, 1.0, 10)
    assert 0.95 * 100 < reference([(sigma, 1.0, 10)], 1e-5) <= 100


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"per_device_train_batch_size": 0.5}, r"training\.per_device_train_batch_size = 0\.5: private training takes a whole number"),
        ({"gradient_accumulation_steps": 0}, r"training\.gradient_accumulation_steps = 0: private training takes a whole number"),
        ({"max_steps": 2.5}, r"training\.max_steps = 2\.5: private training takes a whole number"),
        ({"max_steps": 10**8}, "^400000000 private steps, and there may be 1000000: take fewer"),
        ({"num_train_epochs": 1e5}, "^5000000 private steps"),
        ({"num_train_epochs": math.inf}, r"training\.num_train_epochs = inf: private training takes more than none"),
        ({"num_train_epochs": math.nan}, r"training\.num_train_epochs = nan: private training takes more than none"),
        ({"num_train_epochs": "many"}, r"training\.num_train_epochs = 'many': private training takes a number"),
    ],
)
def test_steps_are_a_server_s_word_and_have_bounds(training, words):
    odd = config().model_copy(update={"training": {"per_device_train_batch_size": 8, **training}})
    with pytest.raises(ConfigError, match=words) as caught:
        privacy_plan(odd, "a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [("clip_norm", 1e-43), ("clip_norm", 9e-7), ("epsilon", 101), ("budget", 101)])
def test_extreme_settings_are_refused(key, value):
    """At a clip norm of 1e-43, which float32 hardly has, a clipped gradient was twice as long."""
    with pytest.raises(ConfigError, match=key):
        config(privacy={key: value})
    assert config(privacy={"clip_norm": 1e-6, "epsilon": 100, "budget": 100}).privacy.clip_norm == 1e-6


def test_an_epsilon_that_is_no_number_pays_for_nothing(tmp_path, monkeypatch):
    begin_ledger(tmp_path / "ledger")
    opened = Account(tmp_path / "ledger", "a", privacy_plan(config(), "a"), 3.0, "rdp")
    with monkeypatch.context() as patch:
        patch.setattr("fedex_lora.privacy.account.spent", lambda *given: math.nan)
        with pytest.raises(PrivacyError, match="epsilon nan"):
            opened.enter("run", 1)
    assert read_ledger(tmp_path / "ledger") == []
    opened.enter("run", 1)
    assert len(read_ledger(tmp_path / "ledger")) == 1
