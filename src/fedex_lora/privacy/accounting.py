"""How much noise a run needs, and how much privacy was spent: the Poisson-subsampled Gaussian mechanism, composed."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from fedex_lora.config import Config
from fedex_lora.errors import ConfigError, require_extra

BATCH, EPOCHS = 8, 3.0  # transformers.TrainingArguments' own, where [training] says nothing
MOST = 1024.0  # of sigma: with more nothing is left to learn


class Mechanism(NamedTuple):
    """So many steps, each of a sum of clipped gradients with noise.

    Attributes:
        sigma: standard deviation of the noise, in clip norms.
        rate: q, the probability that a record is in a batch.
        steps: how many.
    """

    sigma: float
    rate: float
    steps: int


@dataclass(frozen=True)
class PrivacyPlan:
    """What a client's private training is in a run.

    Attributes:
        round: the mechanism of one round.
        rounds: how many.
        batch: the expected number of records of a step, by which the sum is divided.
        clip_norm: C.
        rows: the stated number.
        epsilon: of all rounds.
        delta: the same.
    """

    round: Mechanism
    rounds: int
    batch: int
    clip_norm: float
    rows: int
    epsilon: float
    delta: float


def spent(history: Iterable[Mechanism], delta: float, accountant: str = "prv") -> float:
    """Epsilon of everything together, at this delta.

    Args:
        history: what was done on the rows, in any order.
        delta: of (epsilon, delta).
        accountant: "prv" (an upper bound of the numerical composition, Gopi et al. 2021) or "rdp".

    Example:
        >>> round(spent([Mechanism(sigma=1.1, rate=0.01, steps=1000)], delta=1e-5), 1)
        1.5
    """
    steps: dict[tuple[float, float], int] = {}
    for one in history:
        steps[one.sigma, one.rate] = steps.get((one.sigma, one.rate), 0) + one.steps
    return _epsilon(tuple(sorted((sigma, rate, count) for (sigma, rate), count in steps.items() if count)), delta, accountant)


@lru_cache(maxsize=4096)
def _epsilon(history: tuple[tuple[float, float, int], ...], delta: float, accountant: str) -> float:
    if not history:
        return 0.0
    if any(sigma == 0 for sigma, _, _ in history):
        return math.inf
    if accountant == "rdp":
        return _accounted(history, "rdp", delta=delta)
    error = min(0.01, _epsilon(history, delta, "rdp") / 200)  # that of the numerical composition is added to it: a hundredth would be all
    return _accounted(history, accountant, delta=delta, eps_error=error)


def _accounted(history: Sequence[tuple[float, float, int]], accountant: str, **options: float) -> float:
    require_extra("opacus", "dp", "private runs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import create_accountant

        made = create_accountant(mechanism=accountant)
        made.history = list(history)
        return float(made.get_epsilon(**options))


@lru_cache(maxsize=1024)
def noise_for(epsilon: float, delta: float, rate: float, steps: int, accountant: str = "prv") -> float:
    """The smallest sigma, to a thousandth of it, with which so many steps spend at most epsilon.

    Raises:
        ConfigError: no noise is enough.

    Example:
        >>> round(noise_for(epsilon=1.0, delta=1e-5, rate=0.01, steps=1000), 1)
        1.4
    """

    def over(sigma: float) -> float:
        """How far above epsilon this sigma is, as a logarithm."""
        return math.log(spent([Mechanism(sigma, rate, steps)], delta, accountant) / epsilon)

    high = _first_guess(epsilon, delta, rate, steps, accountant)
    above = over(high)
    if above > 0 and over(MOST) > 0:
        raise ConfigError(f"privacy.epsilon = {epsilon:g}: no noise is enough for {steps} steps: take fewer, or a larger epsilon")
    while above > 0:
        high *= 2
        above = over(high)
    low = high / 2
    while (below := over(low)) <= 0:
        low, high, above = low / 2, low, below
        if high < 1e-3:
            return high
    while high > 1.001 * low:  # the curve is all but straight in logarithms
        share = below / (below - above) if math.isfinite(below) else 0.5
        middle = min(max(low * (high / low) ** share, 1.0004 * low), high / 1.0004)
        if (here := over(middle)) <= 0:
            high, above = middle, here
        else:
            low, below = middle, here
    return high


def _first_guess(epsilon: float, delta: float, rate: float, steps: int, accountant: str) -> float:
    """A sigma from above by Rényi divergences, which are worked out at once; one where they have none."""
    if accountant == "rdp":
        return 1.0
    try:
        return noise_for(epsilon, delta, rate, steps, "rdp")
    except ConfigError:
        return 1.0


def privacy_plan(config: Config, client: str) -> PrivacyPlan:
    """What the private training of a client is in a run.

    Raises:
        ConfigError: the settings say none that there is.
    """
    privacy, training = config.privacy, config.training
    rows, batch = privacy.stated(client), _batch(config)
    if privacy.epsilon is None or rows is None:
        raise ConfigError(f"client {client} has not stated how many rows it trains on: set privacy.rows")
    if rows < batch:
        raise ConfigError(f"client {client} states {rows} rows, and a batch has {batch}: set training.per_device_train_batch_size lower")
    if privacy.delta >= 1 / rows:
        raise ConfigError(f"privacy.delta = {privacy.delta:g} is not below 1 / {rows} rows of client {client}: one record might be shown")
    most = int(training.get("max_steps", -1))
    steps = most if most > 0 else max(1, math.ceil(float(training.get("num_train_epochs", EPOCHS)) * rows / batch))
    rate = batch / rows
    sigma = noise_for(privacy.epsilon, privacy.delta, rate, steps * config.rounds, privacy.accountant)
    mechanism = Mechanism(sigma, rate, steps)
    epsilon = spent([mechanism._replace(steps=steps * config.rounds)], privacy.delta, privacy.accountant)
    return PrivacyPlan(mechanism, config.rounds, batch, privacy.clip_norm, rows, epsilon, privacy.delta)


def _batch(config: Config) -> int:
    training = config.training
    return int(training.get("per_device_train_batch_size", BATCH)) * int(training.get("gradient_accumulation_steps", 1))


def rounds_left(history: Sequence[Mechanism], plan: PrivacyPlan, budget: float, accountant: str = "prv") -> int:
    """How many more rounds of the plan, of at most as many as it has, a budget pays for after this history."""
    low, high, middle = 0, plan.rounds, plan.rounds  # all of them, most often
    while low < high:
        more = plan.round._replace(steps=plan.round.steps * middle)
        low, high = (middle, high) if spent([*history, more], plan.delta, accountant) <= budget else (low, middle - 1)
        middle = (low + high + 1) // 2
    return low
