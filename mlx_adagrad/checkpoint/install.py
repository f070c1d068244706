"""Puts another framework's checkpoint into a live optimizer: everything is checked before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.optimizers import Optimizer

from ..adagrad import Adagrad
from ..leaves import RESERVED
from ..trees import dotted, labels, name
from ..update.accumulators import EXPONENTS, stored_like
from ..update.rule import Rule
from ..update.storage import COMPENSATION
from ..wrappers import ExponentialMovingAverage, GradientAccumulation
from . import trees
from .foreign import AVERAGE, GRADIENT, Foreign, Matched, Names, V, match
from .safetensors import Entry, entry_of


class Slot(NamedTuple):
    """One parameter in an Adagrad state: the keys to it, and its state dict."""

    keys: tuple[Any, ...]
    state: dict[str, Any]


def slots(tree: Any, keys: tuple[Any, ...] = ()) -> Iterator[Slot]:
    """Every parameter in an Adagrad state."""
    if isinstance(tree, dict) and isinstance(tree.get("v"), mx.array):
        yield Slot(keys, tree)
    elif isinstance(tree, dict | list | tuple):
        for key, child in trees.children(tree).items():
            if keys or key not in RESERVED:
                yield from slots(child, (*keys, key))


class Live:
    """An Adagrad with the wrappers around it: where each array of a checkpoint goes.

    Raises:
        ValueError: If there is no :class:`~mlx_adagrad.Adagrad` in the optimizer.
    """

    def __init__(self, optimizer: Optimizer):
        self.wrappers: list[Any] = []
        inner: Any = optimizer
        while not isinstance(inner, Adagrad):
            self.wrappers.append(inner)
            inner = getattr(inner, "optimizer", None)
            if inner is None:
                raise ValueError(f"there is no mlx_adagrad.Adagrad in {type(optimizer).__name__}")
        self.adagrad = inner
        found = {slot.keys: slot for slot in slots(inner.state)}
        self.slots = {path: found[keys] for path, keys in labels(found).items()}
        averages, sums = self.own(ExponentialMovingAverage), self.own(GradientAccumulation)
        # the dicts of what goes with parameters, by kind, for the kinds that there are
        self.kept = {AVERAGE: averages["averages"]} if averages else {}
        self.kept |= {GRADIENT: sums["gradients"]} if sums else {}

    def own(self, kind: type) -> dict[str, Any] | None:
        """The own state of the wrapper of this kind, None without one."""
        return next((w.state[trees.OWN] for w in self.wrappers if isinstance(w, kind)), None)

    def group(self, path: str) -> int | None:
        """The group that the parameter at ``path`` is in."""
        (keys, state), groups = self.slots[path], self.adagrad.groups.groups
        return next((i for i, group in enumerate(groups) if group.matches(dotted(keys), state[V])), None)

    def resolve(self, path: str) -> tuple[int | None, Rule]:
        """The group whose learning rate holds at ``path``, and the rule; asked of ``v``, so nothing is remembered."""
        groups = copy.copy(self.adagrad.groups)
        groups._resolved = dict(groups._resolved)
        return groups.resolve(self.slots[path].keys, self.slots[path].state[V])


class Place(NamedTuple):
    """Where an entry goes: ``holder[key]``, its axes in another order first."""

    path: str
    holder: dict[str, Any]
    key: str
    entry: Entry
    axes: tuple[int, ...] | None
    is_v: bool

    def problem(self) -> str | None:
        """What keeps the entry from going there, in words."""
        shape, live = self.entry.shape, self.holder.get(self.key)
        if live is None:
            return f"'{self.path}' has no state here yet: call optimizer.init(model.trainable_parameters())"
        if self.axes is not None:
            if sorted(self.axes) != list(range(len(shape))):
                return f"'{self.path}' has {len(shape)} axes in the file: {self.axes} is no order of them"
            shape = tuple(shape[axis] for axis in self.axes)
        if shape != live.shape:
            return f"'{self.path}' has shape {shape} in the file but {live.shape} here"
        if self.entry.dtype == mx.complex64 != live.dtype:
            return f"'{self.path}' is {self.entry.dtype} in the file but {live.dtype} here"
        return None

    def value(self) -> mx.array:
        """The array in the dtype of the one that it replaces; for a ``v`` in 8 bits, the numbers in fp32."""
        array = self.entry.read()
        with mx.stream(mx.cpu):
            array = array if self.axes is None else mx.transpose(array, self.axes)
            quantized = self.is_v and EXPONENTS in self.holder
            return array.astype(mx.float32 if quantized else self.holder[self.key].dtype)

    def stored(self, value: mx.array) -> dict[str, mx.array]:
        """What to put into the holder for this value; the compensation of other weights goes."""
        if not self.is_v:
            return {self.key: value}
        rest = {key: mx.zeros_like(self.holder[key]) for key in (COMPENSATION,) if key in self.holder}
        with mx.stream(mx.cpu):
            return stored_like(self.holder, value) | rest

    def is_sound(self, value: mx.array) -> mx.array:
        """Whether a run can have got to this value; from others it would go on to NaN."""
        parts = [mx.real(value), mx.imag(value)] if value.dtype == mx.complex64 else [value]
        if self.is_v:  # it may have overflowed in half precision
            return mx.all(mx.stack([(part >= 0).all() for part in parts]))
        return mx.isfinite(value).all()


def install(live: Live, foreign: Foreign, names: Names | None, strict: bool = True) -> Matched:
    """Put another framework's checkpoint into the live state in place, all of it or, with an error, nothing.

    Raises:
        ValueError: If it does not fit; each difference is named.
    """
    if not live.slots:
        raise ValueError("the optimizer has no state yet: call optimizer.init(model.trainable_parameters()) first")
    matched = match(foreign.tensors, live.slots, names)
    places = [place for path in matched for place in _places(live, foreign, path, *matched[path])]
    problems = list(_option_problems(live, foreign, matched)) if strict else []
    problems += [problem for place in places if (problem := place.problem())]
    if problems:
        raise ValueError(trees.listed(problems))
    new: list[tuple[dict[str, Any], str, mx.array]] = []
    new += [(holder, "learning_rate", mx.array(rate, mx.float32)) for holder, rate in _rates(live, foreign, matched)]
    new += [(holder, "step", mx.array(step, mx.uint64)) for holder, step in _steps(live, foreign, matched)]
    new += [(own, key, number) for kind, key, number in foreign.counters if (own := live.own(kind)) is not None]
    values = [place.value() for place in places]
    mx.eval([array for _, _, array in new], values)
    _check_values(places, values)
    for place, value in zip(places, values, strict=True):
        new += [(place.holder, key, array) for key, array in place.stored(value).items()]
    mx.eval([array for _, _, array in new])
    for holder, key, array in new:
        holder[key] = array
    return matched


def _check_values(places: list[Place], values: list[mx.array]) -> None:
    with mx.stream(mx.cpu):
        sound = [place.is_sound(value) for place, value in zip(places, values, strict=True)]
        mx.eval(sound)
    for place, one in zip(places, sound, strict=True):
        if not one.item():
            wanted = "a sum of squares" if place.is_v else "finite"
            raise ValueError(f"what the file has for '{place.path}' is not {wanted}: it is damaged")


def _places(live: Live, foreign: Foreign, path: str, key: Any, axes: Any) -> Iterator[Place]:
    keys, state = live.slots[path]
    for kind, entry in foreign.tensors[key].items():
        holder, where = (state, V) if kind == V else (live.kept[kind], name(keys))
        yield Place(path, holder, where, entry, axes, kind == V)
    if V not in foreign.tensors[key]:
        like = mx.zeros(state[V].shape) if EXPONENTS in state else state[V]
        initial = live.adagrad.accumulator.plain.init(like, live.adagrad.rule.initial_accumulator_value)
        yield Place(path, state, V, entry_of(initial), None, True)


def _option_problems(live: Live, foreign: Foreign, matched: Matched) -> Iterator[str]:
    for path, (key, _) in matched.items():
        rule = live.resolve(path)[1]
        for option, theirs in foreign.options.get(key, {}).items():
            if theirs != getattr(rule, option):
                yield f"'{option}' of '{path}' is {theirs!r:.40} in the file but {getattr(rule, option)} here"


def _rates(live: Live, foreign: Foreign, matched: Matched) -> list[tuple[dict[str, Any], float]]:
    """The dicts of the state that hold a learning rate, each with theirs; a schedule here keeps its own."""
    found: dict[int | None, tuple[float, str]] = {}
    for path, (key, _) in matched.items():
        if key not in foreign.rates:
            continue
        theirs = foreign.rates[key]
        rate, first = found.setdefault(live.resolve(path)[0], (theirs, path))
        if rate != theirs:
            raise ValueError(
                f"'{first}' and '{path}' have the learning rates {rate} and {theirs} in the file but share one here: "
                "give them groups with an 'lr'"
            )
    adagrad, groups = live.adagrad, live.adagrad.groups
    scheduled: dict[int | None, bool] = {i: callable(group.lr) for i, group in enumerate(groups.groups)}
    scheduled[None] = "learning_rate" in adagrad._schedulers
    holders: dict[int | None, dict[str, Any]] = {**dict(enumerate(groups.states(adagrad.state))), None: adagrad.state}
    return [(holders[group], rate) for group, (rate, _) in found.items() if not scheduled[group]]


def _steps(live: Live, foreign: Foreign, matched: Matched) -> list[tuple[dict[str, Any], int]]:
    """The dicts of the state that hold a step count, each with theirs."""
    counts = foreign.steps if isinstance(foreign.steps, dict) else dict.fromkeys(foreign.tensors, foreign.steps)
    own = {path: counts[key] for path, (key, _) in matched.items()}
    rules = [live.adagrad.rule, *(group.rule for group in live.adagrad.groups.groups)]
    apart = live.adagrad.rule.step_per_parameter
    if len(set(own.values())) > 1 and not apart and any(rule.lr_decay for rule in rules):
        raise ValueError("its parameters have made different numbers of steps: only presets.torch counts them apart")
    places = [(live.slots[path].state, step) for path, step in own.items() if apart]
    return [(live.adagrad.state, max(own.values())), *places]
