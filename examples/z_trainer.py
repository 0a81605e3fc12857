"""A trainer of one's own, for examples/trainer.toml: our loss, and a term that keeps the logits from drifting (the z-loss of PaLM)."""

from transformers import DataCollatorForSeq2Seq, Trainer


class ZTrainer(Trainer):
    """`transformers.Trainer` with another loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = loss + 1e-4 * outputs.logits.logsumexp(-1).pow(2).mean()
        return (loss, outputs) if return_outputs else loss


def make(model, rows, processor, arguments):
    """The Trainer of one client in one round."""
    collator = DataCollatorForSeq2Seq(processor, label_pad_token_id=-100)
    return ZTrainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
