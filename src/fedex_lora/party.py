"""The clients' side: from the bytes of a message to the bytes of an answer, with what a client remembers in between."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from fedex_lora import server
from fedex_lora.aggregation import method_named
from fedex_lora.aggregation.lowrank import same_bits
from fedex_lora.answers import Emit, stays
from fedex_lora.catch_up import BaseCopy, caught_up
from fedex_lora.client import ClientData, evaluate, local_update
from fedex_lora.errors import LacksError, WireError
from fedex_lora.memory import MEMORY, ClientMemory, load_memory, save_memory
from fedex_lora.peft_io import format_of, safe_name, write_adapter_folder, write_model
from fedex_lora.place import Place
from fedex_lora.types import Adapter, ClientUpdate, Delta, ServerState
from fedex_lora.wire import Download, completed, decode_download, encode_update


class Parties:
    """Clients that train in turn on the one model of this process: all of a federation, or one alone on its own machine.

    Each has its own copies of base delta and adapter, as on its own machine. Where many are here, those with the server's bits are one
    object in memory, and are not written to the clients' files; who is `alone` keeps and writes them.

    Args:
        place: the model.
        data: client -> its rows.
        emit: told of training steps.
        alone: nobody else on this machine knows what the client was sent.
    """

    def __init__(self, place: Place, data: Mapping[str, ClientData], emit: Emit, alone: bool = False) -> None:
        self.place, self.data, self.alone = place, data, alone
        self.memories = dict[str, ClientMemory]()  # base deltas with the same bits are one object
        self.latest: Adapter = place.first  # what a client's copy of the global adapter is, in the factors that do not travel again
        self._emit = emit
        self._folder: Path | None = None

    def remember_in(self, folder: Path, latest: Adapter, base_of: Callable[[int], Mapping[str, Delta] | None]) -> None:
        """Keep the clients' memories in `folder/CLIENT`, and take up those that are there.

        Args:
            folder: of this run.
            latest: the global adapter.
            base_of: the server's base delta of a version, for memories that do not hold it; None where it is gone.

        Raises:
            StorageError: one of them is broken.
        """
        self._folder, self.latest = folder, latest
        for client in self.data:
            if (path := self._path(client)).exists():
                self.memories[client] = load_memory(path, base_of)

    def _path(self, client: str) -> Path:
        assert self._folder is not None
        return self._folder / safe_name(client) / MEMORY

    def _memory(self, client: str) -> ClientMemory:
        return self.memories.get(client, ClientMemory())

    def answer(self, client: str, payload: bytes) -> bytes:
        """What the client says to a message; to one that it answered before it was interrupted, the same again.

        Raises:
            WireError: the message is wrong, or the client lacks what it counts on.
            TrainingError: see `local_update`.
        """
        memory = self._memory(client)
        message = decode_download(payload, memory.adapter or self.latest)
        if message.kind == "train" and memory.round == message.round and memory.reply:
            return memory.reply
        place, method, message = self.place, method_named(message.method), self._catch_up(client, message)
        memory = self._memory(client)
        kept = _counted(memory, message.accepted) if method.own else {}
        start, held = server.start_of(message.method, message.adapter, message.rank, kept.get(message.accepted))
        place.base.set(server.advance(memory.base.delta, held))
        write_model(place.model, start, message.other)
        data, steps = self.data[client], self._emit
        own = {f"held_out_{name}": value for name, value in evaluate(place.model, data.held_out, place.work).items()}
        left = stays(message.method, message.round)
        if message.kind == "evaluate":
            update = ClientUpdate(client_id=client, adapter={}, num_examples=len(data.train), metrics=own)
            return encode_update(update, message.run, message.round, message.method, left, memory.base.version)
        update, optimizer = local_update(
            place.model,
            client,
            message.round,
            data,
            place.work,
            memory.optimizer,
            lambda step, total: steps("step", round=message.round, client=client, step=step, steps=total),
        )
        update = replace(update, metrics={**update.metrics, **own})
        reply = encode_update(update, message.run, message.round, message.method, left, memory.base.version)
        memory = replace(
            memory,
            trained={**kept, message.round: update.adapter} if method.own or place.config.messages.per_client else {},
            optimizer=optimizer,
            round=message.round,
            reply=reply,
        )
        if self._folder:
            save_memory(self._path(client), memory, whole=self.alone)
        self.memories[client] = replace(memory, reply=b"")
        return reply

    def _catch_up(self, client: str, message: Download) -> Download:
        """Bring the client's copies of base and adapter to the message's version, from what it has and what it was sent; the whole message.

        Copies that must have the server's bits are compared, and are one object in memory: one for each version that some client has.
        """
        counted_on, memory = message.share is not None, self._memory(client)
        message = completed(message, memory.trained.get(message.round - 1))
        copy = caught_up(BaseCopy() if message.anew else memory.base, message.catch_up)
        bases = [other.base for other in self.memories.values()]
        alike = (other for other in bases if other.version == copy.version and not other.lossy)
        if not copy.lossy and (twin := next(alike, None)):
            if copy.delta.keys() != twin.delta.keys() or not all(same_bits(copy.delta[name], twin.delta[name]) for name in twin.delta):
                raise LacksError(f"the base of version {copy.version} is not the one that other clients were sent: ask for a snapshot")
            copy = twin
        own_copy = self.alone or counted_on or memory.adapter is not None
        self.memories[client] = replace(memory, base=copy, adapter=message.adapter if own_copy else None)
        if not own_copy and message.rank is None:
            self.latest = message.adapter
        return message

    def save_personal(self, state: ServerState, folder: Path, ranks: Mapping[str, int]) -> None:
        """Under a personalised method each client's model is its own: its adapter, as a PEFT folder, in `CLIENT/adapter`."""
        if method_named(state.method).exactness != "personalised":
            return
        for client in self.data:
            kept = self._memory(client).trained
            adapter, _ = server.start_of(state.method, state.adapter, ranks.get(client), kept[max(kept)] if kept else None)
            write_adapter_folder(folder / safe_name(client) / "adapter", adapter, state.other, format_of(self.place.model))


def _counted(memory: ClientMemory, accepted: int) -> dict[int, Adapter]:
    """The client's own factors of the last round in which its update counted; what it trained since is forgotten.

    Raises:
        WireError: it has none of that round.
    """
    kept = {round: own for round, own in memory.trained.items() if round == accepted}
    if accepted and not kept:
        raise WireError(f"the server counts on this client's own factors of round {accepted}, and it has none: start the run anew")
    return kept
