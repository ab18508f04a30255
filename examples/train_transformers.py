"""Counting words of a kind, by a small BERT under direct feedback alignment with transformers.Trainer.

The line that is new is marked.

    python examples/train_transformers.py
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import rewire


def main(rule: str = "dfa", epochs: int = 8) -> float:
    torch.manual_seed(0)
    tokens = torch.randint(2, 40, (1200, 8))
    labels = (tokens < 10).sum(1).clamp(max=3)  # how many of the eight words are among the first few
    rows = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=40, num_labels=4, **size))
    rewire.convert(model, rule)  # new
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=3e-3, use_cpu=True,
            save_strategy="no", report_to=[], disable_tqdm=True, logging_strategy="no", max_grad_norm=1.0,
        )  # fmt: skip
        trainer = Trainer(model, settings, train_dataset=rows[:1000])
        trainer.train()
        found = trainer.predict(rows[1000:])
    return float((found.predictions.argmax(1) == found.label_ids).mean())


if __name__ == "__main__":
    print(f"test accuracy {main():.1%}")
