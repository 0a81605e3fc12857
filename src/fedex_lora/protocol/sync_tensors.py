"""What brings a client's base up to date, as the tensors of a message's body, and back."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedex_lora.aggregation.flatten import flatten_deltas, under, unflatten_deltas
from fedex_lora.errors import WireError
from fedex_lora.protocol.delta_sync import CatchUp, require_whole
from fedex_lora.protocol.frame import shown
from fedex_lora.types import Adapter, Delta, LoRAPair, LowRank


def catch_up_tensors(message: CatchUp, adapter: Adapter) -> dict[str, Tensor]:
    """`log|ROUND|MODULE|PART`, `gain|MODULE|PART`, `snapshot|MODULE|PART`; and `past|ROUND|MODULE|B` of the adapters of past rounds, with A
    where that is not the present one's."""
    tensors = flatten_deltas("gain", message.gain) | flatten_deltas("snapshot", message.snapshot)
    for number, gains in message.log.items():
        tensors |= flatten_deltas(f"log|{number}", gains)
    for number, past in message.adapters.items():
        for module, pair in past.items():
            tensors[f"past|{number}|{module}|B"] = pair.B.clone()  # after a skipped round it may be the present one
            if not torch.equal(pair.A, adapter[module].A):
                tensors[f"past|{number}|{module}|A"] = pair.A.clone()
    return tensors


def catch_up_of(
    since: int, version: int, rounds: Sequence[int], halts: Sequence[int], tensors: Mapping[str, Tensor], adapter: Adapter
) -> CatchUp:
    """The inverse of `catch_up_tensors`, with modules and shapes those of the adapter.

    Raises:
        WireError: else; or half of a product, a tensor of no form, or what `require_whole` refuses.
    """
    logs, pasts = (_by_round(form, tensors) for form in ("log", "past"))
    try:
        log = {number: unflatten_deltas(f"log|{number}", logs.get(number, {})) for number in rounds}
        gain, snapshot = unflatten_deltas("gain", tensors), unflatten_deltas("snapshot", tensors)
    except ValueError as error:
        raise WireError(str(error)[:400]) from None
    placed = ("adapter|", "other|", "past|", "snapshot|", "gain|", "log|")
    if odd := [name for name in tensors if not name.startswith(placed)] + [name for one in logs.keys() - log.keys() for name in logs[one]]:
        raise _misplaced(odd[0], rounds)
    for form, deltas in {**{f"log|{number}": gains for number, gains in log.items()}, "gain": gain, "snapshot": snapshot}.items():
        for module, delta in deltas.items():
            if module not in adapter or adapter[module].shape != delta.shape:
                ours = adapter[module].shape if module in adapter else "no such module"
                name = shown(f"{form}|{module}")
                raise WireError(f"{name} is {delta.shape} and the adapter has {ours}: is the message of another model?")
    before = set(rounds[:-1])
    past = {number: _past(under(f"past|{number}", group), adapter, number in before) for number, group in pasts.items()}
    products = {number: _products(f"log|{number}", gains, rounds) for number, gains in log.items()}
    message = CatchUp(since, version, products, _products("gain", gain, rounds), snapshot, past, halts)
    require_whole(message)
    return message


def _products(form: str, deltas: Mapping[str, Delta], rounds: Sequence[int]) -> dict[str, LowRank]:
    """What is a product U V, as a log and a gain must be."""
    found = {module: delta for module, delta in deltas.items() if isinstance(delta, LowRank) and type(delta) is LowRank}
    if odd := deltas.keys() - found.keys():
        raise _misplaced(f"{form}|{min(odd)}", rounds)
    return found


def _misplaced(name: str, rounds: Sequence[int]) -> WireError:
    return WireError(f"tensor {shown(name)} has no place in a download with the log of rounds {list(rounds[:20])}")


def _by_round(form: str, tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The tensors `FORM|ROUND|...` of each round, in one pass, for there may be many; -1 where ROUND is no number as we write it."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        first, text = [*name.split("|", 2), ""][:2]
        if first == form:
            number = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else -1
            found.setdefault(number if str(number) == text else -1, {})[name] = tensor
    return found


def _past(tensors: Mapping[str, Tensor], adapter: Adapter, logged: bool) -> dict[str, LoRAPair]:
    """The adapter of a past round, of the shapes of the present one."""
    found: dict[str, LoRAPair] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition("|")
        now = adapter[module].parts.get(part) if module in adapter else None
        if now is None or not logged or now.shape != tensor.shape or now.dtype != tensor.dtype:
            what = f"tensor {shown(name)} {list(tensor.shape)}"
            raise WireError(f"{what} is no factor of a past round's adapter: is the message of another run?")
        pair = found.get(module, adapter[module])
        found[module] = pair.with_part(part, tensor)
    return found
