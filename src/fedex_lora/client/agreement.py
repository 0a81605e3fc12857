"""What a party and its server must have alike, and what an update must be: said in a line at the party, before it costs a round."""

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from fedex_lora.aggregation.methods import Method
from fedex_lora.config import Rules
from fedex_lora.errors import AdapterError, ModelError, TrainingError, UsageError
from fedex_lora.protocol.frame import shown
from fedex_lora.types import Adapter, LoRAPair

Trained: TypeAlias = tuple[Adapter, Mapping[str, Tensor]]
"""The factors, and the other trained tensors."""


def require_same_rules(mine: Rules, theirs: Mapping[str, str]) -> None:
    """Both sides say the same of what decides which model a round makes.

    Args:
        mine: this party's.
        theirs: `Rules.agreed` of the server; empty: it has not said.

    Raises:
        UsageError: with the first key that differs.
    """
    own = mine.agreed
    odd = sorted(key for key in {*own, *theirs} if own.get(key) != theirs.get(key))
    if theirs and odd:
        here, there = (rules.get(odd[0], "as by default") for rules in (own, theirs))
        raise UsageError(f"Rules: {shown(odd[0])[1:-1]} is {here} here and {shown(there)[1:-1]} at the server: give both the same")


def require_same_method(mine: str, theirs: str) -> None:
    """What is trained, and leaves, is by the method that this party has agreed to, also where a server says no rules.

    Raises:
        UsageError: the message is of another one.
    """
    if mine != theirs:
        raise UsageError(f"Rules: method is {mine} here and {shown(theirs)[1:-1]} at the server: give both the same")


def require_same_adapter(mine: Adapter, theirs: Adapter, ranks: bool) -> None:
    """The server's adapter is on the modules of this party's, with the same shapes, precision and scalings.

    Args:
        mine, theirs: this party's initial adapter, and what the server sends.
        ranks: must they have the same ranks, too?

    Raises:
        AdapterError: with the first module that differs.
    """
    if odd := sorted(mine.keys() ^ theirs.keys()):
        where = "here" if odd[0] in mine else "at the server"
        raise AdapterError(f"{shown(odd[0])} ({len(odd)} such) has an adapter {where} only: use one base and one LoraConfig everywhere")
    for module, pair in mine.items():
        here, there = _described(pair, ranks), _described(theirs[module], ranks)
        if not math.isclose(pair.scaling, theirs[module].scaling, rel_tol=1e-6):
            here, there = {"scaling": pair.scaling, **here}, {"scaling": theirs[module].scaling, **there}
        for what, value in here.items():
            if value != there[what]:
                said = f"the {what} of {shown(module)} is {value} here and {there[what]} at the server"
                raise AdapterError(f"{said}: use one base and one LoraConfig everywhere")


def _described(pair: LoRAPair, ranks: bool) -> dict[str, object]:
    return {"shape": pair.shape, **({"rank": pair.rank} if ranks else {}), "precision": str(pair.A.dtype).removeprefix("torch.")}


def require_same_base(mine: str, theirs: str) -> None:
    """Both stand on one base; a name that is not known says nothing.

    Raises:
        ModelError: they do not.
    """
    if mine and theirs and mine != theirs:
        (weights, *precision), (others, *_) = mine.split(" "), theirs.split(" ")
        what = "weights" if weights != others else f"precision ({' '.join(precision)} here)"
        raise ModelError(f"this party's base has other {what} than the federation's: load the same model, revision and precision", "base")


def require_as_loaded(method: Method, round: int, start: Adapter, other: Mapping[str, Tensor], after: Trained) -> None:
    """What comes back of a training is what was loaded, with other values in the factors that the method trains.

    Args:
        method, round: of the run.
        start, other: what was loaded.
        after: the same after the training.

    Raises:
        TrainingError: other tensors are trained than were loaded, or a factor that is frozen.
    """
    adapter, tensors = after
    if odd := sorted((start.keys() ^ adapter.keys()) | (other.keys() ^ tensors.keys())):
        raise TrainingError(f"{odd[0]} ({len(odd)} such) was made trainable, or frozen, after the load: train what was loaded, no more")
    for module, pair in adapter.items():
        begun, trained = start[module], method.trained(round)
        if pair.parts.keys() != begun.parts.keys():
            raise TrainingError(f"{module} is made of {', '.join(pair.parts)} after the training: train what was loaded, no more")
        if (pair.rank, pair.scaling) != (begun.rank, begun.scaling):
            raise TrainingError(f"the training changed rank or scaling of {module}: leave them as they were loaded")
        if frozen := [name for name, one in pair.parts.items() if name not in trained and not torch.equal(one, begun.parts[name])]:
            what = f"the training changed {frozen[0]} of {module}, which method {method.name} freezes in round {round}"
            raise TrainingError(f"{what}: call fedex_lora.models.lora.set_trained(model, {trained!r}) before it")


def require_trained(start: Adapter, other: Mapping[str, Tensor], after: Trained) -> None:
    """Something has other values than were loaded.

    Raises:
        TrainingError: nothing has, to the bit: what was trained is another object, or the learning rate was zero.
    """
    adapter, tensors = after
    same = all(torch.equal(getattr(pair, part), getattr(start[module], part)) for module, pair in adapter.items() for part in "AB")
    if same and all(torch.equal(tensor, other[name]) for name, tensor in tensors.items()):
        raise TrainingError(
            "nothing has changed in the model that was loaded: train that very object, at a learning rate above zero (a trainer with a "
            "peft_config of its own, or a model that was loaded again, is another)"
        )
