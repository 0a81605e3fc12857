"""Private local training: DP-SGD (Abadi et al. 2016, algorithm 1) inside `transformers.Trainer`, by Opacus' hooks and optimiser.

A step draws every row with probability q, scales each row's gradient to norm C at most, adds noise of standard deviation sigma C to the
sum, and divides by the *expected* number of rows. Nothing else of the rows goes into the model, and nothing else comes out: no loss.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from logging import ERROR, INFO, WARNING, getLogger
from typing import Any

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.linalg import vector_norm
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from fedex_lora.client.example_gradients import forget, losses_of, per_example_gradients, quieten
from fedex_lora.errors import TrainingError
from fedex_lora.privacy.accounting import Mechanism, PrivacyPlan
from fedex_lora.privacy.secret_numbers import secret_normals, secret_uniforms
from fedex_lora.protocol.failures import ignored_failures

log = getLogger(__name__)
Tell = Callable[[int, str], None]
"""(level of `logging`, words), for the party's own eyes."""
TOLERANCE = 0.05  # of sums of gradients in the lowest precision that there is; a gradient of something else is off by its own size
TINY = 1e-30  # a factor of a gradient that says nothing but that it overflows


class PrivateOptimizer(DPOptimizer):
    """Opacus' optimiser, whose sum holds to C in any precision, and whose noise is of no generator that can be solved.

    Norms are float64 and sums float32, whatever the gradients are, and no matrix product that a device may round. An example with a
    gradient that is not finite counts as zero: it says nothing, and spoils nothing. Noise is added in float64, and their sum is rounded
    once.

    Attributes:
        spoilt: how many examples of the last batch counted as zero.
    """

    spoilt: int | Tensor = 0

    @torch.no_grad()
    def clip_and_accumulate(self) -> None:
        """Add each example's gradient over all that is trained, scaled to norm C at most, to `summed_grad`."""
        samples = [sample.float() for sample in self.grad_samples]
        parts = [vector_norm(sample.flatten(start_dim=1), dim=1, dtype=torch.float64) for sample in samples]
        norms = torch.stack(parts, dim=1).norm(dim=1)
        factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        factors = torch.where(norms.isfinite() & (factors > TINY), factors, 0.0).float()  # as float32 it would be rounded up
        self.spoilt = (factors == 0).sum()
        for parameter, sample in zip(self.params, samples, strict=True):
            scaled = sample.nan_to_num(0.0, 0.0, 0.0) * factors.view(-1, *[1] * (sample.dim() - 1))
            added = scaled.sum(dim=0)
            parameter.summed_grad = added if parameter.summed_grad is None else parameter.summed_grad + added

    @torch.no_grad()
    def add_noise(self) -> None:
        """Make of `summed_grad` the gradient: with numbers of standard deviation sigma C, drawn on the CPU."""
        deviation = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            noise = torch.from_numpy(deviation * secret_normals(parameter.numel())).view(parameter.shape)
            parameter.grad = (parameter.summed_grad.cpu().double() + noise).to(parameter.device, parameter.dtype)


class PoissonBatches(Sampler[list[int]]):
    """So many batches, in which each row is with probability q, whatever else is in it.

    Args:
        rows: how many there are.
        mechanism: q, and how many batches.
    """

    def __init__(self, rows: int, mechanism: Mechanism) -> None:
        self._rows, self._mechanism = rows, mechanism

    def __len__(self) -> int:
        return self._mechanism.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self._mechanism.steps):
            yield np.flatnonzero(secret_uniforms(self._rows) <= self._mechanism.rate).tolist()


class PrivateTrainer(Trainer):
    """`transformers.Trainer`, whose steps are those of DP-SGD. Made by `private_trainer`, with hooks on its model.

    Args:
        plan: what a round is.
        kind: of the task.
        given: of `Trainer`.
    """

    def __init__(self, plan: PrivacyPlan, kind: str, **given: Any) -> None:
        super().__init__(**given)
        model: nn.Module = given["model"]
        self.model_accepts_loss_kwargs = False  # losses are ours
        self._plan, self._kind, self._compared = plan, kind, False
        self._drawn, self._spoilt, self._failed, self._reason = 0, torch.zeros((), dtype=torch.long), 0, ""
        self._names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.add_callback(_Moves({name: parameter for parameter, name in self._names.items()}, plan.round.sigma))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in which each row is with probability q, each in parts of one shape, of `per_device_train_batch_size` rows at most."""
        assert self.train_dataset is not None
        rows, args = self._remove_unused_columns(self.train_dataset, "training"), self.args  # type: ignore[arg-type]
        return DataLoader(
            rows,  # type: ignore[arg-type]
            batch_sampler=PoissonBatches(len(rows), self._plan.round),
            collate_fn=partial(_in_parts, collate=self.data_collator, size=args.per_device_train_batch_size),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimiser, behind clipping and noise."""
        if self.optimizer is None:
            made = super().create_optimizer(model)
            self._private = self.optimizer = PrivateOptimizer(
                made,
                noise_multiplier=self._plan.round.sigma,
                max_grad_norm=self._plan.clip_norm,
                expected_batch_size=self._plan.batch,
            )
            if {id(parameter) for parameter in self._private.params} != set(map(id, self._names)):
                raise TrainingError("the optimiser's parameters are not those that are trained: nothing is sent")
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The sum of all clipped gradients; the optimiser's step, which adds those of no more rows, makes it the noised mean."""
        quieten(model)
        self._drawn += inputs["drawn"]
        for reason in inputs["failed"]:
            self._fail(reason)
        for part in inputs["parts"]:
            self._add(model, self._prepare_inputs(part))
        self._private.zero_grad(set_to_none=True)
        for parameter in self._private.params:
            parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))  # type: ignore[attr-defined]
        return torch.zeros((), device=self.args.device)

    def _add(self, model: nn.Module, batch: dict[str, Tensor]) -> None:
        """The rows of a batch; one that cannot be computed counts as zero, for whether it was drawn must not end a round."""
        self._private.zero_grad(set_to_none=True)
        rows, reasons = len(batch["labels"]), list[str]()
        with ignored_failures(reasons):  # whatever the model makes of a row
            with self.compute_loss_context_manager():
                losses = losses_of(model, batch, self._kind)
            losses.sum().backward()  # type: ignore[no-untyped-call]
        if reasons:
            forget(model)
            for row in range(rows if rows > 1 else 0):
                self._add(model, {name: tensor[row : row + 1] for name, tensor in batch.items()})
            if rows == 1:
                self._fail(reasons[0])
            return
        self._require_own(rows)
        self._private.signal_skip_step(True)
        self._private.pre_step()
        self._spoilt = self._spoilt + self._private.spoilt

    def _fail(self, reason: str) -> None:
        self._failed, self._reason = self._failed + 1, reason

    def say(self, tell: Tell) -> None:
        """What became of the rows that were drawn, in one line."""
        spoilt = int(self._spoilt)
        used = self._drawn - self._failed - spoilt
        words = f"of {self._drawn} rows that were drawn, {used} were used"
        if self._failed:
            words += f"; {self._failed} could not be computed, the last for {self._reason}"
        if spoilt:
            words += f"; {spoilt} had no finite gradient"
        if used == self._drawn:
            tell(INFO, words)
        else:
            tell(WARNING if used else ERROR, f"{words}: {'they count' if used else 'what is sent is noise alone, for they count'} as zero")

    def _require_own(self, rows: int) -> None:
        """Each parameter has one gradient a row; and in the first finite batch they are, in sum, what autograd says."""
        own = {name: getattr(parameter, "grad_sample", None) for parameter, name in self._names.items()}
        odd = [name for name, sample in own.items() if not isinstance(sample, Tensor) or len(sample) != rows]
        finite = self._compared or all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in self._names)
        if not odd and not self._compared and finite:
            self._compared = True
            odd = [name for parameter, name in self._names.items() if not _alike(own[name], parameter.grad)]
        if odd:
            raise TrainingError(f"no gradient of single rows for {odd[0]} ({len(odd)} such): nothing is sent; do not train it")


def _alike(samples: Any, whole: Any) -> bool:
    """Is the sum of the examples' gradients that of the whole, up to rounding?"""
    scale = samples.flatten(start_dim=1).float().norm(dim=1).sum()
    return bool((samples.float().sum(dim=0) - whole).norm() <= TOLERANCE * scale)


def _in_parts(rows: list[Any], collate: Callable[[list[Any]], Any], size: int) -> dict[str, Any]:
    """Rows of one shape together. Each is made alone and none is padded, so that what a row is does not depend on those beside it."""
    alike, failed = dict[object, list[Any]](), list[str]()
    for row in rows:
        with ignored_failures(failed):  # of whatever a row has in it
            made = collate([row])
            shapes = tuple((name, one.shape, one.dtype) for name, one in made.items())
            alike.setdefault(shapes, []).append(made)
    joined = list[Any]()
    while alike:  # what is joined is let go
        some = alike.pop(next(iter(alike)))
        while some:
            part, some = some[:size], some[size:]
            joined.append({name: torch.cat([one[name] for one in part]) for name in part[0]})
    return {"parts": joined, "drawn": len(rows), "failed": failed}


class _Moves(TrainerCallback):
    """Every trained tensor moves in the first step, or in a later one where its learning rate is still too small to show."""

    def __init__(self, parameters: dict[str, nn.Parameter], sigma: float) -> None:
        self._parameters, self._sigma, self._rate = parameters, sigma, 0.0
        self._still = dict[str, Tensor]()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._still = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        first = self._sigma and state.global_step == 0
        if first and (silent := [name for name, one in self._parameters.items() if one.grad is None or not one.grad.any()]):
            raise TrainingError(f"no noise reached {silent[0]} ({len(silent)} such): nothing is sent")
        self._rate = max(self._rate, *(float(group["lr"]) for group in optimizer.param_groups))
        self._still = {name: start for name, start in self._still.items() if torch.equal(start, self._parameters[name])}

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._still and self._sigma and self._rate:
            name, *others = self._still
            raise TrainingError(f"training did not move {name} ({1 + len(others)} such): nothing is sent; raise training.learning_rate")


@contextmanager
def private_trainer(
    plan: PrivacyPlan, kind: str, arguments: TrainingArguments, tell: Tell = log.log, **given: Any
) -> Iterator[PrivateTrainer]:
    """A Trainer of DP-SGD on a model, which has nothing of it left afterwards.

    Args:
        plan: what a round is.
        kind: of the task.
        arguments: of the run; steps, accumulation and clipping become those of the plan.
        tell: told at the end what became of the rows that were drawn.
        given: of `Trainer`: model, rows, collator.
    """
    arguments.max_steps, arguments.gradient_accumulation_steps, arguments.max_grad_norm = plan.round.steps, 1, 0.0
    trainer = PrivateTrainer(plan, kind, args=arguments, **given)
    with per_example_gradients(given["model"]):  # Trainer has moved the model: hooks come last
        yield trainer
    trainer.say(tell)
