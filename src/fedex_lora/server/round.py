"""One round that is going on: whom it asks, what it has heard, whether that is enough, and what it comes to. No I/O, no waiting."""

import json
from collections import Counter
from collections.abc import Collection, Sequence

from fedex_lora.aggregation import get_method
from fedex_lora.aggregation import server_state as states
from fedex_lora.errors import StorageError, TrainingError, UsageError, WireError
from fedex_lora.protocol.envelopes import answer_in
from fedex_lora.protocol.failures import OF_THE_RUN, Failure
from fedex_lora.protocol.frame import printable
from fedex_lora.protocol.messages import Download, decode_update
from fedex_lora.protocol.records import Answer, Apology, elsewhere
from fedex_lora.server.checks import below_quorum, quorum
from fedex_lora.server.norm_filter import Size, norm_rejected, require_frozen, size_of
from fedex_lora.server.registry import ServerContext, Unanswered
from fedex_lora.server.requests import LazyMessages, Phase, Requests
from fedex_lora.server.result import Result, result_of
from fedex_lora.server.verdicts import Accepted, Complete, Failed, Ignored, Late, NeedsFull, Receipt, Rejected, Short, Verdict
from fedex_lora.types import ClientUpdate, LowRank

TWICE, NOT_ASKED = "its first answer counts", "it was not asked in this round"
OTHER_BASE = "its base model is not the others': give all the same model, revision and precision"
_SETS = ("missing", "needs_full", "failed", "hopeless", "_unsettled", "_silent")


class Round:
    """A round, as `Server.open_round` makes it. It has ended once it is closed or skipped, or another one is opened.

    Attributes:
        phase: "train", or "evaluate" (clients answer with numbers only).
        number: from 1; of an evaluation after the last round, one more than that.
        participants: whom it asks.
        messages: client -> bytes, of those whom the last `open_round` or `ask_again` asked.
        missing: who of them is still waited for.
        receipts: client -> what is remembered of its valid update.
        late: the same, of updates of the round before.
        needs_full: who does not have what its message counts on: see `ask_again`.
        failed: who said that it has no update, or is gone.
    """

    def __init__(self, server: ServerContext, phase: Phase, participants: Sequence[str]) -> None:
        self._server, self.phase, self.participants = server, phase, list(participants)
        self.number, self.ended = server.state.round + 1, False
        self.receipts, self.late = dict[str, Receipt](), dict[str, Receipt]()
        self.missing, self.needs_full, self.failed, self.hopeless = set[str](), set[str](), set[str](), set[str]()
        self._requests, self._rejections = Requests(server, phase), list[Rejected]()
        self._unsettled, self._silent, self._ignored = set[str](), set[str](), dict[str, str]()
        self._ask(self.participants)

    def _ask(self, clients: Sequence[str]) -> None:
        self.messages = self._requests.ask(clients)
        self.missing |= set(clients)
        self._unsettled |= set(clients)
        self._silent -= set(clients)
        self.needs_full -= set(clients)

    def _require_open(self) -> None:
        if self.ended:
            raise UsageError(f"round {self.number} has ended: open the next one")

    def receive(self, client: str, payload: bytes) -> Verdict:
        """See `Server.receive`; UsageError where the round has ended."""
        self._require_open()
        said = answer_in(payload)
        verdict = self._judged(client, payload, said)
        self._record(verdict, said.base if isinstance(said, Answer) else "")
        return verdict

    def lost(self, client: str, reason: str, round: int | None = None) -> Verdict:
        """The transport says that nothing will come of a client; UsageError where the round has ended.

        Args:
            client, reason: who and why.
            round: that it was asked in; None: this one.
        """
        self._require_open()
        verdict: Verdict = Failed(client, self.number, f"it failed: {reason}")
        if round not in (None, self.number):
            verdict = Rejected(client, round or 0, f"it failed, too late to matter: {reason}")
        elif client in self.receipts:
            verdict = Ignored(client, self.number, TWICE)
        elif client not in self._requests.asked:
            verdict = Rejected(printable(client), self.number, NOT_ASKED)
        self._record(verdict)
        return verdict

    def give_up(self, reason: str = "") -> list[Rejected]:
        """Wait for nobody any more. With a reason, who is missing is rejected and returned; its answer may still come in the next round."""
        silent, self.missing = sorted(self.missing), set()
        self._silent |= set(silent)
        if not reason:
            return []
        rejected = [Rejected(client, self.number, self._ignored.get(client, reason)) for client in silent if client not in self.late]
        self._rejections += rejected
        return rejected

    def _judged(self, client: str, payload: bytes, said: Answer | Apology | None) -> Verdict:
        if self.phase == "train" and (verdict := self._of_the_round_before(client, payload, said)):
            return verdict
        if client in self.receipts:
            return Ignored(client, self.number, TWICE)
        if client not in self._requests.asked:
            kind = Ignored if said is not None and said.round < self.number else Rejected
            return kind(printable(client), self.number, NOT_ASKED)
        sent = self._requests.download(client)
        if said is not None and (why := elsewhere(said, sent.request)):
            return Ignored(client, self.number, why)
        if isinstance(said, Apology):
            return self._apology(client, Failure(said.code, said.rows))
        try:
            return Accepted(client, self.number, self._decoded(payload, sent, said))
        except WireError as error:
            return Rejected(client, self.number, str(error))

    def _decoded(self, payload: bytes, sent: Download, said: Answer | Apology | None) -> ClientUpdate:
        rules, withheld = self._server.rules, get_method(sent.body.method).withheld(sent.request.round)
        update = decode_update(payload, sent, withheld, rules.messages.max_examples)
        if self._server.base and isinstance(said, Answer) and said.base not in ("", self._server.base):
            raise WireError(OTHER_BASE)
        if rules.local.head_rounds:
            require_frozen(update, self._requests.start(sent)[0], sent, rules.local.head_rounds)
        return update

    def _of_the_round_before(self, client: str, payload: bytes, said: Answer | Apology | None) -> Verdict | None:
        """What a valid answer to a message of the round before is; None: it is no such answer."""
        if (sent := self._server.unanswered.downloads.get(client)) is None:
            return None
        try:
            update = self._decoded(payload, sent, said)
        except WireError:
            return None
        if client in self.late or client in self.receipts:
            return Ignored(client, sent.request.round, TWICE)
        if self._server.rules.clients.late == "next":
            return Late(client, sent.request.round, update)
        return Rejected(client, sent.request.round, f"it answered in round {self.number} only: too late (clients.late = 'refuse')")

    def _apology(self, client: str, failure: Failure) -> Verdict:
        if failure.code == "lacks" and not self._requests.asked[client].request.full:
            return NeedsFull(client, self.number, str(failure))
        return Failed(client, self.number, f"it failed: {failure}", failure.code in OF_THE_RUN, failure.code)

    def _record(self, verdict: Verdict, base: str = "") -> None:
        client = verdict.client
        if isinstance(verdict, Late):
            self.late[client] = self._receipt(verdict.update, self._server.unanswered.downloads[client], base)
        elif isinstance(verdict, Accepted):
            self.late.pop(client, None)  # what is averaged is what was judged, also where this one is asked for again
            self.receipts[client] = self._receipt(verdict.update, self._requests.download(client), base)
            for heard in (self.needs_full, self.missing, self.failed, self.hopeless):
                heard.discard(client)
        elif isinstance(verdict, Ignored):
            self._ignored.setdefault(client, verdict.reason)
        elif isinstance(verdict, NeedsFull):
            self.needs_full |= {client} & self.missing
            self.missing.discard(client)
        elif verdict.round == self.number and client in self._requests.asked:
            self._rejections.append(verdict)
            self.failed |= {client} if isinstance(verdict, Failed) else set()
            self.hopeless |= {client} if isinstance(verdict, Failed) and verdict.hopeless else set()
            self.missing.discard(client)

    def _receipt(self, update: ClientUpdate, sent: Download, base: str) -> Receipt:
        first = self._requests.start(sent)[0] if update.adapter else {}
        return Receipt(update.num_examples, update.metrics, size_of(update, first, sent.body.other), base)

    def ask_again(self, clients: Collection[str], full: bool = False) -> LazyMessages:
        """Ask some clients once more, whatever they answered; with `full` their messages bring everything.

        Raises:
            UsageError: they were not asked before, or the round has ended.
        """
        self._require_open()
        if odd := set(clients) - set(self._requests.asked):
            raise UsageError(f"{min(odd)} was not asked in this round: ask its participants")
        self._settle(clients)
        if full:
            self._server.registry = self._server.registry.record_replies(self._server.state.round, clients, (), {})
        self._rejections = [one for one in self._rejections if one.client not in clients]
        self.failed, self.hopeless = self.failed - set(clients), self.hopeless - set(clients)
        self.receipts = {client: one for client, one in self.receipts.items() if client not in clients}
        self._ask(sorted(clients))
        return self.messages

    def _settle(self, clients: Collection[str]) -> None:
        """The registry learns what the answers of these clients say of who holds what, and whom to tell of a rejection."""
        reasons, valid = {one.client: one.reason for one in self.rejections}, self.receipts.keys() & set(clients)
        asked = valid | self._unsettled & set(clients)
        self._server.registry = self._server.registry.record_replies(self._server.state.round, asked, valid, reasons)
        self._unsettled -= set(clients)

    def _base(self) -> str:
        """What the base is called: where it is not known yet, as most of the updates say; of two with as many, the first client's."""
        found = Counter(one.base for _, one in sorted({**self.late, **self.receipts}.items()) if one.base)
        return self._server.base or max(found, key=found.__getitem__, default="")

    def _refused(self) -> dict[str, Rejected]:
        """Of the clients whose valid update is not averaged: it is of another base than the others', or far larger."""
        found, base, bound = {**self.late, **self.receipts}, self._base(), self._server.rules.messages.norm_bound
        odd = {client: OTHER_BASE for client, one in found.items() if one.base not in ("", base)}
        sizes = {client: one.size for client, one in found.items() if client not in odd}
        return {client: Rejected(client, self.number, why) for client, why in (odd | norm_rejected(sizes, bound)).items()}

    @property
    def rejections(self) -> list[Rejected]:
        """What is no part of the mean, and why, as far as it has been heard."""
        return [one for one in self._rejections if one.client not in self.receipts] + list(self._refused().values())

    def ready(self) -> Complete | Short:
        """Are there enough updates of those that have come? Those of another base, and far larger ones, do not count."""
        rules, asked, refused = self._server.rules, len(self.participants), self._refused()
        on_time, late = sorted(self.receipts.keys() - refused.keys()), frozenset(self.late.keys() - refused.keys() - self.receipts.keys())
        rejected, reasons = list(refused.values()), [(one.client, one.reason) for one in self.rejections]
        if reason := below_quorum(self.number, len(on_time), asked, reasons, rules):
            return Short(reason, on_time, len(self.hopeless) > asked - quorum(rules, asked), rejected)
        return Complete(sorted([*on_time, *late]), late, rejected)

    def close(self, updates: Sequence[ClientUpdate]) -> Result:
        """End the round with the mean of the updates: the server goes on from it.

        Args:
            updates: those of `Complete.clients`, as `receive` gave them, in any order.

        Raises:
            TrainingError: there are too few: see `ready`.
            UsageError: they are other clients', the round has ended, or it only evaluates.
            AggregationError: see `server_state.step`.
        """
        self._require_open()
        ready, server = self.ready(), self._server
        if self.phase == "evaluate":
            raise UsageError("an evaluation is not closed: read its receipts, and open the next round")
        if isinstance(ready, Short):
            raise TrainingError(ready.reason)
        updates = sorted(updates, key=lambda update: update.client_id)
        if [update.client_id for update in updates] != list(ready.clients):
            raise UsageError(f"the round is closed with the updates of {', '.join(ready.clients)}, each once, and no others")
        before, rules, sent = server.state, server.rules, self._requests.download
        behind = {module: LowRank(U=-gain.U, V=gain.V) for module, gain in server.unanswered.gained.items()}
        held = {client: behind if client in ready.late else self._requests.start(sent(client))[1] for client in ready.clients}
        late = {client: held[client] for client in ready.late}
        state, aggregate = states.step(before, updates, rules.weights, rules.truncation, late, rules.server)
        server.base, silent = self._base(), self.leave()
        server.registry = server.registry.after_round(before, state, aggregate, ready.clients, server.clients, rules)
        gain = states.gained_in(before, state, aggregate, rules.server) if silent else {}
        server.state, server.unanswered = state, Unanswered(silent, gain)
        return result_of(before, state, aggregate, updates, held, rules.server, server.base)

    def skip(self) -> None:
        """End the round without a mean: the server is as before it, and its number is used up.

        Raises:
            UsageError: the round has ended.
        """
        self._require_open()
        server, before, state, silent = self._server, self._server.state, states.skip(self._server.state), self.leave()
        server.registry = server.registry.after_skip(before, state, server.clients, server.rules)
        server.state, server.unanswered = state, Unanswered(silent)

    def leave(self) -> dict[str, Download]:
        """End the round; the registry has learnt from its answers. Returns the messages that nobody answered."""
        self._settle(self._unsettled | self.receipts.keys())
        self.ended = True
        silent = sorted((self._silent | self.missing) - self.receipts.keys())
        return {client: self._requests.download(client) for client in silent} if self.phase == "train" else {}

    def dump(self) -> bytes:
        """What the round has heard so far; the updates are the caller's. See `Server.reopen`."""
        receipts = {name: {client: list(one) for client, one in getattr(self, name).items()} for name in ("receipts", "late")}
        about = {
            "phase": self.phase,
            "number": self.number,
            "participants": self.participants,
            "asked": self._requests.table(),
            "rejections": [[one.client, one.round, one.reason] for one in self._rejections],
            **receipts,
            **{name: sorted(getattr(self, name)) for name in _SETS},
        }
        return json.dumps(about).encode()

    @classmethod
    def restore(cls, server: ServerContext, payload: bytes) -> "Round":
        """The inverse of `dump`, on the server that was dumped with it: see `Server.reopen`; StorageError where it is no such dump."""
        try:
            about = json.loads(payload)
            round = cls(server, about["phase"], about["participants"])
            if about["number"] != round.number:
                raise StorageError(f"it is the dump of round {about['number']}, and the server is at round {round.number}: give its twin")
            round._requests.take(about["asked"])
            for name in ("receipts", "late"):
                heard = about[name].items()
                setattr(round, name, {client: Receipt(rows, has, Size(*size), *more) for client, (rows, has, size, *more) in heard})
            round._rejections = [Rejected(*one) for one in about["rejections"]]
            for name in _SETS:
                setattr(round, name, set(about[name]))
        except (KeyError, ValueError, TypeError) as error:
            raise StorageError(f"it is no dump of a round ({error!r}): give what dump() returned") from None
        return round
