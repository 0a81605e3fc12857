"""Three parties in one process. Run it: python examples/join/in_process.py"""

from pathlib import Path

from party import NAMES, ROUNDS, RULES, join
from script import prepare

from fedex_lora import AdaptedModel, Server, save_result
from fedex_lora.errors import UsageError
from fedex_lora.server.verdicts import Accepted


def federate(ask, out):
    """All rounds. `ask` takes everybody's message and gives everybody's answer."""
    if Path(out).exists():
        raise UsageError(f"{out} is there: this federation is over; move it away. For more rounds, raise ROUNDS in party.py before")
    start = AdaptedModel(prepare(NAMES[0])[0])
    server = Server.start(RULES, *start.read(), NAMES, base=start.base.name)
    for number in range(1, ROUNDS + 1):
        round = server.open_round()
        verdicts = [server.receive(name, answer) for name, answer in ask(round.messages).items()]
        result = round.close([verdict.update for verdict in verdicts if isinstance(verdict, Accepted)])
        print(f"round {number}: exactness error {result.exactness.max_relative_error:.1e}")
    save_result(out, result, start.format)


if __name__ == "__main__":
    answers = {name: join(name) for name in NAMES}
    federate(lambda messages: {name: answers[name](message) for name, message in messages.items()}, "trained/in-process")
