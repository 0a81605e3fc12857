"""The transport: each participant's message as an NVFlare task of its own, and their answers, for `runs.listening`."""

import queue
from collections.abc import Iterator, Mapping

from nvflare.apis.controller_spec import ClientTask, Task, TaskCompletionStatus
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal

from fedex_lora.errors import TrainingError
from fedex_lora.protocol.envelopes import envelope_of
from fedex_lora.protocol.records import Request
from fedex_lora.runs.listening import Reply

TASK, PAYLOAD = "fedex_lora", "fedex_lora"  # the task's name, and the key of our bytes in it
CODES = {value for name, value in vars(ReturnCode).items() if name.isupper()}
PAUSE = 1.0  # seconds between two looks at the clock


class TaskExchange:
    """`exchange` over a controller's tasks: see `listening.Exchange`. Who answered is NVFlare's word, never the answer's.

    Args:
        controller: whose tasks they are.
        context: NVFlare's, of the run.
        abort: NVFlare's signal that the job is to end.
        late: an answer may come in the round after its own; else nobody waits for it any more when another message goes out.
    """

    def __init__(self, controller: Controller, context: FLContext, abort: Signal, late: bool) -> None:
        self._controller, self._context, self._abort, self._late = controller, context, abort, late
        self._came: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self._out = dict[str, tuple[int, Task]]()  # client -> the round that it was asked in, and the task

    def __call__(self, messages: Mapping[str, bytes], deadline: float | None = None) -> Iterator[Reply | None]:
        """Everybody's message goes out before anybody is waited for; the deadline is the listener's to keep."""
        waiting = {client: self._send(client, messages[client]) for client in messages}
        while waiting:
            if self._abort.triggered:
                raise TrainingError("the job was aborted: its rounds are kept, and go on where it is given the same out")
            try:
                reply = self._came.get(timeout=PAUSE)
            except queue.Empty:
                yield None
                continue
            if waiting.get(reply.client) == reply.round:
                del waiting[reply.client]
            yield reply

    def _send(self, client: str, payload: bytes) -> int:
        """The round that a message asks in, once it is on its way."""
        round = envelope_of(payload, Request, len(payload))[0].round
        before = self._out.pop(client, None)
        if before is not None and not (self._late and before[0] == round - 1):
            self._controller.cancel_task(before[1])

        def received(client_task: ClientTask, fl_ctx: FLContext) -> None:
            self._came.put(_reply(client_task.client.name, round, client_task.result))
            client_task.result = None  # it may be large, and NVFlare keeps what it is given

        def done(task: Task, fl_ctx: FLContext) -> None:
            if task.completion_status not in (TaskCompletionStatus.OK, TaskCompletionStatus.CANCELLED):
                self._came.put(Reply(client, None, f"NVFlare ended its task: {task.completion_status.value}", round))

        task = Task(TASK, Shareable({PAYLOAD: payload}), result_received_cb=received, task_done_cb=done)
        self._out[client] = round, task
        self._controller.send(task, self._context, targets=[client])
        return round


def _reply(client: str, round: int, result: Shareable) -> Reply:
    """What a site's answer is; of its words none is repeated."""
    code = result.get_return_code()
    if code != ReturnCode.OK:
        words = code if code in CODES else "a code that NVFlare does not have"
        return Reply(client, None, f"its site failed outside of fedex-lora ({words}): see that site's own log", round)
    payload = result.get(PAYLOAD)
    if not isinstance(payload, bytes | bytearray | memoryview):
        return Reply(client, None, "its answer is not of this protocol: is fedex-lora there the same version?", round)
    return Reply(client, bytes(payload), round=round)
