"""The dialect of Keras: an optimizer's variables as a list, without names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer

from ..wrappers import DynamicLossScale, ExponentialMovingAverage, GradientAccumulation
from . import hdf5, kinds, sources
from .foreign import AVERAGE, GRADIENT, LARGEST_RATE, Foreign, Key, Names, V
from .install import Live, install
from .safetensors import Entry

CALLED = {AVERAGE: "averages", GRADIENT: "sums of gradients", V: "accumulators"}
OUTER = ("iteration", "learning rate", "step counter", "scale")  # of a LossScaleOptimizer, before all others


def import_keras(source: Any, optimizer: Optimizer, names: Names | None = None, *, key: str | None = None) -> None:
    """Go on from an Adagrad of Keras: a ``.keras``, ``.weights.h5`` or ``.h5`` file, or the optimizer's variables.

    Also within a window of ``gradient_accumulation_steps``, with averages (``use_ema``), and from a
    ``LossScaleOptimizer`` around it. Such a list tells neither names nor hyperparameters: build the optimizer with
    those of the saved one, for the number of variables and their shapes are all that can be checked.

    Args:
        source: The path of a file that ``model.save`` or ``save_weights`` wrote, which h5py reads
            (``mlx-adagrad[keras]``); or what ``optimizer.save_own_variables(store)`` gave, ``{"0": iteration, "1":
            learning rate, ...}``: arrays of any kind (h5py's too), or an .npz file. The list that ``get_weights()`` of
            tf.keras gives is one too, as ``dict(enumerate(...))``.
        optimizer: ``presets.keras(...)`` or the same by hand, initialised with the model's parameters.
        names: Ours for theirs where the order differs: a list of our dotted paths in Keras's order (None: leave it
            out), or a mapping from the parameter's index. In place of a path, ``(path, axes)`` reorders the axes: a
            Dense kernel of Keras is ``(path, (1, 0))`` for ``mlx.nn.Linear``.
        key: The optimizer's name in a file that has several. Default: ``None``, ``"optimizer"``.

    Raises:
        ValueError: If the file is damaged or does not fit; each difference is named. Nothing has changed then.
        ImportError: If a file of Keras is given, and h5py is not installed.
    """
    with sources.naming(source), _opened(source, key) as entries:
        live = Live(optimizer)
        count = len(live.slots) if names is None or isinstance(names, Mapping) else len(names)
        install(live, _read(entries, live, count), names)


@contextmanager
def _opened(source: Any, key: str | None) -> Iterator[dict[str, Entry]]:
    if isinstance(source, Mapping):
        groups = hasattr(source, "visititems")  # an open file of h5py, or a part of one
        yield hdf5.variables(source, key) if groups else sources.entries(source)
        return
    kind = kinds.expect(source, kinds.KERAS, kinds.HDF5, kinds.NPZ, kinds.SAFETENSORS)
    if kind in (kinds.NPZ, kinds.SAFETENSORS):
        with sources.opened(source) as entries:
            yield entries
        return
    if kind is None:
        raise ValueError("it is no file that Keras writes (.keras, .weights.h5, .h5), and no .npz, or it is damaged")
    with hdf5.opened(source, key) as entries:
        yield entries


def _read(entries: dict[str, Entry], live: Live, count: int) -> Foreign:
    """The variables in order: iteration, learning rate (if no schedule), averages, sums of gradients, accumulators."""
    kinds = [*live.kept, V]
    outer = OUTER if live.own(DynamicLossScale) is not None else ()
    head = len(entries) - len(outer) - count * len(kinds)
    if head not in (1, 2) or entries.keys() != {str(i) for i in range(len(entries))}:
        parts = [*outer, "iteration", "learning rate (if no schedule)", *(f"{count} {CALLED[kind]}" for kind in kinds)]
        raise ValueError(f"it holds {len(entries)} variables, but those of this optimizer are: {', '.join(parts)}")
    variables = [entries[str(i)] for i in range(len(entries))]
    first = variables[len(outer) : len(outer) + head]
    arrays = variables[len(outer) + head :]
    tensors: dict[Key, dict[str, Entry]] = {
        i: {kind: arrays[k * count + i] for k, kind in enumerate(kinds)} for i in range(count)
    }
    calls = int(sources.number("iteration", first[0]))
    rates = dict.fromkeys(tensors, sources.number("learning rate", first[1])) if head == 2 else {}
    counters = _scale_counters(variables[: len(outer)]) + [
        (kind, "calls", _count(calls)) for kind in (ExponentialMovingAverage, GradientAccumulation)
    ]
    window = next((w.steps for w in live.wrappers if isinstance(w, GradientAccumulation)), 1)
    return Foreign(tensors, calls // window, rates, counters=counters)


def _scale_counters(outer: list[Entry]) -> list[tuple[type, str, mx.array]]:
    if not outer:
        return []
    steps, scale = (sources.number(name, entry) for name, entry in zip(OUTER[2:], outer[2:], strict=True))
    if not 0 < scale <= LARGEST_RATE:
        raise ValueError(f"the loss scale is {scale}")
    values = {"step_counter": _count(int(steps)), "dynamic_scale": mx.array(scale)}
    return [(DynamicLossScale, key, value) for key, value in values.items()]


def _count(number: int) -> mx.array:
    if not 0 <= number < 2**63:
        raise ValueError(f"a count of {number} cannot be")
    return mx.array(number, mx.uint64)
