"""Membership inference against a party of a federation: who of the candidates was among its rows?

    python benchmarks/membership.py --seeds 5

Each candidate is a row with random words, and a member by the toss of a coin: add or remove one. Two attacks, both published:

- *final model* (Yeom et al. 2018, arXiv 1709.01604, calibrated by a reference as of Watson et al. 2022, arXiv 2111.08440): members
  have lost more of the loss that the base had on them. The reference is the base itself. Whoever has the final model can do it.
- *server*: the gradient of a member points along the party's own update, summed over rounds. It needs each update, as the server has it.

An attack says "member" above a threshold, which it chooses on the runs of all other seeds: what it reaches is no luck of the choice.
Advantage is its true positive rate minus its false positive rate. Under (epsilon, delta) none can have more than
(e^epsilon - 1 + 2 delta) / (e^epsilon + 1).
"""

import argparse
import json
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedex_lora.aggregation import get_method
from fedex_lora.config import Config, parse_config
from fedex_lora.models.lora import lora_layers, set_trained
from fedex_lora.privacy.ledger import begin_ledger
from fedex_lora.runs.context import ModelContext
from fedex_lora.runs.run import run
from fedex_lora.storage.result import read_result
from fedex_lora.storage.run_folder import round_folder
from fedex_lora.tasks import collator, load_task
from fedex_lora.tasks.demo import COLOURS, PATIENTS, WEIGHTS

TARGET, OTHER, CANDIDATES, ROUNDS, DELTA = "target", "other", 80, 2, 1e-3


# The attack.


def attack(folder: Path, config: Config, rows: Any) -> dict[str, list[float]]:
    """Scores of the candidates, high for members, from a run's folder."""
    place = ModelContext(config, load_task(config.task, config.seed))
    batches = [collator(place.work.task.kind, place.work.processor)([row]) for row in place.work.tokens(rows)]
    adapter, delta, aligned = place.first, place.start, torch.zeros(len(batches))
    before = losses(place, adapter, delta, batches)
    for number in range(1, ROUNDS + 1):
        result, part = read_result(round_folder(folder, number)), get_method(config.method).trained(number)
        update = next(one for one in result.updates if one.client_id == TARGET).adapter
        step = torch.cat([(getattr(update[name], p) - getattr(adapter[name], p)).flatten() for name in adapter for p in part])
        aligned += alignment(place, adapter, delta, batches, step, part)
        adapter, delta = result.adapter, result.base_delta
    after = losses(place, adapter, delta, batches)
    return {"final model": (before - after).tolist(), "server": aligned.tolist()}


@torch.no_grad()
def losses(place: ModelContext, adapter: Any, delta: Any, batches: Sequence[Any]) -> torch.Tensor:
    """The loss of each candidate."""
    place.adapted.load(adapter, delta, {})
    place.model.eval()
    return torch.stack([place.model(**batch).loss for batch in batches])


def alignment(place: ModelContext, adapter: Any, delta: Any, batches: Sequence[Any], step: torch.Tensor, part: str) -> torch.Tensor:
    """The cosine of each candidate's descent and the step that the party made from there."""
    place.adapted.load(adapter, delta, {})
    set_trained(place.model, part)
    place.model.eval()
    layers = lora_layers(place.model)
    trained = [layers[name].parameter(p) for name in adapter for p in part]
    found = []
    for batch in batches:
        gradients = torch.autograd.grad(place.model(**batch).loss, trained)
        found.append(-torch.cosine_similarity(torch.cat([one.flatten() for one in gradients]), step, dim=0))
    return torch.stack(found)


def advantage(scores: Sequence[np.ndarray], members: Sequence[np.ndarray]) -> tuple[float, float]:
    """True minus false positives, each seed by the threshold that is best on the others; and its standard error."""
    said = []
    for seed in range(len(scores)):
        others = [one for one in range(len(scores)) if one != seed]
        known, truth = np.concatenate([scores[one] for one in others]), np.concatenate([members[one] for one in others])
        said.append(scores[seed] >= max(known, key=lambda at: (known >= at)[truth].mean() - (known >= at)[~truth].mean()))
    guess, truth = np.concatenate(said), np.concatenate(members)
    rates = [(guess[truth == kind].mean(), (truth == kind).sum()) for kind in (True, False)]
    return float(rates[0][0] - rates[1][0]), math.sqrt(sum(rate * (1 - rate) / count for rate, count in rates))


# The runs that are attacked.


def bound(epsilon: float | None, delta: float = DELTA) -> float:
    """The most that an attack can reach (Kairouz et al. 2015, theorem 2.1 at equal rates)."""
    return 1.0 if epsilon is None else (math.exp(epsilon) - 1 + 2 * delta) / (math.exp(epsilon) + 1)


def candidate(rng: random.Random) -> dict[str, str]:
    """A row that says nothing of any other."""
    findings = [rng.choice(list(WEIGHTS)) for _ in range(3)]
    prompt = f"bed {rng.randrange(1, 10)} : the {rng.choice(PATIENTS)} has {findings[0]} , {findings[1]} and {findings[2]} . triage :"
    return {"prompt": prompt, "completion": "".join(f" {rng.choice([*COLOURS, *WEIGHTS])}" for _ in range(6))}


def attacked(folder: Path, method: str, epsilon: float | None, seed: int, epochs: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A run in a new folder: the attacks' scores, and who was a member."""
    rng = random.Random(seed)
    rows = [candidate(rng) for _ in range(CANDIDATES)]
    members = np.array([rng.random() < 0.5 for _ in rows])
    theirs, unseen = ([candidate(rng) for _ in range(16)] for _ in range(2))
    folder.mkdir(parents=True)
    target = [row for row, member in zip(rows, members, strict=True) if member]
    for name, chosen in {"target": target, "other": theirs, "all": rows, "measured": unseen}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    config = parse_config(tables(folder, method, epsilon, seed, epochs))
    if epsilon is not None:
        begin_ledger(folder / "ledger.jsonl")
    run(config, folder / "run", lambda event: None)
    everyone = config.model_copy(update={"clients": config.clients.model_copy(update={"data": {}})})
    everyone = everyone.model_copy(update={"task": config.task.model_copy(update={"train": str(folder / "all.jsonl")})})
    scores = attack(folder / "run", everyone, load_task(everyone.task, seed).train)
    return {name: np.array(values) for name, values in scores.items()}, members


def tables(folder: Path, method: str, epsilon: float | None, seed: int, epochs: int) -> dict[str, Any]:
    """The configuration of a run."""
    stated: Mapping[str, Any] = {
        "epsilon": epsilon, "delta": DELTA, "rows": {TARGET: CANDIDATES // 2, OTHER: 16},
        "ledger": str(folder / "ledger.jsonl"), "accountant": "rdp",
    }  # fmt: skip
    return {
        "method": method,
        "rounds": ROUNDS,
        "seed": seed,
        "torch_threads": 1,
        "base": {"model": "demo"},
        "lora": {"r": 8, "alpha": 16, "target_modules": "all-linear"},
        "task": {
            "name": "custom", "kind": "causal-lm", "prompt": "{prompt}", "completion": "{completion}",
            "eval": str(folder / "measured.jsonl"),
        },
        "clients": {"data": {TARGET: str(folder / "target.jsonl"), OTHER: str(folder / "other.jsonl")}, "holdout": 0},
        "training": {"learning_rate": 5e-3, "num_train_epochs": epochs, "per_device_train_batch_size": 16},
        **({"privacy": dict(stated)} if epsilon is not None else {}),
    }  # fmt: skip


def measured(method: str, epsilon: float | None, seeds: Sequence[int], epochs: int = 40) -> dict[str, tuple[float, float]]:
    """Attack -> its advantage and the standard error of that."""
    with tempfile.TemporaryDirectory() as folder:
        runs = [attacked(Path(folder) / str(seed), method, epsilon, seed, epochs) for seed in seeds]
    return {name: advantage([scores[name] for scores, _ in runs], [members for _, members in runs]) for name in runs[0][0]}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", default="ffa,fedex")
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error("--seeds: give two or more, for a threshold is chosen on the other seeds")
    print("| method | epsilon | final model | server | allowed |\n|---|---|---|---|---|")
    for method in given.methods.split(","):
        for epsilon in (None, 8.0, 1.0):
            found = measured(method, epsilon, range(given.seeds))
            cells = [f"{value:.2f} ± {2 * error:.2f}" for value, error in found.values()]
            named = "none" if epsilon is None else f"{epsilon:g}"
            print(f"| {method} | {named} | {' | '.join(cells)} | {bound(epsilon):.2f} |", flush=True)


if __name__ == "__main__":
    main()
