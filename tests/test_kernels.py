"""The Metal kernel of the dense update: equal to the operations and to numpy float64, and as lean as promised."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from cases import GPU_DTYPES, assert_near, dtype_pairs, options, run, tensors, to_numpy
from mlx_adagrad import Adagrad, Dense
from mlx_adagrad.update import kernels, ops
from mlx_adagrad.update.modifiers import Modifiers
from reference import adagrad

pytestmark = pytest.mark.usefixtures("kernel_device")
SIZES = [0, 1, 7, 8, 1023, 65_537]


@options
@dtype_pairs
def test_kernel_equals_operations_and_float64(options, dtypes):
    w, gradients = tensors((6, 5), dtypes, steps=3)
    fused_w, fused_v = run(Adagrad(0.1, **options, fused=True), w, gradients)
    plain_w, plain_v = run(Adagrad(0.1, **options, fused=False), w, gradients)
    want_w, want_v = adagrad(to_numpy(w), [to_numpy(g) for g in gradients], **options)[-1]
    assert fused_w.dtype == dtypes[0] and fused_v.dtype == mx.float32
    assert_near(fused_w, to_numpy(plain_w), dtypes[0], steps=1)
    assert_near(fused_w, want_w, dtypes[0])
    assert_near(fused_v, to_numpy(plain_v), dtypes[0] if options.get("weight_decay") else mx.float32, steps=1)
    assert_near(fused_v, want_v, dtypes[0] if options.get("weight_decay") else mx.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
def test_every_size(size, dtype):
    w, gradients = tensors((size,), (dtype, dtype), steps=2)
    got_w, got_v = run(Adagrad(0.1, fused=True), w, gradients)
    want_w, want_v = adagrad(to_numpy(w), [to_numpy(g) for g in gradients])[-1]
    assert_near(got_w, want_w, dtype)
    assert_near(got_v, want_v)


def test_a_million_elements():
    w, gradients = tensors((1000, 1000), steps=1)
    got, _ = run(Adagrad(0.1, fused=True), w, gradients)
    assert_near(got, adagrad(to_numpy(w), [to_numpy(gradients[0])])[-1][0])


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4)], ids=str)
def test_layouts(shape, dtype):
    w, gradients = tensors(shape, (dtype, dtype), steps=2)
    base = mx.concatenate([mx.zeros((1,), dtype), w.reshape(-1)])
    views = {"offset": base[1:].reshape(shape), "transposed": w.T, "plain": w}
    if w.ndim:
        views |= {"sliced": mx.concatenate([w, w], axis=-1)[..., ::2], "broadcast": mx.broadcast_to(w[:1], w.shape)}
    for view in views.values():
        g = mx.sin(view)
        got, _ = run(Adagrad(0.1, fused=True), view, [g, g])
        assert got.shape == view.shape
        assert_near(got, adagrad(to_numpy(view), [to_numpy(g)] * 2)[-1][0], dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_modifiers_enter_as_scalars(weight_decay):
    w, (g, *_) = tensors((9,))
    modifiers = Modifiers(scale=mx.array(0.5)).clipped(mx.array(-0.2), mx.array(0.3)).scaled(mx.array(2.0))
    for apply in (True, False):
        for fused in (True, False):
            optimizer = Adagrad(0.1, weight_decay=weight_decay, fused=fused)
            optimizer.init({"w": w})
            new = optimizer.apply_modified({"w": g}, {"w": w}, modifiers.gated(mx.array(apply)))["w"]
            clipped = 2 * np.clip(0.5 * to_numpy(g), -0.2, 0.3)
            want_w, want_v = adagrad(to_numpy(w), [clipped], weight_decay=weight_decay)[-1]
            assert_near(new, want_w if apply else to_numpy(w))
            assert_near(optimizer.state["w"]["v"], want_v if apply else np.zeros(9))
            assert optimizer.step.item() == apply


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_held_back_step_survives_what_is_not_finite(bad):
    w = mx.ones((3,))
    for fused in (True, False):
        optimizer = Adagrad(0.1, fused=fused)
        optimizer.init({"w": w})
        new = optimizer.apply_modified({"w": mx.full((3,), bad)}, {"w": w}, Modifiers(apply=mx.array(False)))
        assert mx.array_equal(new["w"], w) and mx.array_equal(optimizer.state["w"]["v"], mx.zeros((3,)))


def test_not_finite_gradients_stay_visible():
    for fused in (True, False):
        for modifiers in (Modifiers(), Modifiers().clipped(mx.array(-1.0), mx.array(1.0))):
            optimizer = Adagrad(0.1, fused=fused)
            new = optimizer.apply_modified({"w": mx.array([1.0, float("nan")])}, {"w": mx.ones((2,))}, modifiers)
            assert mx.isnan(new["w"]).tolist() == [False, True]
            assert mx.isnan(optimizer.state["w"]["v"]).tolist() == [False, True]
            again = optimizer.apply_gradients({"w": mx.ones((2,))}, {"w": mx.ones((2,))})
            assert mx.isnan(again["w"]).tolist() == [False, True]


def test_accumulator_dtype_is_a_template_argument():
    w, gradients = tensors((9,), (mx.bfloat16, mx.bfloat16))
    fused_w, fused_v = run(Adagrad(0.1, accumulator=Dense("parameter"), fused=True), w, gradients)
    plain_w, plain_v = run(Adagrad(0.1, accumulator=Dense("parameter"), fused=False), w, gradients)
    assert fused_v.dtype == mx.bfloat16
    assert_near(fused_v, to_numpy(plain_v), mx.bfloat16, steps=1)
    assert_near(fused_w, to_numpy(plain_w), mx.bfloat16, steps=1)


def test_bf16_accumulator_from_elsewhere_is_taken_up_in_fp32():
    w = mx.ones((9,))
    optimizer = Adagrad(0.1, fused=True)
    state: Any = optimizer.state
    state["w"] = {"v": mx.full((9,), 0.5, mx.bfloat16)}
    optimizer.apply_gradients({"w": w}, {"w": w})
    assert optimizer.state["w"]["v"].dtype == mx.float32
    assert_near(optimizer.state["w"]["v"], np.full(9, 1.5))


def test_groups_take_a_row_each():
    params = {"a": mx.ones((9,)), "b": mx.ones((9,)), "c": mx.ones((9,))}
    groups = [{"params": "b", "lr": 0.3, "eps": 0.5}, {"params": "c", "weight_decay": 0.5, "maximize": True}]
    got = {}
    for fused in (True, False):
        optimizer = Adagrad(0.1, groups=groups, fused=fused)
        got[fused] = params
        for _ in range(3):
            got[fused] = optimizer.apply_gradients(params, got[fused])
    for key in params:
        assert_near(got[True][key], to_numpy(got[False][key]), steps=1)


def test_differentiable_kernel_has_the_derivatives_of_the_rule():
    def loss(fused):
        def function(lr, w, g):
            optimizer = Adagrad(lr, weight_decay=0.1, lr_decay=0.1, fused=fused, differentiable=True)
            params = {"w": w}
            for _ in range(2):
                params = optimizer.apply_gradients({"w": g}, params)
            return mx.sum(mx.square(params["w"]))

        return function

    at = (mx.array(0.1), mx.array([1.0, -2.0, 0.5]), mx.array([0.3, 0.0, -2.0]))
    host_or_metal = mx.grad(loss(False), argnums=(0, 1, 2))(*at)
    second = mx.grad(lambda lr: mx.grad(loss(False))(lr, *at[1:]))(at[0])
    if not mx.metal.is_available():
        return _derivatives_on_the_host(loss, at, host_or_metal, second)
    for got, want in zip(mx.grad(loss(True), argnums=(0, 1, 2))(*at), host_or_metal, strict=True):
        assert_near(got, to_numpy(want), steps=50)
    assert_near(mx.grad(lambda lr: mx.grad(loss(True))(lr, *at[1:]))(at[0]), to_numpy(second), steps=50)


def _derivatives_on_the_host(loss, at, first, second):
    # the host cannot run a kernel on a tracer, so operations stand in for the launch: what is under test is the vjp
    def launch(form, w, g, v, scalars, v_dtype=mx.float32):
        return ops.functions(form, Dense(), v_dtype).update(w, g, v, scalars)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "launch", lambda *args: [mx.stop_gradient(x) for x in launch(*args)])
        for got, want in zip(mx.grad(loss(True), argnums=(0, 1, 2))(*at), first, strict=True):
            assert_near(got, to_numpy(want), steps=50)
        got = mx.grad(lambda lr: mx.grad(loss(True))(lr, *at[1:]))(at[0])
        assert_near(got, to_numpy(second), steps=50)


# --- what only the host counts ----------------------------------------------------------------------------------------


def test_bytes_per_element(host):
    for w_dtype, g_dtype, promised in ((mx.float32, mx.float32, 20), (mx.bfloat16, mx.bfloat16, 14)):
        for size in (1000, 100_000):
            host.clear()
            w, g = mx.ones((size,), w_dtype), mx.ones((size,), g_dtype)
            optimizer = Adagrad(0.1, weight_decay=0.1, decoupled_weight_decay=True, fused=True)
            optimizer.apply_modified({"w": g}, {"w": w}, Modifiers(scale=mx.array(0.5), apply=mx.array(True)))
            (launch,) = host.launches
            assert launch.traffic("w", "g", "v") == promised * size


def test_one_launch_for_each_tensor_that_is_not_empty(host):
    params = {"a": mx.ones(()), "b": mx.ones((3,)), "c": mx.ones((0, 4)), "d": mx.ones((70_000,)), "e": mx.ones((9, 9))}
    Adagrad(0.1, fused=True).apply_gradients(params, params)
    assert len(host.launches) == 4


def test_three_sources_for_each_dtype_combination(host):
    shapes = [(), (1,), (7,), (8,), (9, 9), (100,), (65_535,), (65_536,), (300, 300), (2, 3, 4, 5), (70_001,)]
    for dtype in GPU_DTYPES:
        host.clear()
        params = {str(i): mx.ones(shape, dtype) for i, shape in enumerate(shapes)}
        optimizer = Adagrad(optim.exponential_decay(0.1, 0.5), lr_decay=0.1, fused=True)
        for _ in range(2):
            optimizer.apply_gradients(params, params)
        assert len(host.sources) == 3


def test_work_of_a_thread_is_that_of_mlx(host):
    for dtype, shape, grid, threadgroup in (
        (mx.float32, (65_536,), (32_768, 1, 1), (256, 1, 1)),
        (mx.float32, (65_535,), (65_535, 1, 1), (256, 1, 1)),
        (mx.bfloat16, (65_537,), (16_385, 1, 1), (256, 1, 1)),
        (mx.float32, (1,), (1, 1, 1), (1, 1, 1)),
        (mx.float32, (256, 300), (150, 256, 1), (16, 16, 1)),
        (mx.float32, (9, 4), (4, 9, 1), (4, 9, 1)),
        (mx.float32, (5, 100), (100, 5, 1), (51, 5, 1)),
        (mx.float32, (64, 3, 3, 2), (2, 3, 192), (2, 3, 42)),
    ):
        host.clear()
        w = mx.ones(shape, dtype)
        Adagrad(0.1, fused=True).apply_gradients({"w": w}, {"w": w})
        assert (host.launches[0].grid, host.launches[0].threadgroup) == (grid, threadgroup)


def test_more_blocks_than_an_axis_of_the_grid_holds(host, monkeypatch):
    monkeypatch.setattr(kernels, "MOST_BLOCKS", 4)
    w = mx.random.normal((3, 3, 2, 5))
    got, _ = run(Adagrad(0.1, fused=True), w, [w])
    assert_near(got, adagrad(to_numpy(w), [to_numpy(w)])[-1][0])
    assert host.launches[-1].grid == (5, 2, 4)
    monkeypatch.undo()
    assert kernels.grid((2**20, 2**20, 2, 2), 1)["grid"] == (2, 2, 2**30)
    assert kernels.grid((2**31 - 1,), 2)["grid"] == (2**30, 1, 1)


def test_indices_are_64_bit():
    dense, layout = kernels.source("dense"), kernels.source("layout")
    for offset in ("long at_w", "long at_g", "long at_v", "ulong i = (block *", "ulong block ="):
        assert offset in dense
    assert layout.count("inline long") == 2 and "inline ulong adagrad_blocks" in layout


# --- without Metal ----------------------------------------------------------------------------------------------------

no_metal = pytest.mark.skipif(mx.metal.is_available(), reason="Metal is here")


@no_metal
def test_fused_without_metal_is_refused_before_anything_changes(no_host):
    optimizer = Adagrad(0.1, fused=True)
    with pytest.raises(RuntimeError, match=r"\[Adagrad\] 'fused=True' needs a Metal GPU: .*No Metal back-end"):
        optimizer.apply_gradients({"w": mx.ones((3,))}, {"w": mx.ones((3,))})
    assert list(optimizer.state) == ["step", "learning_rate"] and optimizer.step.item() == 0
    Adagrad(0.1).apply_gradients({"w": mx.ones((3,))}, {"w": mx.ones((3,))})  # falls back by itself


@no_metal
def test_a_training_step_with_the_kernel_exports(tmp_path, no_host):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = Adagrad(optim.exponential_decay(0.1, 0.9), lr_decay=0.1, fused=True)
    optimizer.init(model.trainable_parameters())

    def step(x):
        loss, gradients = nn.value_and_grad(model, lambda m, x: m(x).sum())(model, x)
        optimizer.update(model, gradients)
        return [loss] + [w for _, w in tree_flatten([model.trainable_parameters(), optimizer.state])]

    mx.export_function(str(tmp_path / "step.mlxfn"), step, mx.ones((2, 4)))
    exported = (tmp_path / "step.mlxfn").read_bytes()
    assert exported.count(b"[[kernel]] void custom_kernel_mlx_adagrad_dense") == 4
    assert b"adagrad_descend" in exported


@pytest.mark.parametrize("accumulator_dtype", ["float32"])
def test_fused_refuses_what_no_kernel_takes(accumulator_dtype):
    optimizer = Adagrad(0.1, fused=True, accumulator=Dense(accumulator_dtype))
    z = mx.ones((3,), mx.complex64)
    with pytest.raises(RuntimeError, match="no kernel takes 'z': mlx.core.complex64"):
        optimizer.apply_gradients({"a": mx.ones((2,)), "z": z}, {"a": mx.ones((2,)), "z": z})
    assert list(optimizer.state) == ["step", "learning_rate"]
    Adagrad(0.1).apply_gradients({"z": z}, {"z": z})  # falls back by itself
