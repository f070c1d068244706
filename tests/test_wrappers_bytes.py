"""What wrappers derive reaches the kernel as scalars: the same launches, bytes and gradients as without wrappers."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from cases import to_numpy
from mlx_adagrad import Adagrad
from mlx_adagrad.update import ops
from mlx_adagrad.wrappers import (
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    DynamicLossScale,
    ExponentialMovingAverage,
    GradientAccumulation,
    LossScale,
    SkipNonFinite,
)

WRAPPED: dict[str, Any] = {
    "value": lambda o: ClipByValue(o, 0.5),
    "norm": lambda o: ClipByNorm(o, 1.0),
    "global_norm": lambda o: ClipByGlobalNorm(o, 1.0),
    "average": lambda o: ExponentialMovingAverage(o, 0.9, 2),
    "loss_scale": lambda o: LossScale(o, 8.0),
    "dynamic_loss_scale": lambda o: DynamicLossScale(o, 8.0),
    "skip": lambda o: SkipNonFinite(o),
    "all": lambda o: SkipNonFinite(LossScale(ExponentialMovingAverage(ClipByValue(ClipByNorm(o, 1.0), 0.1), 0.9), 8.0)),
}
SIZES = {"a": (70_001,), "b": (40, 25), "c": (3,)}
wrapper = pytest.mark.parametrize("wrapper", WRAPPED)


def trees(dtype=mx.float32):
    rng = np.random.default_rng(0)
    w, g = ({k: mx.array(rng.normal(size=s), mx.float32).astype(dtype) for k, s in SIZES.items()} for _ in range(2))
    return w, g


def steps(optimizer, dtype, calls=2):
    w, g = trees(dtype)
    for _ in range(calls):
        w = w | optimizer.apply_gradients(g, w)
        mx.eval(w, optimizer.state)
    return w


def traffic(host, optimizer, dtype):
    """Bytes by buffer and launch of two steps, without those of scalars, shapes and strides."""
    host.clear()
    steps(optimizer, dtype)
    seen = []
    for launch in host.launches:
        read = {name: launch.bytes_read[name] for name in ("w", "g", "v")}
        seen.append((launch.name, launch.grid, read, launch.bytes_written))
    return seen


@wrapper
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_the_kernel_moves_not_one_byte_more(wrapper, dtype, host):
    bare = traffic(host, Adagrad(0.1), dtype)
    wrapped = traffic(host, WRAPPED[wrapper](Adagrad(0.1)), dtype)
    assert len(wrapped) == 2 * len(SIZES)
    assert wrapped == bare
    elements = sum(int(np.prod(shape)) for shape in SIZES.values())
    moved = sum(sum(read.values()) + sum(written.values()) for _, _, read, written in wrapped) / (2 * elements)
    assert moved == (20 if dtype == mx.float32 else 14)


def test_the_mean_of_accumulated_gradients_is_a_scalar_too(host):
    """One launch a tensor at the K-th call, which reads the fp32 sum as it would a gradient; none before."""
    bare = traffic(host, Adagrad(0.1), mx.float32)
    optimizer = LossScale(GradientAccumulation(ClipByNorm(Adagrad(0.1), 1.0), 3), 4.0)
    host.clear()
    w, g = trees()
    for call in range(6):
        w = w | optimizer.apply_gradients(g, w)
        mx.eval(w, optimizer.state)
        assert len(host.launches) == (call + 1) // 3 * len(SIZES)
    read = [launch.bytes_read for launch in host.launches]
    assert [(r["w"], r["g"], r["v"]) for r in read] == [(r["w"], r["g"], r["v"]) for _, _, r, _ in bare]


@wrapper
def test_the_very_gradients_of_the_user_reach_the_update(wrapper, monkeypatch):
    """Around our Adagrad no scaled copy of a gradient is made: on the CPU's path as on the kernel's."""
    w, g = trees()
    seen = []
    for name in ("update", "update_many"):
        original = getattr(ops.Functions, name)

        def spy(self, *args, original=original, many=name == "update_many"):
            seen.extend([gradient for _, gradient, _ in args[0]] if many else [args[1]])
            return original(self, *args)

        monkeypatch.setattr(ops.Functions, name, spy)
    WRAPPED[wrapper](Adagrad(0.1, fused=False)).apply_gradients(g, w)
    assert len(seen) == len(g) and all(any(s is x for s in seen) for x in g.values())


@wrapper
def test_the_kernel_agrees_with_operations(wrapper, kernel_device):
    got = steps(WRAPPED[wrapper](Adagrad(0.1)), mx.float32, calls=4)
    want = steps(WRAPPED[wrapper](Adagrad(0.1, fused=False)), mx.float32, calls=4)
    for name in want:
        np.testing.assert_allclose(to_numpy(got[name]), to_numpy(want[name]), rtol=2e-5, atol=2e-6)


def test_a_skipped_step_in_the_kernel_changes_no_bit(kernel_device):
    w, g = trees()
    optimizer = SkipNonFinite(Adagrad(0.1))
    new = optimizer.apply_gradients(g, w)
    v = optimizer.state["inner"]["a"]["v"]
    g["a"][70_000] = mx.nan
    skipped = optimizer.apply_gradients(g, new)
    assert all(mx.array_equal(skipped[k], new[k]).item() for k in w)
    assert mx.array_equal(optimizer.state["inner"]["a"]["v"], v).item() and optimizer.step.item() == 1


def test_a_step_of_wrapped_kernels_exports(tmp_path):
    """As a program for a Mac would be: with the kernels inside, recorded and not run."""
    w, g = trees()
    optimizer = WRAPPED["all"](Adagrad(0.1, fused=True))
    optimizer.init(w)

    def step(a, b, c):
        new = optimizer.apply_gradients({"a": a, "b": b, "c": c}, w)
        return new["a"], new["b"], new["c"]

    mx.export_function(str(tmp_path / "step.mlxfn"), step, *g.values())
    assert (tmp_path / "step.mlxfn").read_bytes().count(b"mlx_adagrad_dense") >= len(SIZES)
