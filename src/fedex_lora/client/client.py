"""A client of a federation as a protocol object: it gets bytes and gives bytes, and never reads, writes, waits or trains."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable
from weakref import WeakValueDictionary

from torch import Tensor

from fedex_lora.aggregation import get_method
from fedex_lora.aggregation import server_state as states
from fedex_lora.client import agreement
from fedex_lora.client.received import Asking, Evaluate, NeedsFull, Received, StoredAnswer, Train
from fedex_lora.client.state import ClientState, Question, client_state_of, client_table
from fedex_lora.config import Config, Rules
from fedex_lora.errors import LacksError, PrivacyError, UsageError, WireError
from fedex_lora.protocol.delta_sync import ModelCopy, caught_up, require_next
from fedex_lora.protocol.dumps import pack, unpack
from fedex_lora.protocol.envelopes import REQUEST, encode_failure, envelope_of
from fedex_lora.protocol.failures import Failure
from fedex_lora.protocol.messages import Body, decode_body, encode_update
from fedex_lora.protocol.records import Request, uncountable
from fedex_lora.types import Adapter, ClientUpdate, Delta


@runtime_checkable
class Model(Protocol):
    """What a client trains: `fedex_lora.AdaptedModel`, or anything that has these two."""

    def load(self, start: Adapter, delta: Mapping[str, Delta], other: Mapping[str, Tensor]) -> str | None:
        """Take over the factors to train, what the frozen base has gained, and the other trained tensors. Returns the name of its base,
        where it has one."""

    def read(self) -> tuple[Adapter, Mapping[str, Tensor]]:
        """The factors and the other trained tensors as they are now."""


class Shared:
    """What clients of one process need not have twice: copies of the global model with the server's bits, and the last body decoded."""

    def __init__(self) -> None:
        self.copies: WeakValueDictionary[tuple[str, int | None], ModelCopy] = WeakValueDictionary()  # by history and rank
        self.body: tuple[tuple[str, str, int | None], Body] | None = None


class Client:
    """One client.

    Args:
        rules: what server and clients agree on.
        name: under which the server knows it.
        first: the initial adapter: the same for everyone who has the configuration and the base.
        shared: one `fedex_lora.client.client.Shared()` for all clients of this process; None: its own.
        base: what the frozen base has gained before the first round, where a run starts from a result: the same for everyone, too.

    Attributes:
        state: what it remembers from round to round.

    Raises:
        UsageError: `first` is no adapter.
        PrivacyError: the rules are those of private training, which is none of this object's.

    Example: see `fedex_lora.server.server.Server`.
    """

    def __init__(
        self, rules: Rules, name: str, first: Adapter, shared: Shared | None = None, base: Mapping[str, Delta] | None = None
    ) -> None:
        if not isinstance(first, Mapping):
            raise UsageError(f"a client's first adapter is AdaptedModel(model).read()[0], and this is a {type(first).__name__}")
        if isinstance(rules, Config) and rules.privacy.is_on:
            raise PrivacyError(
                "privacy.epsilon is set, and a Client of one's own trains plainly: remove it, or run by fedex_lora.run or Flower"
            )
        self.rules, self.name, self.first = rules, name, ModelCopy(adapter=first, delta=base or {})
        self.state = ClientState(self.first)
        self._shared = shared or Shared()
        self._request: Request | None = None
        self._work: Asking | None = None
        self._model: Model | None = None
        self._base = ""

    def receive(self, payload: bytes) -> Received:
        """Read a message: what it asks of this client, whose copy of the global model is then at the message's version.

        Raises:
            WireError: the message is not for it, altered, or contradicts itself or what the client has: answer with `fail("message")`.
            UsageError, AdapterError: this party's rules, or its initial adapter, are not the server's.
        """
        self._request = self._work = self._model = None
        request, body = envelope_of(payload, Request, REQUEST)
        if request.client != self.name:
            raise WireError(f"this is client {self.name!r}, and the message is for {request.client!r}")
        self._request = request
        if request.kind == "train" and _question(request) == self.state.answered:
            return StoredAnswer(self.state.reply)
        agreement.require_same_rules(self.rules, request.rules)
        try:
            self._work = self._begun(request, body)
        except LacksError as error:
            return NeedsFull(self.fail(error.code), str(error))
        return self._work

    def _begun(self, request: Request, payload: memoryview) -> Train | Evaluate:
        """Bring the copy of the global model to the message's version, and say what is trained."""
        copy = self.first if request.full else self.state.copy
        if not request.full and copy.history not in (request.base_history, request.history):
            raise LacksError(f"the base is at version {copy.version}, and the message counts from a model that this client does not have")
        key = request.body, copy.history, request.rank  # the factors that did not travel are those of the copy
        if self._shared.body is None or self._shared.body[0] != key:
            self._shared.body = key, decode_body(payload, request.body, copy.adapter)
        body = self._shared.body[1]
        if body.catch_up.version != request.round - 1:
            raise WireError(f"the message of round {request.round} brings version {body.catch_up.version}")
        agreement.require_same_method(self.rules.method, body.method)
        method = get_method(body.method)
        if not self.state.round:
            agreement.require_same_adapter(self.first.adapter, body.adapter, request.rank is None and not method.per_client_ranks)
        copy = self._synced(copy, body, request)
        own = method.client_state
        kept = self._last_accepted_factors(request.accepted) if own else {}
        start, held = states.start_of(body.method, copy.adapter, request.rank, kept.get(request.accepted))
        new = request.kind == "train" and request.round > self.state.round
        moments = self.state.moments if new else None  # those of a round that the server lost are of another model
        self.state = replace(self.state, copy=copy, trained=kept if new else self.state.trained)
        kind = Train if request.kind == "train" else Evaluate
        return kind(request.round, start, states.advance(copy.delta, held), body.other, moments, request, body.method)

    def _synced(self, copy: ModelCopy, body: Body, request: Request) -> ModelCopy:
        """The copy after a message, which may come again; of what has the server's bits there is one in this process."""
        if request.history and copy.history == request.history:
            return copy
        if copy.lossy or body.catch_up.gain or not request.history:
            return replace(caught_up(copy, body.catch_up, body.adapter, self.rules.server), history=request.history)
        require_next(copy, body.catch_up)
        key = request.history, request.rank
        if (found := self._shared.copies.get(key)) is None:
            found = replace(caught_up(copy, body.catch_up, body.adapter, self.rules.server), history=request.history)
            twin = next((other for (history, _), other in self._shared.copies.items() if history == request.history), None)
            found = replace(found, delta=twin.delta) if twin else found
            self._shared.copies[key] = found
        return found

    def _last_accepted_factors(self, accepted: int) -> dict[int, Adapter]:
        """The client's own factors of the last round in which its update counted; what it trained since is forgotten.

        Raises:
            WireError: it has none of that round.
        """
        kept = {round: own for round, own in self.state.trained.items() if round == accepted}
        if accepted and not kept:
            raise WireError(f"the server counts on this client's own factors of round {accepted}, and it has none: start the run anew")
        return kept

    def load(self, model: Model) -> None:
        """Write what is to be trained, or measured, into a model, which many clients may share.

        Raises:
            UsageError: nothing was asked, or it is no such model.
            ModelError: its base is not the federation's.
            AdapterError: what is to be trained does not fit it.
        """
        work = self._asked()
        if not isinstance(model, Model):
            raise UsageError(f"load takes AdaptedModel(model), and this is a {type(model).__name__}: make one, and keep it for all rounds")
        base = model.load(work.start, work.delta, work.other)
        self._base = base if isinstance(base, str) else ""
        agreement.require_same_base(self._base, work.request.base)
        self._model = model

    def reply(
        self,
        num_examples: int,
        metrics: Mapping[str, float],
        moments: Mapping[str, Any] | None = None,
        update: ClientUpdate | None = None,
    ) -> bytes:
        """The answer to the last message.

        Args:
            num_examples: the client's training rows, a whole number from 1 (of an evaluation from 0).
            metrics: what it measured, numbers only; names that begin with `held_out_` are of its own held-out rows.
            moments: the optimiser's `state_dict`, to be kept until the next round where the rules say so.
            update: what it trained; None: what the model that was loaded holds.

        Raises:
            UsageError: nothing was asked, no model was loaded, no number of rows, or metrics that are no plain numbers.
            TrainingError: the model that was loaded has not changed, or has where it may not.
        """
        work, state = self._asked(), self.state
        if wrong := uncountable(num_examples, work.request.kind, self.rules.messages.max_examples):
            raise UsageError(wrong)
        if isinstance(work, Evaluate):
            update = ClientUpdate(self.name, {}, num_examples, metrics=metrics)
        elif update is None:
            if self._model is None:
                raise UsageError("load a model before the reply, or give the update")
            adapter, other = self._model.read()
            agreement.require_trained(work.start, work.other, (adapter, other))
            update = ClientUpdate(self.name, adapter, num_examples, other, metrics)
        method = get_method(work.method)
        if isinstance(work, Train) and self._model is not None:
            agreement.require_as_loaded(method, work.round, work.start, work.other, (update.adapter, update.other))
        try:
            update = replace(update, num_examples=int(num_examples), metrics={name: float(value) for name, value in metrics.items()})
            reply = encode_update(update, work.request, work.method, state.copy.version, method.withheld(work.round), self._base)
        except (TypeError, ValueError) as error:
            raise UsageError(f"a reply has at most 64 metrics, numbers under plain names: {' '.join(str(error).split())[:200]}") from None
        if isinstance(work, Train):
            trained = {**state.trained, work.round: update.adapter} if method.client_state else {}
            kept = moments if self.rules.local.optimizer_state == "keep" else None
            self.state = ClientState(state.copy, trained, kept, _question(work.request), reply)
        self._work = self._model = None
        return reply

    def _asked(self) -> Asking:
        if self._work is None:
            raise UsageError("receive a message before: call receive(message), then load and reply")
        return self._work

    def fail(self, code: str, rows: int = 0) -> bytes:
        """The answer of a client without an update. `code` is of `protocol.failures.WORDS`; another one is sent as "unexpected"."""
        return encode_failure(Failure(code, rows), self.name, self._request)

    def dump(self, whole: bool = True) -> bytes:
        """Everything that the client knows between two messages.

        Args:
            whole: with the base also where it has the server's bits; else `restore` is told where that is.
        """
        return pack("client", *client_table(self.state, whole))

    @classmethod
    def restore(
        cls,
        payload: bytes,
        rules: Rules,
        name: str,
        first: Adapter,
        shared: Shared | None = None,
        base_of: Callable[[int], Mapping[str, Delta] | None] = lambda version: None,
        base: Mapping[str, Delta] | None = None,
    ) -> "Client":
        """The inverse of `dump`.

        Args:
            payload: what `dump` gave.
            rules, name, first, shared, base: see the class.
            base_of: gives the server's base delta of a version, for dumps that are not whole; None: it is gone, and asked for anew.

        Raises:
            StorageError: it is no such dump.
        """
        client = cls(rules, name, first, shared, base)
        client.state = client_state_of(*unpack("client", payload), client.first, base_of)
        return client


def _question(request: Request) -> Question:
    """What an answer is the answer to; the same round of another run, or of a server that lost rounds, is another question."""
    return request.run, request.round, request.history
