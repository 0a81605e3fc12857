"""Three parties in processes of their own, with pipes to the server. Run it: python examples/join/over_pipes.py"""

from multiprocessing import get_context

from in_process import federate
from party import NAMES, join


def party(name, pipe):
    """One party's process: it answers until there are no more messages."""
    answer = join(name)
    while message := pipe.recv_bytes():
        pipe.send_bytes(answer(message))


if __name__ == "__main__":
    context, pipes = get_context("spawn"), {}
    for name in NAMES:
        pipes[name], theirs = context.Pipe()
        context.Process(target=party, args=(name, theirs), daemon=True).start()

    def ask(messages):
        """Everybody is sent its message before anybody is waited for."""
        for name, message in messages.items():
            pipes[name].send_bytes(message)
        return {name: pipes[name].recv_bytes() for name in messages}

    federate(ask, "trained/over-pipes")
    for pipe in pipes.values():
        pipe.send_bytes(b"")
