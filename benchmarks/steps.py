"""The ways to take one step of Adagrad over the same parameters with the same gradients.

A step is ``apply_gradients`` and the evaluation of everything it returns. The gradients are there before it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as stock
import numpy as np

import mlx_adagrad
from mlx_adagrad.update.streams import IN_PLACE_ELEMENTS
from report import has_torch, on_gpu
from timing import Step

Shape = tuple[int, ...]

LEARNING_RATE, EPS = 0.01, 1e-8

# Bytes that the operations of one fp32 step ask of memory for each element: every operation reads its inputs and
# writes its output, as if no cache held anything between two of them. Page faults and lines that are fetched only to be
# overwritten come on top. Stock Adagrad is seven operations: square, lr g, sqrt and + eps (8 each), v + ., / and - (12
# each). A compiled step is one: w, g, v in, w, v out. torch single-tensor: addcmul_ 12, sqrt 8, add_ 8, addcdiv_ 16;
# foreach also multiplies g by lr, 8. Ours in place, from IN_PLACE_ELEMENTS on, is two passes: v + g^2, 12; w - ., 16.
ONE_PASS, TWO_PASSES, STOCK_EAGER, TORCH_SINGLE, TORCH_FOREACH = 20, 28, 68, 44, 52


class Candidate(NamedTuple):
    """One way to take the step."""

    setup: Callable[[], Step]
    bytes_per_element: float


def candidates(shapes: Sequence[Shape]) -> dict[str, Candidate]:
    """Every way to take the step that this machine has, from the same parameters with the same gradients."""
    parameters, gradients = _arrays(shapes, seed=0), _arrays(shapes, seed=1)
    ours = partial(mlx_adagrad.Adagrad, LEARNING_RATE, EPS)
    operations = partial(ours, fused=False)
    plain = partial(stock.Adagrad, LEARNING_RATE, EPS)
    found = {
        "stock eager": Candidate(partial(_eager, plain, parameters, gradients), STOCK_EAGER),
        "stock compiled": Candidate(partial(_compiled, plain, parameters, gradients), ONE_PASS),
        "ours eager": Candidate(
            partial(_eager, ours, parameters, gradients),
            ONE_PASS if on_gpu() else _operations_bytes(shapes),
        ),
        "ours compiled": Candidate(partial(_compiled, ours, parameters, gradients), ONE_PASS),
    }
    if on_gpu():
        setup = partial(_eager, operations, parameters, gradients)
        found["ours eager, fused=False"] = Candidate(setup, _operations_bytes(shapes))
    if has_torch():
        found.update(_torch_candidates(parameters, gradients))
    return found


def _operations_bytes(shapes: Sequence[Shape]) -> float:
    def each(size: int) -> int:
        return ONE_PASS if size < IN_PLACE_ELEMENTS else TWO_PASSES

    return sum(each(prod(shape)) * prod(shape) for shape in shapes) / sum(map(prod, shapes))


def eager_steps(make: Callable[[], stock.Optimizer], shapes: Sequence[Shape]) -> Step:
    """The eager step of an optimizer over parameters of these shapes."""
    return _eager(make, _arrays(shapes, seed=0), _arrays(shapes, seed=1))


def _arrays(shapes: Sequence[Shape], seed: int) -> list[mx.array]:
    mx.random.seed(seed)
    arrays = [mx.random.normal(shape) for shape in shapes]
    mx.eval(arrays)
    return arrays


def _tree(arrays: Sequence[mx.array]) -> dict[str, Any]:
    return {"layers": [{"weight": array} for array in arrays]}


def _copies(arrays: Sequence[mx.array]) -> dict[str, Any]:
    copies = [mx.array(np.array(array)) for array in arrays]
    mx.eval(copies)
    return _tree(copies)


def _eager(make: Callable[[], stock.Optimizer], start: Sequence[mx.array], gradients: Sequence[mx.array]) -> Step:
    optimizer, parameters, tree = make(), _copies(start), _tree(gradients)

    def step() -> Any:
        nonlocal parameters
        parameters = optimizer.apply_gradients(tree, parameters)
        mx.eval(parameters, optimizer.state)
        return parameters

    return step


def _compiled(make: Callable[[], stock.Optimizer], start: Sequence[mx.array], gradients: Sequence[mx.array]) -> Step:
    optimizer, parameters, tree = make(), _copies(start), _tree(gradients)
    optimizer.init(parameters)
    captured = [parameters, optimizer.state]

    @partial(mx.compile, inputs=captured, outputs=captured)
    def update(gradients: dict[str, Any]) -> None:
        parameters.update(optimizer.apply_gradients(gradients, parameters))

    def step() -> Any:
        update(tree)
        mx.eval(captured)
        return parameters

    return step


def _torch_candidates(start: Sequence[mx.array], gradients: Sequence[mx.array]) -> dict[str, Candidate]:
    import torch  # type: ignore[import-not-found]

    device = "mps" if on_gpu() and torch.backends.mps.is_available() else "cpu"
    tensors = [torch.from_numpy(np.array(g)).to(device) for g in gradients]

    def setup(**form: bool) -> Step:
        parameters = [torch.nn.Parameter(torch.from_numpy(np.array(w)).to(device)) for w in start]
        for parameter, gradient in zip(parameters, tensors, strict=True):
            parameter.grad = gradient
        optimizer = torch.optim.Adagrad(parameters, lr=LEARNING_RATE, eps=EPS, **form)

        def step() -> Any:
            optimizer.step()
            if device == "mps":
                torch.mps.synchronize()
            return [parameter.detach() for parameter in parameters]

        return step

    forms = {
        f"torch {device} single-tensor": Candidate(partial(setup, foreach=False, fused=False), TORCH_SINGLE),
        f"torch {device} foreach": Candidate(partial(setup, foreach=True), TORCH_FOREACH),
    }
    if device == "cpu":  # torch has no fused Adagrad for Apple's GPUs
        forms["torch cpu fused"] = Candidate(partial(setup, fused=True), ONE_PASS)
    return forms
