"""What validation and atomic storage cost, beside none, as a share of a round.

    python benchmarks/cost_of_safety.py examples/mrpc.toml --set base.model=FOLDER --set task.data=GLUE_FOLDER --set rounds=2

Runs the configuration in this process, then repeats on the last round's own messages and results, in turn and several times: what the
server and all clients do to be safe (checksums, checks of every message, norms against the median, clients' memories, the round's folder
with its manifest, synced and renamed), and the same bytes and files without: parsed and written plainly.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load, save, save_file

from fedex_lora.aggregation import get_method
from fedex_lora.client.state import ClientState, client_table
from fedex_lora.client.training import silence_libraries
from fedex_lora.config import read_config
from fedex_lora.models.lora import format_of
from fedex_lora.protocol.delta_sync import ModelCopy
from fedex_lora.protocol.dumps import pack
from fedex_lora.protocol.envelopes import envelope_of
from fedex_lora.protocol.frame import digest, split
from fedex_lora.protocol.messages import Download, decode_body, decode_update
from fedex_lora.protocol.records import Request
from fedex_lora.runs.round_loop import run_rounds
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.server.checkpoint import FILE, Checkpoint, load_checkpoint, to_file
from fedex_lora.server.norm_filter import norm_rejected, size_of
from fedex_lora.storage.adapter_folder import Format
from fedex_lora.storage.files import write_bytes
from fedex_lora.storage.result import read_result, write_result
from fedex_lora.storage.run_folder import round_folder
from fedex_lora.storage.tensors import load_tensors


@dataclass(frozen=True, eq=False)
class Round:
    """A round's messages and results."""

    down: dict[str, bytes]
    up: dict[str, bytes]
    sent: dict[str, Download]
    here: Checkpoint
    folder: Path
    format: Format
    seconds: float


def last_round(config, out: Path) -> Round:
    place, down, up = LocalSimulation(config, lambda event: None), {}, {}

    def exchange(messages, deadline=None):
        for reply in place.exchange(messages, deadline):
            if len(reply.payload) > 20_000 or reply.client not in up:  # the last message only measures
                down[reply.client], up[reply.client] = messages[reply.client], reply.payload
            yield reply

    federation = replace(place.federation(), exchange=exchange)
    run_rounds(config, place.initial(), federation, out, lambda event: None)
    here, known = load_checkpoint(round_folder(out, config.rounds)), place.initial().adapter
    sent = {client: received(payload, known) for client, payload in down.items()}
    return Round(down, up, sent, here, round_folder(out, config.rounds), format_of(place.host.place.model), here.done["seconds"])


def received(payload: bytes, known) -> Download:
    """A message as a client reads it."""
    request, body = envelope_of(payload, Request, 2**20)
    return Download(request, decode_body(body, request.body, known))


def safely(one: Round, out: Path) -> dict[str, float]:
    """Seconds of each part."""
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    known = next(iter(one.sent.values())).body.adapter
    for payload in (next(iter(one.down.values())), *one.up.values()):  # one body serves all clients of a version
        digest(split(payload, len(payload))[1])
    taken = {"checksums when sent": lap()}
    for payload in one.down.values():
        received(payload, known)
    stays = get_method(one.here.state.method).withheld(one.here.state.round)
    updates = [decode_update(one.up[client], sent, stays) for client, sent in one.sent.items()]
    taken["checks of messages"] = lap()
    norm_rejected({update.client_id: size_of(update, known, one.here.state.other) for update in updates}, 10)
    taken["norms"] = lap()
    for client, reply in one.up.items():
        state = ClientState(ModelCopy(adapter=known), round=one.here.state.round, reply=reply)
        write_bytes(out / client / "memory.safetensors", pack("client", *client_table(state, whole=False)))
    taken["clients' memories"] = lap()
    weights = {update.client_id: 1 / len(updates) for update in updates}
    more, before = {FILE: to_file(one.here)}, read_result(one.folder, check=False).previous_delta
    lap()
    write_result(out / "round", one.here.state, updates, weights, one.format, {}, before, more=more)
    taken["the round's folder"] = lap()
    return taken


def plainly(one: Round, out: Path) -> float:
    """The same messages and the same files, without."""
    files = {path.relative_to(one.folder): load_tensors(path)[0] for path in one.folder.rglob("*.safetensors")}
    files = {name: tensors for name, tensors in files.items() if name.name != FILE}
    began = time.perf_counter()
    for payload in (*one.down.values(), *one.up.values()):
        body = bytes(split(payload, len(payload))[1])
        save(load(body))  # what is sent
        load(body)  # what is received
    for name, tensors in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / name)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    silence_libraries()
    with tempfile.TemporaryDirectory(prefix="fedex-lora-", dir=Path.cwd()) as folder:  # on the disk, not in memory
        one = last_round(read_config(args.config, args.overrides), Path(folder) / "run")
        parts, without = [], []
        for number in range(args.repeats):
            parts.append(safely(one, Path(folder) / f"safe{number}"))
            without.append(plainly(one, Path(folder) / f"plain{number}"))
            shutil.rmtree(Path(folder) / f"safe{number}")
            shutil.rmtree(Path(folder) / f"plain{number}")
    median = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    extra = statistics.median(sum(part.values()) - other for part, other in zip(parts, without, strict=True))
    for name, seconds in median.items():
        print(f"{name:24} {seconds * 1e3:8.1f} ms")
    print(f"{'the same without':24} {statistics.median(without) * 1e3:8.1f} ms")
    print(f"a round of {one.seconds:.1f} s; safety adds {extra:.3f} s, {extra / one.seconds:.2%} of it")
    if args.out:
        result = {"seconds": median, "without": statistics.median(without), "round": one.seconds, "share": extra / one.seconds}
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
