"""The clients' side: from the bytes of a message to the bytes of an answer, with what each client remembers in between."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from fedex_lora.aggregation import get_method
from fedex_lora.aggregation import server_state as server
from fedex_lora.aggregation.lowrank import same_bits
from fedex_lora.client.learner import Learner
from fedex_lora.client.receiving import begin, read
from fedex_lora.client.state import MEMORY, ClientMemory, load_memory, save_memory
from fedex_lora.config import Config
from fedex_lora.errors import LacksError
from fedex_lora.storage.adapter_folder import Format, write_adapter_folder
from fedex_lora.storage.result import safe_name
from fedex_lora.types import Adapter, ClientUpdate, Delta, ServerState


class Parties:
    """Clients that train in turn on one learner: all of a federation in one process, or one alone on its own machine.

    Each knows what it was sent itself and nothing else, as on its own machine. Where many are here, copies with the same bits are one
    object in memory, and base deltas with the server's bits are not written to the clients' files; who is `alone` writes them.

    Args:
        config: the run.
        learner: what trains.
        alone: nobody else on this machine knows what the client was sent.
    """

    def __init__(self, config: Config, learner: Learner, alone: bool = False) -> None:
        self.config, self.learner, self.alone = config, learner, alone
        self.memories = dict[str, ClientMemory]()
        self._folder: Path | None = None

    def remember_in(self, folder: Path, base_of: Callable[[int], Mapping[str, Delta] | None]) -> None:
        """Keep the clients' memories in `folder/CLIENT`, and take up those that are there.

        Args:
            folder: of this run.
            base_of: the server's base delta of a version, for memories that do not hold it; None where it is gone.

        Raises:
            StorageError: one of them is broken.
        """
        self._folder = folder
        for client in self.learner.rows:
            if (path := self._path(client)).exists():
                self.memories[client] = self._sharing_adapter(load_memory(path, base_of))

    def _path(self, client: str) -> Path:
        assert self._folder is not None
        return self._folder / safe_name(client) / MEMORY

    def answer(self, client: str, payload: bytes) -> bytes:
        """What the client says to a message; to a round that it answered already, the same again.

        Raises:
            WireError: the message is wrong, or the client lacks what it counts on.
            TrainingError: see `Learner.train`.
        """
        memory = self.memories.get(client, ClientMemory())
        message = read(payload, memory, self.learner.first)
        if message.kind == "train" and message.round == memory.round and (reply := self._reply(client, memory)):
            return reply
        begun = begin(message, memory, self.learner.first, self.config.server)
        begun = replace(begun, memory=self._sharing(begun.memory))
        self.memories[client] = begun.memory
        self.learner.put(begun.start, begun.delta, begun.message.other)
        own = self.learner.measure(client)
        if message.kind == "evaluate":
            return begun.answer(ClientUpdate(client_id=client, adapter={}, num_examples=self.learner.rows[client], metrics=own))
        update, optimizer = self.learner.train(client, message.round, memory.optimizer)
        update = replace(update, metrics={**update.metrics, **own})
        reply = begun.answer(update)
        memory = begun.remembered(update, reply, optimizer, self.config)
        if self._folder:
            save_memory(self._path(client), memory, whole=self.alone)
            memory = replace(memory, reply=b"")
        self.memories[client] = memory
        return reply

    def _reply(self, client: str, memory: ClientMemory) -> bytes:
        """The client's last answer, from its file where that has it."""
        if memory.reply or self._folder is None or not self._path(client).exists():
            return memory.reply
        return load_memory(self._path(client), lambda version: None).reply

    def _sharing(self, memory: ClientMemory) -> ClientMemory:
        """The memory, with base and adapter those of another client where they have the same bits.

        Raises:
            LacksError: the base must have the server's bits, and has not those of another client's of that version.
        """
        base = memory.base
        bases = (other.base for other in self.memories.values())
        twin = next((one for one in bases if one.version == base.version and not one.lossy), None)
        if twin is not None and not base.lossy:
            if base.delta.keys() != twin.delta.keys() or not all(same_bits(base.delta[name], twin.delta[name]) for name in twin.delta):
                raise LacksError(f"the base of version {base.version} is not the one that other clients were sent: ask for a snapshot")
            memory = replace(memory, base=twin)
        return self._sharing_adapter(memory)

    def _sharing_adapter(self, memory: ClientMemory) -> ClientMemory:
        mine, version = memory.adapter, memory.base.version
        others = (other.adapter for other in self.memories.values() if other.base.version == version)
        twin = next((other for other in others if mine and other and _same(mine, other)), mine)
        return replace(memory, adapter=twin)

    def save_personal(self, state: ServerState, folder: Path, ranks: Mapping[str, int], format: Format) -> None:
        """Under a personalised method each client's model is its own: its adapter, as a PEFT folder, in `CLIENT/adapter`."""
        if get_method(state.method).exactness != "personalised":
            return
        for client in self.learner.rows:
            kept = self.memories.get(client, ClientMemory()).trained
            adapter, _ = server.start_of(state.method, state.adapter, ranks.get(client), kept[max(kept)] if kept else None)
            write_adapter_folder(folder / safe_name(client) / "adapter", adapter, state.other, format)


def _same(left: Adapter, right: Adapter) -> bool:
    """The same factors, bit for bit."""
    return left.keys() == right.keys() and all(
        pair.scaling == other.scaling and torch.equal(pair.A, other.A) and torch.equal(pair.B, other.B)
        for pair, other in ((pair, right[module]) for module, pair in left.items())
    )
