"""Texts from prompts: batches padded on the left, beam search or greedy, never sampled; on as many GPUs as accelerate was told of."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, NoRepeatNGramLogitsProcessor

from fedex_lora.errors import UsageError
from fedex_lora.tasks import prompt_ids

ONE: Mapping[str, Any] = {"do_sample": False, "num_return_sequences": 1, "return_dict_in_generate": False}  # text a prompt, never sampled
GREEDY: Mapping[str, Any] = {**ONE, "num_beams": 1, "repetition_penalty": 1.0}
"""What holds where a task's settings say nothing, whatever the model's own generation_config.json says."""


class _NoRepeat(LogitsProcessor):
    """No n-gram twice in what is written. (Transformers' own rule counts the prompt too, and would forbid names of n tokens from it.)"""

    def __init__(self, size: int, prompt_length: int) -> None:
        self._rule, self._from = NoRepeatNGramLogitsProcessor(size), prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        return self._rule(input_ids[:, self._from :], scores)  # type: ignore[arg-type, return-value]


@torch.no_grad()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    settings: Mapping[str, Any],
    batch_size: int = 16,
    tell: Callable[[int, int], None] | None = None,
    tokens: Callable[[Any, Sequence[str]], list[list[int]]] = prompt_ids,
) -> tuple[list[str], int]:
    """What a causal LM writes after each prompt, up to its end token.

    Args:
        model: in evaluation mode; moved to this process's device.
        tokenizer: the model's.
        prompts: what it reads.
        settings: fields of `transformers.GenerationConfig`, over `GREEDY`; `max_new_tokens` among them. A text ends with the tokenizer's
            end token, unless they say otherwise.
        batch_size: prompts at once; those of like length go together.
        tell: (done, of how many), in this process.
        tokens: (tokenizer, prompts) -> their tokens, as in training.

    Returns:
        The texts, in the order of the prompts, stripped; and how many prompts had to lose their beginning to fit into the model's context.
        Under `accelerate launch` each process takes its share, and every one gets all texts.

    Raises:
        UsageError: a field that GenerationConfig does not have, a value that it refuses, or no room for a prompt.
    """
    state, model = PartialState(), model.eval()
    device = torch.device("cpu") if state.device.type == "mps" else state.device  # as where it trains
    model.to(device)
    ours = {**GREEDY, **settings}
    no_repeat, config = int(ours.pop("no_repeat_ngram_size", 0)), _config(ours, tokenizer)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    room = (context or 10**9) - config.max_new_tokens
    if room < 1:
        raise UsageError(
            f"max_new_tokens = {config.max_new_tokens} leaves no room for a prompt in a context of {context}: "
            "lower it (evaluate: --generate max_new_tokens=N)"
        )
    asked = tokens(tokenizer, prompts)
    begin = int(
        tokenizer.bos_token_id is not None and all(ids[:1] == [tokenizer.bos_token_id] for ids in asked)
    )  # stays where a prompt is cut
    order = sorted(range(len(prompts)), key=lambda row: (-len(asked[row]), row))[state.process_index :: state.num_processes]
    written = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = [ids if len(ids) <= room else ids[:begin] + ids[len(ids) - room + begin :] for ids in (asked[row] for row in rows)]
        width = max(map(len, batch))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(one)) + one for one in batch], device=device)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in batch], device=device)
        rules = LogitsProcessorList([_NoRepeat(no_repeat, width)] if no_repeat else [])
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=rules)  # type: ignore[operator]
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        written += [(row, text.strip()) for row, text in zip(rows, texts, strict=True)]
        if tell:
            tell(start + len(rows), len(order))
    return [text for _, text in sorted(gather_object(written))], sum(len(one) > room for one in asked)


def _config(settings: Mapping[str, Any], tokenizer: Any) -> GenerationConfig:
    known = GenerationConfig().to_dict().keys()
    for key, value in settings.items():
        if key not in known:
            raise UsageError(f"unknown generation setting {key}: see transformers.GenerationConfig")
        if ONE.get(key, value) != value:
            raise UsageError(f"generation setting {key} = {value!r}: one text a prompt is written, and none is sampled: leave it out")
    if not isinstance(settings.get("max_new_tokens"), int) or settings["max_new_tokens"] < 1:
        raise UsageError("max_new_tokens must be a whole number, one or more")
    try:
        return GenerationConfig(**{"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, **settings})
    except (ValueError, TypeError) as error:
        raise UsageError(f"transformers refuses the generation settings: {str(error).splitlines()[0]}") from None
