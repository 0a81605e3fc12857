"""What a round under server momentum started from, as a file of its result folder."""

import json
from pathlib import Path

from fedex_lora.aggregation.flatten import flatten_adapter, flatten_deltas, scalings_of, under, unflatten_adapter, unflatten_deltas
from fedex_lora.errors import AggregationError, StorageError
from fedex_lora.storage.tensors import Tensors, load_tensors
from fedex_lora.types import Adapter, Motion


def motion_tensors(motion: Motion) -> Tensors:
    """The file of what a round started from."""
    tensors = flatten_adapter("adapter", motion.adapter)
    tensors |= flatten_deltas("change", motion.change)
    tensors |= {f"other|{name}": tensor for name, tensor in motion.other.items()}
    tensors |= {f"other_change|{name}": tensor for name, tensor in motion.other_change.items()}
    about = {"momentum": motion.momentum, "learning_rate": motion.learning_rate, "scalings": scalings_of(motion.adapter)}
    return tensors, {"motion": json.dumps(about)}


def read_motion(path: Path, like: Adapter) -> Motion | None:
    """The inverse of `motion_tensors`; None where there is no such file.

    Raises:
        StorageError: it is not of an adapter with the modules and shapes of `like`.
    """
    if not path.is_file():
        return None
    tensors, metadata = load_tensors(path)

    try:
        about = json.loads(metadata["motion"])
        made = Motion(
            momentum=float(about["momentum"]),
            learning_rate=float(about["learning_rate"]),
            adapter=unflatten_adapter("adapter", about["scalings"], tensors),
            change=unflatten_deltas("change", tensors, dotted=True),
            other=under("other", tensors),
            other_change=under("other_change", tensors),
        )
    except (KeyError, ValueError, TypeError, AggregationError, RuntimeError) as error:
        raise StorageError(f"{path} does not say what the round started from ({error!r}): copy the folder again") from None
    if odd := _misfit(made, like):
        raise StorageError(f"{path} does not fit the folder's adapter in {odd}: copy the folder again")
    return made


def _misfit(motion: Motion, like: Adapter) -> str | None:
    """What is not of the adapter's modules and shapes, or no number; None where all is."""
    shapes = {name: (pair.shape, pair.rank) for name, pair in like.items()}
    odd = [name for name in {**like, **motion.adapter} if name not in like or name not in motion.adapter]
    odd += [name for name, pair in motion.adapter.items() if (pair.shape, pair.rank) != shapes.get(name)]
    odd += [name for name, pair in motion.adapter.items() if not (pair.A.is_floating_point() and pair.B.is_floating_point())]
    odd += [name for name, change in motion.change.items() if name not in like or change.shape != like[name].shape]
    return next(iter(odd), None)
