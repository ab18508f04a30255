"""How much memory tensors take at the worst moment."""

import gc
from collections.abc import Callable

import torch


def peak(run: Callable[[], object]) -> int:
    """The most bytes that tensors made in ``run`` held at one time, as PyTorch's allocator counts them."""
    gc.collect()  # what others left must not be let go in between
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    results = profile.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
