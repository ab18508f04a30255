"""Handwritten digits under direct feedback alignment, in several processes. The line that is new is marked.

torchrun --standalone --nproc-per-node 2 examples/train_parallel.py [rule] [ddp or fsdp]
"""

import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rewire


def train(rule: str, how: str, epochs: int) -> None:
    torch.manual_seed(0)  # the same weights and batches on every rank
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    rewire.convert(model, rule)  # new
    trained = DistributedDataParallel(model) if how == "ddp" else fully_shard(model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(1400).split(32):
            mine = rows.chunk(dist.get_world_size())[dist.get_rank()]
            optimizer.zero_grad()
            nn.functional.cross_entropy(trained(x[mine]), y[mine]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (trained(x[1400:]).argmax(1) == y[1400:]).float().mean().item()
    if dist.get_rank() == 0:
        print(f"test accuracy {accuracy:.2%} on {dist.get_world_size()} processes")


def main(rule: str = "dfa", how: str = "ddp", epochs: int = 4) -> None:
    dist.init_process_group("gloo")
    train(rule, how, epochs)  # what it made is gone before the group is: DistributedDataParallel ends it without care
    dist.barrier()  # or a thread of gloo may still let go of a tensor while Python shuts down: an abort
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
