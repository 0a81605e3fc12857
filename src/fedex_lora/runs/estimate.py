"""What a run will take, said before it begins: time from a few real steps, bytes and disk from the method's row, memory as it is."""

import math
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import cast

import torch
from transformers import TrainingArguments

from fedex_lora.aggregation import get_method
from fedex_lora.client.arguments import training_arguments
from fedex_lora.client.training import evaluate
from fedex_lora.config import Config
from fedex_lora.runs.context import GlobalModel
from fedex_lora.runs.learner import ModelLearner
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.server.checkpoint import adapter_bytes, bytes_needed, gained_bytes
from fedex_lora.server.checks import participants
from fedex_lora.types import ServerState

STEPS, MORE = 3, 24  # of training that are timed, the first one only warms up; and of a small model
QUICK = 2.0  # seconds: training that took less is timed again, for most of that was the libraries' first time
ENTRY, MESSAGE = 160, 2048  # bytes of JSON that a tensor and a message have beside it, from above


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take.

    Attributes:
        step_seconds: one optimiser step.
        round_seconds, run_seconds: of all participants in turn, with what is measured after each round.
        memory_bytes: of this process at its peak; on an accelerator, beside what the device holds.
        device_bytes: of the accelerator; None on a CPU.
        disk_bytes: of the run folder in the end, from above.
        down, up: bytes of one client in a round, the largest of all rounds, from above.
        travelled: bytes of all clients and rounds, and of the final model to all, from above.
    """

    step_seconds: float
    round_seconds: float
    run_seconds: float
    memory_bytes: int
    device_bytes: int | None
    disk_bytes: int
    down: int
    up: int
    travelled: int

    def lines(self) -> list[str]:
        """In words."""
        device = f" and {_size(self.device_bytes)} of the device" if self.device_bytes is not None else ""
        return [
            f"expected: {_time(self.step_seconds)} a step, {_time(self.round_seconds)} a round, {_time(self.run_seconds)} in all; "
            f"{_size(self.memory_bytes)} of memory{device}, up to {_size(self.disk_bytes)} of disk",
            f"each client and round: up to {_size(self.down)} down, {_size(self.up)} up; {_size(self.travelled)} in all",
        ]


def estimate(place: LocalSimulation) -> Estimate:
    """Of a run whose model and rows are here; nothing is written, and the model is left as it was.

    Raises:
        TrainingError: the first steps fail as they would in the run.
    """
    host, learner = place.host, cast(ModelLearner, place.pool.learner)
    config, state, data = host.place.config, host.initial(), learner.data
    client, rows = max(data, key=lambda name: len(data[name].train)), learner.rows
    began, step = _trained(learner, client)
    host.load(state)
    arguments, taking_part = training_arguments(config), participants(config.clients.fraction, len(data))
    steps = sum(steps_of(count, arguments) for count in rows.values()) / len(rows)
    start, batch = _measured(host, arguments)
    batches = [math.ceil(len(one.held_out) / arguments.eval_batch_size) for one in data.values()]
    own = (sum(map(bool, batches)) * start + sum(batches) * batch) / len(batches)
    everywhere = start + math.ceil(len(host.eval) / arguments.eval_batch_size) * batch
    closing = _closed(host, state)
    one_round = taking_part * (began + steps * step + own) + everywhere + closing
    kept = 3 if config.local.optimizer_state == "keep" else 1
    down, up, travelled = bytes_of(config, state, len(data), host.ranks)
    more = adapter_bytes(state) * (2 * taking_part + kept * len(data)) + 2 * gained_bytes(config, state.adapter, taking_part, config.rounds)
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() and arguments.device.type == "cuda" else None
    return Estimate(
        step_seconds=step,
        round_seconds=one_round,
        run_seconds=config.rounds * one_round + everywhere + len(data) * own,
        memory_bytes=peak_memory() + more,
        device_bytes=device,
        disk_bytes=bytes_needed(config, state, len(data)),
        down=down,
        up=up,
        travelled=travelled,
    )


def steps_of(rows: int, arguments: TrainingArguments) -> int:
    """Optimiser steps of a client with so many rows in one round, as Trainer counts them."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    share = rows / arguments.train_batch_size
    batches = max(1, math.floor(share) if arguments.dataloader_drop_last else math.ceil(share))
    return math.ceil(arguments.num_train_epochs * max(1, math.ceil(batches / arguments.gradient_accumulation_steps)))


def bytes_of(config: Config, state: ServerState, clients: int, ranks: Mapping[str, int]) -> tuple[int, int, int]:
    """What travels, from above: down and up of one client in the largest round, and of all clients in the whole run.

    A client that was not asked for some rounds catches up on them; with a fraction f, that is on 1 / f rounds at a time.
    """
    row = get_method(config.method)
    taking_part = 1 if row.centralised else participants(config.clients.fraction, clients)
    largest = sorted(ranks.values(), reverse=True)[:taking_part]
    missed = min(config.rounds, math.ceil(clients / taking_part))
    other = sum(tensor.numel() * tensor.element_size() for tensor in state.other.values())
    envelope = MESSAGE + ENTRY * (len(state.other) + 2 * len(state.adapter))
    gains = 2 * ENTRY * missed * len(state.adapter) if row.residual_rank else 0

    def message(round: int) -> tuple[int, int]:
        down, up = other + envelope + (gains if round > 1 else 0), other + envelope
        for pair in state.adapter.values():
            cut = (config.truncation.rank or None) if row.residual_policy == "truncate" else None
            size = row.message_size(largest or [pair.rank] * taking_part, 0, pair.shape, round, cut)
            lacked = max(0, size.down - pair.rank * sum(pair.shape)) if round > 1 else 0
            down += 4 * min(size.down + (missed - 1) * lacked, size.down + math.prod(pair.shape))
            up += 4 * size.up
        return down, up

    period = len(row.trained_schedule)  # the first two rounds are their own, and the others repeat
    last = config.rounds + 1  # which is measured only
    times = {number: 1 if number < 3 else (last - number) // period + 1 for number in range(1, min(last, 2 + period) + 1)}
    rounds = {number: message(number) for number in times}
    end, end_up = message(last)
    travelled = taking_part * (sum(times[number] * sum(rounds[number]) for number in times) - end - end_up) + clients * (end + MESSAGE)
    return max(down for down, _ in rounds.values()), max(up for _, up in rounds.values()), travelled


def peak_memory() -> int:
    """Bytes that this process had at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _trained(learner: ModelLearner, client: str) -> tuple[float, float]:
    """Seconds that a client's training takes beside its steps, and those of a step; the model is trained by a few."""
    whole, times = _timed(learner, client, STEPS)
    if whole < QUICK:
        whole, times = _timed(learner, client, max(STEPS, min(MORE, int(QUICK / whole * STEPS))))
    step = median([after - before for before, after in pairwise(times)] or [whole])
    return max(0.0, whole - len(times) * step), step


def _timed(learner: ModelLearner, client: str, steps: int) -> tuple[float, list[float]]:
    """Seconds that so many steps of a client took with all around them, and when each was done.

    A party's own trainer need not look at `max_steps`, so it is given the rows of so many steps only.
    """
    place, work, data, times = learner.place, learner.place.work, learner.data, list[float]()
    short = work.config.model_copy(update={"training": {**work.config.training, "max_steps": steps}})
    if work.trainer is not None:
        arguments, mine = training_arguments(work.config), data[client]
        few = steps * arguments.train_batch_size * arguments.gradient_accumulation_steps
        data = {client: replace(mine, train=mine.train.select(range(min(few, len(mine.train)))))}
    timed = ModelLearner(place, data, lambda _: times.append(time.perf_counter()))
    began, place.work = time.perf_counter(), replace(work, config=short)
    try:
        timed.train(client, 1, None)
    finally:
        place.work = work
    return time.perf_counter() - began, times


def _measured(host: GlobalModel, arguments: TrainingArguments) -> tuple[float, float]:
    """Seconds that measuring takes beside its batches, and those of a batch."""

    def seconds(batches: int) -> float:
        rows = host.eval.select(range(min(len(host.eval), batches * arguments.eval_batch_size)))
        began = time.perf_counter()
        evaluate(host.place.model, rows, host.place.work)
        return time.perf_counter() - began

    seconds(1)
    one, three = seconds(1), seconds(3)
    there = math.ceil(len(host.eval) / arguments.eval_batch_size)
    batch = (three - one) / (min(3, there) - 1) if there > 1 else one
    batch = max(batch, 0.0)
    return max(0.0, one - batch), batch


def _closed(host: GlobalModel, state: ServerState) -> float:
    """Seconds of what a round ends with, beside training and measuring: of comparing the layers in fp64, twice."""
    if not state.adapter:
        return 0.0
    began = time.perf_counter()
    host.realised(state, {name: pair.low_rank() for name, pair in state.adapter.items()})
    return 2 * (time.perf_counter() - began)


def _size(count: int | None) -> str:
    from rich.filesize import decimal

    return decimal(count or 0, precision=1)


def _time(seconds: float) -> str:
    for unit, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
