"""The gradient of a convolution's weight alone: PyTorch's own kernel, and what a layer under a direct rule runs.

    python benchmarks/weight_gradients.py
    python benchmarks/weight_gradients.py --batch 128

Layers of ResNets and MobileNetV2 for images of 64² and 224² pixels. Both run in turns; the figure is the median over
turns of the ratio within a turn, with the quartiles behind it. Where rewire/kernels.py leaves PyTorch's kernel as it is
there is nothing to time.
"""

from __future__ import annotations

import argparse

import torch
from machine import machine, one_line
from paired import paired
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from rewire.kernels import choose

# Input and output channels, kernel, stride, height and width of the input, groups.
LAYERS = [
    (64, 64, 3, 1, 16, 1),
    (256, 512, 3, 2, 4, 1),
    (512, 512, 3, 1, 2, 1),
    (512, 512, 3, 1, 7, 1),
    (24, 144, 1, 1, 16, 1),
    (192, 32, 1, 1, 8, 1),
    (384, 64, 1, 1, 4, 1),
    (160, 960, 1, 1, 2, 1),
    (320, 1280, 1, 1, 7, 1),
    (256, 64, 1, 1, 56, 1),
    (128, 512, 1, 1, 28, 1),
    (1024, 256, 1, 1, 14, 1),
    (144, 144, 3, 1, 16, 144),
    (960, 960, 3, 1, 2, 960),
    (960, 960, 3, 1, 7, 960),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=2.0, help="of measuring each (default 2)")
    parser.add_argument("--quick", action="store_true", help="four layers, a fifth of a second each")
    options = parser.parse_args()
    seconds, layers = (0.2, LAYERS[1:5]) if options.quick else (options.seconds, LAYERS)
    table = Table(title=f"gradient of the weight alone, batch {options.batch}")
    for column in ("layer", "input", "made", "PyTorch's, ms", "made / PyTorch's"):
        table.add_column(column, justify="left" if column in ("layer", "made") else "right")
    torch.manual_seed(0)
    for inputs, outputs, kernel, stride, size, groups in layers:
        module = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        x = torch.randn(options.batch, inputs, size, size)
        how = choose(module, x)
        delta = torch.randn_like(module(x).detach())
        shape, geometry = module.weight.shape, (module.stride, module.padding)

        def usual(x=x, delta=delta, shape=shape, geometry=geometry, groups=groups) -> Tensor:
            return conv2d_weight(x, shape, delta, *geometry, 1, groups)

        def ours(x=x, delta=delta, shape=shape, geometry=geometry, how=how) -> Tensor:
            return how(delta, x, shape, *geometry)

        cells = ["as it is", "", ""]
        if how is not None:
            torch.testing.assert_close(ours(), usual(), rtol=1e-3, atol=1e-2)
            found = paired({"ours": ours}, usual, seconds)
            low, median, high = found["contenders"]["ours"]["ratio"]
            milliseconds = f"{found['reference_seconds'] * 1e3:.2f}"
            cells = [how.__name__.replace("_", " "), milliseconds, f"{median:.2f} [{low:.2f} {high:.2f}]"]
        each = " each" if groups > 1 else ""
        title = f"{inputs} → {outputs}, {kernel}×{kernel}{each}" + (f", stride {stride}" if stride > 1 else "")
        table.add_row(*map(escape, (title, f"{size}²", *cells)))
    console = Console(width=120)
    console.print(table)
    console.print(one_line(machine("cpu")), highlight=False)


if __name__ == "__main__":
    main()
