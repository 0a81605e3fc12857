"""What a template must write of a chat, and whether a text has it all."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys that hold what the assistant says before its content
ELEMENT = re.compile(r"(<\w+>).*(</\w+>)", re.DOTALL)


def first_missing(messages: Sequence[Message], text: str) -> Message | None:
    """The first message whose words or calls are not in the text, after those of the messages before it; white space does not count.

    Instructions may stand anywhere: some templates write them into the user's last turn.
    """
    plain, place = _compact(text), 0
    for message in messages:
        anywhere = message["role"] in ("system", "developer")
        reached = place
        for forms in _parts(message):
            ends = [at + len(form) for form in forms if (at := plain.find(form, 0 if anywhere else place)) >= 0]
            if not ends:
                return message
            reached = reached if anywhere else max(reached, min(ends))
        place = reached
    return None


def name_of(tool: Any) -> str:
    """The name of a tool or of a call, in a `function` or plain."""
    return str(tool.get("function", tool).get("name"))


def strange(messages: Sequence[Message], tools: Sequence[Any] | None, text: str) -> tuple[list[Message], list[Any] | None]:
    """The same chat in words of which none is in the text: what a template writes of it, it writes of no other turn, and not by itself."""
    stem = next(stem for stem in ("z" * more + "q" for more in count(1)) if stem not in text)
    numbers = count()

    def fresh(old: Any) -> Any:
        if not isinstance(old, str):
            return f"{stem}{next(numbers)}x"
        element = ELEMENT.fullmatch(old.strip())  # templates look for <tool_response> around what a user says
        return (f"{{}}{stem}{next(numbers)}x{{}}".format(*(element.groups() if element else ("", "")))) if old.strip() else old

    def turn(message: Message) -> Message:
        words = {name: fresh(message[name]) for name in ("content", *THOUGHTS) if message.get(name)}
        calls = {"tool_calls": [_altered(call, fresh) for call in message["tool_calls"]]} if message.get("tool_calls") else {}
        return {**message, **words, **calls}

    return [turn(message) for message in messages], [_altered(tool, fresh) for tool in tools] if tools else None


def _altered(tool: Mapping[str, Any], fresh: Callable[[Any], Any]) -> dict[str, Any]:
    """A tool or a call with another name and other arguments."""
    if "function" in tool:
        return {**tool, "function": _altered(tool["function"], fresh)}
    more = {"arguments": _changed(tool["arguments"], fresh)} if "arguments" in tool else {}
    return {**tool, "name": fresh(tool["name"]), **more}


def _changed(value: Any, fresh: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {name: _changed(inner, fresh) for name, inner in value.items()}
    if isinstance(value, list):
        return [_changed(inner, fresh) for inner in value]
    return None if value is None else fresh(value)


def _parts(message: Message) -> Iterator[tuple[str, ...]]:
    """What must be found of a message, each as it is or as JSON has it: thoughts, content, and of each call its name and arguments."""
    yield from (_forms(message.get(name) or "") for name in (*THOUGHTS, "content"))
    for call in message.get("tool_calls") or []:
        yield (_compact(name_of(call)),)
        yield from map(_forms, _leaves(call.get("function", call).get("arguments")))


def _leaves(value: Any) -> Iterator[Any]:
    """Names and values of arguments; of those without a value neither."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if inner is not None:
                yield name
                yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif value is not None:
        yield value


def _forms(value: Any) -> tuple[str, ...]:
    if not isinstance(value, str):
        return json.dumps(value), str(value)
    escaped = (json.dumps(value, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
    return tuple(map(_compact, (value, *escaped)))


def _compact(text: str) -> str:
    return "".join(text.split())
