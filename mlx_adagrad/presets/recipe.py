"""How a preset remembers the call that made it, so that its config can be written as JSON and read back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx

from .. import schedules
from ..adagrad import Adagrad
from ..checks import bound, shown
from ..groups import RULE_KEYS, Groups, listed
from ..trees import present
from ..wrappers import config as wrapper_configs

P = ParamSpec("P")
Made = TypeVar("Made", bound=Any)

RATE_KEYS = ("learning_rate", "lr")
PRESETS: dict[str, Callable[..., Any]] = {}


@dataclass(frozen=True)
class Recipe:
    """The name of a preset, the arguments that it was called with, and whether its framework refuses a call in which
    no parameter has a gradient.
    """

    name: str
    arguments: dict[str, Any]
    needs_gradient: bool = False

    def is_idle(self, gradients: Any) -> bool:
        """Whether a call does not even count.

        Raises:
            ValueError: If there are gradients, all of them absent, and the framework refuses that.
        """
        if not self.needs_gradient or next(present(gradients), None) is not None:
            return False
        if gradients:
            raise ValueError(f"[{self.name}] no parameter has a gradient.")
        return True

    def config(self, optimizer: Any) -> dict[str, Any]:
        """:meth:`entries` in the types of JSON.

        Raises:
            TypeError: If a function is among them.
        """
        return {key: _entry(self.name, key, value) for key, value in self.entries(optimizer).items()}

    def entries(self, optimizer: Any) -> dict[str, Any]:
        """``{"preset": name, argument: value, ...}`` with learning rates and groups as they are in ``optimizer``."""
        adagrad = innermost(optimizer)
        entries = {"preset": self.name} | self.arguments
        for key in entries:
            if key in RATE_KEYS:
                schedule = adagrad._schedulers.get("learning_rate")
                entries[key] = _rate(schedule, adagrad.learning_rate, entries[key])
        if "groups" in entries or adagrad.groups.groups:
            entries["groups"] = _groups(adagrad, self.arguments.get("groups") or []) or None
        return entries


def preset(build: Callable[P, Made], *, needs_gradient: bool = False) -> Callable[P, Made]:
    """Make ``build`` a preset: what it returns can tell its config, and :func:`from_config` finds it by name."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def make(*args: P.args, **kwargs: P.kwargs) -> Made:
        given = bound(f"presets.{build.__name__}", signature, args, kwargs)
        if given.arguments.get("groups") is not None:
            given.arguments["groups"] = listed(f"presets.{build.__name__}", given.arguments["groups"])
        optimizer = build(*given.args, **given.kwargs)
        optimizer._recipe = Recipe(build.__name__, dict(given.arguments), needs_gradient)
        return optimizer

    PRESETS[build.__name__] = make
    return make


def from_config(config: Mapping[str, Any]) -> Any:
    """The optimizer that ``get_config()`` described, without its state.

    Args:
        config: ``{"preset": name, ...}`` with arguments of that preset; what is missing takes its default. For a
            wrapper around it ``{"wrapper": name, ..., "optimizer": config}``.

    Raises:
        ValueError: If there is no such preset, it has no such argument, or a value is refused by it.
        TypeError: If a value has a wrong type.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"[presets] a config must be a dict but got {shown(config)}.")
    if "wrapper" in config:
        return wrapper_configs.wrapper_of(config, from_config)
    name, arguments = config.get("preset"), {key: value for key, value in config.items() if key != "preset"}
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"[presets] there is no preset {shown(name)}, only {', '.join(sorted(PRESETS))}.")
    known = inspect.signature(PRESETS[name]).parameters
    groups = [_revived(group) for group in listed(f"presets.{name}", arguments.pop("groups", None) or [])]
    for key in arguments:
        if key not in known:
            raise ValueError(f"[presets] {name} does not know {key!r}.")
    if "groups" in known:
        return PRESETS[name](**_revived(arguments), groups=groups or None)
    optimizer = PRESETS[name](**_revived(arguments))
    for group in groups:
        optimizer.add_group(group)
    return optimizer


def innermost(optimizer: Any) -> Adagrad:
    """The :class:`~mlx_adagrad.Adagrad` inside the wrappers."""
    while not isinstance(optimizer, Adagrad):
        optimizer = optimizer.optimizer
    return optimizer


def _revived(arguments: Any) -> Any:
    """``arguments`` with schedules and constraints in place of their configs; presets read Keras's by themselves."""
    if not isinstance(arguments, Mapping):
        return arguments
    revived = dict(arguments)
    for key, value in arguments.items():
        if key in RATE_KEYS and isinstance(value, Mapping) and "class_name" not in value:
            revived[key] = schedules.from_config(value)
        elif key == "constraints" and isinstance(value, Mapping):
            revived[key] = wrapper_configs.constraints(value)
    return revived


def _rate(schedule: Any, rate: mx.array, given: Any = None) -> Any:
    """The schedule, or the number that was given, or else the shortest one, that is this fp32."""
    if schedule is not None:
        return schedule.given
    number = rate.item()
    candidates = [float(given)] if isinstance(given, Real) else []
    candidates += [float(f"{number:.{digits}g}") for digits in range(1, 10)]
    return next((c for c in candidates if mx.array(c, mx.float32).item() == number), number)


def _groups(adagrad: Adagrad, given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    entries = adagrad.groups.states(adagrad.state)
    rates = [group.get("lr") for group in given] + [None] * len(entries)  # those added since come last
    return [_group(adagrad.groups, i, entry, rates[i]) for i, entry in enumerate(entries)]


def _group(groups: Groups, index: int, state: dict[str, Any], given: Any) -> dict[str, Any]:
    group, default = groups.groups[index], groups.default
    entry: dict[str, Any] = {"params": group.patterns}
    if group.lr is not None:
        entry["lr"] = _rate(group.lr if callable(group.lr) else None, state["learning_rate"], given)
    return entry | {k: getattr(group.rule, k) for k in RULE_KEYS if getattr(group.rule, k) != getattr(default, k)}


def _entry(owner: str, key: str, value: Any) -> Any:
    """An argument for JSON."""
    if key in RATE_KEYS:
        return value if isinstance(value, float) else schedules.get_config(value)
    if key == "groups" and value:
        return [{k: _entry(f"{owner} groups[{i}]", k, v) for k, v in group.items()} for i, group in enumerate(value)]
    return wrapper_configs.entry(owner, key, value)
