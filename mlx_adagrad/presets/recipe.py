"""How a preset remembers the call that made it, so that its config can be written as JSON and read back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import mlx.core as mx

from .. import schedules
from ..adagrad import Adagrad
from ..groups import RULE_KEYS, Groups
from ..wrappers.constraint import NAMED
from ..wrappers.trees import present

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
        """``{"preset": name, argument: value, ...}`` with learning rates and groups as they are in ``optimizer``."""
        adagrad = innermost(optimizer)
        config: dict[str, Any] = {"preset": self.name}
        for key, value in self.arguments.items():
            if key in RATE_KEYS:
                schedule = adagrad._schedulers.get("learning_rate")
                config[key] = _rate(schedule, adagrad.learning_rate, value)
            elif key == "constraints" and value:
                config[key] = {_plain(self.name, key, p): _constraint(self.name, c) for p, c in value.items()}
            elif key != "groups":
                config[key] = _plain(self.name, key, value)
        if "groups" in self.arguments or adagrad.groups.groups:
            config["groups"] = _groups(adagrad) or None
        return config


def preset(build: Callable[P, Made], *, needs_gradient: bool = False) -> Callable[P, Made]:
    """Make ``build`` a preset: what it returns can tell its config, and :func:`from_config` finds it by name."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def make(*args: P.args, **kwargs: P.kwargs) -> Made:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        optimizer = build(*given.args, **given.kwargs)
        optimizer._recipe = Recipe(build.__name__, dict(given.arguments), needs_gradient)
        return optimizer

    PRESETS[build.__name__] = make
    return make


def from_config(config: Mapping[str, Any]) -> Any:
    """The optimizer that ``get_config()`` described, without its state.

    Args:
        config: ``{"preset": name, ...}`` with arguments of that preset; what is missing takes its default.

    Raises:
        ValueError: If there is no such preset, it has no such argument, or a value is refused by it.
        TypeError: If a value has a wrong type.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"[presets] a config must be a dict but got {config!r}.")
    name, arguments = config.get("preset"), {key: value for key, value in config.items() if key != "preset"}
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"[presets] there is no preset {name!r}, only {', '.join(sorted(PRESETS))}.")
    groups = arguments.pop("groups", None) or []
    for key in arguments:
        if key not in inspect.signature(PRESETS[name]).parameters:
            raise ValueError(f"[presets] {name} does not know {key!r}.")
    optimizer = PRESETS[name](**_revived(arguments))
    for group in groups:
        optimizer.add_group(_revived(group) if isinstance(group, Mapping) else group)
    return optimizer


def innermost(optimizer: Any) -> Adagrad:
    """The :class:`~mlx_adagrad.Adagrad` inside the wrappers."""
    while not isinstance(optimizer, Adagrad):
        optimizer = optimizer.optimizer
    return optimizer


def _revived(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` with schedules and constraints in place of their configs; presets read Keras's by themselves."""
    revived = dict(arguments)
    for key, value in arguments.items():
        if key in RATE_KEYS and isinstance(value, Mapping) and "class_name" not in value:
            revived[key] = schedules.from_config(value)
        elif key == "constraints" and isinstance(value, Mapping):
            revived[key] = {pattern: _revived_constraint(constraint) for pattern, constraint in value.items()}
    return revived


def _rate(schedule: Any, rate: mx.array, given: Any = None) -> Any:
    """A learning rate for JSON: the config of a schedule, or a number, as it was given where fp32 did not change it."""
    if schedule is not None:
        return schedules.get_config(schedule.given)
    number = rate.item()
    if isinstance(given, Real) and mx.array(float(given), mx.float32).item() == number:
        return float(given)
    return number


def _groups(adagrad: Adagrad) -> list[dict[str, Any]]:
    entries = adagrad.groups.states(adagrad.state)
    return [_group(adagrad.groups, i, entry) for i, entry in enumerate(entries)]


def _group(groups: Groups, index: int, state: dict[str, Any]) -> dict[str, Any]:
    group, default = groups.groups[index], groups.default
    entry: dict[str, Any] = {"params": _plain(group.rule.owner, "params", group.patterns)}
    if group.lr is not None:
        entry["lr"] = _rate(group.lr if callable(group.lr) else None, state["learning_rate"])
    return entry | {k: getattr(group.rule, k) for k in RULE_KEYS if getattr(group.rule, k) != getattr(default, k)}


def _constraint(owner: str, constraint: Any) -> Any:
    """A constraint for JSON: its name, with its arguments where it is one of those that have some."""
    for name, kind in NAMED.items():
        if type(constraint) is kind:
            return {"name": name} | _plain(owner, "constraints", asdict(constraint))
    return _plain(owner, "constraints", constraint)


def _revived_constraint(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    name, arguments = config.get("name"), {key: value for key, value in config.items() if key != "name"}
    if name not in NAMED:
        raise ValueError(f"[presets] there is no constraint {name!r}, only {', '.join(NAMED)}.")
    return schedules.call_with("presets", NAMED[name], arguments)


def _plain(owner: str, name: str, value: Any) -> Any:
    """``value`` in the types of JSON."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Real):
        return int(value) if isinstance(value, Integral) else float(value)
    if isinstance(value, Mapping):
        return {key: _plain(owner, name, child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(owner, name, child) for child in value]
    raise TypeError(f"[{owner}] '{name}' holds {value!r}, which a config cannot.")
