"""Direct rules: the output error is projected straight to each layer's input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rewire.errors import PassError
from rewire.rules.base import DirectRule, register_rule
from rewire.targets import current_targets


@register_rule("dfa")
class DFA(DirectRule):
    """Direct feedback alignment: ``B e``."""

    source = "Nøkland 2016, arXiv:1609.01596"

    def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        return error


@register_rule("sdfa")
class SDFA(DirectRule):
    """Sign-quantised direct feedback alignment: ``B sign(e)``."""

    source = "Frenkel et al. 2019, arXiv:1909.01311"

    def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        return torch.sign(error)


@register_rule("drtp")
class DRTP(DirectRule):
    """Direct random target projection: ``B y*``, y* being the one-hot target.

    The published update moves a hidden layer along ``-B y*``; with the feedback handed back as a gradient
    the sign is a matter of B, whose distribution is symmetric.
    """

    source = "Frenkel et al. 2019, arXiv:1909.01311"
    needs_targets = True

    def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        return _targets_from_sign(error, axis) if targets is None else _as_errors(targets, error, axis)

    def in_graph(self) -> DirectRule | None:
        # A rule that is derived from this one has a signal of its own.
        return _InGraph(layout=self.layout, feedback=self.feedback) if type(self) is DRTP else super().in_graph()


class _InGraph(DRTP):
    """:class:`DRTP` in a compiled graph, where targets come from :func:`given_in_graph`."""

    def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        return _operations()[1](error, targets, axis)


def given_in_graph(y: Tensor, axis: int) -> Tensor:
    """An operation of a graph: y*, of the output's shape, if targets are given when the graph runs; else NaNs.

    Args:
        axis: the dimension of y with the n output features.
    """
    return _operations()[0](y.detach(), axis)


@functools.cache
def _operations() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """What looks at targets, and at numbers, each as one operation of PyTorch's."""

    def given(y: Tensor, axis: int) -> Tensor:
        targets = current_targets()
        none = torch.full_like(y, torch.nan)
        return none if targets is None else none.copy_(_as_errors(targets, y, axis))

    def signal(error: Tensor, given: Tensor, axis: int) -> Tensor:
        is_given = given.numel() > 0 and not bool(given.flatten()[0].isnan())
        found = given if is_given else _targets_from_sign(error, axis)
        return torch.empty_like(error).copy_(found)

    made: list[Any] = [
        torch.library.custom_op("rewire::given_targets", given, mutates_args=()),
        torch.library.custom_op("rewire::target_signal", signal, mutates_args=()),
    ]
    for operation in made:
        operation.register_fake(lambda like, *_: torch.empty_like(like))
    return made[0], made[1]


def _as_errors(targets: Tensor, error: Tensor, axis: int) -> Tensor:
    """y*, of the shape and dtype of the output error."""
    if targets.is_floating_point() and targets.shape == error.shape:
        return targets.to(error.dtype)
    classes = error.shape[axis]
    expected = tuple(n for i, n in enumerate(error.shape) if i != axis % error.dim())
    if targets.is_floating_point() or targets.numel() != error.numel() // classes:
        raise PassError(
            f"drtp: targets of shape {tuple(targets.shape)} and dtype {targets.dtype} do not fit the output "
            f"error of shape {tuple(error.shape)}: give class indices of shape {expected}, or floating "
            f"targets of shape {tuple(error.shape)}"
        )
    index = targets.reshape(expected)
    if not _transforming() and int(index.max()) >= classes:
        raise PassError(f"drtp: target {int(index.max())} is out of range for {classes} outputs")
    numbers = torch.arange(classes, device=error.device)
    # A negative index (the usual ignore_index) equals no class: that row has no target.
    return (index.unsqueeze(-1) == numbers).movedim(-1, axis).to(error.dtype)


def _transforming() -> bool:
    """Inside a ``torch.func`` transform values cannot be looked at."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


def _targets_from_sign(error: Tensor, axis: int) -> Tensor:
    """One-hot targets read off a softmax cross-entropy error, ``e = w (softmax(y) - y*)``, w being a sample's weight.

    Such an error has one negative entry in each row, and rows sum to zero; what has not is refused. Of samples that are
    known well little is left but rounding errors, of the size of eps w: rows count by their size, and where
    softmax(y) is 1 in the target, e is 0 in that place alone.
    """
    if _transforming():
        raise PassError("drtp under torch.func transforms needs its targets: use `with rewire.targets(y):` inside")
    if not bool(error.isfinite().all()):
        raise PassError("drtp: the output error is not finite, so the targets cannot be read off its sign")
    negative, zero = error < 0, error == 0
    classes, eps = error.shape[axis], torch.finfo(error.dtype).eps
    shown = negative.sum(axis, keepdim=True)
    size, off = error.abs().amax(axis).float(), error.sum(axis).abs().float()
    balanced = off.sum() <= max(0.1, 8 * eps * classes) * size.sum() + 4 * eps * off.numel()
    if classes < 2 or not bool(((shown <= 1).all()) & balanced):
        raise PassError(
            "drtp projects the targets, and this loss does not show them: wrap the forward in "
            "`with rewire.targets(y):`, or use a softmax cross-entropy loss with one-hot targets, whose "
            "output error tells them by its sign"
        )
    surest = zero & (shown == 0) & (zero.sum(axis, keepdim=True) == 1)
    return (negative | surest).to(error.dtype)


@register_rule("shallow")
class Shallow(DirectRule):
    """Control: nothing is handed back, so only layers the loss sees directly are trained."""

    silent = True

    def signal(self, error: Tensor, targets: Tensor | None, axis: int) -> Tensor:
        return torch.zeros_like(error)
