"""A chat as tokens, through the tokenizer's own chat template, and those of them that the loss is on: what the assistant says.

A template with `{% generation %}` says itself what that is. Else it is found turn by turn. Of each assistant turn, let P be the text of
what stands before it, with the words that ask for an answer, E the text up to its end, and W the text of the whole chat. E must begin with
P, and W with E. Then E without P is learnt: what the assistant says, and what ends its turn. W is tokenised once.
"""

import random
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils import chat_template_utils

from fedex_lora.errors import DataError, ModelError
from fedex_lora.tasks._chat_words import Message, first_missing, name_of, strange
from fedex_lora.tasks._completions import IGNORED, OPEN, TORN, plain_ids, token_rows
from fedex_lora.tasks._rows import some

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MARKED = "save with the tokenizer a template that marks what the assistant says by {% generation %}"
TAKES = "save with the tokenizer a template that takes them, or mend or leave out these rows"
NOW = datetime(2024, 7, 26)  # where there is no clock, Llama 3's templates write this day
ANSWER = "answered"  # a word that no template writes by itself


@dataclass(frozen=True)
class Chat:
    """One chat.

    Attributes:
        messages: with `role`, `content`, `tool_calls`, as templates read them.
        tools: what the assistant may call; None: nothing.
        given: so many messages at the beginning are only read, whoever wrote them.
        where: its file and line, for complaints.
    """

    messages: Sequence[Message]
    tools: list[Any] | None = None
    given: int = 0
    where: str = ""


class _RefusedError(Exception):
    """Why a template cannot be used for a chat, and how to mend it."""

    def __init__(self, reason: str, mend: str) -> None:
        super().__init__(f"{reason} {{where}}: {mend}")


def tokenize_chats(tokenizer: Any, chats: Sequence[Chat], max_length: int) -> Dataset:
    """Causal-LM inputs, with labels on what the assistant says; its columns are those of `tokenize_completions`, and two.

    Args:
        tokenizer: the model's, with its chat template.
        chats: one a row.
        max_length: tokens, at most; a longer chat is cut at its right end.

    Returns:
        Two columns more: `TORN`: the words that ask for the answer have other tokens when it is not there yet; `OPEN`: nothing that ends
        the last answer is learnt.

    Raises:
        ModelError: the tokenizer has no chat template, or does not say where in the text its tokens are.
        DataError: the template cannot be used for some of the chats: all of them in one line.
    """
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise ModelError(f"the tokenizer of {name} has no chat template: use a model that was made for chats, or set and save one with it")
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {name} does not say where its tokens are in the text: save it as a fast one (tokenizer.json)")
    made, refused = [], dict[str, list[str]]()
    for chat in chats:
        try:
            made.append(chat_tokens(tokenizer, chat))
        except _RefusedError as error:
            refused.setdefault(str(error), []).append(chat.where)
    if refused:
        reasons = "; ".join(reason.replace("{where}", f"({some(places)})") for reason, places in refused.items())
        raise DataError(f"the chat template of {tokenizer.name_or_path} {reasons}", "rows", sum(map(len, refused.values())))
    added = set(tokenizer.added_tokens_decoder)
    torn = [_is_torn(tokenizer, added, *row) for row in made]
    is_open = [_is_open(tokenizer, *row, chat) for row, chat in zip(made, chats, strict=True)]
    return token_rows(tokenizer, made, max_length).add_column(TORN, torn).add_column(OPEN, is_open)  # type: ignore[call-arg]


def _is_open(tokenizer: Any, ids: Sequence[int], labels: Sequence[int], chat: Chat) -> bool:
    """Does what is learnt of the last answer end with its own last word, so that a model never learns to end it?"""
    words = (chat.messages[-1].get("content") or "").split()
    if not words or chat.messages[-1].get("tool_calls"):
        return False
    end = next(place for place in reversed(range(len(ids))) if labels[place] != IGNORED) + 1
    learnt = tokenizer.decode(ids[max(0, end - len(words[-1]) - 8) : end], clean_up_tokenization_spaces=False)
    return bool("".join(learnt.split()).endswith(words[-1]))


def _is_torn(tokenizer: Any, added: Collection[int], ids: Sequence[int], labels: Sequence[int]) -> bool:
    """Has what stands before the last answer, from its last marker on, other tokens when no answer follows?

    So it is where a tokenizer makes one token of two new lines, but two tokens where a word follows them.
    """
    begin = next((place for place in reversed(range(1, len(ids))) if labels[place] != IGNORED == labels[place - 1]), 0)
    start = next((place for place in reversed(range(begin)) if ids[place] in added), 0)
    head = list(ids[start:begin])
    return head != plain_ids(tokenizer, [tokenizer.decode(head, clean_up_tokenization_spaces=False)])[0]


def chat_tokens(tokenizer: Any, chat: Chat) -> tuple[list[int], list[int]]:
    """The chat's tokens, and their labels."""
    text = _render(tokenizer, chat, len(chat.messages))
    _require_written(chat, text)
    _require_written(*_strange(tokenizer, chat, text))
    if GENERATION.search(tokenizer.get_chat_template(tools=chat.tools)):
        encoded, learnt = _marked(tokenizer, chat)
    else:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        learnt = list(_inside(encoded["offset_mapping"], _spans(tokenizer, chat, text)))
    _require_learnt(text, encoded["offset_mapping"], learnt, chat)
    ids: list[int] = encoded["input_ids"]
    return ids, [token if on else IGNORED for token, on in zip(ids, learnt, strict=True)]


def _require_written(chat: Chat, text: str) -> None:
    """The text has all turns and tools."""
    if (missing := first_missing(chat.messages, text)) is not None:
        raise _RefusedError(f"leaves out, changes or moves a turn of the role {missing['role']}", TAKES)
    if any(name_of(tool) not in text for tool in chat.tools or []):
        raise _RefusedError("leaves out the tools", TAKES)


def _strange(tokenizer: Any, chat: Chat, text: str) -> tuple[Chat, str]:
    """The chat in other words, for words that a template leaves out may stand elsewhere; as it is where the template refuses them."""
    messages, tools = strange(chat.messages, chat.tools, text)
    other = replace(chat, messages=messages, tools=tools)
    try:
        return other, _render(tokenizer, other, len(messages))
    except _RefusedError:
        return chat, text


def _render(tokenizer: Any, chat: Chat, count: int, ask: bool = False) -> str:
    """The text of the first messages; `ask`: with the words that ask the assistant to go on."""
    try:
        with _same_chance():
            text: str = tokenizer.apply_chat_template(
                list(chat.messages[:count]), tools=chat.tools, tokenize=False, add_generation_prompt=ask
            )
    except Exception as error:  # templates raise what they like
        raise _RefusedError(f"refuses chats: {_own_words(error, tokenizer.get_chat_template(tools=chat.tools))}", TAKES) from None
    return text


@contextmanager
def _same_chance() -> Iterator[None]:
    """A template draws by chance alike for each chat, at one time, so that no chat changes the text of another."""
    templates: Any = chat_template_utils
    state, clock = random.getstate(), templates.datetime
    random.seed(0)
    templates.datetime = SimpleNamespace(now=lambda: NOW)
    try:
        yield
    finally:
        random.setstate(state)
        templates.datetime = clock


def _own_words(error: Exception, template: str) -> str:
    """What a template says of its own accord: the beginning of what it raises, as far as it stands in the template; nothing of a row."""
    if isinstance(error, TemplateSyntaxError):  # said before any row is looked at
        return (str(error).splitlines() or [""])[0][:120]
    words = str(error).partition("\n")[0][:120] if type(error) is TemplateError else ""
    while words and words not in template:
        words = words[:-1]
    return words.strip() or type(error).__name__


def _marked(tokenizer: Any, chat: Chat) -> tuple[Any, list[bool]]:
    """Tokens with their offsets, and which of them the template marks, behind the messages that are only read."""
    more = {"return_offsets_mapping": True, "verbose": False}
    with _same_chance():
        encoded = tokenizer.apply_chat_template(
            list(chat.messages), tools=chat.tools, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs=more
        )
    read = tokenizer(_render(tokenizer, chat, chat.given, ask=True), add_special_tokens=False)["input_ids"] if chat.given else []
    begin = common_length(read, encoded["input_ids"])
    return encoded, [bool(on) and place >= begin for place, on in enumerate(encoded["assistant_masks"])]


def _spans(tokenizer: Any, chat: Chat, text: str) -> list[tuple[int, int]]:
    """Where in the text each assistant turn stands, with what ends it."""
    spans, reached = [], 0
    for turn, message in enumerate(chat.messages):
        if message["role"] != "assistant" or turn < chat.given:
            continue
        before, whole = _render(tokenizer, chat, turn, ask=True), _render(tokenizer, chat, turn + 1)
        if not whole.startswith(before) or len(before) < reached:
            raise _RefusedError("asks for an answer in other words than it writes before one", MARKED)
        if not text.startswith(whole) or len(whole) == len(before):
            raise _RefusedError("writes a turn in another way once others follow it, so that what is learnt cannot be told", MARKED)
        reached = len(whole)
        spans.append((len(before), reached))
    return spans


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Iterator[bool]:
    """Is some of a token's text in a span? One of no length is white space that the tokenizer does not count: it goes on from the last."""
    reached = 0
    for start, end in offsets:
        begin = start if start < end else reached
        yield any(begin < stop and end > first for first, stop in spans)
        reached = max(reached, end)


def _require_learnt(text: str, offsets: Sequence[tuple[int, int]], learnt: Sequence[bool], chat: Chat) -> None:
    """What is learnt holds every assistant turn, in order."""
    said = bytearray(len(text))
    for (start, end), on in zip(offsets, learnt, strict=True):
        said[start:end] = bytes([on]) * (end - start) if on else said[start:end]
    heard = "".join(letter for letter, on in zip(text, said, strict=True) if on)
    if first_missing([message for message in chat.messages[chat.given :] if message["role"] == "assistant"], heard) is not None:
        raise _RefusedError("does not mark all that the assistant says, or its tokenizer does not say where its tokens are", MARKED)


def common_length(left: Sequence[Any], right: Sequence[Any]) -> int:
    """How long two sequences are alike from their beginning.

    >>> common_length([1, 2, 3], [1, 2, 4, 5])
    2
    """
    most = min(len(left), len(right))
    return next((place for place in range(most) if left[place] != right[place]), most)


def chat_prompt(tokenizer: Any, chat: Chat) -> str:
    """What a model reads before it writes the last turn.

    Raises:
        DataError: the template refuses the chat.
    """
    try:
        return _render(tokenizer, chat, len(chat.messages) - 1, ask=True)
    except _RefusedError as error:
        raise DataError(f"the chat template of {tokenizer.name_or_path} {error}".replace("{where}", f"({chat.where})")) from None


def chat_answer(tokenizer: Any, chat: Chat) -> str:
    """What the last turn says, as the template writes it, without special tokens."""
    before, whole = chat_prompt(tokenizer, chat), _render(tokenizer, chat, len(chat.messages))
    if not whole.startswith(before):
        return str(chat.messages[-1].get("content") or "")
    ids = tokenizer(whole[len(before) :], add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()


def turn_ends(tokenizer: Any, model: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's and the model's end tokens, and the one that the template ends a turn with."""
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    probe = Chat([{"role": "user", "content": "asked"}, {"role": "assistant", "content": ANSWER}])
    try:
        tail = _render(tokenizer, probe, 2).rpartition(ANSWER)[2]
    except _RefusedError:  # it wants other turns
        return sorted(ends)
    added = set(tokenizer.added_tokens_decoder)
    after = [token for token in tokenizer(tail, add_special_tokens=False)["input_ids"] if token in added]
    return sorted({*ends, *after[:1]})
