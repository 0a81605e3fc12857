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
LEAST, MOST = 0.1, 1024.0  # of sigma: less is next to none, and with more nothing is left to learn
MOST_STEPS = 1_000_000  # of all rounds together
FEW_STEPS = 100_000  # so many are composed numerically, of more Rényi divergences bound epsilon
CERTAIN = 1e-12  # of a delta and a step: below it the numerical composition, in float64, is not certain
LARGE = 400.0  # an epsilon, by Rényi divergences, that need not be known better
TINY = 1e-12  # of an epsilon: what is nothing at all, to its logarithm
POINTS = 2_000_000  # of a distribution of losses: more take gigabytes, and minutes


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
        history: what was done on the rows, in any order. With sigma below 0.1 the result is infinite.
        delta: of (epsilon, delta).
        accountant: "prv": the upper bound of the numerical composition (Gopi et al. 2021), or the Rényi bound where there are more than
            100,000 steps, epsilon is above 400, or delta is too small for float64; "rdp": the Rényi bound (Mironov et al. 2019).

    Raises:
        ConfigError: Opacus cannot compute it. UsageError: Opacus is not installed (the extra `dp`).

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
    if any(not sigma >= LEAST for sigma, _, _ in history):
        return math.inf
    if accountant == "rdp":
        return _accounted(history, "rdp", delta=delta)
    bound, steps = _epsilon(history, delta, "rdp"), sum(count for _, _, count in history)
    if not bound <= LARGE or steps > FEW_STEPS or delta < CERTAIN * steps:
        return bound
    error = max(min(0.01, bound / 200), _coarsest(history, steps, delta))  # it is added to the result
    return min(bound, _accounted(history, accountant, delta=delta, eps_error=error))


def _coarsest(history: Sequence[tuple[float, float, int]], steps: int, delta: float) -> float:
    """The error at which the numerical composition has `POINTS` of losses, by Opacus' own measures of how far and how fine they are."""
    alone = (_epsilon(((sigma, rate, 1),), delta / (8000 * steps), "rdp") for sigma, rate, _ in history)
    reach = max(_epsilon(tuple(history), delta / 4000, "rdp"), *alone) + 3
    return 2 * reach * math.sqrt(steps * math.log(12_000 / delta) / 2) / POINTS


def _accounted(history: Sequence[tuple[float, float, int]], accountant: str, **options: float) -> float:
    require_extra("opacus", "dp", "private runs")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.accountants import create_accountant

        made = create_accountant(mechanism=accountant)
        made.history = list(history)
        try:
            found = float(made.get_epsilon(**options))
        except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            told = ", ".join(f"{steps} steps of sigma {sigma:g} at rate {rate:g}" for sigma, rate, steps in history[:3])
            raise ConfigError(
                f"epsilon of {told}{', ...' if history[3:] else ''} at delta {options['delta']:g} cannot be computed by {accountant} "
                f"({type(error).__name__}): "
                + ('set privacy.accountant = "rdp"' if accountant == "prv" else "take a larger delta, or fewer steps")
            ) from None
    return math.inf if math.isnan(found) else max(0.0, found)


@lru_cache(maxsize=1024)
def noise_for(epsilon: float, delta: float, rate: float, steps: int, accountant: str = "prv") -> float:
    """The smallest sigma from `LEAST` up, to a thousandth of it, with which so many steps spend at most epsilon.

    Raises:
        ConfigError: no noise is enough, or see `spent`. UsageError: Opacus is not installed.

    Example:
        >>> round(noise_for(epsilon=1.0, delta=1e-5, rate=0.01, steps=1000), 1)
        1.4
    """

    def over(sigma: float) -> float:
        """How far above epsilon this sigma is, as a logarithm."""
        return math.log(max(spent([Mechanism(sigma, rate, steps)], delta, accountant) / epsilon, TINY))

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
        ConfigError: no number of rows is stated, or rows, batch, delta or steps that no plan allows; see `noise_for`.
    """
    privacy = config.privacy
    rows = privacy.stated(client)
    batch = _whole(config, "per_device_train_batch_size", BATCH) * _whole(config, "gradient_accumulation_steps", 1)  # expected, of a step
    if privacy.epsilon is None or rows is None:
        raise ConfigError(f"no {'epsilon is set: set privacy.epsilon' if rows else 'number of rows is stated: set privacy.rows'}")
    if rows < batch:
        raise ConfigError(f"{rows} rows are stated, and a batch has {batch}: set training.per_device_train_batch_size lower")
    if rows > config.messages.max_examples:
        raise ConfigError(f"{rows} rows are stated, and messages.max_examples is {config.messages.max_examples}: raise it")
    if privacy.delta >= 1 / rows:
        raise ConfigError(f"privacy.delta = {privacy.delta:g} is not below 1 / {rows} rows, so one record might be shown: set it lower")
    steps = _steps(config, rows, batch)
    if steps * config.rounds > MOST_STEPS:
        raise ConfigError(
            f"{steps * config.rounds} private steps, and there may be {MOST_STEPS}: take fewer rounds or epochs, or larger batches"
        )
    rate = batch / rows
    sigma = noise_for(privacy.epsilon, privacy.delta, rate, steps * config.rounds, privacy.accountant)
    mechanism = Mechanism(sigma, rate, steps)
    epsilon = spent([mechanism._replace(steps=steps * config.rounds)], privacy.delta, privacy.accountant)
    return PrivacyPlan(mechanism, config.rounds, batch, privacy.clip_norm, rows, epsilon, privacy.delta)


def _steps(config: Config, rows: int, batch: int) -> int:
    """Of a round."""
    if _number(config, "max_steps", -1) > 0:
        return _whole(config, "max_steps", 1)
    epochs = _number(config, "num_train_epochs", EPOCHS)
    if not 0 < epochs <= MOST_STEPS:
        raise ConfigError(f"training.num_train_epochs = {epochs:g}: private training takes more than none, and at most {MOST_STEPS}")
    return max(1, math.ceil(epochs * rows / batch))


def _whole(config: Config, key: str, default: int) -> int:
    number = _number(config, key, default)
    if not (number >= 1 and number.is_integer()):
        raise ConfigError(f"training.{key} = {number:g}: private training takes a whole number from 1 up")
    return int(number)


def _number(config: Config, key: str, default: float) -> float:
    try:
        return float(config.training.get(key, default))
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"training.{key} = {config.training[key]!r}: private training takes a number") from None


def rounds_left(history: Sequence[Mechanism], plan: PrivacyPlan, budget: float, accountant: str = "prv") -> int:
    """How many more rounds of the plan, of at most as many as it has, a budget pays for after this history."""
    low, high, middle = 0, plan.rounds, plan.rounds  # all of them, most often
    while low < high:
        more = plan.round._replace(steps=plan.round.steps * middle)
        low, high = (middle, high) if spent([*history, more], plan.delta, accountant) <= budget else (low, middle - 1)
        middle = (low + high + 1) // 2
    return low
