"""torch's ReduceLROnPlateau: an object beside the optimizer, since it goes by a metric that only the loop knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from mlx.optimizers import MultiOptimizer, Optimizer

from .. import checks
from ..checks import shown

# what changes from one call of `step` to the next, by torch's names
COUNTERS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


class _Rate(NamedTuple):
    """A learning rate of an optimizer: of what is in no group, or of one of its groups."""

    get: Callable[[], Any]
    set: Callable[[float], None]


class ReduceLROnPlateau:
    """torch's ReduceLROnPlateau: multiplies the learning rates by ``factor`` once a metric has stopped improving.

    Call :meth:`step` with the metric after each epoch. It lowers the optimizer's learning rate and that of every group
    that has one, and does so in the optimizer's state, so that a compiled step takes it up.

    Args:
        optimizer: Any ``mlx.optimizers.Optimizer``, wrapped or not, whose learning rates are numbers and not schedules.
        mode: ``"min"`` for a metric that is to fall, ``"max"`` for one that is to rise. Default: ``"min"``.
        factor: What rates are multiplied by, >= 0 and < 1. Default: ``0.1``.
        patience: How many epochs without improvement are allowed, >= 0. Default: ``10``.
        threshold: The least improvement that counts, >= 0. Default: ``1e-4``.
        threshold_mode: ``"rel"`` for a fraction of the best metric, ``"abs"`` for a difference. Default: ``"rel"``.
        cooldown: Epochs after a reduction in which none is counted as bad, >= 0. Default: ``0``.
        min_lr: The lowest rate, >= 0, or a list with one for the optimizer's rate and each group's. Default: ``0``.
        eps: A reduction by no more than this is left out, >= 0. Default: ``1e-8``.

    Raises:
        ValueError: For a value out of range, or a list of the wrong length.
        TypeError: For a wrong type, and for an optimizer with a schedule, which would overwrite the rate.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: str = "rel",
        cooldown: int = 0,
        min_lr: float | Iterable[float] = 0.0,
        eps: float = 1e-8,
    ):
        owner = "ReduceLROnPlateau"
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"[{owner}] 'optimizer' must be an mlx.optimizers.Optimizer but got {shown(optimizer)}.")
        self.mode = checks.one_of(owner, "mode", mode, ("min", "max"))
        self.factor = checks.non_negative(owner, "factor", factor)
        if self.factor >= 1:
            raise ValueError(f"[{owner}] 'factor' must be below 1 but got {self.factor}.")
        self.patience = checks.natural(owner, "patience", patience)
        self.threshold = checks.non_negative(owner, "threshold", threshold)
        self.threshold_mode = checks.one_of(owner, "threshold_mode", threshold_mode, ("rel", "abs"))
        self.cooldown = checks.natural(owner, "cooldown", cooldown)
        self.eps = checks.non_negative(owner, "eps", eps)
        self.optimizer = optimizer
        lowest = list(min_lr) if isinstance(min_lr, Iterable) else [min_lr]
        self.min_lr = [checks.non_negative(owner, "min_lr", rate) for rate in lowest]
        rates = len(_rates(optimizer))
        if isinstance(min_lr, Iterable) and len(lowest) != rates:
            raise ValueError(f"[{owner}] 'min_lr' must be a number or a list of {rates} but got {len(lowest)}.")
        self.best = math.inf if mode == "min" else -math.inf
        self.num_bad_epochs = self.cooldown_counter = self.last_epoch = 0

    def step(self, metrics: Any) -> None:
        """Take note of the metric of an epoch, a number or a one-element array, and lower the rates if it is time."""
        current = checks.real("ReduceLROnPlateau", "metrics", metrics)
        rates = _rates(self.optimizer)  # may raise, so before anything changes
        self.last_epoch += 1
        better = self._is_better(current)
        self.best = current if better else self.best
        self.num_bad_epochs = 0 if better else self.num_bad_epochs + 1
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
            self.num_bad_epochs = 0
        if self.num_bad_epochs > self.patience:
            self._reduce(rates)
            self.cooldown_counter, self.num_bad_epochs = self.cooldown, 0

    def _is_better(self, current: float) -> bool:
        margin = self.threshold if self.threshold_mode == "abs" else self.threshold * self.best
        margin = margin if math.isfinite(self.best) else 0.0  # before the first metric
        return current < self.best - margin if self.mode == "min" else current > self.best + margin

    def _reduce(self, rates: list[_Rate]) -> None:
        lowest = self.min_lr * len(rates) if len(self.min_lr) == 1 else self.min_lr
        if len(lowest) != len(rates):
            wanted = f"one for each of the {len(rates)} rates that there are now"
            raise ValueError(f"[ReduceLROnPlateau] 'min_lr' must have {wanted} but has {len(lowest)}.")
        for rate, least in zip(rates, lowest, strict=True):
            old = float(rate.get().item())
            new = max(old * self.factor, least)
            if old - new > self.eps:
                rate.set(new)

    def state_dict(self) -> dict[str, Any]:
        """What changes from epoch to epoch, and the options, in the types of JSON and by torch's names."""
        options = ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "eps")
        return {key: getattr(self, key) for key in (*COUNTERS, *options)} | {"min_lrs": list(self.min_lr)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a :meth:`state_dict`, torch's too; the options stay as they are here.

        Raises:
            ValueError: If a counter is missing or negative. Nothing has changed then.
            TypeError: If one is no number. Nothing has changed then.
        """
        owner = "ReduceLROnPlateau"
        missing = [key for key in COUNTERS if key not in state_dict]
        if missing:
            raise ValueError(f"[{owner}] the state_dict lacks {', '.join(map(repr, missing))}.")
        counters = {key: checks.natural(owner, key, state_dict[key]) for key in COUNTERS[1:]}
        vars(self).update({"best": checks.real(owner, "best", state_dict["best"])}, **counters)


def _rates(optimizer: Any) -> list[_Rate]:
    """The learning rates of an optimizer, as they can be read and set.

    Raises:
        TypeError: If one of them is a schedule.
    """
    if isinstance(optimizer, MultiOptimizer):
        return [rate for part in optimizer.optimizers for rate in _rates(part)]
    if isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        return _rates(optimizer.optimizer)
    groups = optimizer.groups.groups if hasattr(optimizer, "groups") else []
    if "learning_rate" in optimizer._schedulers or any(callable(group.lr) for group in groups):
        why = "a schedule would overwrite what is set: give a number"
        raise TypeError(f"[ReduceLROnPlateau] the learning rate of the optimizer is a schedule; {why}.")
    own = _Rate(lambda: optimizer.learning_rate, lambda rate: setattr(optimizer, "learning_rate", rate))
    return [own, *(_group_rate(optimizer, i) for i, group in enumerate(groups) if group.lr is not None)]


def _group_rate(optimizer: Any, index: int) -> _Rate:
    entries = optimizer.groups.states(optimizer.state)
    return _Rate(lambda: entries[index]["learning_rate"], lambda rate: optimizer.set_group(index, lr=rate))
