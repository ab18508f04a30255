"""Do several CUDA streams help when layers' weight gradients do not wait for each other?

    python benchmarks/streams.py

Under a direct rule every layer's δ is known once e is, so the products δᵀx of all layers could run at a time. Here they
are issued to one stream, and spread over several, for layers of several widths; the figure is the ratio, median over
turns. Without a GPU there is nothing to measure, and this says so.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from paired import cuda_clock


def products(width: int, batch: int, layers: int, streams: int) -> float:
    """Seconds for one weight gradient of each layer issued to ``streams`` streams: the quickest of a few."""
    xs = [torch.randn(batch, width, device="cuda") for _ in range(layers)]
    deltas = [torch.randn(batch, width, device="cuda") for _ in range(layers)]
    outs = [torch.empty(width, width, device="cuda") for _ in range(layers)]
    several = [torch.cuda.Stream() for _ in range(streams)]

    def issue() -> None:
        main = torch.cuda.current_stream()
        for stream in several:
            stream.wait_stream(main)
        for number, (x, delta, out) in enumerate(zip(xs, deltas, outs, strict=True)):
            with torch.cuda.stream(several[number % streams]):
                torch.mm(delta.t(), x, out=out)
        for stream in several:
            main.wait_stream(stream)

    for _ in range(3):
        issue()
    return min(cuda_clock(issue) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 512, 2048, 8192])
    parser.add_argument("--streams", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="two widths, few turns")
    options = parser.parse_args()
    if options.quick:
        options.widths, options.turns = options.widths[:2], 3
    if not torch.cuda.is_available():
        print(f"no GPU here, so no streams to measure (torch {torch.__version__})")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"{options.layers} layers, batch {options.batch}: time on several streams / time on one")
    for width in options.widths:
        cells = []
        for streams in options.streams:
            ratios = []
            for _ in range(options.turns):
                one = products(width, options.batch, options.layers, 1)
                ratios.append(products(width, options.batch, options.layers, streams) / one)
            cells.append(f"{streams} streams {statistics.median(ratios):.2f}")
        print(f"  width {width:5}: {', '.join(cells)}")


if __name__ == "__main__":
    main()
