"""Where the time of a small message goes: what Flower's process for it imports, what the party does, with a worker and without.

    python benchmarks/flower_message.py [--repeats 3]

CPU seconds (user and system) of processes of their own, the smallest of the repeats, so that other work on the machine counts little.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from fedex_lora.config import write_config
from fedex_lora.engines.flower._node import Node
from fedex_lora.engines.flower._request import NodeRequest
from fedex_lora.engines.flower._trial import short_demo
from fedex_lora.engines.flower._worker import ask, serve
from fedex_lora.runs.simulation import LocalSimulation
from fedex_lora.server.server import Server

FLOWER, APP = "import flwr.supernode.runtime.run_clientapp", "import fedex_lora.engines.flower.client"
STEPS = {
    "python": "pass",
    "flower": FLOWER,
    "flower and the app": f"{FLOWER}; {APP}",
    "flower, the app and the model's libraries": f"{FLOWER}; {APP}; import fedex_lora.engines.flower._node",
}


def ignore(event, **fields):
    pass


def cpu(code):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def timed(answer, request):
    began = time.process_time()
    answer(request)
    return time.process_time() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = range(parser.parse_args().repeats)
    result = {f"{name}, import": min(cpu(code) for _ in repeats) for name, code in STEPS.items()}
    config = short_demo()
    place = LocalSimulation(config, ignore)
    sent = Server(config, place.initial(), place.federation().clients).open_round(["bone"]).messages
    with tempfile.TemporaryDirectory() as folder:

        def request(number, **node):
            settings = {"rows": "dealt", "state": f"{folder}/{number}", **node}
            return NodeRequest(sent["bone"], "bone", "run", "", write_config(config), settings)

        result["an answer by a new party: rows, model, training"] = min(timed(Node(ignore).answer, request(n)) for n in repeats)
        socket, ready = Path(folder) / "socket", threading.Event()
        threading.Thread(target=serve, args=(socket, lambda line: ready.set()), daemon=True).start()
        ready.wait()
        ask(request("first", worker=str(socket)))
        result["an answer by a worker: training"] = min(timed(ask, request(f"w{n}", worker=str(socket))) for n in repeats)
    print(json.dumps({name: round(seconds, 2) for name, seconds in result.items()}, indent=1), flush=True)
    os._exit(0)  # the worker's thread never ends


if __name__ == "__main__":
    main()
