"""One round that is going on: whom it asks, what it has heard, whether that is enough, and what it comes to. No I/O, no waiting."""

import json
from collections.abc import Collection, Sequence

from fedex_lora.aggregation import get_method
from fedex_lora.aggregation import server_state as states
from fedex_lora.errors import StorageError, TrainingError, UsageError, WireError
from fedex_lora.protocol.failures import Failure
from fedex_lora.protocol.messages import Download, decode_update, envelope_of
from fedex_lora.protocol.records import Answer, Apology, Request
from fedex_lora.server.checks import below_quorum, quorum
from fedex_lora.server.context import ServerContext, Unanswered
from fedex_lora.server.norm_filter import Size, norm_rejected, size_of
from fedex_lora.server.requests import Asked, LazyMessages, Phase, Requests
from fedex_lora.server.result import Result, result_of
from fedex_lora.server.verdicts import (
    Accepted,
    Complete,
    Duplicate,
    Failed,
    Late,
    NeedsFull,
    Receipt,
    Rejected,
    Short,
    Verdict,
    one_line,
    printable,
)
from fedex_lora.types import ClientUpdate, LowRank

TWICE = "its first answer counts"
_SETS = ("missing", "needs_full", "failed", "hopeless", "_unsettled", "_silent")


class Round:
    """A round, as `Server.open_round` makes it.

    Attributes:
        phase: "train", or "evaluate" (clients answer with numbers only).
        number: from 1; of an evaluation after the last round, one more than that.
        participants: whom it asks.
        messages: client -> bytes, of those whom the last `open_round` or `ask_again` asked.
        missing: who of them is still waited for.
        receipts: client -> what is remembered of its valid update.
        late: the same, of updates of the round before.
        rejections: what is no part of the mean, as it came.
        needs_full: who does not have what its message counts on: see `ask_again`.
        failed: who said that it has no update, or is gone.
    """

    def __init__(self, server: ServerContext, phase: Phase, participants: Sequence[str]) -> None:
        self._server, self.phase, self.participants = server, phase, list(participants)
        self.number = server.state.round + 1
        self.receipts, self.late = dict[str, Receipt](), dict[str, Receipt]()
        self.rejections, self.missing, self.needs_full = list[Rejected](), set[str](), set[str]()
        self.failed, self.hopeless = set[str](), set[str]()
        self._requests, self._unsettled, self._again, self._silent = Requests(server, phase), set[str](), dict[str, str](), set[str]()
        self._complete: Complete | None = None
        self._ask(self.participants)

    def _ask(self, clients: Sequence[str]) -> None:
        self.messages = self._requests.ask(clients)
        self.missing |= set(clients)
        self._unsettled |= set(clients)
        self._silent -= set(clients)
        self.needs_full -= set(clients)
        self._complete = None

    def receive(self, client: str, payload: bytes) -> Verdict:
        """See `Server.receive`."""
        verdict = self._judged(client, payload)
        self._record(verdict)
        return verdict

    def lost(self, client: str, reason: str, round: int | None = None) -> Verdict:
        """The transport says that nothing will come of a client.

        Args:
            client, reason: who and why.
            round: that it was asked in; None: this one.
        """
        name, number, reason = printable(client), self.number, one_line(reason)
        verdict: Verdict
        if round not in (None, number):
            verdict = Rejected(name, round or 0, f"it failed, too late to matter: {reason}")
        elif client in self.receipts:
            verdict = Duplicate(name, number, TWICE)
        elif client not in self._requests.asked:
            verdict = Rejected(name, number, "it was not asked in this round")
        else:
            verdict = Failed(name, number, f"it failed: {reason}")
        self._record(verdict)
        return verdict

    def give_up(self, reason: str = "") -> list[Rejected]:
        """Nobody is waited for any more. Whoever is missing is rejected, if a reason is given; its answer may come in the next round."""
        silent, self.missing = sorted(self.missing), set()
        self._silent |= set(silent)
        if not reason:
            return []
        rejected = [Rejected(client, self.number, self._again.get(client, reason)) for client in silent if client not in self.late]
        self.rejections += rejected
        return rejected

    def _judged(self, client: str, payload: bytes) -> Verdict:
        number, claimed = self.number, _round_of(payload)
        if self.phase == "train" and (verdict := self._of_the_round_before(client, payload)):
            return verdict
        if client in self.receipts:
            return Duplicate(client, number, TWICE)
        if client not in self._requests.asked:
            kind = Duplicate if claimed is not None and claimed < number else Rejected
            return kind(printable(client), number, "it was not asked in this round")
        try:
            return self._apology(client, envelope_of(payload, Apology)[0])
        except WireError:
            pass  # then it is an update, or nothing
        sent = self._requests.download(client)
        try:
            return Accepted(client, number, self._decoded(payload, sent))
        except WireError as error:
            kind = Duplicate if 0 < sent.request.accepted == claimed else Rejected
            return kind(client, number, one_line(str(error)))

    def _decoded(self, payload: bytes, sent: Download) -> ClientUpdate:
        stays = get_method(sent.body.method).withheld(sent.request.round)
        return decode_update(payload, sent, stays, self._server.rules.messages.max_examples)

    def _of_the_round_before(self, client: str, payload: bytes) -> Verdict | None:
        """What a valid answer to a message of the round before is; None: it is no such answer."""
        sent = self._server.unanswered.downloads.get(client)
        if sent is None:
            return None
        try:
            update = self._decoded(payload, sent)
        except WireError:
            return None
        number = sent.request.round
        if client in self.late:
            return Duplicate(client, number, TWICE)
        if self._server.rules.clients.late == "next":
            return Late(client, number, update)
        return Rejected(client, number, f"it answered in round {self.number} only: too late (clients.late = 'refuse')")

    def _apology(self, client: str, apology: Apology) -> Verdict:
        failure = Failure(apology.code, apology.rows)
        if apology.round not in (0, self.number):
            return Rejected(client, apology.round, f"it failed, too late to matter: {failure}")
        if apology.run not in ("", self._server.run) or apology.client != client:
            return Rejected(client, self.number, "its failure is of another run, or of another client")
        if failure.lacks and not self._requests.asked[client].request.full:
            return NeedsFull(client, self.number, str(failure))
        return Failed(client, self.number, f"it failed: {failure}", failure.of_the_run)

    def _record(self, verdict: Verdict) -> None:
        client = verdict.client
        if isinstance(verdict, Late):
            self.late[client] = self._receipt(verdict.update, self._server.unanswered.downloads[client])
        elif isinstance(verdict, Accepted):
            self.receipts[client] = self._receipt(verdict.update, self._requests.download(client))
            for heard in (self.needs_full, self.missing, self.failed, self.hopeless):
                heard.discard(client)
        elif isinstance(verdict, Duplicate):
            self._again.setdefault(client, verdict.reason)
        elif isinstance(verdict, NeedsFull):
            self.needs_full |= {client} & self.missing
            self.missing.discard(client)
        elif verdict.round == self.number and client in self._requests.asked:
            self.rejections.append(verdict)
            self.failed |= {client} if isinstance(verdict, Failed) else set()
            self.hopeless |= {client} if isinstance(verdict, Failed) and verdict.hopeless else set()
            self.missing.discard(client)

    def _receipt(self, update: ClientUpdate, sent: Download) -> Receipt:
        first = self._requests.start(sent)[0] if update.adapter else {}
        return Receipt(update.num_examples, update.metrics, size_of(update, first, sent.body.other))

    def ask_again(self, clients: Collection[str], full: bool = False) -> LazyMessages:
        """Ask some clients once more; with `full` their messages bring everything."""
        self._settle()
        if full:
            self._server.registry = self._server.registry.record_replies(self._server.state.round, clients, (), {})
        self.rejections = [one for one in self.rejections if one.client not in clients]
        self.failed -= set(clients)
        self.hopeless -= set(clients)
        self._ask(sorted(clients))
        return self.messages

    def _settle(self) -> None:
        """The registry learns what the answers say of who holds what."""
        reasons = {one.client: one.reason for one in self.rejections}
        valid = self.receipts.keys() & self._unsettled
        self._server.registry = self._server.registry.record_replies(self._server.state.round, self._unsettled, valid, reasons)
        self._unsettled = set()

    def ready(self) -> Complete | Short:
        """Are there enough updates? Those that are far larger than the others are rejected before they are counted."""
        if self._complete:
            return self._complete
        self._settle()
        rules, asked = self._server.rules, len(self.participants)
        late = {client: receipt for client, receipt in self.late.items() if client not in self.receipts}
        sizes = {client: receipt.size for client, receipt in {**late, **self.receipts}.items()}
        large = norm_rejected(sizes, rules.messages.norm_bound)
        rejected = [Rejected(client, self.number, one_line(reason)) for client, reason in large.items()]
        self.rejections = [one for one in self.rejections if one.client not in self.receipts] + rejected
        self._server.registry = self._server.registry.record_rejections(large)
        self.receipts = {client: receipt for client, receipt in self.receipts.items() if client not in large}
        self.late = {client: receipt for client, receipt in late.items() if client not in large}
        reasons = [(one.client, one.reason) for one in self.rejections]
        if reason := below_quorum(self.number, len(self.receipts), asked, reasons, rules):
            return Short(reason, len(self.hopeless) > asked - quorum(rules, asked), rejected)
        self._complete = Complete(sorted([*self.receipts, *self.late]), frozenset(self.late), rejected)
        return self._complete

    def close(self, updates: Sequence[ClientUpdate]) -> Result:
        """End the round with the mean of the updates: the server goes on from it.

        Args:
            updates: those of `Complete.clients`, as `receive` gave them, in any order.

        Raises:
            TrainingError: there are too few: see `ready`.
            UsageError: they are other clients'.
            AggregationError: see `server_state.step`.
        """
        ready, server = self.ready(), self._server
        if isinstance(ready, Short):
            raise TrainingError(ready.reason)
        updates = sorted(updates, key=lambda update: update.client_id)
        if [update.client_id for update in updates] != list(ready.clients):
            raise UsageError(f"the round is closed with the updates of {', '.join(ready.clients)}, each once, and no others")
        before, rules = server.state, server.rules
        behind = {module: LowRank(U=-gain.U, V=gain.V) for module, gain in server.unanswered.gained.items()}
        held = {
            client: behind if client in ready.late else self._requests.start(self._requests.download(client))[1] for client in ready.clients
        }
        late = {client: held[client] for client in ready.late}
        state, aggregate = states.step(before, updates, rules.weights, rules.truncation, late, rules.server)
        registry = server.registry.after_round(before, state, aggregate, ready.clients, server.clients, rules)
        silent = self._downloads_of_the_silent()
        gain = states.gained_in(before, state, aggregate, rules.server) if silent else {}
        server.state, server.registry, server.unanswered = state, registry, Unanswered(silent, gain)
        return result_of(before, state, aggregate, updates, held, rules.server)

    def dump(self) -> bytes:
        """What the round has heard so far; the updates are the caller's, and late ones are heard again. See `Server.reopen`."""
        asked = [[one.request.model_dump(), one.since, one.omit] for one in self._requests.asked.values()]
        return json.dumps({
            "phase": self.phase,
            "participants": self.participants,
            "asked": asked,
            "receipts": {client: [one.num_examples, dict(one.metrics), one.size] for client, one in self.receipts.items()},
            "rejections": [[one.client, one.round, one.reason] for one in self.rejections],
            **{name: sorted(getattr(self, name)) for name in _SETS},
        }).encode()  # fmt: skip

    @classmethod
    def restore(cls, server: ServerContext, payload: bytes) -> "Round":
        """The inverse of `dump`, on the server that was dumped with it: see `Server.reopen`."""
        try:
            about = json.loads(payload)
            round = cls(server, about["phase"], about["participants"])
            for request, since, omit in about["asked"]:
                round._requests.asked[request["client"]] = Asked(Request(**request), since, omit)
            round.receipts = {client: Receipt(count, metrics, Size(*size)) for client, (count, metrics, size) in about["receipts"].items()}
            round.rejections = [Rejected(*one) for one in about["rejections"]]
            for name in _SETS:
                setattr(round, name, set(about[name]))
        except (KeyError, ValueError, TypeError) as error:
            raise StorageError(f"it is no dump of a round ({error!r}): give what dump() returned") from None
        return round

    def skip(self) -> None:
        """End the round without a mean: the server is as before it, and its number is used up."""
        self._settle()
        before, state = self._server.state, states.skip(self._server.state)
        silent = self._downloads_of_the_silent()
        registry = self._server.registry.after_skip(before, state, self._server.clients, self._server.rules)
        self._server.state, self._server.registry, self._server.unanswered = state, registry, Unanswered(silent)

    def _downloads_of_the_silent(self) -> dict[str, Download]:
        return {client: self._requests.download(client) for client in sorted(self._silent | self.missing) if client not in self.receipts}


def _round_of(payload: bytes) -> int | None:
    """The round that an answer says it is of; None where it says nothing that can be read."""
    try:
        return envelope_of(payload, Answer)[0].round
    except WireError:
        return None
