"""Handwritten digits under direct feedback alignment with Lightning. The line that is new is marked.

python examples/train_lightning.py
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rewire


class Digits(lightning.LightningModule):
    def __init__(self, rule: str) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
        rewire.convert(self.model, rule)  # new

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(rule: str = "dfa", epochs: int = 8) -> float:
    lightning.seed_everything(0, verbose=False)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    loader, module = DataLoader(TensorDataset(x[:1400], y[:1400]), batch_size=32, shuffle=True), Digits(rule)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(max_epochs=epochs, accelerator="cpu", gradient_clip_val=1.0, **quiet).fit(module, loader)
    return (module.model(x[1400:]).argmax(1) == y[1400:]).float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main():.1%}")
