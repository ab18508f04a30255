"""The plain training loop of an existing model, plus one line.

    python examples/convert_your_model.py [rule]

Trains a small CNN on scikit-learn's handwritten digits and prints the summary and the test accuracy.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import rewire


def main(rule: str = "dfa") -> float:
    """Train under ``rule``; returns the test accuracy."""
    torch.manual_seed(0)
    digits = load_digits()
    split = train_test_split(digits.images / 16, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    x, x_test, y, y_test = (torch.as_tensor(part) for part in split)
    x, x_test = x.float().unsqueeze(1), x_test.float().unsqueeze(1)

    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    rewire.convert(model, rule)  # the one line; nothing below knows of it

    for _ in range(10):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()

    with torch.no_grad():
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    print(rewire.summary(model))
    print(f"{rule}: {accuracy:.1%} of the test images")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:2])
