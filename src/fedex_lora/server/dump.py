"""The server's state and registry as one table of tensors and one JSON text, and back."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedex_lora.aggregation.flatten import flatten_adapter, flatten_deltas, scalings_of, under, unflatten_adapter, unflatten_deltas
from fedex_lora.errors import StorageError
from fedex_lora.protocol.delta_sync import CatchUp, Log
from fedex_lora.protocol.messages import Body, Download
from fedex_lora.protocol.records import Request
from fedex_lora.server.registry import ClientRegistry, Unanswered
from fedex_lora.storage.result import StoredResult
from fedex_lora.types import Delta, LowRank, MovingDense, MovingLowRank, ServerState


def unanswered_table(unanswered: Unanswered) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The messages of the round before that nobody answered, as far as an answer needs it. They have one body: where answers may be late,
    ranks do not differ."""
    if not unanswered.downloads:
        return {}, {}
    body = next(iter(unanswered.downloads.values())).body
    tensors = flatten_adapter("asked", body.adapter) | {f"asked_other|{name}": tensor for name, tensor in body.other.items()}
    tensors |= flatten_deltas("gained", unanswered.gained)
    about = {"scalings": scalings_of(body.adapter), "version": body.catch_up.version, "gained": list(unanswered.gained)}
    return tensors, {**about, "requests": [sent.request.model_dump() for sent in unanswered.downloads.values()]}


def unanswered_of(tensors: Mapping[str, Tensor], about: Mapping[str, Any], method: str) -> Unanswered:
    """The inverse of `unanswered_table`."""
    if not about:
        return Unanswered()
    adapter, version = unflatten_adapter("asked", about["scalings"], tensors), about["version"]
    body = Body(method, adapter, under("asked_other", tensors), CatchUp(version, version))
    requests = [Request(**request) for request in about["requests"]]
    return Unanswered({sent.client: Download(sent, body) for sent in requests}, _products("gained", about["gained"], tensors))


def server_table(state: ServerState, registry: ClientRegistry, whole: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what is to be said of them.

    Args:
        state, registry: of the server.
        whole: with adapter, base delta and other tensors; without, they are in the result folder beside (which has no place for the exact
            scalings, PEFT's alpha / r rounds them, nor for the base delta's velocities).
    """
    log, stored = registry.log, {} if whole else state.base_delta
    moving: dict[str, Delta] = {name: delta for name, delta in stored.items() if isinstance(delta, MovingLowRank | MovingDense)}
    tensors = flatten_deltas("moving", moving) | {f"velocity|{name}": tensor for name, tensor in state.velocity.items()}
    for number, gains in log.gains.items():
        tensors |= flatten_deltas(f"log|{number}", gains)
    for number, past in log.adapters.items():
        tensors |= {name: tensor.clone() for name, tensor in flatten_adapter(f"past{number}", past).items()}  # rounds may share them
    for index, adapter in enumerate(state.personal.values()):
        tensors |= flatten_adapter(f"personal{index}", adapter)
    tensors |= flatten_adapter("adapter", state.adapter, "" if whole else "AB")  # U and C, which the folder has as `B = U C`
    if whole:
        tensors |= flatten_deltas("base_delta", state.base_delta)
        tensors |= {f"other|{name}": tensor for name, tensor in state.other.items()}
    about = {
        "method": state.method,
        "round": state.round,
        "seed": state.seed,
        "adapter": scalings_of(state.adapter),
        "base_delta": list(state.base_delta),
        "other": list(state.other),
        "personal": [[client, scalings_of(adapter)] for client, adapter in state.personal.items()],
        "log": {str(number): list(gains) for number, gains in log.gains.items()},
        "whole": log.whole,
        "past": [[number, scalings_of(past)] for number, past in log.adapters.items()],
        "halts": list(log.halts),
        "version": registry.version,
        "changed": registry.last_changed,
        "lost": sorted(registry.unknown_state),
        "accepted": registry.last_accepted,
        "told": registry.pending_rejection,
        "history": list(registry.history.items()),
    }
    return tensors, about


def server_state_of(
    tensors: Mapping[str, Tensor], about: Mapping[str, Any], stored: StoredResult | None = None
) -> tuple[ServerState, ClientRegistry]:
    """The inverse of `server_table`.

    Args:
        tensors, about: what `server_table` gave, the JSON parsed.
        stored: what the result folder beside holds; None: the dump is whole.

    Raises:
        StorageError: something is missing, or does not fit together.
    """
    try:
        if stored is None:
            adapter = unflatten_adapter("adapter", about["adapter"], tensors)
            base_delta, other = unflatten_deltas("base_delta", tensors), under("other", tensors)
        else:
            adapter = unflatten_adapter("adapter", about["adapter"], {**flatten_adapter("adapter", stored.adapter), **tensors})
            base_delta, other = base_delta_of(tensors, about, stored.base_delta), dict(stored.other)
        state = ServerState(
            method=about["method"],
            round=int(about["round"]),
            adapter={module: adapter[module] for module in about["adapter"]},
            base_delta={module: base_delta[module] for module in about["base_delta"]},
            other={name: other[name] for name in about["other"]},
            seed=about["seed"],
            personal={
                client: unflatten_adapter(f"personal{i}", scalings, tensors) for i, (client, scalings) in enumerate(about["personal"])
            },
            velocity=under("velocity", tensors),
        )
        log = Log(
            gains={int(number): _products(f"log|{number}", modules, tensors) for number, modules in about["log"].items()},
            whole=about["whole"],
            adapters={number: unflatten_adapter(f"past{number}", scalings, tensors) for number, scalings in about.get("past", ())},
            halts=tuple(about.get("halts", ())),
        )
        registry = ClientRegistry(
            log=log,
            version=about["version"],
            last_changed=about["changed"],
            unknown_state=frozenset(about["lost"]),
            last_accepted=about["accepted"],
            pending_rejection=about["told"],
            history=dict(about.get("history", ())),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise StorageError(
            f"the server's dump is not what this version writes ({error!r}): resume with the version that wrote it"
        ) from None
    return state, registry


def _products(prefix: str, modules: list[str], tensors: Mapping[str, Tensor]) -> dict[str, LowRank]:
    found = unflatten_deltas(prefix, tensors)
    return {module: LowRank(U=delta.U, V=delta.V) for module in modules if isinstance(delta := found[module], LowRank)}


def base_delta_of(tensors: Mapping[str, Tensor], about: Mapping[str, Any], stored: Mapping[str, Delta]) -> dict[str, Delta]:
    """What the base gained, in the order of the modules, with the velocities that the result folder's own file has no place for.

    Raises:
        KeyError, ValueError: something is missing.
    """
    moving = unflatten_deltas("moving", tensors, dotted=True)
    return {module: moving.get(module) or stored[module] for module in about["base_delta"]}
