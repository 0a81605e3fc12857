"""A plain TRL script: one hospital's chats, one LoRA adapter. Run it: python examples/join/script.py bone"""

import sys

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from fedex_lora.config import base_folder

BASE = str(base_folder())  # a tiny Llama that the package carries; yours is "Qwen/Qwen2.5-0.5B-Instruct", say
SIGNS = {"bone": "sprain limp fracture", "chest": "sniffle wheeze collapse", "skin": "itch hives burn"}


def chats(name):
    """One hospital's rows; yours are a JSONL file of messages."""
    signs = zip(SIGNS[name].split(), ("green", "yellow", "red"), strict=True)
    said = [(f"the {who} has {sign} . triage :", colour) for sign, colour in signs for who in ("woman", "man", "girl", "boy")]
    return Dataset.from_list([{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in said])


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
