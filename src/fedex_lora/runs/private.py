"""What the clients of a run must have said of their privacy, and whether their ledgers pay for it: told before anything is written."""

from collections.abc import Collection, Mapping

from fedex_lora.config import Config, nearest
from fedex_lora.errors import ConfigError, FedexLoraError
from fedex_lora.privacy.account import Account
from fedex_lora.privacy.accounting import PrivacyPlan, privacy_plan
from fedex_lora.privacy.ledger import read_ledger


def accounts_of(config: Config, clients: Collection[str], whole: bool = False) -> dict[str, Account]:
    """The account of each client by its ledger; none where training is not private.

    Args:
        config: the run.
        clients: all of them, or the one that is here.
        whole: see `Account`.

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
    return {client: Account(privacy.ledger, client, plan, budget, privacy.accountant, whole=whole) for client, plan in plans.items()}


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
