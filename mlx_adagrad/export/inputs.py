"""The arrays of a run by name: parameters, optimizer state and batch, as an exported step takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
from mlx.nn import Module
from mlx.optimizers import Optimizer

from ..trees import Keys, dotted, fill, find, mapped, present

OWNER = "export_step"
# Names that a batch may not use; the prefixes of the other names end in a dot.
RANDOM, LOSS = "random", "loss"
PREFIXES = ("model.", "optimizer.")


class Refused(ValueError):
    """A step that would not do the same in a file."""


class Run:
    """The arrays of a model and its optimizer by name, read and replaced where they stand.

    A name is ``model.`` or ``optimizer.`` and the dotted path; where two paths read the same, one gets an apostrophe.
    """

    def __init__(self, model: Module, optimizer: Optimizer):
        self.model, self.optimizer = model, optimizer
        self.names: dict[tuple[str, Keys], str] = {}
        for root, tree in self._trees().items():
            for keys, _ in present(tree):
                name = f"{root}.{dotted(keys)}"
                while name in self.names.values():  # {"a.b": x} beside {"a": {"b": y}}
                    name += "'"
                self.names[root, keys] = name

    def _trees(self) -> dict[str, Any]:
        return {"model": self.model.parameters(), "optimizer": self.optimizer.state}

    def arrays(self) -> dict[str, mx.array]:
        """The arrays as they stand now.

        Raises:
            Refused: If there is one that has no name, since it was not there when this was made.
        """
        found: dict[str, mx.array] = {}
        for root, tree in self._trees().items():
            for keys, leaf in present(tree):
                if (root, keys) not in self.names:
                    raise Refused(
                        f"[{OWNER}] the step makes new state, '{root}.{dotted(keys)}', so that its first run is not "
                        "like the next ones: take one step inside mx.compile before the export."
                    )
                found[self.names[root, keys]] = leaf
        return found

    def beside(self) -> dict[Keys, mx.array]:
        """The arrays in the model that are no parameters: those under names that begin with ``_``."""
        arrays = ((keys, leaf) for keys, leaf in present(self.model) if isinstance(leaf, mx.array))
        return {keys: leaf for keys, leaf in arrays if ("model", keys) not in self.names}

    def check_beside(self, before: Mapping[Keys, mx.array]) -> None:
        """Raise Refused if :meth:`beside` is another than before."""
        for keys, array in self.beside().items():
            if before.get(keys) is not array:
                raise Refused(
                    f"[{OWNER}] the loss sets '{dotted(keys)}' of the model, which is no parameter, so that the file "
                    "could not hand it on: name it without '_' and freeze it, or, if it is a constant that the first "
                    "call makes, call the model once before the export."
                )

    def put_back(self, before: Mapping[Keys, mx.array]) -> None:
        """Make :meth:`beside` what it was."""
        for keys in self.beside().keys() - before.keys():
            del find(self.model, keys[:-1])[keys[-1]]
        for keys, array in before.items():
            if find(self.model, keys) is not array:
                find(self.model, keys[:-1])[keys[-1]] = array

    def replace(self, arrays: Mapping[str, mx.array]) -> None:
        """Put arrays in the places of those of the same names."""
        trees = self._trees()

        def placed(root: str) -> Any:
            return mapped(lambda keys, _: arrays[self.names[root, keys]], trees[root])

        self.model.update(placed("model"))
        fill(trees["optimizer"], placed("optimizer"))


def batches(loss_fn: Callable[..., Any], model: Module, example: Any) -> list[dict[str, mx.array]]:
    """The example batches by name: of one batch, or of a list of them; one for each shape.

    Raises:
        TypeError: For what is no batch, and for leaves that are no arrays.
        ValueError: For no batch at all, and for names that differ between batches or that a step uses itself.
    """
    given = example if isinstance(example, list) else [example]
    if not given:
        raise ValueError(f"[{OWNER}] 'example_batch' must hold at least one batch.")
    named = [_named(loss_fn, model, batch) for batch in given]
    for batch in named:
        if batch.keys() != named[0].keys():
            raise ValueError(f"[{OWNER}] all batches must have the names {list(named[0])} but one has {list(batch)}.")
        for name, array in batch.items():
            if not isinstance(name, str):
                raise TypeError(f"[{OWNER}] the names of a batch must be strings but one is {name!r:.80}.")
            if not isinstance(array, mx.array):
                raise TypeError(f"[{OWNER}] '{name}' of the batch must be an array but got {type(array).__name__}.")
            if name in (RANDOM, LOSS) or name.startswith(PREFIXES):
                raise ValueError(f"[{OWNER}] an array of the batch may not be named {name!r}: the step uses that name.")
    shapes = [{name: described(array) for name, array in batch.items()} for batch in named]
    return [batch for i, batch in enumerate(named) if shapes[i] not in shapes[:i]]


def described(array: mx.array) -> dict[str, Any]:
    """The shape and the dtype of an array, as the manifest has them."""
    return {"shape": list(array.shape), "dtype": str(array.dtype).removeprefix("mlx.core.")}


def _named(loss_fn: Callable[..., Any], model: Module, batch: Any) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        return dict(batch)
    if isinstance(batch, mx.array):
        batch = (batch,)
    if not isinstance(batch, tuple):
        wanted = "a dict of arrays by the names of loss_fn's arguments, a tuple of arrays, or a list of those"
        raise TypeError(f"[{OWNER}] 'example_batch' must be {wanted} but got {type(batch).__name__}.")
    names = [p.name for p in _positional(loss_fn)]
    for leading in ([model], []):
        if len(names) >= len(batch) + len(leading) and _binds(loss_fn, *leading, *batch):
            return dict(zip(names[len(leading) :], batch, strict=False))
    raise TypeError(f"[{OWNER}] 'loss_fn' takes {names} but the batch has {len(batch)} arrays.")


def takes_model(loss_fn: Callable[..., Any], names: Sequence[str]) -> bool:
    """Whether ``loss_fn`` is to be called ``loss_fn(model, **batch)`` and not ``loss_fn(**batch)``.

    Raises:
        TypeError: If it takes the batch in neither way.
    """
    batch = dict.fromkeys(names)
    first = next(iter(_positional(loss_fn)), None)
    if first is not None and first.name not in names and _binds(loss_fn, None, **batch):
        return True
    if _binds(loss_fn, **batch):
        return False
    raise TypeError(f"[{OWNER}] 'loss_fn' must take (model, {', '.join(names)}) or ({', '.join(names)}).")


def _positional(function: Callable[..., Any]) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in inspect.signature(function).parameters.values() if p.kind in kinds]


def _binds(function: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True
