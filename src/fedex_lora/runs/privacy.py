"""What a private run says of itself: each party's plan, the facts of its manifest, how large noise times noise is."""

import math
from collections.abc import Collection, Mapping
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from fedex_lora.aggregation import METHODS, get_method
from fedex_lora.client.arguments import training_arguments
from fedex_lora.config import Config, Privacy
from fedex_lora.errors import ConfigError
from fedex_lora.models.outline import outline
from fedex_lora.privacy.accounting import PrivacyPlan
from fedex_lora.privacy.noise import UpdateNoise, noise_of_training, noise_of_update
from fedex_lora.runs.private import accounts_of, digests_of, plans_or_problems, trained_and_measured
from fedex_lora.server.checks import participants, require_consistent
from fedex_lora.tasks import Task
from fedex_lora.tasks.dealt import dealt
from fedex_lora.tasks.partition import Indices
from fedex_lora.types import Adapter

ALLOWED = (1.0, 3.0, 8.0)  # epsilons that a description compares


def plans_of(config: Config, clients: Collection[str]) -> dict[str, PrivacyPlan]:
    """Client -> what its private training is.

    Raises:
        ConfigError: all that is wrong with all of them, in one line.
    """
    found, wrong = plans_or_problems(config, sorted(clients))
    if wrong:
        raise ConfigError("; ".join(wrong))
    return found


def privacy_facts(config: Config, clients: Collection[str]) -> dict[str, Any]:
    """What manifests and the first event say of privacy: nothing of a plain run, and nothing that is a function of private rows.

    `privacy` is for everybody. `private_clients` is what single clients do, where they have stated their rows here: over Flower each
    node keeps that to itself, and may be stricter than the run.
    """
    privacy = config.privacy
    if not privacy.is_on:
        return {}
    common = {key: getattr(privacy, key) for key in ("epsilon", "delta", "clip_norm", "accountant")}
    facts: dict[str, Any] = {"privacy": {**common, "unit": "record", "relation": "add or remove one", "rounds": config.rounds}}
    if stated := [client for client in clients if privacy.stated(client) is not None]:
        facts["private_clients"] = {client: plan_facts(plan) for client, plan in plans_of(config, stated).items()}
    return facts


def plan_facts(plan: PrivacyPlan) -> dict[str, float]:
    """A plan as plain values."""
    one = plan.round
    return {"rows": plan.rows, "rate": one.rate, "steps": one.steps * plan.rounds, "sigma": one.sigma, "epsilon": plan.epsilon}


def noise_warning(config: Config, adapter: Adapter, clients: Collection[str]) -> str:
    """What is to be said of noise times noise in a private run; "" where there is none: the run is plain, or trains one factor at a time.

    Args:
        config: the run.
        adapter: at its start.
        clients: all of them.
    """
    method = get_method(config.method)
    if not config.privacy.is_on or method.private != "warns":
        return ""
    why = f"{config.method} trains both factors, so noise meets noise"
    instead = f"{', '.join(name for name, row in METHODS.items() if row.private == 'yes')} have none"
    if any(config.privacy.stated(client) is None for client in clients):
        return f"{why} in their products; how much, `fedex-lora privacy` says where the rows are stated: {instead}"
    found = update_noise(config, adapter, plans_of(config, clients))
    if method.reinitialises:
        where = f"in what the base gains, of norm {found.products:.2g}"
    elif method.residual_policy == "base":
        where = f"in the residual that the base gains, of norm {found.residual:.2g}"
    else:
        where = f"in the product of the mean factors, of norm {found.means:.2g} (in the residual, which is dropped, {found.residual:.2g})"
    return f"{why}: {where} in round 1, where noise makes {found.first:.2g} of the update to first order: {instead}"


def start_warning(config: Config, start: Mapping[str, Any]) -> str:
    """What is to be said of a private run that goes on from a result; "" where there is none, or the run is plain.

    Args:
        config: the run.
        start: see `ModelContext.stands_on`.
    """
    if not (config.privacy.is_on and start):
        return ""
    own = f"privacy.epsilon = {config.privacy.epsilon:g} is of this run alone: base.start {start['folder']}"
    if start["privacy"].startswith("none") or "after none" in start["privacy"]:
        return f"{own} was trained without privacy (in all: {start['privacy']}), and what it learnt of the same rows is not covered"
    return f"{own} has its own ({start['privacy']}), and of the same rows both together say more: their ledgers have the sum"


def update_noise(config: Config, adapter: Adapter, plans: Mapping[str, PrivacyPlan]) -> UpdateNoise:
    """Of round 1, by the run's own optimiser and schedule; where not all clients take part, of those with most noise."""
    deviations = {client: factor_noise(config, plan) for client, plan in plans.items()}
    asked = sorted(plans, key=lambda client: -deviations[client])[: participants(config.clients.fraction, len(plans))]
    rows = np.array([plans[client].rows if config.weights == "num_examples" else 1 for client in asked], dtype=float)
    return noise_of_update(adapter, [deviations[client] for client in asked], list(rows / rows.sum()))


def factor_noise(config: Config, plan: PrivacyPlan) -> float:
    """Standard deviation of the noise in each number of a client's factors after round 1."""
    steps = plan.round.steps

    def stepping(numbers: nn.Parameter) -> tuple[Optimizer, Any]:
        model = nn.Module()
        model.weight = numbers
        with TemporaryDirectory() as folder:  # Trainer makes its own
            arguments = training_arguments(config, folder)
            arguments.remove_unused_columns = False
            trainer = Trainer(model=model, args=arguments)
        trainer.create_optimizer_and_scheduler(steps * (plan.rounds if config.local.schedule == "run" else 1))
        optimizer: Any = trainer.optimizer
        schedule: Any = trainer.lr_scheduler
        return optimizer, schedule.step

    return noise_of_training(stepping, steps, plan.round.sigma * plan.clip_norm / plan.batch)


def describe_privacy(config: Config) -> dict[str, Any]:
    """What `fedex-lora privacy` says; nothing is trained, and no weight of the base is read.

    Returns:
        `method`, `rounds`, `epsilon`, `delta`, `accountant`, `clip_norm`, `trained` (numbers); `clients`: name -> its plan, with the noise
        beside the clip norm, `each` of a single number and `noise` of all that are trained, and where there is a ledger what is `spent`
        and how many `rounds_paid` it pays for; `allows`: client -> epsilon -> sigma and these, for epsilon 1, 3 and 8; `notes`: lines.
        Clients that state alike are one, "each of N".

    Raises:
        FedexLoraError: the settings give no privacy, or the rows or the model are not there.
    """
    task, parts = dealt(config)
    privacy = config.privacy
    require_consistent(config if privacy.is_on else config.model_copy(update={"privacy": Privacy()}), len(parts))
    shapes = outline(config, task.kind, task.model_config)
    alike = not isinstance(privacy.rows, dict) and len(parts) > 1
    names = {next(iter(parts)): f"each of {len(parts)}"} if alike else {client: client for client in sorted(parts)}

    def described(epsilon: float | None) -> dict[str, dict[str, Any]]:
        asked = config.model_copy(update={"privacy": privacy.model_copy(update={"epsilon": epsilon})})
        return {names[client]: _row(plan, shapes.trained) for client, plan in plans_of(asked, names).items()}

    allowed = {epsilon: described(epsilon) for epsilon in ALLOWED}
    short = ("sigma", "each", "noise")

    def chosen(name: str) -> dict[str, dict[str, float]]:
        return {f"{epsilon:g}": {key: rows[name][key] for key in short} for epsilon, rows in allowed.items()}

    return {
        **{key: getattr(config, key) for key in ("method", "rounds")},
        **{key: getattr(privacy, key) for key in ("epsilon", "delta", "accountant", "clip_norm")},
        "trained": shapes.trained,
        "clients": _with_budget(config, described(privacy.epsilon), task, parts) if privacy.is_on else {},
        "allows": {name: chosen(name) for name in names.values()},
        "notes": [_meaning(config, shapes.trained), *filter(None, [noise_warning(config, shapes.adapter, parts)])],
    }


def _row(plan: PrivacyPlan, trained: int) -> dict[str, Any]:
    each = plan.round.sigma / plan.batch
    return {**plan_facts(plan), "round_steps": plan.round.steps, "each": each, "noise": each * math.sqrt(trained)}


def _with_budget(
    config: Config, rows: dict[str, dict[str, Any]], task: Task, parts: Mapping[str, tuple[Indices, Indices]]
) -> dict[str, dict[str, Any]]:
    """With what the ledger says of each client, where there is one: of clients that are one row, of the one that has spent most."""
    privacy = config.privacy
    if privacy.ledger is None or not privacy.ledger.exists():
        return rows
    accounts = accounts_of(config, list(parts), digests_of(task, parts), trained_and_measured(config, task, parts))
    standing = {client: account.standing() for client, account in accounts.items()}
    left = {client: {"spent": one.epsilon, "rounds_paid": one.paid} for client, one in standing.items()}
    most = max(left.values(), key=lambda one: one["spent"])
    return {name: {**row, **left.get(name, most)} for name, row in rows.items()}


def _meaning(config: Config, trained: int) -> str:
    return (
        f"noise: of a step's mean gradient, in clip norms (privacy.clip_norm = {config.privacy.clip_norm:g}): standard deviation of one "
        f"number, and norm over the {trained:,} that {config.method} trains; a record weighs at most 1 / batch in the same unit"
    )
