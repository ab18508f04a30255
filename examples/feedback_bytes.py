"""What feedback of each structure keeps for a torchvision model under dfa, before any of it is made.

python examples/feedback_bytes.py [model]
"""

from __future__ import annotations

import sys

import torch
import torchvision

import rewire
from rewire.structures import NAMES


def main(name: str = "resnet50") -> None:
    """Print one line per structure: bytes kept, and that as a share of the parameters' bytes."""
    image = torch.randn(1, 3, 224, 224)
    model = torchvision.models.get_model(name)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{name}: parameters {parameters / 1e6:.1f} MB")
    for feedback in NAMES:
        kept = rewire.summary(rewire.convert(model, "dfa", feedback=feedback), image).feedback_bytes
        print(f"{feedback:11}{kept / 1e6:12.1f} MB{kept / parameters:14.1%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
