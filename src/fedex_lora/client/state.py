"""What a client remembers between rounds, as a table of tensors and a JSON text, and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedex_lora.aggregation.flatten import flatten_adapter, flatten_deltas, scalings_of, under, unflatten_adapter, unflatten_deltas
from fedex_lora.errors import StorageError
from fedex_lora.protocol.delta_sync import ModelCopy
from fedex_lora.types import Adapter, Delta

Question: TypeAlias = tuple[str, int, str]
"""A run, a round and its history."""


@dataclass(frozen=True, eq=False)
class ClientState:
    """One client.

    Attributes:
        copy: of the global model.
        trained: round -> what it trained in it, where the method has it keep factors.
        moments: Adam's, as `Optimizer.state_dict` has them, where they are kept.
        answered: the run, the round and its history that it answered last.
        reply: its answer.
    """

    copy: ModelCopy
    trained: Mapping[int, Adapter] = field(default_factory=dict)
    moments: Mapping[str, Any] | None = None
    answered: Question = ("", 0, "")
    reply: bytes = b""

    @property
    def round(self) -> int:
        """The round that it answered last."""
        return self.answered[1]


def client_table(state: ClientState, whole: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what is to be said of them.

    Args:
        state: of the client.
        whole: with the base also where it has the server's bits; else it is known by its version.
    """
    whole = whole or bool(state.copy.lossy)
    optimizer = state.moments or {}
    moments = {f"{index}|{name}": value for index, values in optimizer.get("state", {}).items() for name, value in values.items()}
    tensors = {"reply": torch.frombuffer(bytearray(state.reply), dtype=torch.uint8)} if state.reply else {"reply": torch.empty(0)}
    tensors |= {f"optimizer|{name}": value for name, value in moments.items() if isinstance(value, Tensor)}
    tensors |= flatten_deltas("base", state.copy.delta) if whole else {}
    for prefix, adapter in (("adapter", state.copy.adapter), *((f"trained{number}", one) for number, one in state.trained.items())):
        tensors |= flatten_adapter(prefix, adapter)
    about = {
        "answered": list(state.answered),
        "history": state.copy.history,
        "version": state.copy.version,
        "lossy": sorted(state.copy.lossy),
        "whole": whole,
        "adapter": scalings_of(state.copy.adapter),
        "trained": [[number, scalings_of(adapter)] for number, adapter in state.trained.items()],
        "optimizer": None if state.moments is None else optimizer["param_groups"],
        "plain": {name: value for name, value in moments.items() if not isinstance(value, Tensor)},
    }
    return tensors, about


def client_state_of(
    tensors: Mapping[str, Tensor], about: Mapping[str, Any], first: ModelCopy, base_of: Callable[[int], Mapping[str, Delta] | None]
) -> ClientState:
    """The inverse of `client_table`.

    Args:
        tensors, about: what `client_table` gave.
        first: the global model before the first round.
        base_of: gives the server's base delta of a version, or None: then the client has what it had before the first round.

    Raises:
        StorageError: something is missing, or does not fit together.
    """
    try:
        delta = unflatten_deltas("base", tensors, dotted=True) if about["whole"] else base_of(about["version"])
        lossy = frozenset(about["lossy"])
        adapter = first.adapter if about["adapter"] is None else unflatten_adapter("adapter", about["adapter"], tensors)
        reply = tensors["reply"].numpy().tobytes()
        if "answered" not in about and about["optimizer"] is not None and about["round"]:
            raise StorageError("its answer is an older version's, and what came before it is lost: resume with that version")
        return ClientState(
            copy=first if delta is None else ModelCopy(about["version"], delta, adapter, lossy, about.get("history", "")),
            trained={number: unflatten_adapter(f"trained{number}", scalings, tensors) for number, scalings in about["trained"]},
            moments=_moments(about, tensors),
            answered=tuple(about.get("answered", ("", 0, ""))),  # older versions' answers can be read no more, and are worked out again
            reply=reply,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise StorageError(f"it is no client's state of this version ({error!r}): resume with the version that began the run") from None


def _moments(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    if about["optimizer"] is None:
        return None
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**under("optimizer", tensors), **about["plain"]}.items():
        index, _, key = name.partition("|")
        state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": about["optimizer"]}
