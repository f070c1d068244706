"""What stands under ``optimizer_config: {adagrad: {...}}`` of a configuration file, made into an optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import mlx_adagrad

from .. import checks, schedules
from ..adagrad import Adagrad
from ..checks import shown
from ..rates import LearningRate
from ..schedules.named import call_with
from ..update.accumulators import Dense
from ..wrappers import (
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Constraint,
    DynamicLossScale,
    ExponentialMovingAverage,
    GradientAccumulation,
    LossScale,
    SkipNonFinite,
    Wrapper,
)
from ..wrappers.constraint import NAMED

OWNER = "optimizer_config.adagrad"
NO_JSON = {
    "learning_rate": "it stands outside, as 'learning_rate' or 'lr_schedule'",
    "weight_decay_mask": "it is a function: use 'groups' with a 'weight_decay' of 0",
}
SPARSE = "sparse_embedding"
# Innermost first, in Keras's order; the clip by value comes before norms. The names of norms are those of
# torch.nn.utils.clip_grad_norm_ and mlx.optimizers.clip_grad_norm: one norm of all gradients.
WRAPPERS: dict[str, tuple[type[Wrapper], str]] = {
    "clip_norm_each": (ClipByNorm, "max_norm"),
    "clip_norm": (ClipByGlobalNorm, "max_norm"),
    "clip_value": (ClipByValue, "value"),
    "accumulate": (GradientAccumulation, "steps"),
    "ema": (ExponentialMovingAverage, "momentum"),
    "constraints": (Constraint, "constraints"),
    "loss_scale": (LossScale, "factor"),
    "skip_non_finite": (SkipNonFinite, "on_skip"),
}

BuildSchedule = Callable[[Any], Any]


def optimizer_of(options: Any, learning_rate: LearningRate, build_schedule: BuildSchedule) -> Adagrad | Wrapper:
    """The optimizer that ``options`` describe, wrappers around it.

    Args:
        options: A mapping of JSON's types: the keywords of :class:`~mlx_adagrad.Adagrad`, those of ``WRAPPERS``, and
            ``sparse_embedding``. The value of a wrapper is its first argument, or a mapping of all of them; null and
            false leave it out.
        learning_rate: As :class:`~mlx_adagrad.Adagrad` takes it.
        build_schedule: mlx-lm's function from an ``lr_schedule`` to a schedule, for the ``lr`` of groups.

    Raises:
        ValueError: For an option that is not known, and for values that the optimizer or a wrapper refuses.
        TypeError: For values of a wrong type.
    """
    options = _checked(options)
    wrapped = {key: options.pop(key, None) for key in WRAPPERS}
    options.pop(SPARSE, None)
    if "accumulator" in options:
        options["accumulator"] = _accumulator(options["accumulator"])
    if isinstance(options.get("groups"), list):
        options["groups"] = [_group(group, build_schedule) for group in options["groups"]]
    optimizer: Adagrad | Wrapper = Adagrad(learning_rate, **options)
    for key, value in wrapped.items():
        if value is not None and value is not False:
            optimizer = _wrapped(optimizer, key, value)
    return optimizer


def sparse_embedding(options: Any) -> bool:
    """Whether the options ask for row-sparse gradients of the embedding."""
    value = (options or {}).get(SPARSE)
    return False if value is None else checks.boolean(OWNER, SPARSE, value)


def _checked(options: Any) -> dict[str, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise TypeError(f"[{OWNER}] must be a mapping of options but got {shown(options)}.")
    known = [name for name in inspect.signature(Adagrad).parameters if name not in NO_JSON]
    for key in options:
        if key in NO_JSON:
            raise ValueError(f"[{OWNER}] '{key}' cannot be given here: {NO_JSON[key]}.")
        if key not in (*known, *WRAPPERS, SPARSE):
            raise ValueError(f"[{OWNER}] there is no option {key!r}, only {', '.join((*known, *WRAPPERS, SPARSE))}.")
    sparse_embedding(options)
    return dict(options)


def _accumulator(value: Any) -> Any:
    """``"RowWise"`` or ``{"name": "RowWise", "dtype": "parameter"}`` as an accumulator."""
    if value is None:
        return None
    public = {name: getattr(mlx_adagrad, name) for name in mlx_adagrad.__all__}
    kinds = {name: kind for name, kind in public.items() if isinstance(kind, type) and issubclass(kind, Dense)}
    return _named(f"{OWNER}.accumulator", kinds, value)


def _named(owner: str, kinds: Mapping[str, Callable[..., Any]], value: Any) -> Any:
    """One of ``kinds`` by its name, or by a mapping of its ``name`` and its arguments."""
    arguments = dict(value) if isinstance(value, Mapping) else {"name": value}
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"[{owner}] must be one of {', '.join(kinds)} but got {shown(value)}.")
    return call_with(owner, kinds[name], arguments)


def _group(group: Any, build_schedule: BuildSchedule) -> Any:
    rate = group.get("lr") if isinstance(group, Mapping) else None
    if not isinstance(rate, Mapping):
        return group
    # our own schedules have a "config", those of Keras a "class_name", which Adagrad reads by itself
    if "arguments" in rate:
        return {**group, "lr": build_schedule(rate)}
    return {**group, "lr": schedules.from_config(rate)} if "class_name" not in rate else group


def _wrapped(optimizer: Adagrad | Wrapper, key: str, value: Any) -> Wrapper:
    kind, first = WRAPPERS[key]
    if kind is SkipNonFinite:
        checks.boolean(OWNER, key, value)
        return SkipNonFinite(optimizer)
    if kind is Constraint:
        return Constraint(optimizer, _constraints(value))
    if kind is LossScale and (value == "dynamic" or isinstance(value, Mapping) and "factor" not in value):
        kind, value = DynamicLossScale, {} if value == "dynamic" else value
    arguments = value if isinstance(value, Mapping) else {first: value}
    return call_with(f"{OWNER}.{key}", kind, {"optimizer": optimizer, **arguments})


def _constraints(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    owner = f"{OWNER}.constraints"
    return {pattern: _named(f"{owner}['{pattern}']", NAMED, constraint) for pattern, constraint in value.items()}
