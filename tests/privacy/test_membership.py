"""Who was among a party's rows? A published attack finds them without privacy, and at epsilon 1 no more than epsilon allows."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks.membership import advantage, bound, main, measured
from scipy.stats import beta
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from fedex_lora.client.private import private_trainer
from fedex_lora.privacy.accounting import Mechanism, PrivacyPlan, noise_for

SEEDS = range(2)


def test_one_seed_has_no_other_to_choose_a_threshold_on(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["membership.py", "--seeds", "1"])
    with pytest.raises(SystemExit):
        main()
    assert "--seeds: give two or more" in capsys.readouterr().err


@pytest.fixture(scope="module")
def plain():
    return measured("ffa", None, SEEDS, epochs=24)


def test_without_privacy_members_are_found(plain):
    for name, least in (("final model", 0.3), ("server", 0.1)):
        value, error = plain[name]
        assert value - 2 * error > least, name


def test_at_epsilon_1_what_is_found_in_the_model_is_within_the_bound(plain):
    """Which without privacy it is not. Of the server's view the attack is too weak to say so: there the step itself is audited, below."""
    assert bound(1.0) == pytest.approx(0.463, abs=1e-3)
    value, error = measured("ffa", 1.0, SEEDS, epochs=24)["final model"]
    assert value - 2 * error <= bound(1.0) < plain["final model"][0] - plain["final model"][1]


DRAWS, DELTA = 400, 1e-5


def seen(folder, with_canary, sigma):
    """How far each of many noised gradients, of one private step each, points along the canary's, in clip norms.

    This is what the server has: the change of B under sgd, divided by the learning rate. Rows beside the canary say nothing here.
    """
    rows = [{"x": torch.zeros(4), "labels": torch.tensor(0)}] * 3
    rows += [{"x": torch.tensor([0.0, 100.0, 0.0, 0.0]), "labels": torch.tensor(1)}] * with_canary
    arguments = TrainingArguments(
        str(folder), report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, optim="sgd",
        learning_rate=1e-9, remove_unused_columns=False,
    )  # fmt: skip
    model, clip, batch, found = Linear(), 0.5, 4, []

    class Seen(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **more):
            found.append(float(model.layer.weight.grad[:, 1] @ torch.tensor([1.0, -1.0])) * batch / clip / math.sqrt(2))

    plan = PrivacyPlan(Mechanism(sigma, 1.0, DRAWS), rounds=1, batch=batch, clip_norm=clip, rows=4, epsilon=math.inf, delta=DELTA)
    stacked = {"data_collator": lambda few: {name: torch.stack([row[name] for row in few]) for name in few[0]}}
    with private_trainer(plan, "classification", arguments, model=model, train_dataset=rows, **stacked) as trainer:
        trainer.add_callback(Seen())
        trainer.train()
    return np.array(found)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x):
        return SimpleNamespace(logits=self.layer(x))


def least_epsilon(without, with_canary, threshold=0.75):
    """With 99 % confidence, by Clopper and Pearson's bounds: true positives are at most exp(epsilon) false ones, and delta."""
    found, false = (int((scores >= threshold).sum()) for scores in (with_canary, without))
    true_rate = beta.ppf(0.005, found, DRAWS - found + 1) if found else 0.0
    false_rate = beta.ppf(0.995, false + 1, DRAWS - false) if false < DRAWS else 1.0
    return math.log(max(true_rate - DELTA, 1e-12) / false_rate)


def test_an_audit_of_the_step_on_the_server_s_view(tmp_path):
    """One row in or out, its gradient in a direction that the server chose: epsilon is no larger than is said, and noise is all of it."""
    epsilon = 2.0
    sigma = noise_for(epsilon, DELTA, 1.0, 1)
    views = [seen(tmp_path, number, sigma) for number in (0, 1)]
    assert least_epsilon(*views) <= epsilon
    assert abs(float(np.mean(views[1]) - np.mean(views[0]))) == pytest.approx(1.0, abs=6 * sigma * math.sqrt(2 / DRAWS))
    assert least_epsilon(*(seen(tmp_path, number, sigma / 10) for number in (0, 1))) > epsilon


def test_the_attack_has_no_luck_of_its_own():
    """On scores that say nothing it finds nothing, though a threshold chosen on the same runs would; on those that say all, all."""
    rng = np.random.default_rng(0)
    members = [rng.random(60) < 0.5 for _ in range(16)]
    value, error = advantage([rng.normal(size=60) for _ in members], members)
    assert abs(value) < 3 * error
    assert advantage([one + 0.1 * rng.normal(size=60) for one in members], members)[0] > 0.99
