"""Chats: the layouts that files have them in, read as one; the loss is on what the assistant says.

A row of each::

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], "tools": [...]}     as OpenAI's
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}                          as ShareGPT's
    {"instruction": "Greet.", "input": "", "output": "Hello!"}                                                         as Alpaca's
    {"prompt": [{"role": "user", ...}], "chosen": [{"role": "assistant", ...}], "rejected": [...]}                     preferences

Preferences may be plain text, or whole conversations that begin alike, without a prompt. Their `messages` are those of the chosen answer.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fedex_lora import config
from fedex_lora.errors import DataError
from fedex_lora.tasks._chat_template import Chat, chat_answer, chat_prompt, common_length, tokenize_chats, turn_ends
from fedex_lora.tasks._chat_words import THOUGHTS
from fedex_lora.tasks._completions import plain_ids
from fedex_lora.tasks._files import Rows
from fedex_lora.tasks._rows import Problem, RowTable
from fedex_lora.tasks._task import Task, causal_task, limit, samples

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}  # others are called as OpenAI calls them
ALPACA = frozenset({"instruction", "input", "output", "history"})
KEYS = {"role", "content", "name", "tool_calls", "tool_call_id", "weight", *THOUGHTS}  # of a message
WHERE = "file:line"  # a column: where a row is from, for complaints


@dataclass(frozen=True)
class ChatLayout:
    """How a file has its chats.

    Attributes:
        columns: those that tell it.
        read: a row -> its `messages`, and what else is to be known of it.
        used: columns that are no more once it is read.
        note: what is said of it.
    """

    columns: frozenset[str]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    used: frozenset[str] = frozenset()
    note: str = ""


def chat_table(source: str, rows: Rows) -> RowTable:
    """A file's chats, in one layout, with what is wrong with single ones.

    Raises:
        DataError: the file has none of the layouts.
    """
    layout = next((one for one in LAYOUTS if one.columns <= set(rows.columns)), None)
    if layout is None:
        raise DataError(
            f"{source} has no chats: give it a column messages, or conversations (ShareGPT), or instruction, input and output (Alpaca), "
            f"or prompt, chosen and rejected (preferences); it has {', '.join(map(str, rows.columns))}",
            "column",
        )
    records = rows.to_dict(orient="records")
    read = [_with_system(row.get("system"), layout.read(row)) for row in records]
    if "tools" in rows.columns:
        read = [{**row, "tools": _json(cell) or None} for row, cell in zip(read, rows["tools"], strict=True)]
    kept = rows.drop(columns=[name for name in rows.columns if name in {"system", *layout.used, *read[0]}])
    names = list(read[0])
    made = pd.DataFrame([[row[name] for name in names] for row in read], columns=names, index=rows.index, dtype=object)
    made = pd.concat([made, kept], axis=1).assign(**{WHERE: [f"{source}:{line}" for line in rows.index]})
    notes = [f"{source}: {layout.note}"] if layout.note else []
    if "system" in rows.columns:
        notes.append(f"{source}: the column system is the first turn of each chat that has no system turn")
    inputs = [name for name in ("messages", "rejected", "tools") if name in names]
    faults = [_cell_fault(record, layout, row) or _fault(row) for record, row in zip(records, read, strict=True)]
    return RowTable(source, made, _problems(faults, [int(line) for line in rows.index]), inputs, notes=notes)


def chat_task(settings: config.TaskSettings, train: Rows, held: Rows, notes: Sequence[str]) -> Task:
    """The task of rows as `chat_table` has them."""
    return causal_task(
        (train, held),
        lambda tokenizer, rows: tokenize_chats(tokenizer, _chats(rows), limit(settings, tokenizer)),
        notes=notes,
        generation=samples(
            held,
            lambda tokenizer, rows: [chat_prompt(tokenizer, chat) for chat in _chats(rows)],
            lambda tokenizer, rows: [chat_answer(tokenizer, chat) for chat in _chats(rows)],
            tokens=plain_ids,
            ends=turn_ends,
        ),
    )


def _chats(rows: Rows) -> list[Chat]:
    preferred, records = {"chosen", "rejected"} <= set(rows.columns), rows.to_dict(orient="records")
    return [Chat(row["messages"], row.get("tools"), len(row["prompt"]) if preferred else 0, row[WHERE]) for row in records]


def _alpaca(row: Mapping[str, Any]) -> dict[str, Any]:
    parts = [part for name in ("instruction", "input") if isinstance(part := row.get(name), str) and part.strip()]
    turns = [{"role": "user", "content": "\n\n".join(parts)}, {"role": "assistant", "content": row["output"]}]
    return {"messages": _messages(turns)}


def _with_system(system: Any, read: dict[str, Any]) -> dict[str, Any]:
    """The messages behind the text of a column `system`, where none of them is of that role."""
    messages = read["messages"]
    if not isinstance(system, str) or not system.strip() or not isinstance(messages, list) or _systems(messages):
        return read
    first = {"role": "system", "content": system}
    return {**read, **{name: [first, *read[name]] for name in ("messages", "prompt") if name in read}}


def _systems(messages: Sequence[Any]) -> list[Any]:
    return [message.get("content") for message in messages if _role(message) in ("system", "developer")]


def _preference(row: Mapping[str, Any]) -> dict[str, Any]:
    """As TRL reads it: an explicit prompt, or the messages that both answers begin with."""
    given = _as_turns(row.get("prompt"), "user") or []
    chosen, rejected = (_as_turns(row.get(name), "assistant") or [] for name in ("chosen", "rejected"))
    repeated = not isinstance(row.get("prompt"), list) or chosen[: len(given)] == given
    if repeated and not any(_role(side[0]) == "assistant" for side in (chosen, rejected) if side):  # whole conversations
        alike = common_length(chosen[:-1], rejected[:-1])
        given, chosen, rejected = chosen[:alike], chosen[alike:], rejected[alike:]
    return {"messages": [*given, *chosen], "prompt": given, "chosen": chosen, "rejected": rejected}


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _as_turns(cell: Any, role: str) -> Any:
    """A text as one turn of the role; none where it is blank."""
    if isinstance(cell, str):
        return [{"role": role, "content": cell}] if cell.strip() else None
    return _messages(cell) if isinstance(cell, list) else None


LAYOUTS = (
    ChatLayout(
        frozenset({"chosen", "rejected"}), _preference, note="preferences: the loss and what is measured are those of the chosen answers"
    ),
    ChatLayout(frozenset({"messages"}), lambda row: {"messages": _messages(row["messages"])}),
    ChatLayout(
        frozenset({"conversations"}),
        lambda row: {"messages": _messages(row["conversations"])},
        frozenset({"conversations"}),
        "ShareGPT's conversations, read as messages",
    ),
    ChatLayout(
        frozenset({"instruction", "output"}),
        _alpaca,
        ALPACA,
        "Alpaca's instruction, input and output, read as messages",
    ),
    ChatLayout(frozenset({"chosen"}), _preference),  # one column of two: each row has the same fault
    ChatLayout(frozenset({"rejected"}), _preference),
)


def _messages(cell: Any) -> Any:
    """Messages as templates read them; what is none stays as it is, and is complained of."""
    return [_message(one) if isinstance(one, Mapping) else one for one in cell] if isinstance(cell, list) else cell


def _message(written: Mapping[str, Any]) -> dict[str, Any]:
    made = {name: value for name, value in written.items() if value is not None}  # parquet has all keys everywhere
    if "from" in made and "role" not in made:
        said = made.pop("from")
        made["role"] = SHAREGPT.get(said, said) if isinstance(said, str) else said
        made["content"] = made.pop("value", None)
    parts = made.get("content")
    if isinstance(parts, list) and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        made["content"] = "".join(part["text"] for part in parts)
    calls, old = _json(made.pop("tool_calls", None)), _json(made.pop("function_call", None))
    if old:  # what OpenAI had before tool calls
        calls = [*(calls if isinstance(calls, list) else []), {"type": "function", "function": old}]
    if calls:
        made["tool_calls"] = [_call(one) for one in calls] if isinstance(calls, list) else calls
    return made


def _call(written: Any) -> Any:
    """A call with its arguments as an object, which OpenAI writes as text and templates read as an object."""
    if not isinstance(written, Mapping):
        return written
    if "function" in written:
        return {**written, "function": _call(written["function"])}
    arguments = _json(written.get("arguments"))
    return {**written, "arguments": arguments} if isinstance(arguments, dict) else dict(written)


def _json(cell: Any) -> Any:
    """JSON text as what it says; another text as it is."""
    try:
        return json.loads(cell) if isinstance(cell, str) and cell.strip() else cell or None
    except (ValueError, RecursionError):
        return cell


def _problems(faults: Sequence[tuple[str, str] | None], lines: Sequence[int]) -> list[Problem]:
    """Each row's first fault, by kind."""
    kinds: dict[tuple[str, str], list[int]] = {}
    for fault, line in zip(faults, lines, strict=True):
        if fault:
            kinds.setdefault(fault, []).append(line)
    return [Problem(code, words, tuple(bad)) for (code, words), bad in kinds.items()]


def _cell_fault(record: Mapping[str, Any], layout: ChatLayout, read: Mapping[str, Any]) -> tuple[str, str] | None:
    """Cells that no turn is made of."""
    texts = ["system"] + (["instruction", "input"] if layout.used == ALPACA else [])
    if name := next((name for name in texts if record.get(name) and not isinstance(record[name], str)), None):
        return "rows", f"a column {name!r} that is not text"
    if layout.used == ALPACA and _json(record.get("history")):
        return "rows", "a history, which is not read: write its turns as messages"
    system, turns = record.get("system"), read["messages"]
    if isinstance(system, str) and system.strip() and isinstance(turns, list) and any(said != system for said in _systems(turns)):
        return "rows", "a column 'system' that says other things than the chat's system turn"
    return None


def _fault(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The code and the words of what is wrong with a row."""
    if "chosen" in row:
        for name in ("chosen", "rejected"):
            if not row[name]:
                return "empty", f"no {name!r} answer"
        if row["chosen"] == row["rejected"]:
            return "rows", "a chosen answer that is the rejected one"
    tools = row.get("tools")
    if tools is not None and not (isinstance(tools, list) and all(map(_is_named, tools))):
        return "rows", "tools that are no list of functions with names"
    return _chat_fault(row["messages"]) or (_chat_fault([*row["prompt"], *row["rejected"]]) if "chosen" in row else None)


def _chat_fault(messages: Any) -> tuple[str, str] | None:
    if not isinstance(messages, list) or not messages:
        return "empty", "no messages"
    if fault := next(filter(None, map(_turn_fault, messages)), None):
        return fault
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return "rows", "no assistant turn: there is nothing to learn"
    if roles[-1] != "assistant":
        return "rows", f"a chat that ends with the {roles[-1]}: there is nothing to learn at its end"
    return ("rows", "nothing before the assistant's first turn") if roles[0] == "assistant" else None


def _turn_fault(message: Any) -> tuple[str, str] | None:
    if not isinstance(message, Mapping):
        return "rows", "a message that is no object with role and content"
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if role not in ROLES:
        return "rows", f"a role {str(role)[:40]!r}, which is none of {', '.join(ROLES)}"
    if calls is not None and not (isinstance(calls, list) and all(map(_is_named, calls))):
        return "rows", "tool calls that are no list of functions with names"
    if content is not None and not isinstance(content, str):
        return "rows", "content that is not text"
    if name := next((name for name in THOUGHTS if not isinstance(message.get(name, ""), str)), None):
        return "rows", f"{name} that is not text"
    if name := next((name for name, value in message.items() if name not in KEYS and value not in ("", [], {})), None):
        return "rows", f"a message with the key {name[:40]!r}, which is not read"
    if role == "assistant":
        return None if calls or (content or "").strip() else ("empty", "an empty assistant turn")
    return None if (content or "").strip() or (role == "tool" and content is not None) else ("empty", "a message without content")


def _is_named(tool: Any) -> bool:
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return isinstance(inner, Mapping) and isinstance(inner.get("name"), str)
