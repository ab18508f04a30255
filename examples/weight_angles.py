"""Learned local feedback comes to resemble the weight: angles between W and B after training an MLP on digits.

python examples/weight_angles.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

import rewire

RULES = ("fa", "kp", "wm", "ldfa", "pfa", "pfa(expand=1, orthogonal=True)")


def train(rule: str, epochs: int = 30, weight_decay: float = 0.01) -> tuple[nn.Module, float]:
    """An MLP 64-128-64-10 trained by momentum SGD; and its accuracy on every fifth digit."""
    images, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(classes)
    test = torch.arange(len(x)) % 5 == 0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    rewire.convert(model, rule)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    train_x, train_y = x[~test], y[~test]
    for _ in range(epochs):
        for batch in torch.randperm(len(train_x)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = (model(x[test]).argmax(1) == y[test]).float().mean()
    return model, float(right)


def angles(model: nn.Module) -> dict[str, float]:
    """Between W and B, in degrees, by layer name."""
    feedback = rewire.feedback(model)
    weights = {name: module.weight.detach() for name, module in model.named_modules() if name in feedback}
    cosines = {name: torch.cosine_similarity(W.flatten(), feedback[name].flatten(), 0) for name, W in weights.items()}
    return {name: float(torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))) for name, cosine in cosines.items()}


def main() -> None:
    """A line for each rule."""
    for rule in RULES:
        model, accuracy = train(rule)
        shown = "  ".join(f"{name}: {angle:4.1f}" for name, angle in angles(model).items())
        print(f"{rule:32} accuracy {accuracy:.3f}   degrees between W and B  {shown}")


if __name__ == "__main__":
    main()
