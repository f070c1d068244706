"""The laws of the dense optimizer on the operations path, over the shared cases."""

import ast
import gc
import os
import re
import subprocess
import sys
import threading
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from cases import (
    DTYPE_PAIRS,
    RELATIVE,
    SHAPES,
    assert_near,
    bits,
    dtype_pairs,
    flat,
    options,
    run,
    tensors,
    to_numpy,
)
from mlx_adagrad import Adagrad, Dense, RowWise
from mlx_adagrad.update import streams
from mlx_adagrad.update.modifiers import Modifiers
from mlx_adagrad.update.rule import Rule, Scalars
from mlx_adagrad.update.streams import StreamScheduler
from reference import adagrad


@options
@dtype_pairs
def test_equals_float64(options, dtypes):
    w, gradients = tensors((6, 5), dtypes)
    got_w, got_v = run(Adagrad(0.1, **options, fused=False), w, gradients)
    want_w, want_v = adagrad(to_numpy(w), [to_numpy(g) for g in gradients], **options)[-1]
    assert got_w.dtype == dtypes[0] and got_v.dtype == mx.float32
    assert_near(got_w, want_w, dtypes[0])
    # v sees w only through weight decay, where a half-precision w has been rounded at every step
    assert_near(got_v, want_v, dtypes[0] if options.get("weight_decay") else mx.float32)


@options
def test_float64_parameters_are_computed_in_float64(options, cpu):
    w, gradients = tensors((6, 5), (mx.float64, mx.float64))
    got_w, got_v = run(Adagrad(0.125, **options), w, gradients)
    want_w, want_v = adagrad(to_numpy(w), [to_numpy(g) for g in gradients], learning_rate=0.125, **options)[-1]
    assert got_w.dtype == got_v.dtype == mx.float64
    assert_near(got_w, want_w, mx.float64)
    assert_near(got_v, want_v, mx.float64)


@options
def test_complex_parameters_are_two_reals(options):
    (re, re_gradients), (im, im_gradients) = tensors((3, 4), seed=1), tensors((3, 4), seed=2)
    gradients = [a + 1j * b for a, b in zip(re_gradients, im_gradients, strict=True)]
    w, v = run(Adagrad(0.1, **options), re + 1j * im, gradients)
    for part, w0, gs in ((np.real, re, re_gradients), (np.imag, im, im_gradients)):
        want_w, want_v = adagrad(to_numpy(w0), [to_numpy(g) for g in gs], **options)[-1]
        assert_near(part(to_numpy(w)), want_w)
        assert_near(part(to_numpy(v)), want_v)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.complex64], ids=str)
def test_every_shape_keeps_shape_and_dtype(shape, dtype):
    w, gradients = tensors(shape, (dtype, dtype))
    got_w, got_v = run(Adagrad(0.1), w, gradients)
    assert got_w.shape == got_v.shape == shape and got_w.dtype == dtype
    if dtype != mx.complex64:
        assert_near(got_w, adagrad(to_numpy(w), [to_numpy(g) for g in gradients])[-1][0], dtype)


@pytest.mark.parametrize("size", [streams.PARALLEL_ELEMENTS, streams.IN_PLACE_ELEMENTS], ids=["streams", "in place"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_large_tensors_take_other_ways_to_the_same_numbers(size, dtype):
    rng = np.random.default_rng(0)
    w, g = (mx.array(rng.normal(size=size), mx.float32).astype(dtype) for _ in range(2))
    options: dict[str, Any] = {
        "weight_decay": 0.1,
        "initial_accumulator_value": 0.5,
    }  # where g + decay nearly vanishes, v does not
    optimizer = Adagrad(0.1, **options)
    params = {"a": w, "b": w, "c": w}
    for _ in range(2):
        params = optimizer.apply_gradients({"a": g, "b": g, "c": g}, params)
    want_w, want_v = adagrad(to_numpy(w), [to_numpy(g)] * 2, **options)[-1]
    for key in params:
        assert_near(params[key], want_w, dtype)
        assert_near(optimizer.state[key]["v"], want_v, dtype)


@pytest.mark.parametrize("accumulator", [Dense("parameter"), RowWise("parameter")], ids=str)
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_v_in_half_precision_is_rounded_after_the_update(dtype, accumulator, monkeypatch):
    w, g = mx.zeros((4, 6), dtype), mx.full((4, 6), 1e-4, dtype)  # g² is 0 in fp16
    for size in (streams.IN_PLACE_ELEMENTS, 1):
        monkeypatch.setattr(streams, "IN_PLACE_ELEMENTS", size)
        optimizer = Adagrad(0.1, accumulator=accumulator)
        assert_near(optimizer.apply_gradients({"w": g}, {"w": w})["w"], np.full((4, 6), -0.1), dtype)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 33])
def test_many_small_tensors_of_one_shape(count):
    rng = np.random.default_rng(0)
    params = {str(i): mx.array(rng.normal(size=(3, 2)), mx.float32) for i in range(count)}
    gradients = [tree_map(lambda w: mx.array(rng.normal(size=w.shape), mx.float32), params) for _ in range(3)]
    optimizer, got = Adagrad(0.1), params
    for g in gradients:
        got = optimizer.apply_gradients(g, got)
    for key in params:
        want = adagrad(to_numpy(params[key]), [to_numpy(g[key]) for g in gradients])[-1]
        assert_near(got[key], want[0])
        assert_near(optimizer.state[key]["v"], want[1])


@options
@pytest.mark.parametrize("count", [1, 20], ids=["large", "batches"])
def test_streams_change_no_bit(options, count, cpu, monkeypatch):
    shapes = {"a": (3, 2), "b": (5,), "c": (2, 2)}
    names = [f"{key}{i}" for key in shapes for i in range(count)]
    rng = np.random.default_rng(0)
    params = {name: mx.array(rng.normal(size=shapes[name[0]]), mx.float32) for name in names}
    gradients = tree_map(lambda w: mx.array(rng.normal(size=w.shape) * (rng.random(w.shape) < 0.5), mx.float32), params)

    def steps():
        optimizer = Adagrad(0.1, **options, fused=False)
        new = optimizer.apply_gradients(gradients, optimizer.apply_gradients(gradients, params))

        def loss(lr, g):  # the derivative at a v of 0, too
            other = Adagrad(0.1, **options, fused=False)
            other.learning_rate = lr
            return sum(mx.square(w).sum() for w in other.apply_gradients(g, params).values())

        by_lr, by_gradients = mx.grad(loss, argnums=[0, 1])(mx.array(0.1), gradients)
        return by_lr, [new, optimizer.state, by_gradients]

    want_by_lr, want = steps()
    want = bits(want)
    assigned = []
    assign = StreamScheduler.assign
    monkeypatch.setattr(streams, "PARALLEL_ELEMENTS", 1)
    monkeypatch.setattr(StreamScheduler, "assign", lambda *args: assigned.append(assign(*args)) or assigned[-1])
    by_lr, got = steps()
    assert bits(got) == want
    assert by_lr.item() == pytest.approx(want_by_lr.item(), rel=1e-5)  # a sum over all tensors, in another order
    assert any(scalars.smallest is not None for _, scalars in assigned)


TRANSFORMATIONS = {
    "compile": lambda step, w: mx.compile(step)(w),
    "shapeless compile": lambda step, w: mx.compile(step, shapeless=True)(w),
    "vmap": lambda step, w: mx.vmap(step)(mx.stack([w, w + 1]))[1],
    "grad": lambda step, w: mx.grad(lambda w: mx.square(step(w)).sum())(w),
    "jvp": lambda step, w: mx.jvp(step, [w], [w])[1][0],
    "checkpoint": lambda step, w: mx.grad(lambda w: mx.checkpoint(step)(w).sum())(w),
}


@pytest.mark.parametrize("transform", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
@pytest.mark.parametrize("tracer", ["parameter", "gradient", "accumulator", "learning rate"])
def test_transformations_of_an_update_in_place(transform, tracer, cpu, monkeypatch):
    def step(x):
        w = x if tracer == "parameter" else mx.ones((23, 3))
        optimizer = Adagrad(0.1, fused=False)
        optimizer.init({"w": w})
        if tracer == "accumulator":
            optimizer.state["w"]["v"] = mx.square(x)
        if tracer == "learning rate":
            optimizer.learning_rate = x.sum()
        return optimizer.apply_gradients({"w": x if tracer == "gradient" else mx.ones((23, 3))}, {"w": w})["w"]

    x = mx.array(np.random.default_rng(0).normal(size=(23, 3)), mx.float32)
    want = transform(step, x)
    monkeypatch.setattr(streams, "IN_PLACE_ELEMENTS", 1)
    assert mx.allclose(transform(step, x), want, rtol=1e-6, atol=0)


def test_a_gpu_gets_whole_tensors_on_one_stream(monkeypatch):
    monkeypatch.setattr(streams, "PARALLEL_ELEMENTS", 1)
    scalars, scheduler = Scalars(mx.array(0.1), mx.array(0.0), mx.array(0.0)), StreamScheduler()
    scheduler.active = False
    for _ in range(3):
        stream, same = scheduler.assign(16, scalars)
        assert same is scalars and isinstance(stream, nullcontext)


@pytest.mark.parametrize("in_place", [False, True], ids=["one pass", "in place"])
def test_a_step_on_several_streams_can_be_exported(in_place, cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(streams, "PARALLEL_ELEMENTS", 1)
    monkeypatch.setattr(streams, "IN_PLACE_ELEMENTS", 20 if in_place else 1000)
    arrays = [mx.ones((23, 2)), mx.ones((3, 2)), mx.ones((4,))]

    def step(*parameters):
        params = dict(enumerate(parameters))
        return list(Adagrad(0.1, fused=False).apply_gradients(params, params).values())

    mx.export_function(str(tmp_path / "step.mlxfn"), step, *arrays)
    imported: Any = mx.import_function(str(tmp_path / "step.mlxfn"))
    assert bits(imported(*arrays)) == bits(step(*arrays))


@options
def test_an_eager_update_is_one_kernel_a_tensor(options, cpu, tmp_path):
    """MLX splits what it compiles where an intermediate result is used in two ways, or where expressions are deep."""
    params = {str(i): mx.ones((4, 3 + i)) for i in range(3)}
    optimizer = Adagrad(0.1, **options, fused=False)
    optimizer.init(params)
    mx.eval(params, optimizer.state)
    new = optimizer.apply_gradients(params, params)
    with open(tmp_path / "graph.dot", "w") as file:
        mx.export_to_dot(file, *new.values(), *(optimizer.state[key]["v"] for key in params))
    nodes = re.findall(r'label ="([A-Za-z]+)', (tmp_path / "graph.dot").read_text())
    assert sum(node.startswith("Compiled") for node in nodes) == len(params)
    assert not {"Square", "Sqrt"} & set(nodes)


def test_streams_leave_the_kernels_of_a_compiled_step_whole(cpu, monkeypatch, tmp_path):
    monkeypatch.setattr(streams, "PARALLEL_ELEMENTS", 1)
    params = {str(i): mx.ones((4, 3)) for i in range(40)}
    optimizer = Adagrad(0.1, fused=False)
    optimizer.init(params)
    mx.eval(params, optimizer.state)
    step = mx.compile(optimizer.apply_gradients, inputs=optimizer.state, outputs=optimizer.state)
    new = step(params, params)
    with open(tmp_path / "graph.dot", "w") as file:
        mx.export_to_dot(file, *new.values())
    nodes = re.findall(r'label ="([A-Za-z]+)', (tmp_path / "graph.dot").read_text())
    assert sum(node.startswith("Compiled") for node in nodes) == len(params)
    assert "Broadcast" not in nodes


def test_layouts():
    base = mx.array(np.random.default_rng(0).normal(size=(6, 8)), mx.float32)
    views = {
        "transposed": base.T,
        "sliced": base[1::2, 2:7],
        "offset": base.reshape(-1)[1:12],
        "broadcast": mx.broadcast_to(base[0], (4, 8)),
    }
    for w in views.values():
        for g in (w, mx.contiguous(w)):
            got, _ = run(Adagrad(0.1), w, [g, g])
            assert_near(got, adagrad(to_numpy(w), [to_numpy(g)] * 2)[-1][0])


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2), (5,), ()], ids=str)
@options
def test_row_wise_equals_float64(shape, options):
    w, gradients = tensors(shape)
    got_w, got_v = run(Adagrad(0.1, **options, accumulator=RowWise()), w, gradients)
    want_w, want_v = adagrad(to_numpy(w), [to_numpy(g) for g in gradients], row_wise=True, **options)[-1]
    assert got_v.shape == (shape[:1] if len(shape) > 1 else shape)
    assert_near(got_w, want_w)
    assert_near(got_v, want_v)


def test_accumulator_in_the_parameters_dtype():
    w, gradients = tensors((6,), (mx.bfloat16, mx.bfloat16))
    _, v = run(Adagrad(0.1, accumulator=Dense("parameter")), w, gradients)
    assert v.dtype == mx.bfloat16


def test_half_precision_accumulator_does_not_stall():
    w = g = mx.full((3,), 0.1, mx.bfloat16)
    ours, stock = Adagrad(1e-3), optim.Adagrad(1e-3)
    for _ in range(3000):
        ours.apply_gradients({"w": g}, {"w": w})
        stock.apply_gradients({"w": g}, {"w": w})
        mx.eval(ours.state, stock.state)
    true = 3000 * to_numpy(g)[0] ** 2
    assert abs(to_numpy(ours.state["w"]["v"])[0] / true - 1) < 1e-4
    assert to_numpy(stock.state["w"]["v"])[0] < true / 5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("inside", [False, True])
def test_zero_gradient_never_gives_nan(dtype, inside):
    w = mx.ones((4,), dtype)
    for optimizer in (
        Adagrad(0.1, eps_inside_sqrt=inside),
        Adagrad.from_rule(0.1, Rule(eps=0.0, eps_inside_sqrt=inside)),
    ):
        new, _ = run(optimizer, w, [mx.zeros((4,), dtype)] * 2)
        assert mx.array_equal(new, w)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_where_eps_and_v_are_both_zero_the_update_is_zero(inside, fused, request):
    if fused:
        request.getfixturevalue("kernel_device")
    w, g = mx.ones((9,)), mx.full((9,), 1e-25)  # the square of this gradient is 0 in fp32
    optimizer = Adagrad.from_rule(0.1, Rule(eps=0.0, eps_inside_sqrt=inside))
    optimizer.fused = fused
    assert mx.array_equal(optimizer.apply_gradients({"w": g * 0 + g}, {"w": w})["w"], w)
    assert mx.array_equal(optimizer.state["w"]["v"], mx.zeros((9,)))
    large = Adagrad.from_rule(1e30, Rule(eps=0.0, eps_inside_sqrt=inside))
    large.fused = fused
    assert mx.array_equal(large.apply_gradients({"w": g}, {"w": w})["w"], w)


def as_state(pairs) -> Any:
    return tree_unflatten(pairs)


# --- learning rates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate",
    [
        0.1,
        np.float32(0.1),
        np.float64(0.1),
        mx.array(0.1),
        mx.array([0.1]),
        np.array([0.1]),
        lambda: 0.1,
        lambda step: 0.1,
    ],
    ids=["float", "np32", "np64", "0-d", "one", "numpy one", "callable", "schedule"],
)
def test_learning_rate_kinds(rate):
    w, gradients = tensors((4,))
    optimizer = Adagrad(rate)
    got, _ = run(optimizer, w, gradients)
    assert optimizer.learning_rate.dtype == mx.float32 and optimizer.learning_rate.shape == ()
    assert abs(optimizer.learning_rate.item() - 0.1) < 1e-7
    assert_near(got, adagrad(to_numpy(w), [to_numpy(g) for g in gradients])[-1][0])


def test_learning_rate_of_zero_and_int():
    w, gradients = tensors((4,))
    assert mx.array_equal(run(Adagrad(0), w, gradients)[0], w)
    assert Adagrad(1).learning_rate.item() == 1.0


def test_schedule_sees_the_steps_made_before():
    w, gradients = tensors((4,), steps=6)
    schedule = optim.exponential_decay(0.3, 0.7)
    got, _ = run(Adagrad(schedule), w, gradients)
    want = adagrad(to_numpy(w), [to_numpy(g) for g in gradients], learning_rate=lambda t: 0.3 * 0.7**t)[-1][0]
    assert_near(got, want)


def test_learning_rate_is_settable():
    w, gradients = tensors((4,))
    optimizer = Adagrad(0.3)
    optimizer.learning_rate = 0.1
    assert_near(run(optimizer, w, gradients)[0], adagrad(to_numpy(w), [to_numpy(g) for g in gradients])[-1][0])
    optimizer.learning_rate = optim.exponential_decay(0.2, 0.5)
    assert abs(optimizer.learning_rate.item() - 0.2 * 0.5**5) < 1e-6


# --- what is refused, before anything changes -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["learning_rate", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"])
@pytest.mark.parametrize(
    "value, error",
    [
        (-1.0, ValueError),
        (float("nan"), ValueError),
        (1e39, ValueError),
        (float("inf"), ValueError),
        ("x", TypeError),
        (True, TypeError),
    ],
    ids=repr,
)
def test_bad_hyperparameters(name, value, error):
    with pytest.raises(error, match=rf"\[Adagrad\] '{name}'"):
        Adagrad(**{"learning_rate": 0.1, name: value})


@pytest.mark.parametrize("eps", [0.0, -1.0])
def test_eps_must_be_positive_in_mlx_words(eps):
    with pytest.raises(
        ValueError, match=r"\[Adagrad\] 'eps' should be >0 unless initial_accumulator_value is, but got"
    ):
        Adagrad(0.1, eps=eps)


@pytest.mark.parametrize(
    "arguments",
    [
        {"maximize": 1},
        {"decoupled_weight_decay": "no"},
        {"accumulator": "dense"},
        {"fused": 1},
        {"differentiable": None},
    ],
    ids=str,
)
def test_bad_kinds(arguments):
    with pytest.raises(TypeError, match=next(iter(arguments))):
        Adagrad(0.1, **arguments)


def test_bad_learning_rate_arrays():
    with pytest.raises(ValueError, match="one element"):
        Adagrad(mx.array([0.1, 0.2]))
    with pytest.raises(TypeError, match="real number"):
        Adagrad(mx.array(True))
    with pytest.raises(ValueError, match="non-negative"):
        Adagrad(lambda: -1.0)


BAD_STEPS = {
    "shape": ({"w": mx.ones((3,))}, {"w": mx.ones((4,))}, ValueError, r"'w' has shape \(3,\) but the parameter \(4,\)"),
    "integer": ({"w": mx.ones((3,))}, {"w": mx.ones((3,), mx.int32)}, ValueError, "'w' is mlx.core.int32"),
    "bool": ({"w": mx.ones((3,))}, {"w": mx.ones((3,), mx.bool_)}, ValueError, "'w' is mlx.core.bool"),
    "no parameter": ({"w": mx.ones((3,))}, {"x": mx.ones((3,))}, ValueError, "'w' but no parameter"),
    "too long": ({"w": [mx.ones(1), mx.ones(1)]}, {"w": [mx.ones(1)]}, ValueError, r"'w\.1' but no parameter"),
    "complex": ({"w": mx.ones((3,), mx.complex64)}, {"w": mx.ones((3,))}, ValueError, "complex64 but the parameter"),
    "number": ({"w": 1.0}, {"w": mx.ones((3,))}, TypeError, "gradient of 'w' must be an array but got float"),
    "reserved": ({"step": mx.ones((3,))}, {"step": mx.ones((3,))}, ValueError, "may not be named 'step'"),
}


@pytest.mark.parametrize("has_state", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("gradients, parameters, error, match", BAD_STEPS.values(), ids=BAD_STEPS.keys())
def test_a_bad_step_changes_nothing(gradients, parameters, error, match, has_state):
    optimizer = Adagrad(optim.exponential_decay(0.1, 0.9))
    good = {"a": mx.ones((2,)), **({"w": mx.ones((3,))} if has_state else {})}
    optimizer.apply_gradients(good, good)
    before = bits(optimizer.state)
    with pytest.raises(error, match=match):
        optimizer.apply_gradients({"a": mx.ones((2,)), **gradients}, {"a": mx.ones((2,)), **parameters})
    assert bits(optimizer.state) == before


def test_state_that_is_no_array_is_refused():
    optimizer = Adagrad(0.1)
    optimizer.state["w"] = {"v": "1.0"}
    with pytest.raises(TypeError, match="state 'v' of 'w' must be an array but got str"):
        optimizer.apply_gradients({"w": mx.ones((4,))}, {"w": mx.ones((4,))})


class Pair(NamedTuple):
    first: Any
    second: Any


def test_trees_keep_their_kinds():
    tree = {"pair": Pair(mx.ones((3,)), (mx.ones((2,)), [mx.ones((1,))]))}
    new = Adagrad(0.1).apply_gradients(tree, tree)
    assert isinstance(new["pair"], Pair) and isinstance(new["pair"].second, tuple)
    assert isinstance(new["pair"].second[1], list)
    want = optim.Adagrad(0.1).apply_gradients(tree, tree)
    assert bits(new) == bits(want)
    leaves: Any = (mx.ones((3,)),)
    root = Adagrad(0.1).apply_gradients(leaves, leaves)
    assert isinstance(root, tuple) and len(root) == 1


def test_state_of_another_shape_is_refused():
    optimizer = Adagrad(0.1)
    optimizer.apply_gradients({"w": mx.ones((3,))}, {"w": mx.ones((3,))})
    with pytest.raises(ValueError, match=r"state 'v' of 'w' has shape \(3,\) but must have \(4,\)"):
        optimizer.apply_gradients({"w": mx.ones((4,))}, {"w": mx.ones((4,))})


# --- state ------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)]
        self.scale = mx.ones(())

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


def loss_fn(model, x):
    return mx.mean(mx.square(model(x)))


def test_only_what_has_a_gradient_gets_state():
    model = Model()
    model.counts = mx.arange(3)
    model.freeze(keys=["counts"], recurse=False)  # MLX gives integers a gradient of zeros otherwise
    model.layers[0].freeze()
    _, grads = nn.value_and_grad(model, loss_fn)(model, mx.ones((2, 4)))
    optimizer = Adagrad(0.1)
    optimizer.update(model, grads)
    keys = {k for k, _ in tree_flatten(optimizer.state)}
    assert keys == {"step", "learning_rate", "layers.2.weight.v", "layers.2.bias.v", "scale.v"}
    model.layers[0].unfreeze()
    model.layers[0].freeze(keys=["bias"])
    _, grads = nn.value_and_grad(model, loss_fn)(model, mx.ones((2, 4)))
    optimizer.update(model, grads)  # a parameter whose first gradient comes later
    assert {k for k, _ in tree_flatten(optimizer.state)} == keys | {"layers.0.weight.v"}


def test_quantized_base_is_left_alone():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    nn.quantize(model, class_predicate=lambda path, _: path.endswith("0"))
    model.freeze()
    model.layers[1].unfreeze()
    _, grads = nn.value_and_grad(model, lambda m, x: m(x).sum())(model, mx.ones((2, 64)))
    optimizer = Adagrad(0.1)
    optimizer.update(model, grads)
    assert {k for k, _ in tree_flatten(optimizer.state)} == {
        "step", "learning_rate", "layers.1.weight.v", "layers.1.bias.v",
    }  # fmt: skip


def test_init_makes_all_state_and_skips_integers():
    optimizer = Adagrad(0.1, initial_accumulator_value=0.5)
    params = {"w": mx.ones((2,), mx.bfloat16), "ids": mx.arange(3), "l": [mx.zeros((3,)), {"b": mx.zeros(())}]}
    optimizer.init(params)
    assert {k for k, _ in tree_flatten(optimizer.state)} == {"step", "learning_rate", "w.v", "l.0.v", "l.1.b.v"}
    assert optimizer.state["w"]["v"].dtype == mx.float32 and optimizer.state["w"]["v"][0].item() == 0.5
    model = Model()
    Adagrad(0.1).init(model.trainable_parameters())
    Adagrad(0.1).init(model)


@pytest.mark.parametrize("hole", [{}, None])
def test_absent_gradients(hole):
    w = mx.ones((3,))
    params = {"a": w, "l": [w, w], "t": (w, w), "n": {"x": w, "y": w}}
    gradients = {"l": [hole, w], "t": (w, hole), "n": {"x": hole, "y": w}, "a": hole}
    optimizer = Adagrad(0.1)
    for _ in range(2):
        new = optimizer.apply_gradients(gradients, params)
    assert {k for k, _ in tree_flatten(optimizer.state)} == {"step", "learning_rate", "l.1.v", "t.0.v", "n.y.v"}
    if hole is None:  # the parameter as it is; a {} stays a hole, as in stock
        assert mx.array_equal(new["l"][0], w) and mx.array_equal(new["n"]["x"], w)
    else:
        assert new["l"][0] == new["n"]["x"] == {}
    assert isinstance(new["t"], tuple) and not mx.array_equal(new["l"][1], w)
    later = optimizer.apply_gradients({"l": [w]}, params)  # a shorter list, and a parameter that had no gradient yet
    assert set(later) == {"l"} and len(later["l"]) == 1 and "l.0.v" in dict(flat(optimizer.state))


def test_a_list_of_arrays_split_by_a_multi_optimizer():
    w = [mx.ones((2,)), mx.ones((2, 2))]
    optimizer = optim.MultiOptimizer([Adagrad(0.1), optim.SGD(0.1)], [lambda path, g: g.ndim > 1])
    new: Any = optimizer.apply_gradients({"w": w}, {"w": w})
    assert [x.shape for x in new["w"]] == [(2,), (2, 2)]


def test_state_from_stock_takes_up_steps_per_parameter():
    w, (g, *_) = tensors((3,))
    stock = optim.Adagrad(0.1)
    run(stock, w, [g, g])
    optimizer = Adagrad.from_rule(0.1, Rule(step_per_parameter=True, lr_decay=0.5))
    optimizer.state = as_state(tree_flatten(stock.state))
    optimizer.apply_gradients({"w": g}, {"w": w})
    assert dict(flat(optimizer.state))["w.step"].item() == 3


def test_state_that_is_no_dict_is_refused():
    optimizer = Adagrad(0.1)
    state: Any = optimizer.state
    for wrong in (mx.ones((3,)), mx.zeros((1,)), [mx.ones(())]):
        state["w"] = wrong
        with pytest.raises(ValueError, match=r"\[Adagrad\] the state of 'w' must be a dict but got (array|list)"):
            optimizer.apply_gradients({"w": mx.ones((3,))}, {"w": mx.ones((3,))})
    assert optimizer.step.item() == 0


def test_a_schedule_or_predicate_that_raises_changes_nothing():
    rate = [0.1]
    optimizer = Adagrad(lambda: rate[0], groups=[{"params": "b", "lr": optim.exponential_decay(0.1, 0.5)}])
    rate[0] = -1.0
    params = {"a": mx.ones((3,)), "b": mx.ones((3,))}
    before = bits(optimizer.state)
    with pytest.raises(ValueError, match="'learning_rate' must be non-negative"):
        optimizer.apply_gradients(params, params)
    assert bits(optimizer.state) == before
    picky = Adagrad(0.1, weight_decay_mask=lambda path, w: {"a": True}[path])
    with pytest.raises(KeyError):
        picky.apply_gradients(params, params)
    assert list(picky.state) == ["step", "learning_rate"]


def test_a_subclass_may_override_apply_single():
    class SignAdagrad(Adagrad):
        def apply_single(self, gradient, parameter, state):
            return super().apply_single(mx.sign(gradient), parameter, state)

    w, gradients = tensors((6,))
    groups = [{"params": "w", "lr": 0.2}]
    got, v = run(SignAdagrad(0.1, lr_decay=0.5, groups=groups), w, gradients)
    signs = [np.sign(to_numpy(g)) for g in gradients]
    want_w, want_v = adagrad(to_numpy(w), signs, learning_rate=0.2, lr_decay=0.5)[-1]
    assert_near(got, want_w)
    assert_near(v, want_v)


@pytest.mark.parametrize("eps", [1e-30, 1e-10])
def test_a_tiny_eps_is_not_replaced(eps, cpu):
    w, g = mx.ones((3,)), mx.full((3,), 1e-18)
    assert_near(Adagrad(0.1, eps=eps).apply_gradients({"w": g}, {"w": w})["w"], 1 - 0.1 * 1e-18 / (1e-18 + eps))


def test_a_complex_part_that_is_not_finite_leaves_the_other_alone():
    w = mx.array([0j])
    optimizer = Adagrad(0.1)
    for _ in range(2):
        w = optimizer.apply_gradients({"w": mx.array([1 + 1e20j])}, {"w": w})["w"]
    want = adagrad([0.0], [[1.0], [1.0]])[-1]
    assert_near(np.real(to_numpy(w)), want[0])
    assert_near(np.real(to_numpy(optimizer.state["w"]["v"])), want[1])


def test_rows_without_elements():
    w = mx.ones((4, 0))
    optimizer = Adagrad(0.1, accumulator=RowWise())
    optimizer.apply_gradients({"w": w}, {"w": w})
    assert mx.array_equal(optimizer.state["w"]["v"], mx.zeros((4,)))


def test_groups_and_their_state():
    with pytest.raises(ValueError, match=r"\[Adagrad groups\[0\]\] 'eps' should be >0"):
        Adagrad(0.1, groups=[{"params": "a", "eps": 0.0}])
    two = Adagrad(0.1, groups=[{"params": "a", "lr": 0.2}, {"params": "x[0]", "lr": 0.3}])
    params = {"a": mx.ones((2,)), "x[0]": mx.ones((2,))}
    new = two.apply_gradients(params, params)
    assert_near(new["x[0]"], np.full(2, 0.7))
    one = Adagrad(0.1, groups=[{"params": "a", "lr": 0.2}])
    one.state = as_state(tree_flatten(two.state))
    with pytest.raises(ValueError, match="the state is that of 2 groups, but there are 1"):
        one.apply_gradients({"a": mx.ones((2,))}, {"a": mx.ones((2,))})


def test_assigned_state_reaches_a_compiled_step():
    params = {"w": mx.ones((3,)), "l": [mx.ones((2,))]}
    optimizer = Adagrad(0.1)
    optimizer.init(params)
    state = optimizer.state
    step = partial(mx.compile, inputs=state, outputs=state)(lambda p: optimizer.apply_gradients(p, p))
    step(params)
    saved = as_state([(k, mx.array(a)) for k, a in flat(state)])
    for _ in range(3):
        step(params)
    optimizer.state = saved
    assert optimizer.state is state and state["step"].item() == 1
    step(params)
    assert state["step"].item() == 2 and state["l"][0]["v"][0].item() == 2.0 and saved["step"].item() == 1
    with pytest.raises(TypeError, match="'state' must be a dict but got list"):
        wrong: Any = []
        optimizer.state = wrong


def test_state_in_tuples_is_kept():
    w = mx.ones((2,))
    optimizer = Adagrad(0.1)
    state: Any = optimizer.state
    state["t"] = ({"v": mx.full((2,), 3.0)}, {})  # as stock makes it for a tuple of parameters
    optimizer.apply_gradients({"t": (w, w)}, {"t": (w, w)})
    assert [state["v"][0].item() for state in optimizer.state["t"]] == [4.0, 1.0]


def test_empty_updates_count_steps():
    optimizer = Adagrad(optim.exponential_decay(0.1, 0.5))
    nothing: Any = {}
    for _ in range(3):
        optimizer.update(nothing, {})
    assert optimizer.step.item() == 3 and abs(optimizer.learning_rate.item() - 0.025) < 1e-8


def test_bf16_accumulator_from_a_stock_checkpoint_continues_in_fp32():
    w, gradients = tensors((4,), (mx.bfloat16, mx.bfloat16))
    stock = optim.Adagrad(0.1)
    run(stock, w, gradients[:1])
    assert stock.state["w"]["v"].dtype == mx.bfloat16
    ours = Adagrad(0.1)
    ours.state = as_state(tree_flatten(stock.state))
    start = to_numpy(ours.state["w"]["v"])
    run(ours, w, gradients[1:])
    assert ours.state["w"]["v"].dtype == mx.float32
    assert_near(ours.state["w"]["v"], start + sum(to_numpy(g) ** 2 for g in gradients[1:]))
    stock.state = as_state(tree_flatten(ours.state))  # and back
    run(stock, w, gradients)


@options
def test_saved_loaded_and_continued_equals_never_stopped(options, tmp_path):
    params = {"l": [{"w": tensors((3, 2), seed=3)[0]}, {"w": tensors((4,), seed=4)[0]}]}
    gradients = [tree_map(lambda w, s=s: mx.sin(w * s + s), params) for s in range(1, 9)]
    straight = Adagrad(optim.exponential_decay(0.2, 0.9), **options)
    whole = params
    for g in gradients:
        whole = straight.apply_gradients(g, whole)
    first, half = Adagrad(optim.exponential_decay(0.2, 0.9), **options), params
    for g in gradients[:4]:
        half = first.apply_gradients(g, half)
    mx.save_safetensors(str(tmp_path / "s.safetensors"), dict(tree_flatten(first.state)))
    second = Adagrad(optim.exponential_decay(0.2, 0.9), **options)
    loaded: Any = mx.load(str(tmp_path / "s.safetensors"))
    second.state = as_state(list(loaded.items()))
    for g in gradients[4:]:
        half = second.apply_gradients(g, half)
    assert bits(half) == bits(whole) and bits(second.state) == bits(straight.state)


# --- compile, tracing, threads, memory --------------------------------------------------------------------------------


@options
@pytest.mark.parametrize("initialised", [False, True])
def test_compiled_equals_plain(options, initialised):
    schedule = optim.exponential_decay(0.2, 0.9)
    x = mx.array(np.random.default_rng(0).normal(size=(2, 4)), mx.float32)

    def train(compiled):
        mx.random.seed(3)
        model, optimizer = Model(), Adagrad(schedule, **options)
        if initialised:
            optimizer.init(model.trainable_parameters())
        state, traces = [model.state, optimizer.state, mx.random.state], []

        def step(x):
            traces.append(1)
            loss, grads = nn.value_and_grad(model, loss_fn)(model, x)
            optimizer.update(model, grads)
            return loss

        step = partial(mx.compile, inputs=state, outputs=state)(step) if compiled else step
        for _ in range(6):
            step(x)
            mx.eval(state)
        return model.parameters(), optimizer.state, len(traces)

    plain, plain_state, _ = train(False)
    compiled, compiled_state, traces = train(True)
    assert traces == (1 if initialised else 2)
    for (_, a), (_, b) in zip(tree_flatten(plain), tree_flatten(compiled), strict=True):
        assert_near(a, to_numpy(b))
    for (_, a), (_, b) in zip(tree_flatten(plain_state), tree_flatten(compiled_state), strict=True):
        assert_near(a, to_numpy(b))


def test_pure_compiled_step():
    optimizer = Adagrad(0.1)
    w, gradients = tensors((4,))
    optimizer.init({"w": w})

    @mx.compile
    def step(params, state, g):
        optimizer.state = state
        return optimizer.apply_gradients(g, params), optimizer.state

    params, state = {"w": w}, optimizer.state
    for g in gradients:
        params, state = step(params, state, {"w": g})
    assert_near(params["w"], adagrad(to_numpy(w), [to_numpy(g) for g in gradients])[-1][0])


def test_no_tracer_outlives_a_compiled_step():
    optimizer = Adagrad(optim.exponential_decay(0.1, 0.9), groups=[{"params": "w", "lr": 0.2}])
    params = {"w": mx.ones((3,)), "x": mx.ones((40_000,))}
    optimizer.init(params)
    step = partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)(
        lambda p: optimizer.apply_gradients(p, p)
    )
    mx.eval(step(params), optimizer.state)
    arrays = [a for holder in (vars(optimizer), vars(optimizer.groups)) for _, a in tree_flatten(list(holder.values()))]
    mx.eval([a for a in arrays if isinstance(a, mx.array)])  # a tracer raises
    mx.eval(optimizer.apply_gradients(params, params), optimizer.state)


def test_nothing_is_evaluated_inside_the_update(cpu):
    # an update that evaluated its inputs would raise here, as any evaluation of a traced value does
    optimizer = Adagrad(0.1)
    mx.compile(lambda w, g: optimizer.apply_gradients({"w": g}, {"w": w}))(mx.ones((3,)), mx.ones((3,)))
    w, g = mx.ones((5_000_000,)), mx.ones((5_000_000,))
    mx.eval(w, g)
    optimizer = Adagrad(0.1)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    optimizer.apply_gradients({"w": g}, {"w": w})
    assert mx.get_peak_memory() - before < 1_000_000


@pytest.mark.parametrize(
    "options, copies",
    [
        ({}, 0.1),
        ({"weight_decay": 0.1, "decoupled_weight_decay": True, "lr_decay": 0.1, "maximize": True}, 0.1),
        ({"weight_decay": 0.1}, 1.1),  # v reads w then, and w is still being read when it could be overwritten
    ],
    ids=["plain", "decoupled", "coupled"],
)
def test_large_tensors_are_updated_in_place(cpu, options, copies):
    n = 16_000_000
    params, g = {"w": mx.ones((n,))}, {"w": mx.ones((n,))}
    optimizer = Adagrad(0.1, fused=False, **options)
    for _ in range(2):
        params = optimizer.apply_gradients(g, params)
        mx.eval(params, optimizer.state)
    gc.collect()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    params = optimizer.apply_gradients(g, params)
    mx.eval(params, optimizer.state)
    assert mx.get_peak_memory() - before <= copies * 4 * n


def test_threads_have_streams_of_their_own(cpu):
    w, g = mx.ones((streams.PARALLEL_ELEMENTS,)), mx.ones((streams.PARALLEL_ELEMENTS,))
    mx.eval(w, g)
    optimizer, failures = Adagrad(0.1), []

    def work():
        try:
            with mx.stream(mx.new_stream(mx.cpu)):
                new = optimizer.apply_gradients({"a": g, "b": g}, {"a": w, "b": w})
                mx.eval(new, optimizer.state)
        except Exception as error:  # noqa: BLE001 - reported below
            failures.append(error)

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert failures == []


def test_apply_single_alone():
    optimizer = Adagrad(0.1, lr_decay=0.5)
    w, (g, *_) = tensors((4,))
    state = {}
    optimizer.init_single(w, state)
    new = optimizer.apply_single(g, w, state)
    want_w, want_v = adagrad(to_numpy(w), [to_numpy(g)], lr_decay=0.5)[-1]
    assert_near(new, want_w)
    assert_near(state["v"], want_v)


def test_multi_optimizer():
    model = Model()
    optimizer = optim.MultiOptimizer([Adagrad(0.1), optim.SGD(0.1)], [lambda name, w: w.ndim > 1])
    for _ in range(2):
        _, grads = nn.value_and_grad(model, loss_fn)(model, mx.ones((2, 4)))
        optimizer.update(model, grads)
    adagrad_keys = {k for k, _ in tree_flatten(optimizer.state["states"][0])}
    assert adagrad_keys == {"step", "learning_rate", "layers.0.weight.v", "layers.2.weight.v"}


def test_a_held_back_step_leaves_state_and_learning_rates_alone():
    groups = [{"params": "a", "lr": optim.exponential_decay(0.3, 0.5)}]
    optimizer = Adagrad(optim.exponential_decay(0.1, 0.5), groups=groups)
    params = {"a": mx.ones((3,)), "b": mx.ones((3,))}
    for _ in range(2):
        params = optimizer.apply_gradients(params, params)
    before = bits([params, optimizer.state])
    for flag in (mx.array(False), False):
        params = optimizer.apply_modified(params, params, Modifiers(apply=flag))
        assert bits([params, optimizer.state]) == before
    optimizer.apply_modified(params, params, Modifiers(apply=mx.array(True)))
    assert optimizer.step.item() == 3 and abs(optimizer.learning_rate.item() - 0.025) < 1e-8


def test_right_without_a_compiler(tmp_path):
    code = """
import shutil, mlx.core as mx
from mlx_adagrad import Adagrad
assert shutil.which("g++") is None
params = {"w": mx.arange(5.0), "b": mx.arange(40000.0)}
optimizer = Adagrad(0.1, weight_decay=0.03125, eps=0.0078125)
for _ in range(3):
    params = optimizer.apply_gradients(params, params)
print(params["w"].tolist(), params["b"][-1].item())
"""
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": os.getcwd()}
    without = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"PATH": ""}, capture_output=True, text=True, check=False
    )
    assert without.returncode == 0, without.stderr
    rows = ast.literal_eval(without.stdout.replace("] ", "], "))
    for got, start in ((rows[0], np.arange(5.0)), ([rows[1]], np.array([39999.0]))):
        w, v = start, np.zeros_like(start)
        for _ in range(3):
            g = w + 0.03125 * w
            v = v + g * g
            w = w - 0.1 * g / (np.sqrt(v) + 0.0078125)
        np.testing.assert_allclose(got, w, rtol=1e-5)


# --- derivatives ------------------------------------------------------------------------------------------------------


@options
@pytest.mark.parametrize("way", [{"fused": False}, {"differentiable": True}], ids=str)
def test_gradients_flow_through_an_update(options, way):
    w, (g1, g2, *_) = tensors((5,), seed=7)
    g1, g2 = (mx.where(mx.abs(g) < 0.01, 0.5, g) for g in (g1, g2))

    def loss(lr, w, g):
        optimizer = Adagrad(lr, **options, **way)
        params = {"w": w}
        for gradient in (g, g2):
            params = optimizer.apply_gradients({"w": gradient}, params)
        return mx.sum(mx.square(params["w"]))

    def numpy_loss(lr, w, g):
        return np.sum(adagrad(w, [g, to_numpy(g2)], learning_rate=lr, **options)[-1][0] ** 2)

    d_lr, d_w, d_g = mx.grad(loss, argnums=(0, 1, 2))(mx.array(0.1), w, g1)
    h, at = 1e-6, (0.1, to_numpy(w), to_numpy(g1))
    numeric = (numpy_loss(0.1 + h, *at[1:]) - numpy_loss(0.1 - h, *at[1:])) / (2 * h)
    np.testing.assert_allclose(d_lr.item(), numeric, rtol=1e-3)
    for argument, analytic in ((1, d_w), (2, d_g)):
        for i in range(5):
            shift = np.zeros(5)
            shift[i] = h
            up: list[Any] = [*at]
            down: list[Any] = [*at]
            up[argument], down[argument] = at[argument] + shift, at[argument] - shift
            want = (numpy_loss(*up) - numpy_loss(*down)) / (2 * h)
            np.testing.assert_allclose(analytic[i].item(), want, rtol=2e-3, atol=1e-4)


def test_second_order_and_dead_elements():
    def loss(lr):
        w = Adagrad(lr, differentiable=True).apply_gradients({"w": mx.array([0.0, 1.0, 2.0])}, {"w": mx.ones((3,))})[
            "w"
        ]
        return mx.sum(w * w * w)

    second = mx.grad(mx.grad(loss))(mx.array(0.1))
    assert abs(second.item() - 2 * 6 * 0.9) < 1e-3  # d²/dlr² of 2 (1 - lr)³

    def through_gradient(g):
        return mx.sum(Adagrad(0.1, eps=1e-3, fused=False).apply_gradients({"w": g}, {"w": mx.ones((3,))})["w"])

    assert mx.all(mx.isfinite(mx.grad(through_gradient)(mx.array([0.0, 1.0, 2.0]))))


def test_tolerances_are_tight():
    """The shared tolerances tell eps inside the root from eps outside of it, and one step from the next."""
    w, gradients = tensors((6, 5))
    outside, inside = (run(Adagrad(0.1, eps=0.25, eps_inside_sqrt=i), w, gradients)[0] for i in (False, True))
    assert np.abs(to_numpy(outside) - to_numpy(inside)).max() > 100 * RELATIVE[mx.float32]
    assert len(DTYPE_PAIRS) == 9
