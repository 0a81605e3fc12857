"""Aggregation from files to files, module by module: memory holds one module of all clients, however many modules there are.

Files are opened in turn, and only the bytes of the modules at hand are read, straight into the stacks that `aggregation` works on.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from fedex_lora.aggregation import Batch, Clients, Method, Part, mean_of, shape_batches, splits
from fedex_lora.aggregation.lowrank import finite
from fedex_lora.aggregation.truncation import without_blocks
from fedex_lora.errors import AggregationError, StorageError
from fedex_lora.exactness.streaming_audit import Audit, exact_flops
from fedex_lora.storage.adapter_folder import WEIGHTS, AdapterHeader, Format, frozen_key, write_config
from fedex_lora.storage.files import atomic_folder
from fedex_lora.storage.layout import LINEAR
from fedex_lora.storage.peft_rules import PREFIX
from fedex_lora.storage.result import DELTA, STANDALONE, TRAINABLE, UPDATES, manifest_of, safe_name, write_readme
from fedex_lora.storage.safetensors_io import Shapes, TensorWriter, file_identity, opened, read_into, read_tensor
from fedex_lora.types import ClientUpdate, LoRAPair, LowRank

PIECE = 2**21  # numbers that are transposed, or multiplied, and written at a time
RANKS = 96  # of a product that are summed together: the rounding of one long fp32 sum is larger, and no faster
NUMBER_FLOPS = 256  # that could be done while one number is read or written, and its sum taken
CHEAP = 4
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Round:
    """What is aggregated: clients in the order in which sums are taken.

    Attributes:
        row: the method.
        files: one a client.
        updates: the same as updates whose tensors hold nothing.
        p: weights with sum one.
        format: how the result is written.
    """

    row: Method
    files: Sequence[AdapterHeader]
    updates: Sequence[ClientUpdate]
    p: Sequence[float]
    format: Format

    @property
    def adapter(self) -> Mapping[str, LoRAPair]:
        """The shapes and scalings of the result, which are those of the first client."""
        return self.updates[0].adapter

    def rest_rank(self, module: str) -> int:
        """Columns of what the base gains, as factors: `(k-1) r`."""
        return (len(self.files) - 1) * self.adapter[module].rank if self.row.residual_policy == "base" else 0

    def dense(self, module: str) -> bool:
        """Is the matrix smaller than those factors, and so cheaper to write?"""
        out, inner = self.adapter[module].shape
        return self.rest_rank(module) * (out + inner) >= out * inner

    def standalone(self) -> dict[str, LoRAPair] | None:
        """The shapes of one adapter with all of the update; None where it would be larger than the matrices."""
        if any(self.dense(module) for module in self.adapter):
            return None
        ranks = {module: pair.rank + self.rest_rank(module) for module, pair in self.adapter.items()}
        with torch.device("meta"):
            return {
                module: LoRAPair(A=torch.empty(ranks[module], pair.shape[1]), B=torch.empty(pair.shape[0], ranks[module]))
                for module, pair in self.adapter.items()
            }


def streamable(row: Method, files: Sequence[AdapterHeader]) -> bool:
    """Is this the plain case: a method of mean factors, on linear layers, in 32 or 16 bits? Others are aggregated in memory."""
    layouts = {layout for file in files for layout in file.folder.format.layouts.values()}
    dtypes = {tensor.dtype for file in files for pair in file.folder.adapter.values() for tensor in (pair.A, pair.B)}
    return row.is_factor_mean and not row.client_state and layouts <= {LINEAR} and dtypes <= set(FLOATS)


def audit_is_cheap(round: Round) -> bool:
    """Does an exact audit cost no more than a few times what the aggregation does?"""
    work = audit = 0
    for module, pair in round.adapter.items():
        (out, inner), rank, dense = pair.shape, round.rest_rank(module), round.dense(module)
        clients = pair.rank * len(round.files)
        moved = NUMBER_FLOPS * (clients + pair.rank) * (out + inner)
        work += moved + (2 * rank * out * inner if dense else 2 * NUMBER_FLOPS * rank * (out + inner))
        audit += 2 * exact_flops((out, inner), clients + pair.rank + (0 if dense else rank), dense)  # fp64 takes twice as long
    return audit <= CHEAP * work


def write_streamed(
    folder: Path, round: Round, facts: Mapping[str, Any], keep_updates: bool, audit: Audit | None, blockless: bool = False
) -> None:
    """Aggregate and write a result folder in one step, as `peft_io.write_result` does, without holding more than a module.

    Where factors of what the base gains would have more numbers than the matrix, the matrix is written, and there is no stand-alone
    adapter. A module whose base gains nothing is written as zeros.

    Args:
        folder: must not exist, or be empty.
        round: what to aggregate; see `streamable`.
        facts: for the manifest.
        keep_updates: also write the clients' updates, from which `verify` recomputes the ideal.
        audit: collects the errors; None: they are not measured.
        blockless: write what the base gains in factors that are a function of their product alone (`truncation.without_blocks`).

    Raises:
        AggregationError: NaN or infinity. Nothing is left behind then.
        StorageError: a file changed while it was read, or the disk is full.
    """
    method, first, p = round.row.name, round.updates[0], round.p
    weights = {update.client_id: weight for update, weight in zip(round.updates, p, strict=True)}
    sums: dict[str, str] = {}
    with atomic_folder(folder, manifest_of(method, 1, round.updates, weights) | dict(facts), sums) as temporary:
        order = list(shape_batches(round.updates))
        whole = {name: (torch.promote_types(tensor.dtype, torch.float32), tensor.shape) for name, tensor in first.other.items()}
        other = {f"{PREFIX}{name}": about for name, about in whole.items()}
        frozen = {frozen_key(name, first.adapter): name for name in round.format.frozen}
        other |= {key: (tensor.dtype, tensor.shape) for key, name in frozen.items() for tensor in [round.format.frozen[name]]}
        standalone = round.standalone()
        with ExitStack() as stack:

            def writer(name: str, shapes: Shapes) -> TensorWriter:
                return stack.enter_context(TensorWriter(temporary / name, shapes))

            modules = list(chain.from_iterable(order))
            files = _Files(
                trainable=writer(f"{TRAINABLE}/{WEIGHTS}", _adapter_shapes(modules, round.adapter, other)),
                delta=writer(DELTA, _delta_shapes(modules, round)),
                whole=writer(f"{STANDALONE}/{WEIGHTS}", _adapter_shapes(modules, standalone, other)) if standalone else None,
            )
            for part in splits(round.row, [update.client_id for update in round.updates], _batches(round, order, audit)):
                for index, module in enumerate(part.modules):
                    _write_module(module, part, index, round, files, audit, blockless)
                del part  # or two modules' results would be held while the next one is made
            for name in first.other:
                mean = mean_of(_Tensors([file.path for file in round.files], [file.entries[name] for file in round.files]), p, name)
                _write_both(files, mean)
            for name in frozen.values():
                _write_both(files, read_tensor(round.files[0].path, round.files[0].entries[name]))
        sums |= {str(file.path.relative_to(temporary)): file.sha256 for file in files if file}
        write_config(temporary / TRAINABLE, round.adapter, round.format)
        write_readme(temporary / TRAINABLE, round.adapter, method, 1)
        if standalone:
            write_config(temporary / STANDALONE, standalone, round.format)
        for source, update in zip(round.files, round.updates, strict=True) if keep_updates else ():
            name = f"{UPDATES}/{safe_name(update.client_id)}.safetensors"
            sums[name] = _copy_update(source, update, temporary / name)
        _require_unchanged(round.files)


def _require_unchanged(files: Sequence[AdapterHeader]) -> None:
    for file in files:
        if file_identity(file.path) != file.stamp:
            raise StorageError(f"{file.path} has changed while it was read: aggregate again when nobody writes to it")


class _Files(NamedTuple):
    """What is written."""

    trainable: TensorWriter
    delta: TensorWriter
    whole: TensorWriter | None


def _write_both(files: _Files, tensor: Tensor) -> None:
    """The same into both adapters."""
    for file in (files.trainable, files.whole):
        if file:
            file.write(tensor)


def _batches(round: Round, order: Sequence[Sequence[str]], audit: Audit | None) -> Iterator[Batch]:
    """The modules' factors of all clients, read into memory that the next batch uses again."""
    space = torch.empty(0)
    for modules in order:
        first = round.adapter[modules[0]]
        shape = len(modules), len(round.files)
        sizes = [torch.Size((*shape, *factor.shape)) for factor in (first.A, first.B)]
        if space.numel() < sum(size.numel() for size in sizes):
            space = torch.empty(0)  # give the old memory back first
            space = torch.empty(sum(size.numel() for size in sizes))
        A = space[: sizes[0].numel()].view(sizes[0])
        B = space[sizes[0].numel() :][: sizes[1].numel()].view(sizes[1])
        for client, file in enumerate(round.files):
            with opened(file.path) as descriptor:
                for index, module in enumerate(modules):
                    read_into(descriptor, file.factor(module, "A"), A[index, client])
                    read_into(descriptor, file.factor(module, "B"), B[index, client])
        scalings = [[update.adapter[module].scaling for update in round.updates] for module in modules]
        if audit:
            for index, module in enumerate(modules):
                audit.take(module, A[index], B[index], scalings[index], round.p)
        if any(scaling != first.scaling for some in scalings for scaling in some):
            B = B.clone() if audit else B  # the audit goes on from what was read
            for index, client in product(range(len(modules)), range(len(round.files))):
                B[index, client] = (B[index, client].double() * (scalings[index][client] / first.scaling)).float()
        yield Batch(modules, Clients(A=A, B=B.mT, p=A.new_tensor(round.p), modules=modules, seed=0), first.scaling)


def _write_module(module: str, part: Part, index: int, round: Round, files: _Files, audit: Audit | None, blockless: bool) -> None:
    """One module: the adapter `s B A`; what the base gains as factors `U V`, or the matrix; with factors also `[s B, U] [A; V]`."""
    A, B = part.adapter.A[index], part.adapter.B[index].mT.contiguous()
    files.trainable.write(A)
    files.trainable.write(B)
    dense, gains = round.dense(module), part.rest if round.rest_rank(module) else None
    V, U_t = (gains.A[index], gains.B[index]) if gains else (A[:0], A.new_empty(0, len(B)))
    if blockless and gains and not dense:
        gain = without_blocks(LowRank(U=U_t.mT, V=V))
        V, U_t = gain.V, gain.U.mT
    if audit:
        audit.result(module, LoRAPair(A, B, part.scaling), V, dense)
    if files.whole:
        files.whole.write(A)
        files.whole.write(V)
    for rows in _slices(len(B), max(1, PIECE // (V.shape[1] if dense else max(1, len(V))))):
        piece = _matrix(U_t[:, rows], V) if dense else U_t[:, rows].mT.contiguous()
        scaled = part.scaling * B[rows]
        if not finite(piece, scaled):
            raise AggregationError(f"the update of {module} overflows: some client's factors are too large; leave it out")
        files.delta.write(piece)
        if files.whole:
            files.whole.write(torch.cat([scaled, piece], dim=1))
        if audit:
            audit.rows(module, rows, piece)
    if not dense:
        files.delta.write(V)


def _matrix(U_t: Tensor, V: Tensor) -> Tensor:
    """`U V`."""
    total = U_t.new_zeros(U_t.shape[1], V.shape[1])
    for u, v in zip(U_t.split(RANKS), V.split(RANKS), strict=True):
        total.addmm_(u.mT, v)
    return total


def _slices(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _adapter_shapes(modules: Sequence[str], adapter: Mapping[str, LoRAPair], other: Shapes) -> Shapes:
    """Of an adapter file: `lora_A`, `lora_B` of every module, then the other tensors, which have their names in the file."""
    shapes = {
        f"{PREFIX}{module}.{part}.weight": (torch.float32, tuple(factor.shape))
        for module in modules
        for part, factor in (("lora_A", adapter[module].A), ("lora_B", adapter[module].B))
    }
    return shapes | dict(other)


def _delta_shapes(modules: Sequence[str], round: Round) -> Shapes:
    """Of `base_delta.safetensors`: `M.U` and `M.V`, or `M.W`."""
    shapes: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    for module in modules:
        (out, inner), rank = round.adapter[module].shape, round.rest_rank(module)
        if rank and round.dense(module):
            shapes[f"{module}.W"] = torch.float32, (out, inner)
        elif rank:
            shapes |= {f"{module}.U": (torch.float32, (out, rank)), f"{module}.V": (torch.float32, (rank, inner))}
    return shapes


def _copy_update(file: AdapterHeader, update: ClientUpdate, path: Path) -> str:
    """A client's update as `storage.save_update` writes it, tensor by tensor; its sha256."""
    names = {f"{module}.{part}": file.factor(module, part) for module in update.adapter for part in "AB"}
    names |= {f"other|{name}": file.entries[name] for name in update.other}
    about = {
        "client_id": update.client_id,
        "num_examples": update.num_examples,
        "scalings": {module: pair.scaling for module, pair in update.adapter.items()},
    }
    shapes = {name: (entry.dtype, entry.shape) for name, entry in names.items()}
    with TensorWriter(path, shapes, {"update": json.dumps(about)}) as writer:
        for entry in names.values():
            writer.write(read_tensor(file.path, entry))
    return writer.sha256


class _Tensors(Sequence[Tensor]):
    """One tensor of each file, read when it is asked for."""

    def __init__(self, paths: Sequence[Path], entries: Sequence[Any]) -> None:
        self._paths, self._entries = paths, entries

    def __len__(self) -> int:
        return len(self._paths)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return _Tensors(self._paths[index], self._entries[index])
        return read_tensor(self._paths[index], self._entries[index])
