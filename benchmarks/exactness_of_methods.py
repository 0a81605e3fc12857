"""Every method against the fp64 ideal: how far the clients' models are from the mean of the models that were trained.

    python benchmarks/exactness_of_methods.py [--json] [--out results.json]

For each method: square, wide and tall `nn.Linear` and a `Conv1D`, under PEFT; 1, 2, 3 and 10 clients, also with duplicates among
them, and ranks 2, 4, 8, 16, 16 where a method is exact for them; unequal weights; alpha != r, also alphas that differ between
clients; after one and after three rounds. Columns, each the worst over all:

    factors   |W_eff - E| / |E - W0| of every client's effective weight, from what the client is given: D + held + s B A
    outputs   the same from the model's own layers: identity in, effective weight out (fp32 weights, so a floor of eps |W| / |E - W0|)
    theory    what the method must miss: |R| for fedit, the Eckart-Young tail of M for flexlora, that of R for fedex-svd, ...
    gap       | |W_eff - E| - theory |, relative to |E - W0|

`E` is the mean of the trained models, tracked over the rounds in fp64 numpy by the plain formula
`E_t = sum_i p_i (W_i + s_i B_i A_i - s B_i0 A_i0)`. A personalised method has no such model: its clients are compared with `s B_i Abar`.
"""

import argparse
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedex_lora import METHODS, ClientUpdate, LoRAPair, ServerState
from fedex_lora.aggregation import get_method
from fedex_lora.aggregation import server_state as server
from fedex_lora.exactness.algebra import worst as largest
from fedex_lora.models.base_weights import FrozenBase
from fedex_lora.models.core import core_start
from fedex_lora.models.lora import read_model, write_model

RANK, SCALING, ROUNDS = 4, 2.5, 3
CLIENTS, MIXED = (1, 2, 3, 10), [2, 4, 8, 16, 16]
LORA = [name for name, row in METHODS.items() if row.lora and not row.centralised]


class Layers(nn.Module):
    """One module of each kind that matters for orientation."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.wide, self.tall = nn.Linear(32, 32, bias=False), nn.Linear(48, 20, bias=False), nn.Linear(24, 40, bias=False)
        self.conv1d = Conv1D(40, 28)


@dataclass
class Worst:
    """The largest of each number seen."""

    factors: float = 0.0
    outputs: float = 0.0
    theory: float = 0.0
    gap: float = 0.0
    by_rounds: dict[int, float] = field(default_factory=dict)


def dense(product: Any) -> np.ndarray:
    """s B A, or U V, or W, in fp64 numpy."""
    if isinstance(product, LoRAPair):
        return product.scaling * (product.B.double().numpy() @ product.A.double().numpy())
    if hasattr(product, "U"):
        return product.U.double().numpy() @ product.V.double().numpy()
    return product.W.double().numpy()


def model(rank: int) -> nn.Module:
    torch.manual_seed(0)
    layers = Layers()
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.02)
    nn.init.zeros_(layers.conv1d.bias)
    config = LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=["square", "wide", "tall", "conv1d"])
    return get_peft_model(layers, config)


def trained(method: str, round: int, start: Any, scaling: float, generator: torch.Generator) -> dict[str, LoRAPair]:
    """A client's factors after training: moved away from where they started, only those that the method trains, on the client's scaling."""
    parts, moved = get_method(method).trained(round), {}
    for module, pair in start.items():
        inner = pair.inner  # of a core C between U and A, the pair (A, C)
        A, B = inner.A.clone(), inner.B * (pair.scaling / scaling)
        if "A" in parts:
            A = A + 0.1 * torch.randn(A.shape, generator=generator)
        if parts != "A":
            B = B + 0.1 * torch.randn(B.shape, generator=generator)
        moved[module] = pair.around(LoRAPair(A=A, B=B, scaling=scaling))
    return moved


def tail(matrix: np.ndarray, rank: int) -> float:
    """Eckart-Young: the distance of a matrix from the nearest one of that rank."""
    return float(np.sqrt((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum()))


def theory(method: str, pairs: list[LoRAPair], p: np.ndarray, s: float) -> float:
    """How far the method must be from M, by the plain formulas."""
    row = get_method(method)
    if row.exactness == "exact":
        return 0.0
    A = [pair.A.double().numpy() for pair in pairs]
    B = [pair.B.double().numpy() * (pair.scaling / s) for pair in pairs]
    M = s * sum(w * (b @ a) for w, b, a in zip(p, B, A, strict=True))
    R = M - s * (sum(w * b for w, b in zip(p, B, strict=True)) @ sum(w * a for w, a in zip(p, A, strict=True)))
    if row.exactness == "truncated":
        return tail(R, RANK)
    if row.exactness == "rank-r-optimal":
        return tail(M, RANK)
    if method.startswith("hetlora"):
        norms = np.array([np.linalg.norm(b @ a) for b, a in zip(B, A, strict=True)])
        w = p * norms / (p * norms).sum()
        return float(
            np.linalg.norm(M - s * (sum(x * b for x, b in zip(w, B, strict=True)) @ sum(x * a for x, a in zip(w, A, strict=True))))
        )
    return float(np.linalg.norm(R))


class Federation:
    """One case: a server's state under test, the clients' own factors, and the ideal tracked beside them."""

    def __init__(self, method: str, ranks: list[int], seed: int) -> None:
        self.method, self.ranks, self.row = method, ranks, get_method(method)
        self.generator, self.net = torch.Generator().manual_seed(seed), model(max(ranks))
        self.base, first = FrozenBase(self.net), read_model(self.net)
        self.w0 = {name: effective(self.net, name) for name in first}
        first = core_start(self.base.pristine, first) if self.row.core else first
        self.state = server.init(first, {}, method, seed=seed)
        self.gained = {name: np.zeros_like(weight) for name, weight in self.w0.items()}  # E - W0
        self.own: dict[int, Any] = {}

    def start(self, client: int) -> tuple[Any, Any]:
        return server.start_of(self.method, self.state.adapter, self.ranks[client], self.own.get(client))

    def round(self, scalings: list[float], duplicates: bool, worst: Worst) -> None:
        """Train, aggregate, and note how far every client's next start is from the ideal."""
        clients = range(len(self.ranks))
        starts = [self.start(client)[0] for client in clients]
        adapters: list[dict[str, LoRAPair]] = []
        for client in clients:
            twin = duplicates and client % 2 == 1 and not self.own
            scaling = scalings[client % len(scalings)]
            adapters.append(adapters[-1] if twin else trained(self.method, self.state.round + 1, starts[client], scaling, self.generator))
        updates = [ClientUpdate(f"c{client:02d}", adapters[client], num_examples=3 * client + 2) for client in clients]
        p = np.array([update.num_examples for update in updates], dtype=np.float64)
        p /= p.sum()
        self.state, _ = server.step(self.state, updates)
        if self.row.client_state:
            self.own = dict(enumerate(adapters))
        if self.row.exactness == "personalised":
            note_personalised(self.state, updates, adapters, p, worst)
            return
        for name in self.gained:
            pairs = [adapter[name] for adapter in adapters]
            moves = [dense(pair) - dense(begun[name]) for pair, begun in zip(pairs, starts, strict=True)]
            self.gained[name] = self.gained[name] + sum(w * move for w, move in zip(p, moves, strict=True))
            missed = theory(self.method, pairs, p, self.state.adapter[name].scaling) / np.linalg.norm(self.gained[name])
            for client in clients:
                got = self.note(name, client, missed, worst)
            if self.row.exactness != "exact":
                self.gained[name] = got  # the next round starts from the model that the clients really have

    def note(self, name: str, client: int, missed: float, worst: Worst) -> np.ndarray:
        """One client's model against the ideal, from what it is given and from its layer's outputs; returns the former."""
        adapter, held = self.start(client)
        got = dense(adapter[name]) + sum(dense(part[name]) for part in (held, self.state.base_delta) if name in part)
        self.base.set(server.advance(self.state.base_delta, held))
        write_model(self.net, adapter, {})
        size = np.linalg.norm(self.gained[name])
        error = float(np.linalg.norm(got - self.gained[name]) / size)
        output = float(np.linalg.norm(effective(self.net, name) - self.w0[name] - self.gained[name]) / size)
        worst.factors, worst.outputs = largest([worst.factors, error]), largest([worst.outputs, output])
        worst.theory, worst.gap = largest([worst.theory, missed]), largest([worst.gap, abs(error - missed)])
        worst.by_rounds[self.state.round] = largest([worst.by_rounds.get(self.state.round, 0.0), error])
        return got


@torch.no_grad()
def effective(net: nn.Module, name: str) -> np.ndarray:
    """What the layer computes, as a matrix: out x in."""
    layer = net.get_submodule(f"base_model.model.{name}")
    return layer(torch.eye(layer.in_features)).double().numpy().T


def note_personalised(state: ServerState, updates: list[ClientUpdate], own: list[Any], p: np.ndarray, worst: Worst) -> None:
    """Each client goes on with its own B and the mean A."""
    for name in state.adapter:
        mean_A = sum(w * update.adapter[name].A.double().numpy() for w, update in zip(p, updates, strict=True))
        for adapter in own:
            pair = adapter[name]
            want = pair.scaling * (pair.B.double().numpy() @ mean_A)
            error = float(
                np.linalg.norm(dense(server.start_of(state.method, state.adapter, None, adapter)[0][name]) - want) / np.linalg.norm(want)
            )
            worst.factors = largest([worst.factors, error])
            worst.by_rounds[state.round] = largest([worst.by_rounds.get(state.round, 0.0), error])


def measure(method: str, clients: tuple[int, ...] = CLIENTS) -> Worst:
    """The worst of all cases of one method."""
    worst, row = Worst(), get_method(method)
    ranks = [[RANK] * k for k in clients] + ([MIXED] if row.per_client_ranks and row.exact else [])
    for one in ranks:
        for duplicates in (False, True) if len(one) > 1 and len(set(one)) == 1 else (False,):
            for scalings in ([SCALING],) if row.exactness == "personalised" else ([SCALING], [SCALING, 2 * SCALING, SCALING / 2]):
                federation = Federation(method, one, seed=17 * len(one) + duplicates)
                for _ in range(ROUNDS):
                    federation.round(scalings, duplicates, worst)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join([*LORA, "fedex+balanced", "fedex-best+procrustes"]))
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="fan_in_fan_out")
    results = {}
    table = Table("method", "declared", "1 round", "3 rounds", "outputs", "theory", "gap", title="error against the fp64 ideal")
    for method in arguments.methods.split(","):
        worst = measure(method)
        declared = get_method(method).exactness
        results[method] = {"exactness": declared, **worst.__dict__}
        after = [worst.by_rounds.get(number, worst.factors) for number in (1, 3)]
        cells = [f"{value:.1e}" for value in (*after, worst.outputs, worst.theory, worst.gap)]
        if declared == "personalised":
            cells[2:] = ["", "", ""]
        table.add_row(method, declared, *cells)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.json:
        print(json.dumps(results))
    else:
        Console().print(table)


if __name__ == "__main__":
    main()
