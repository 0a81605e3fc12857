"""A plain TRL script: one hospital's chats, one LoRA adapter. Run it: python examples/join/script.py bone"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from fedex_lora.config import base_folder

BASE = str(base_folder())  # a tiny Llama that the package carries: yours is "Qwen/Qwen2.5-0.5B-Instruct", say
CHATS = Path(__file__).parents[1] / "notes" / "train.jsonl"


def chats(name):
    """The rows of one hospital, as messages."""
    notes = [note for note in map(json.loads, CHATS.read_text().splitlines()) if note["hospital"] == name]
    roles = {"user": "note", "assistant": "colour"}
    return Dataset.from_list([{"messages": [{"role": role, "content": note[key]} for role, key in roles.items()]} for note in notes])


def prepare(name):
    """The model of one hospital, and what trains it."""
    set_seed(0)  # all begin with the same adapter
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokenizer, rows = AutoTokenizer.from_pretrained(BASE), chats(name)
    tokenizer.chat_template = tokenizer.chat_template or "{% for message in messages %}{{ message.content + ' ' }}{% endfor %}"

    def train(round=1):
        set_seed(round)
        arguments = SFTConfig(f"trained/{name}", max_steps=10, learning_rate=1e-2, bf16=False, save_strategy="no", report_to="none")
        trainer = SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        return len(rows)

    return model, train


if __name__ == "__main__":
    model, train = prepare(sys.argv[1])
    train()
    model.save_pretrained(f"trained/{sys.argv[1]}")
