"""What the clients of a run must have said of their privacy, and whether their ledgers pay for it: told before anything is written."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from blake3 import blake3

from fedex_lora.config import Config, nearest
from fedex_lora.errors import ConfigError, FedexLoraError
from fedex_lora.privacy.account import Account, rows_digest
from fedex_lora.privacy.accounting import PrivacyPlan, privacy_plan
from fedex_lora.privacy.ledger import read_ledger
from fedex_lora.tasks import Task
from fedex_lora.tasks.custom import columns_read
from fedex_lora.tasks.partition import Indices


def digests_of(task: Task, parts: Mapping[str, tuple[Indices, Indices]]) -> dict[str, str]:
    """Client -> a digest of all rows that it holds."""
    return {client: rows_digest(task.train.iloc[np.concatenate(held)].to_dict("records")) for client, held in parts.items()}


def trained_and_measured(config: Config, task: Task, parts: Mapping[str, tuple[Indices, Indices]]) -> int:
    """How many evaluation rows clients train on, too; 0 where they are less than half: short texts are alike by chance."""
    said = columns_read(config.task) if config.task.name == "custom" else task.eval.columns
    columns = [column for column in said if column in task.train.columns and column in task.eval.columns]
    everybody = np.concatenate([indices for held in parts.values() for indices in held])
    trained = {rows_digest([row]) for row in task.train.iloc[everybody][columns].to_dict("records")}
    shared = sum(rows_digest([row]) in trained for row in task.eval[columns].to_dict("records"))
    return shared if 2 * shared >= len(task.eval) else 0


def grouped_by_client(said: Iterable[tuple[str, str]]) -> list[str]:
    """What is to be said of clients, once for all of whom it is said.

    >>> grouped_by_client([("north", "no rows"), ("south", "too few steps"), ("west", "no rows")])
    ['clients north, west: no rows', 'client south: too few steps']
    """
    clients = dict[str, list[str]]()
    for client, words in said:
        clients.setdefault(words, []).append(client)
    return [f"client{'s' if len(names) > 1 else ''} {', '.join(names)}: {words}" for words, names in clients.items()]


def plans_or_problems(config: Config, clients: Iterable[str]) -> tuple[dict[str, PrivacyPlan], list[str]]:
    """Client -> what its private training is; and what is wrong with that of others."""
    plans, problems = dict[str, PrivacyPlan](), list[tuple[str, str]]()
    for client in clients:
        try:
            plans[client] = privacy_plan(config, client)
        except ConfigError as error:
            problems.append((client, str(error)))
    return plans, grouped_by_client(problems)


def accounts_of(config: Config, clients: Collection[str], rows: Mapping[str, str] | None = None, shared: int = 0) -> dict[str, Account]:
    """The account of each client by its ledger; none where training is not private.

    Args:
        config: the run.
        clients: all of them, or the one that is here.
        rows: client -> a digest of its rows, where all are in this process and one ledger is of them; else all that a ledger says is of
            this party.
        shared: see `trained_and_measured`.

    Raises:
        ConfigError: what `[privacy]` lacks, or says that cannot be: all of it in one line.
    """
    privacy = config.privacy
    if not privacy.is_on:
        return {}
    plans, wrong = plans_or_problems(config, clients)
    problems = list[str]()
    if config.task.needs_labels:
        problems.append("task.labels is not set: name all classes there, for those of the rows would say which ones there are")
    if isinstance(privacy.rows, dict):
        for name in sorted(privacy.rows.keys() - set(clients)):
            near = nearest(name, sorted(clients))
            problems.append(f"privacy.rows.{name} is no client: " + (f"did you mean {near}?" if near else f"they are {', '.join(clients)}"))
    problems += wrong + _twins(rows or {})
    twice = of_one_file(config) if rows is not None else ""
    if twice or shared:
        which = f"task.eval = {twice!r} has the rows to train on" if twice else f"of the rows of task.eval {shared} are trained on"
        problems.append(f"{which}, and metrics are told without noise: give other rows to measure")
    if privacy.ledger is None:
        problems.append("privacy.ledger is not set: name a file there, and begin it: fedex-lora ledger FILE --begin")
    else:
        try:
            read_ledger(privacy.ledger)
        except FedexLoraError as error:
            problems.append(str(error))
    if problems or privacy.ledger is None:
        raise ConfigError("; ".join(problems), "privacy")
    budget = privacy.budget or privacy.epsilon or 0.0
    made = blake3(config.task.model_dump_json().encode()).hexdigest()[:16]
    account = partial(Account, privacy.ledger, budget=budget, accountant=privacy.accountant, task=made)
    held = rows or {}
    others = {client: frozenset(held.values()) - {held.get(client)} for client in plans}  # equal rows are the client's own
    return {client: account(client, plan, rows=held.get(client, ""), others=others[client]) for client, plan in plans.items()}


def _twins(rows: Mapping[str, str]) -> list[str]:
    """Clients whose rows have one digest."""
    shared = {digest: count for digest, count in Counter(rows.values()).items() if count > 1}
    return [
        f"clients {', '.join(sorted(client for client, mine in rows.items() if mine == digest))} hold the same rows, so that each record "
        f"would be paid for {count} times: give each its own"
        for digest, count in shared.items()
    ]


def of_one_file(config: Config) -> str:
    """`task.eval`, if it is what is trained on, too."""
    task, folder = config.task, Path(config.task.data or "")
    trained = {(folder / name).resolve() for name in [task.train, *config.clients.data.values()] if name}
    return task.eval if task.eval and (folder / task.eval).resolve() in trained else ""


def require_ledgers(accounts: Mapping[str, Account], run: str) -> None:
    """The ledgers know a run of which there are rounds: one that does not would let it spend, and answer, again.

    Raises:
        ConfigError: one has no entry of it.
    """
    for path in {account.path for account in accounts.values()}:
        if not any(line.run == run for line in read_ledger(path)):
            raise ConfigError(f"{path} has no entry of this run, which has rounds: is it the right ledger?", "privacy")


def require_paid(accounts: Mapping[str, Account], run: str) -> list[str]:
    """What is to be said of budgets that end before the run does.

    Args:
        accounts: client -> its own.
        run: the word of the run, as far as it began; "" of one that did not.

    Raises:
        ConfigError: one does not pay for the next round.
    """
    notes, problems = list[tuple[str, str]](), list[tuple[str, str]]()
    for account in accounts.values():
        standing, alone = account.standing(run), account.plan.epsilon
        if standing.paid < standing.ahead:
            below = f"the run alone spends {alone:.4g}, so " if alone > account.budget else ""
            mend = "failed rounds are a part of this run's epsilon: begin a new run" if standing.failed else ""
            words = f"{standing.words(account)}: {mend or f'{below}raise privacy.budget'}"
            words += "" if mend or run else ", or lower privacy.epsilon"  # of which a run that began is made
            (notes if standing.paid else problems).append((account.client, words))
    if problems:
        raise ConfigError("; ".join(grouped_by_client(problems)), "privacy")
    return grouped_by_client(notes)


def spent_lines(accounts: Mapping[str, Account], run: str) -> list[str]:
    """What was spent by now, for the console of whoever has the ledger."""
    return grouped_by_client((client, account.standing(run).words(account)) for client, account in accounts.items())
