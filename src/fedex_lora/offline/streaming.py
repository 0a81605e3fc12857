"""Aggregation from files to files, module by module: memory holds one module of all clients, however many modules there are.

Files are opened in turn, and only the bytes of the modules at hand are read, straight into the stacks that `aggregation` works on.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedex_lora.aggregation import ClientStack, Method
from fedex_lora.aggregation.batching import shape_batches
from fedex_lora.aggregation.engine import BatchResult, mean_of, splits
from fedex_lora.aggregation.lowrank import finite
from fedex_lora.aggregation.truncation import without_blocks
from fedex_lora.errors import AggregationError
from fedex_lora.exactness.streaming_audit import Audit, exact_flops
from fedex_lora.storage.adapter_folder import WEIGHTS, AdapterHeader, Format, frozen_key, write_adapter_config
from fedex_lora.storage.files import atomic_folder
from fedex_lora.storage.layout import LINEAR
from fedex_lora.storage.peft_rules import PREFIX
from fedex_lora.storage.result import DELTA, STANDALONE, TRAINABLE, manifest_of, write_readme
from fedex_lora.storage.safetensors_io import Shapes, TensorWriter, read_into, readable
from fedex_lora.storage.updates import keep_adapters
from fedex_lora.types import ClientUpdate, LoRAPair, LowRank

PIECE = 2**21  # numbers that are transposed, or multiplied, and written at a time
RANKS = 96  # of a product that are summed together: the rounding of one long fp32 sum is larger, and no faster
NUMBER_FLOPS = 256  # that could be done while one number is read or written, and its sum taken
CHEAP = 4
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class StreamJob:
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

    @property
    def weights(self) -> dict[str, float]:
        """Client id -> p_i."""
        return {update.client_id: weight for update, weight in zip(self.updates, self.p, strict=True)}

    def rest_rank(self, module: str) -> int:
        """Columns of what the base gains, as factors: `(k-1) r`."""
        return (len(self.files) - 1) * self.adapter[module].rank if self.row.residual_policy == "base" else 0

    def dense(self, module: str) -> bool:
        """Is the matrix smaller than those factors, and so cheaper to write?"""
        out, inner = self.adapter[module].shape
        return self.rest_rank(module) * (out + inner) >= out * inner

    @cached_property
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


def audit_is_cheap(round: StreamJob) -> bool:
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
    folder: Path, round: StreamJob, facts: Mapping[str, Any], keep_updates: bool, audit: Audit | None, blockless: bool = False
) -> None:
    """Aggregate and write a result folder in one step, as `write_result` does, without holding more than a module.

    Where factors of what the base gains would have more numbers than the matrix, the matrix is written, and there is no stand-alone
    adapter. A module whose base gains nothing is written as zeros.

    Args:
        folder: must not exist, or be empty.
        round: what to aggregate; see `streamable`.
        facts: for the manifest.
        keep_updates: also keep the clients' adapters, from which `verify` recomputes the ideal.
        audit: collects the errors; None: they are not measured.
        blockless: write what the base gains in factors that are a function of their product alone (`truncation.without_blocks`).

    Raises:
        AggregationError: NaN or infinity. Nothing is left behind then.
        StorageError: a file changed while it was read, or the disk is full.
    """
    method, clients = round.row.name, [update.client_id for update in round.updates]
    order, sums = list(shape_batches(round.updates)), dict[str, str]()
    with atomic_folder(folder, manifest_of(method, 1, round.updates, round.weights) | dict(facts), sums) as temporary:
        with _writers(temporary, round, list(chain.from_iterable(order))) as files:
            for part in splits(round.row, clients, _batches(round, order, audit)):
                for index, module in enumerate(part.modules):
                    _write_module(module, part, index, round, files, audit, blockless)
                del part  # or two modules' results would be held while the next one is made
            for name in round.updates[0].other:
                files.both(mean_of((file.tensor(name) for file in (round.files[-1], *round.files[:-1])), round.p, name))
            for name in round.format.frozen:
                files.both(round.files[0].tensor(name))
        sums |= {str(file.path.relative_to(temporary)): file.checksum for file in files if file}
        write_adapter_config(temporary / TRAINABLE, round.adapter, round.format)
        write_readme(temporary / TRAINABLE, round.adapter, method, 1)
        if round.standalone:
            write_adapter_config(temporary / STANDALONE, round.standalone, round.format)
        sums |= keep_adapters(temporary, dict(zip(clients, round.files, strict=True)) if keep_updates else {})
        for file in round.files:
            file.require_unchanged()


class _Files(NamedTuple):
    """What is written; `adapter/` only where it is no larger than the matrices."""

    trainable: TensorWriter
    delta: TensorWriter
    standalone: TensorWriter | None

    def both(self, tensor: Tensor) -> None:
        """The same into both adapters."""
        for file in (self.trainable, self.standalone):
            if file:
                file.write(tensor)


@contextmanager
def _writers(folder: Path, round: StreamJob, modules: Sequence[str]) -> Iterator[_Files]:
    """The files of a result folder, with these modules in this order."""
    first, last, frozen = round.updates[0], round.updates[-1].other, round.format.frozen  # the last one's precision is that of a mean
    other = {f"{PREFIX}{name}": (torch.promote_types(last[name].dtype, torch.float32), x.shape) for name, x in first.other.items()}
    other |= {frozen_key(name, first.adapter): (x.dtype, x.shape) for name, x in frozen.items()}
    deltas: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    for module in modules:
        (out, inner), rank = round.adapter[module].shape, round.rest_rank(module)
        if rank and round.dense(module):
            deltas[f"{module}.W"] = torch.float32, (out, inner)
        elif rank:
            deltas |= {f"{module}.U": (torch.float32, (out, rank)), f"{module}.V": (torch.float32, (rank, inner))}
    with ExitStack() as stack:

        def writer(name: str, shapes: Shapes) -> TensorWriter:
            return stack.enter_context(TensorWriter(folder / name, shapes))

        yield _Files(
            trainable=writer(f"{TRAINABLE}/{WEIGHTS}", _adapter_shapes(modules, round.adapter) | other),
            delta=writer(DELTA, deltas),
            standalone=writer(f"{STANDALONE}/{WEIGHTS}", _adapter_shapes(modules, round.standalone) | other) if round.standalone else None,
        )


def _adapter_shapes(modules: Sequence[str], adapter: Mapping[str, LoRAPair]) -> dict[str, tuple[torch.dtype, Sequence[int]]]:
    return {
        f"{PREFIX}{module}.lora_{part}.weight": (torch.float32, getattr(adapter[module], part).shape) for module in modules for part in "AB"
    }


def _batches(round: StreamJob, order: Sequence[Sequence[str]], audit: Audit | None) -> Iterator[ClientStack]:
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
            with readable(file.path) as content:
                for index, module in enumerate(modules):
                    read_into(content, file.factor(module, "A"), A[index, client])
                    read_into(content, file.factor(module, "B"), B[index, client])
        scalings = [[update.adapter[module].scaling for update in round.updates] for module in modules]
        if audit:
            for index, module in enumerate(modules):
                audit.take(module, A[index], B[index], scalings[index], round.p)
        if any(scaling != first.scaling for some in scalings for scaling in some):
            B = B.clone() if audit else B  # the audit goes on from what was read
            for index, client in product(range(len(modules)), range(len(round.files))):
                B[index, client] = (B[index, client].double() * (scalings[index][client] / first.scaling)).float()
        yield ClientStack(A=A, B=B.mT, p=A.new_tensor(round.p), modules=modules, seed=0, scaling=first.scaling)


def _write_module(
    module: str, part: BatchResult, index: int, round: StreamJob, files: _Files, audit: Audit | None, blockless: bool
) -> None:
    """One module: the adapter `s B A`; what the base gains as factors `U V`, or the matrix; with factors also `[s B, U] [A; V]`."""
    A, B = part.adapter.A[index], part.adapter.B[index].mT.contiguous()
    files.both(A)
    files.trainable.write(B)
    dense, gains = round.dense(module), part.rest if round.rest_rank(module) else None
    V, U_t = (gains.A[index], gains.B[index]) if gains else (A[:0], A.new_empty(0, len(B)))
    if blockless and gains and not dense:
        gain = without_blocks(LowRank(U=U_t.mT, V=V))
        V, U_t = gain.V, gain.U.mT
    if audit:
        audit.result(module, LoRAPair(A, B, part.scaling), V, dense)
    if files.standalone:
        files.standalone.write(V)
    size = max(1, PIECE // (V.shape[1] if dense else max(1, len(V))))
    for rows in (slice(start, min(start + size, len(B))) for start in range(0, len(B), size)):
        piece = _matrix(U_t[:, rows], V) if dense else U_t[:, rows].mT.contiguous()
        scaled = part.scaling * B[rows]
        if not finite(piece, scaled):
            raise AggregationError(f"the update of {module} overflows: some client's factors are too large; leave it out")
        files.delta.write(piece)
        if files.standalone:
            files.standalone.write(torch.cat([scaled, piece], dim=1))
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
