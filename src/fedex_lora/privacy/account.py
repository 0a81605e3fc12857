"""What a client may spend by its ledger: entries before training, answers before they leave, and a table of all that was spent."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from blake3 import blake3

from fedex_lora.errors import PrivacyError, counted
from fedex_lora.privacy.accounting import Mechanism, PrivacyPlan, rounds_left, spent
from fedex_lora.privacy.ledger import Answered, FailedRound, LedgerEntry, RoundLine, TrainedAgain, append_line, held_ledger, read_ledger

RETRIES = 4  # of an entry whose training was stopped; the next one has an entry of its own


@dataclass(frozen=True)
class Standing:
    """Where a client stands.

    Attributes:
        epsilon: of all that its ledger says.
        ahead: rounds of the run that are neither answered nor open.
        paid: how many of them the budget pays for.
        failed: does the run's own epsilon, of which failed rounds are a part, pay for fewer?
    """

    epsilon: float
    ahead: int
    paid: int
    failed: bool = False

    def words(self, account: "Account") -> str:
        """For the party itself, and nobody else."""
        said = f"epsilon {self.epsilon:.4g} of the budget of {account.budget:g} is spent at delta {account.plan.delta:g}"
        return said + (f", which pays for {self.paid} of the {self.ahead} rounds ahead" if self.ahead else "") + f" ({account.path})"


@dataclass(frozen=True)
class Account:
    """A client's ledger, and what it may spend by it.

    Attributes:
        path: the ledger.
        client: who.
        plan: of its run.
        budget: the most epsilon of all that the ledger says.
        accountant: see `spent`.
        rows: `rows_digest`.
        others: digests of the other rows that clients of the run hold; none, where the ledger is of one party.
        task: a digest of what the run makes of the rows.
    """

    path: Path
    client: str
    plan: PrivacyPlan
    budget: float
    accountant: str = "prv"
    rows: str = ""
    others: frozenset[str] = frozenset()
    task: str = ""

    def history(self, lines: Sequence[RoundLine]) -> list[Mechanism]:
        """All that counts of a ledger: what is not known to be of other rows was trained on these, whatever the client was called."""
        entries = [line for line in lines if isinstance(line, LedgerEntry)]
        return [line.mechanism for line in entries if line.client == self.client or line.rows not in self.others]

    def _of_run(self, lines: Sequence[RoundLine], run: str) -> list[RoundLine]:
        return [line for line in lines if (line.client, line.run) == (self.client, run)]

    def standing(self, run: str = "") -> "Standing":
        """Where the client stands, in the middle of a run; "" for one that did not begin."""
        lines = read_ledger(self.path)
        history, of_run = self.history(lines), self._of_run(lines, run)
        said = {line.round for line in of_run if isinstance(line, Answered)}
        done = next((round for round in sorted({line.round for line in of_run}, reverse=True) if round in said or _open(of_run, round)), 0)
        ahead = max(0, self.plan.rounds - done)
        entered = [line.mechanism for line in of_run if isinstance(line, LedgerEntry)]
        by_run = rounds_left(entered, self.plan, self._most, self.accountant)
        by_budget = rounds_left(history, self.plan, self.budget, self.accountant)
        return Standing(
            spent(history, self.plan.delta, self.accountant), ahead, min(ahead, by_run, by_budget), by_run < min(ahead, by_budget)
        )

    @property
    def _most(self) -> float:
        """Epsilon of all rounds of a run, up to rounding."""
        return self.plan.epsilon * (1 + 1e-6)

    def enter(self, run: str, round: int) -> None:
        """Write down a round that is about to be trained.

        One that is there, was neither answered nor told as failed, and is of the same noise and task, is trained again under its entry.
        With another task it is another question: if only whether it fails.

        Raises:
            PrivacyError: the budget does not pay for it, or it is beyond what the run was to spend; this round or a later one of the run
                was answered; or there is no ledger.
            StorageError: the ledger cannot be written, or is broken.
        """
        with held_ledger(self.path) as (descriptor, lines):
            of_run = self._of_run(lines, run)
            last = max((line.round for line in of_run if isinstance(line, Answered)), default=0)
            if round <= last:
                raise PrivacyError(
                    f"client {self.client} answered round {last} of run {run}, and another answer to round {round} would be a second "
                    "release: begin a new run"
                )
            history, mechanism = self.history(lines), self.plan.round
            if (mechanism, self.task) in _open(of_run, round) and _times_again(of_run, round) < RETRIES:
                append_line(descriptor, TrainedAgain(client=self.client, run=run, round=round))
                return
            self._require_of_run(of_run, run, round)
            epsilon = spent([*history, mechanism], self.plan.delta, self.accountant)
            if not epsilon <= self.budget:  # so that no number that is none is below it
                raise PrivacyError(
                    f"client {self.client}: with round {round} of run {run} epsilon would be {epsilon:.4g}, and its budget is "
                    f"{self.budget:g} ({counted(len(history), 'round')} before it in {self.path}): its rows are spent"
                )
            append_line(descriptor, self._entry(run, round))

    def _entry(self, run: str, round: int) -> LedgerEntry:
        return LedgerEntry(client=self.client, run=run, round=round, rows=self.rows, task=self.task, **self.plan.round._asdict())

    def _require_of_run(self, lines: Sequence[RoundLine], run: str, round: int) -> None:
        """All rounds of a run together are what its plan says: those that failed count, and a server cannot add any."""
        before = [line.mechanism for line in lines if isinstance(line, LedgerEntry)]
        epsilon = spent([*before, self.plan.round], self.plan.delta, self.accountant)
        if round > self.plan.rounds or not epsilon <= self._most:
            raise PrivacyError(
                f"client {self.client}: with round {round} of {self.plan.rounds} run {run} would come to epsilon {epsilon:.4g}, with all "
                f"that failed, and is to come to {self.plan.epsilon:.4g}: begin a new run"
            )

    def failed(self, run: str, round: int) -> None:
        """Write down that the training of a round failed, before anybody is told: that is an answer, too.

        Raises:
            PrivacyError, StorageError: see `enter`.
        """
        line = FailedRound(client=self.client, run=run, round=round)
        with held_ledger(self.path) as (descriptor, lines):
            of_run = self._of_run(lines, run)
            if not any(isinstance(one, LedgerEntry) and one.round == round for one in of_run):
                return  # it is another ledger than the one that was entered
            if not _open(of_run, round):  # another process has told something of the entry
                append_line(descriptor, self._entry(run, round))
            append_line(descriptor, line)

    def answered(self, run: str, round: int, reply: bytes) -> None:
        """Write down that the answer to a round is kept, and may leave: this one, and no other.

        Raises:
            PrivacyError, StorageError: see `enter`; or the ledger has no entry of this round, or another answer, so this one stays.
        """
        line = Answered(client=self.client, run=run, round=round, answer=blake3(reply).hexdigest())
        with held_ledger(self.path) as (descriptor, lines):
            there = {one.answer for one in lines if isinstance(one, Answered) and one.question == line.question}
            if there - {line.answer}:
                raise PrivacyError(
                    f"another process answered round {round} of run {run} meanwhile, by {self.path}, and this answer would be a second "
                    "release: keep one state folder a party"
                )
            if there:
                os.fsync(descriptor)
                return
            if not _open(self._of_run(lines, run), round):
                raise PrivacyError(
                    f"{self.path} has no open entry of round {round} of run {run}, so its answer stays: is it the right ledger?"
                )
            append_line(descriptor, line)


def _open(lines: Sequence[RoundLine], round: int) -> set[tuple[Mechanism, str]]:
    """The entries of a round of which nobody was told anything, mechanism and task."""
    found = set[tuple[Mechanism, str]]()
    for line in lines:
        if line.round == round and isinstance(line, LedgerEntry):
            found.add((line.mechanism, line.task))
        elif line.round == round and not isinstance(line, TrainedAgain):
            found = set()
    return found


def _times_again(lines: Sequence[RoundLine], round: int) -> int:
    """How often the last entry of a round was trained again: being stopped too often tells something, too."""
    of_round = [line for line in lines if line.round == round]
    return len(list(takewhile(lambda line: isinstance(line, TrainedAgain), reversed(of_round))))


def rows_digest(rows: Sequence[object]) -> str:
    """Of a party's rows, in whatever order: for its own eyes, for it says which rows of other ledgers are the same.

    Example:
        >>> rows_digest([{"text": "a"}, {"text": "b"}]) == rows_digest([{"text": "b"}, {"text": "a"}])
        True
    """
    each = sorted(blake3(json.dumps(row, sort_keys=True, default=repr).encode()).digest() for row in rows)
    return blake3(b"".join(each)).hexdigest()[:16]


@dataclass(frozen=True)
class Spending:
    """What was spent on the rows of one digest by a client in a run; with "" for a run, on all of a client; for a client, on everything.

    Attributes:
        client, run, rows: see `LedgerEntry`.
        rounds, answered: that were entered, and that were answered.
        steps: of all of them.
        epsilon: of all of them together.
    """

    client: str
    run: str
    rows: str
    rounds: int
    answered: int
    steps: int
    epsilon: float


def spendings(lines: Sequence[RoundLine], delta: float, accountant: str = "prv") -> list[Spending]:
    """A line for each client, run and rows, in the order of the ledger; then all of each client; where there are more, of all together."""
    entries = [line for line in lines if isinstance(line, LedgerEntry)]
    said = {line.question for line in lines if isinstance(line, Answered)}

    def together(key: tuple[str, str, str], those: Sequence[LedgerEntry]) -> Spending:
        epsilon = spent([one.mechanism for one in those], delta, accountant)
        return Spending(*key, len(those), len({one.question for one in those} & said), sum(one.steps for one in those), epsilon)

    groups, clients = dict[tuple[str, str, str], list[LedgerEntry]](), dict[tuple[str, str, str], list[LedgerEntry]]()
    for one in entries:
        groups.setdefault((one.client, one.run, one.rows), []).append(one)
        clients.setdefault((one.client, "", ""), []).append(one)
    everything = {("", "", ""): entries} if len(clients) > 1 else {}
    return [together(key, those) for table in (groups, clients, everything) for key, those in table.items()]
