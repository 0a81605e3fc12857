"""Exports in 16 bits: what rounding may do, and whether an export did no more than that."""

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from fedex_lora.errors import ModelError, UsageError
from fedex_lora.exactness.algebra import norm
from fedex_lora.models.base_weights import FrozenBase
from fedex_lora.models.layers import stored_weight
from fedex_lora.types import Adapter, Delta

DTYPES: Final = ("float32", "bfloat16", "float16")
EXACT = 1e-6  # of an update: what fp32 factors are held to everywhere


def dtype_named(name: str | None) -> torch.dtype:
    """A dtype that exports are written in; float32 where none is asked for.

    Raises:
        UsageError: another.
    """
    if name not in (None, *DTYPES):
        raise UsageError(f"dtype {name!r}: give {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name or "float32")
    return found


def logit_bound(model: nn.Module, dtype: torch.dtype) -> float:
    """How far a model that is stored and computed in `dtype` may be off, relative to its largest output: `4 eps sqrt(2 n / 12)`.

    Each of its n matrices is rounded, and so is what each gives. One rounding is off by a uniform share of eps, whose deviation is
    `eps / sqrt(12)`; 2 n of either sign add up as a random walk; of many outputs, the farthest is within four deviations.
    """
    matrices = sum(parameter.ndim > 1 for parameter in model.parameters())
    return 4 * torch.finfo(dtype).eps * math.sqrt(2 * matrices / 12)


def require_nearest(model: Any, frozen: FrozenBase, gained: Mapping[str, Delta], other: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Every weight of a reloaded model is the number of `dtype` that is nearest to `W0 + D`, up to 1e-6 of |D|.

    Args:
        model: as plain transformers loads it.
        frozen: the run's own base, which knows W0.
        gained: module path -> D.
        other: name -> the parameters that were trained whole.
        dtype: of the export.

    Raises:
        ModelError: one is not, or is above what the dtype holds.
    """
    for name, delta in gained.items():
        want, got = frozen.pristine(name).double() + delta.dense(), stored_weight(model.get_submodule(name)).double()
        nearest = want.to(dtype).double()
        _require_finite(nearest, name, dtype)
        if not bool(((got - want).abs() - (nearest - want).abs() <= EXACT * norm(delta)).all()):
            raise ModelError(f"the export's {name} is not the run's, rounded to {str(dtype).removeprefix('torch.')}: export again")
    there = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in other.items():
        _require_finite(tensor.to(dtype), name, dtype)
        if not torch.equal(there[name].detach(), tensor.to(dtype)):
            raise ModelError(f"the export's {name} is not the run's, rounded to {str(dtype).removeprefix('torch.')}: export again")


def require_same_factors(got: Adapter, want: Adapter) -> None:
    """An adapter that was read back has the bits that were written.

    Raises:
        ModelError: it has not, or not all are finite.
    """
    for module, pair in want.items():
        for part in "AB":
            tensor = getattr(pair, part)
            _require_finite(tensor, module, tensor.dtype)
            if not torch.equal(getattr(got[module], part), tensor):
                raise ModelError(f"the export's adapter of {module} is not what was written: export again")


def _require_finite(tensor: Tensor, name: str, dtype: torch.dtype) -> None:
    if not bool(torch.isfinite(tensor).all()):
        most = torch.finfo(dtype).max
        raise ModelError(f"{name} has numbers above {most:.3g}, where {str(dtype).removeprefix('torch.')} ends: use --dtype bfloat16")
