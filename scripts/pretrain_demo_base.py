"""Make the tiny base model of `fedex-lora demo` again: a Llama of under a million parameters that has read triage notes.

    python scripts/pretrain_demo_base.py OUT [--steps 1000]

The text is notes of the demo, in which the colour after "triage :" is random, so that the base knows the language and nothing
about triage. Takes about two minutes on two cores; the same seed gives the same file on one machine.
"""

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler, set_seed

from fedex_lora.tasks.demo import COLOURS, WARDS, note, vocabulary

CONFIG = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

CHAT = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + ' ' + message['content'] + ' triage :' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('there are user and assistant turns only') }}{% endif %}{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(vocabulary())}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words["<s>"])])
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="right", chat_template=CHAT, **marks)


def pretraining_text(rng: random.Random) -> str:
    """One document for the base: a note, and a colour that means nothing."""
    text, _ = note(rng, rng.choice(list(WARDS)))
    return f"{text} triage : {rng.choice(COLOURS)}"


def main(out: Path, steps: int, seed: int = 0) -> None:
    set_seed(seed)
    rng = random.Random(seed)
    encode = tokenizer()
    ids = {"pad_token_id": encode.pad_token_id, "bos_token_id": encode.bos_token_id, "eos_token_id": encode.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(encode), **ids, **CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    for step in range(steps):
        batch = encode([pretraining_text(rng) for _ in range(64)], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)
    model.save_pretrained(out)
    encode.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    main(arguments.out, arguments.steps)
