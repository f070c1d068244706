"""Hands the state of an optimizer on to other frameworks, or says what they have no place for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.optimizers import Optimizer

from ..update.accumulators import RowWise, dense_v
from ..update.rule import Rule
from ..wrappers import SkipNonFinite
from . import trees
from .foreign import Names, match
from .install import Live

EVERYWHERE = {"eps_inside_sqrt": False, "update_accumulator": True, "decoupled_weight_decay": False}


class Part(NamedTuple):
    """One parameter's state as another framework has it."""

    key: Any
    v: mx.array
    step: mx.array
    group: int | None


def parts(
    optimizer: Optimizer, names: Names | None, framework: str, required: Mapping[str, Any]
) -> tuple[Live, list[Part]]:
    """The state by parameter, in the order of ``names`` if given; ``required``: what a rule must be to be theirs.

    Raises:
        ValueError: If there is no state, or the framework has no place for it.
    """
    live = Live(optimizer)
    if not live.slots:
        raise ValueError(f"[checkpoint] there is no state to export to {framework} yet.")
    rules = [live.adagrad.rule, *(group.rule for group in live.adagrad.groups.groups)]
    refused = [*_foreign_options(rules, {**EVERYWHERE, **required}), *_foreign_state(live)]
    if refused:
        raise ValueError(f"[checkpoint] the Adagrad of {framework} has no {', no '.join(dict.fromkeys(refused))}.")
    theirs = list(live.slots if names is None else names if isinstance(names, Mapping) else range(len(names)))
    return live, [_part(live, path, *where) for path, where in match(theirs, live.slots, names).items()]


def _foreign_options(rules: Iterable[Rule], required: Mapping[str, Any]) -> Iterable[str]:
    for rule in rules:
        for option, value in required.items():
            harmless = option == "decoupled_weight_decay" and rule.weight_decay == 0
            if getattr(rule, option) != value and not harmless:
                yield f"{option}={getattr(rule, option)}"


def _foreign_state(live: Live) -> Iterable[str]:
    if live.adagrad.groups.decays is not None:
        yield "weight_decay_mask"
    if isinstance(live.adagrad.accumulator, RowWise):
        yield f"{live.adagrad.accumulator}"
    for wrapper in live.wrappers:
        if wrapper.state[trees.OWN] and not isinstance(wrapper, SkipNonFinite):
            yield type(wrapper).__name__


def _part(live: Live, path: str, key: Any, axes: tuple[int, ...] | None) -> Part:
    state = live.slots[path].state
    v, step = dense_v(state), state.get("step", live.adagrad.step)
    if live.adagrad.accumulator.is_random(v):  # elsewhere it would be rounded to nearest, and stand still
        v = v.astype(mx.float32)
    if axes is not None:  # from our order back to theirs
        with mx.stream(mx.cpu):
            v = mx.transpose(v, sorted(range(len(axes)), key=lambda axis: axes[axis]))
    return Part(key, v, step, live.group(path))
