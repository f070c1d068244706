"""The dialect of ``torch.optim.Adagrad``: a ``state_dict`` with a ``step`` and a ``sum`` for each parameter."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any, NoReturn

import mlx.core as mx
from mlx.optimizers import Optimizer

from ..adagrad import Adagrad
from . import export, kinds, sources
from .foreign import Foreign, Key, Names, V, few
from .install import Live, install
from .safetensors import Entry

OPTIONS = ("lr_decay", "eps", "weight_decay", "maximize")
OLDEST = (2, 6)  # before it, weights_only=True could be made to run code (CVE-2025-32434)


def import_torch(
    source: Any, optimizer: Optimizer, names: Names | None = None, *, strict: bool = True, key: Any = None
) -> None:
    """Go on from a ``torch.optim.Adagrad``: its ``state_dict()``, or a file of one, which needs torch to read.

    Accumulators, step counts and learning rates (of groups too; a schedule here keeps its own) go into the live state
    in place. torch casts ``sum`` to the parameter's dtype; here it is cast to that of ``v``.

    Args:
        source: The state dict, or a path. A file may hold tensors and plain values only: no code in it is run.
        optimizer: ``presets.torch(...)`` or any Adagrad of this package, initialised with the model's parameters.
        names: Ours for theirs where the order differs: a list of our dotted paths in torch's order (None: leave it
            out), or a mapping from torch's index (or name, where the state dict has ``param_names``). In place of a
            path, ``(path, axes)`` reorders the axes: a Conv2d weight of torch is ``(path, (0, 2, 3, 1))`` here.
        strict: Refuse other hyperparameters than the saved ones. Default: ``True``.
        key: Where in a file of a whole run the optimizer's state dict is: ``"optimizer"``, or a tuple of keys for one
            that is deeper. Default: ``None``, it is the file.

    Raises:
        ValueError: If the file is damaged or does not fit; each difference is named. Nothing has changed then.
        ImportError: If a file is given, and torch is not installed or older than 2.6.
    """
    with sources.naming(source):
        state = source if isinstance(source, Mapping) else _load(source)
        install(Live(optimizer), _read(_at(state, key)), names, strict)


def export_torch(optimizer: Optimizer, names: Names | None = None) -> dict[str, Any]:
    """The state as a ``state_dict`` that ``torch.optim.Adagrad.load_state_dict`` takes.

    One torch group for each group here, in their order, and last one of the parameters that are in none. Where torch is
    installed the arrays are its tensors, else numpy's (bf16 as fp32).

    Args:
        optimizer: ``presets.torch(...)`` or an Adagrad of this package whose options torch has.
        names: As in :func:`import_torch`: our dotted paths in torch's order. Default: the order of the state.

    Raises:
        ValueError: If torch's Adagrad cannot go on as this optimizer would: it has no eps inside the root, no decoupled
            decay, no row-wise accumulator, no averages and no accumulated gradients; or if there is no state yet.
    """
    live, parts = export.parts(optimizer, names, "torch", {})
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for index in (*range(len(live.adagrad.groups.groups)), None):
        members = [part for part in parts if part.group == index]
        if not members and index is None and groups:
            continue
        first = len(state)
        state |= {first + i: {"step": _tensor(part.step), "sum": _tensor(part.v)} for i, part in enumerate(members)}
        groups.append(_group(live.adagrad, index) | {"params": list(range(first, len(state)))})
    return {"state": state, "param_groups": groups}


def _group(adagrad: Adagrad, index: int | None) -> dict[str, Any]:
    groups = adagrad.groups
    rule = adagrad.rule if index is None else groups.groups[index].rule
    own = {} if index is None else groups.states(adagrad.state)[index]
    return {
        "lr": own.get("learning_rate", adagrad.learning_rate).item(),
        "lr_decay": rule.lr_decay,
        "eps": rule.eps,
        "weight_decay": rule.weight_decay,
        "initial_accumulator_value": adagrad.rule.initial_accumulator_value,
        "foreach": None,
        "maximize": rule.maximize,
        "differentiable": False,
        "fused": None,
    }


def _tensor(array: mx.array) -> Any:
    import numpy as np

    wide = array.astype(mx.float32) if array.dtype in (mx.bfloat16, mx.uint64) else array  # torch counts in float32
    copied = np.array(wide)
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        return copied
    tensor = torch.from_numpy(copied)
    return tensor.to(torch.bfloat16) if array.dtype == mx.bfloat16 else tensor


def _at(state: Any, key: Any) -> Any:
    """What a file of a whole run has at ``key``, a key or a tuple of keys."""
    for part in () if key is None else key if isinstance(key, tuple) else (key,):
        try:
            state = state[part]
        except (KeyError, IndexError, TypeError):
            at = f"{few(state)}" if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"there is no {part!r:.40} in it ({at}): check 'key'") from None
    return state


def _refuse(state: Any) -> NoReturn:
    """Say what a file holds that is no state dict of an optimizer."""
    found = [*_state_dicts(state)]
    if found:
        keys = ", ".join(f"key={key!r:.80}" for key in found)
        raise ValueError(f"it is of a whole run, with the state_dict of an optimizer in it: give {keys}")
    if isinstance(state, Mapping) and state and all(hasattr(value, "shape") for value in state.values()):
        raise ValueError("it is the state_dict of a model, tensors by name: give that of the optimizer")
    raise ValueError("it is no state_dict of a torch optimizer: it must have 'state' and 'param_groups'")


def _state_dicts(tree: Any, keys: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Where in a file there are state dicts of optimizers, down to two levels."""
    if isinstance(tree, Mapping) and "param_groups" in tree and isinstance(tree.get("state"), Mapping):
        yield keys[0] if len(keys) == 1 else keys
    elif len(keys) < 2 and isinstance(tree, Mapping | list | tuple):
        for key, below in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _state_dicts(below, (*keys, key))


def _read(state: Any) -> Foreign:
    """``{"state": {i: {"step", "sum"}}, "param_groups": [{"lr", ..., "params": [i, ...]}]}``."""
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        _refuse(state)
    tensors: dict[Key, dict[str, Entry]] = {}
    steps: dict[Key, int] = {}
    rates: dict[Key, float] = {}
    options: dict[Key, dict[str, Any]] = {}
    for group in _groups(state):
        labels = group.get("param_names", group["params"])
        for index, label in zip(group["params"], labels, strict=True):
            own = state["state"].get(index, {})
            if label in tensors:
                raise ValueError(f"it has parameter {label!r:.40} twice")
            if not isinstance(own, Mapping) or own and not own.keys() >= {"step", "sum"}:
                raise ValueError(f"its state of parameter {label!r:.40} has no 'step' and 'sum': it is not Adagrad's")
            # a group that came late has no state before its first step
            tensors[label] = {V: sources.entry(f"'sum' of {label!r:.40}", own["sum"])} if own else {}
            steps[label] = int(sources.number("step", own["step"])) if own else 0
            rates[label] = sources.number("lr", group["lr"])
            options[label] = {key: sources.plain(key, group[key]) for key in OPTIONS if key in group}
    if not tensors:
        raise ValueError("it has no parameters")
    nowhere = state["state"].keys() - {index for group in _groups(state) for index in group["params"]}
    if nowhere:
        raise ValueError(f"it has a state of {few(nowhere)!r:.80}, which is in none of its groups")
    return Foreign(tensors, steps, rates, options)


def _groups(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = state.get("param_groups")
    for group in groups if isinstance(groups, list) else [None]:
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list) or "lr" not in group:
            raise ValueError("its 'param_groups' must be a list of dicts with 'params' and 'lr'")
        labels = group.get("param_names", group["params"])
        hashable = isinstance(labels, list) and all(isinstance(key, int | str) for key in (*labels, *group["params"]))
        if not hashable or len(labels) != len(group["params"]):
            raise ValueError("the 'params' and 'param_names' of its groups must be lists of numbers and names")
    return groups  # type: ignore[return-value]


def _load(path: str | os.PathLike) -> Any:
    """What a file of ``torch.save`` holds; no code in it is run.

    Raises:
        ImportError: If torch is not there, or too old to be trusted with a file.
        ValueError: If the file is damaged, or holds more than tensors, numbers, strings and containers.
    """
    kinds.expect(path, kinds.TORCH)
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("[checkpoint] a file of torch is read by torch, which is not installed.") from None
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST:
        raise ImportError(f"[checkpoint] torch {torch.__version__} may run code from a file: 2.6 or newer is needed.")
    with open(path, "rb") as stream:
        _check_stored(stream)
        stream.seek(0)
        try:
            return torch.load(stream, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged pickle makes of it
            raise ValueError(f"torch refuses it: {str(error)[:300]}") from error


def _check_stored(stream: IO[bytes]) -> None:
    """Refuse an archive that could grow when it is unpacked."""
    with sources.unzipping():  # torch before 1.6 wrote no archive, and what it wrote cannot be checked
        infos = zipfile.ZipFile(stream).infolist()
    size = stream.seek(0, os.SEEK_END)
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos) or sum(i.file_size for i in infos) > size:
        raise ValueError("it holds compressed or overlapping records, which torch.save never writes")
