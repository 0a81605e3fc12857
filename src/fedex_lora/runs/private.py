"""What the clients of a run must have said of their privacy, and whether their ledgers pay for it: told before anything is written."""

from collections.abc import Collection, Mapping
from functools import partial

import numpy as np
from blake3 import blake3

from fedex_lora.config import Config, nearest
from fedex_lora.errors import ConfigError, FedexLoraError
from fedex_lora.privacy.account import Account, rows_digest
from fedex_lora.privacy.accounting import PrivacyPlan, privacy_plan
from fedex_lora.privacy.ledger import read_ledger
from fedex_lora.tasks import Task
from fedex_lora.tasks.partition import Indices


def digests_of(task: Task, parts: Mapping[str, tuple[Indices, Indices]]) -> dict[str, str]:
    """Client -> a digest of all rows that it holds."""
    return {client: rows_digest(task.train.iloc[np.concatenate(held)].to_dict("records")) for client, held in parts.items()}


def accounts_of(config: Config, clients: Collection[str], rows: Mapping[str, str] | None = None) -> dict[str, Account]:
    """The account of each client by its ledger; none where training is not private.

    Args:
        config: the run.
        clients: all of them, or the one that is here.
        rows: client -> a digest of its rows, where one ledger is of them all; else all that a ledger says is of this party.

    Raises:
        ConfigError: what `[privacy]` lacks, or says that cannot be: all of it in one line.
    """
    privacy = config.privacy
    if not privacy.is_on:
        return {}
    problems, plans = list[str](), dict[str, PrivacyPlan]()
    if config.task.needs_labels:
        problems.append("task.labels is not set: name all classes there, for those of the rows would say which ones there are")
    if isinstance(privacy.rows, dict):
        for name in sorted(privacy.rows.keys() - set(clients)):
            near = nearest(name, sorted(clients))
            problems.append(f"privacy.rows.{name} is no client: " + (f"did you mean {near}?" if near else f"they are {', '.join(clients)}"))
    for client in clients:
        try:
            plans[client] = privacy_plan(config, client)
        except ConfigError as error:
            problems.append(str(error))
    if privacy.ledger is None:
        problems.append("privacy.ledger is not set: name a file there, and begin it: fedex-lora ledger FILE --begin")
    else:
        try:
            read_ledger(privacy.ledger)
        except FedexLoraError as error:
            problems.append(str(error))
    if problems or privacy.ledger is None:
        raise ConfigError("; ".join(dict.fromkeys(problems)), "privacy")
    budget = privacy.budget or privacy.epsilon or 0.0
    made = blake3(config.task.model_dump_json().encode()).hexdigest()[:16]
    account = partial(Account, privacy.ledger, budget=budget, accountant=privacy.accountant, task=made)
    held = rows or {}
    others = {client: frozenset(digest for name, digest in held.items() if name != client) for client in plans}
    return {client: account(client, plan, rows=held.get(client, ""), others=others[client]) for client, plan in plans.items()}


def require_paid(accounts: Mapping[str, Account], run: str) -> list[str]:
    """What is to be said of budgets that end before the run does.

    Args:
        accounts: client -> its own.
        run: the word of the run, as far as it began; "" of one that did not.

    Raises:
        ConfigError: one does not pay for the next round.
    """
    notes, problems = list[str](), list[str]()
    for account in accounts.values():
        standing = account.standing(run)
        if standing.paid < standing.ahead:
            (notes if standing.paid else problems).append(standing.words(account))
    if problems:
        raise ConfigError("; ".join(problems), "privacy")
    return notes
