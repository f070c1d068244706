"""The host harness itself: it runs what MLX generates, computes as Metal does, and catches what Metal forbids."""

import os
import subprocess
import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metal_host import HostError, HostMetal
from metal_host.source import for_clang, parse

REAL: Any = mx.fast.metal_kernel
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kernels run on the host under Linux only")
FLOATS = [mx.float32, mx.float16, mx.bfloat16]


@pytest.fixture
def host() -> HostMetal:
    return HostMetal(seed=7)


def launch(host, source, inputs, outputs, grid, group=256, **options: Any):
    """Run a body over inputs and outputs given as {name: array} and {name: (shape, dtype)}."""
    definition = {k: options.pop(k) for k in ("header", "ensure_row_contiguous", "atomic_outputs") if k in options}
    kernel = host.metal_kernel(
        name="trial", input_names=list(inputs), output_names=list(outputs), source=source, **definition
    )
    return kernel(
        inputs=list(inputs.values()),
        output_shapes=[shape for shape, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
        grid=grid if isinstance(grid, tuple) else (grid, 1, 1),
        threadgroup=group if isinstance(group, tuple) else (group, 1, 1),
        **options,
    )


def copy(host, body, n=20, dtype=mx.float32, **options: Any):
    """Run a body that turns x, of n elements, into y."""
    x = mx.arange(n).astype(dtype)
    (y,) = launch(host, f"uint i = thread_position_in_grid.x; {body}", {"x": x}, {"y": ((n,), dtype)}, n, **options)
    return y


# ---- What runs is what MLX generates, under MLX's own call.


def test_runs_the_source_that_mlx_prints(host, capfd):
    inputs, body = (
        [mx.arange(9.0), mx.array(2.0), mx.zeros((3,))],
        "a[thread_position_in_grid.x] = x[0] + T(s * z[0]);",
    )
    call = dict(
        inputs=inputs,
        template=[("T", mx.bfloat16), ("N", 3), ("B", True)],
        output_shapes=[(9,)],
        output_dtypes=[mx.bfloat16],
        grid=(9, 1, 1),
        threadgroup=(4, 1, 1),
    )
    names = dict(name="p", input_names=["x", "s", "z"], output_names=["a"], source=body.replace("x[0] +", ""))
    host.metal_kernel(**names)(**call)
    (source,) = host.sources

    def record(*arrays):
        return REAL(**names)(**{**call, "inputs": list(arrays)}, verbose=True)

    mx.export_function(lambda _: None, record, *inputs)
    assert source in capfd.readouterr().out


def test_reads_the_generated_signature(host):
    body = "y[thread_position_in_grid.x] = x[0] * s * c[0] + simdgroup_index_in_threadgroup + x_shape[0];"
    inputs = {"x": mx.ones((9,)), "s": mx.array(2.0), "c": mx.ones((2,), mx.float16)}
    launch(host, body, inputs, {"y": ((3,), mx.float32)}, 3)
    read = [(p.name, p.kind, p.type, p.reference) for p in parse(host.launches[0].source).parameters]
    assert read == [
        ("x", "device", "float", "*"),
        ("x_shape", "constant", "int", "*"),
        ("s", "constant", "float", "&"),
        ("c", "constant", "float16_t", "*"),
        ("y", "device", "float", "*"),
        ("simdgroup_index_in_threadgroup", "attribute", "uint", ""),
        ("thread_position_in_grid", "attribute", "uint3", ""),
    ]


def test_the_text_given_to_clang_keeps_its_lines(host):
    copy(host, "threadgroup float t[4]\n [2];\n t[0][0] = 1e-3; y[i] = x[i] * 0.1 + t[0][0];", group=1)
    source = host.launches[0].source
    text = for_clang(source, parse(source)).split('#line 1 "source"\n')[1].split('\n#line 1 "entry"')[0]
    assert text.count("\n") == source.count("\n")
    assert "0.1f" in text and "1e-3f" in text


def test_one_source_serves_all_shapes_of_a_class(host):
    kernel = host.metal_kernel(
        name="k", input_names=["x"], output_names=["y"], source="y[thread_position_in_grid.x] = 0;"
    )
    for shape in [(8,), (9,), (4, 5), (3,), (7,), (1, 2), ()]:
        kernel(inputs=[mx.zeros(shape)], output_shapes=[(2,)], output_dtypes=[mx.float32], grid=(2, 1, 1),
               threadgroup=(1, 1, 1))  # fmt: skip
    assert len(host.launches) == 7
    assert len(host.sources) == 3  # a device pointer, a constant pointer, a constant reference
    host.clear()
    assert not host.launches and not host.sources


def test_patched_replaces_and_restores(host):
    with host.patched() as same:
        assert same is host
        kernel: Any = mx.fast.metal_kernel(name="k", input_names=["x"], output_names=["y"], source="y[0] = x;")
        one = (1, 1, 1)
        (y,) = kernel(inputs=[3], output_shapes=[(1,)], output_dtypes=[mx.int32], grid=one, threadgroup=one)
        assert y.item() == 3
        with pytest.raises(RuntimeError, match="inside"):
            with host.patched():
                raise RuntimeError("inside")
        assert mx.fast.metal_kernel == host.metal_kernel
    assert mx.fast.metal_kernel is REAL


def test_runs_inside_grad_but_not_inside_a_trace(host):
    def square(x):
        return (copy_of(x) * x).sum()

    def copy_of(x):
        return launch(host, "y[thread_position_in_grid.x] = x[0];", {"x": x}, {"y": ((1,), mx.float32)}, 1)[0]

    grad: Any = mx.grad(square)
    assert grad(mx.array([3.0])).item() == 3.0  # the kernel is a constant to grad
    compiled: Any = mx.compile(square)
    with pytest.raises(ValueError, match="during function transformations"):
        compiled(mx.array([3.0]))


# ---- What Metal would refuse.


@pytest.mark.parametrize("grid", [(0, 1, 1), (4, 0, 1), (4, 1, -1), (2**31, 1, 1)])
def test_refuses_a_grid_that_metal_refuses(host, grid):
    with pytest.raises(HostError, match="grid must be three positive int32"):
        launch(host, "y[0] = x[0];", {"x": mx.ones(3)}, {"y": ((1,), mx.float32)}, grid)


def test_refuses_a_threadgroup_above_1024_and_more_than_31_buffers(host):
    with pytest.raises(HostError, match="at most 1024 threads but got 1056"):
        copy(host, "y[i] = x[i];", group=(33, 32, 1))
    with pytest.raises(HostError, match="32 buffers, but Metal binds at most 31"):
        inputs = {f"x{i}": mx.ones(1) for i in range(31)}
        launch(host, "y[0] = x0[0];", inputs, {"y": ((1,), mx.float32)}, 1)
    assert not host.launches


@pytest.mark.parametrize(
    "body",
    [
        "device float* p = c; y[i] = p[0];",  # c has fewer than 8 elements: constant
        "thread float* p = x; y[i] = p[0];",
        "y[i] = helper(x);",  # a bare pointer is thread
        "x[i] = 1;",
        "double d = x[i]; y[i] = d;",
        "y[i] = no_such_function(x[i]);",
        "bfloat16_t b = x[i]; y[i] = b;",  # Metal wants a cast
    ],
)
def test_does_not_compile(host, body):
    inputs, outputs = {"x": mx.ones(9), "c": mx.ones(4)}, {"y": ((9,), mx.float32)}
    header = "inline float helper(const float* p) { return p[0]; }"
    with pytest.raises(HostError, match="the kernel does not compile"):
        launch(host, f"uint i = thread_position_in_grid.x; {body}", inputs, outputs, 9, header=header)


@pytest.mark.parametrize(
    "body, message",
    [
        ("y[i] = x[i + 1];", r"thread \(19, 0, 0\): out of bounds: loads 4 bytes at byte 80 of 'x', which has 80"),
        ("y[i] = x[long(i) - 1];", r"thread \(0, 0, 0\): out of bounds: loads 4 bytes at byte -4 of 'x'"),
        ("y[i] = x[i + 10000000u];", r"out of bounds: loads 4 bytes at byte [34]\d{7} of '[xy]'"),
        ("packed_float2 p = *(const device packed_float2*)(x + i); y[i] = p.x + p.y;", "loads 8 bytes at byte 76 of"),
        ("y[i + 1] = x[i];", "out of bounds: stores 4 bytes at byte 80 of 'y'"),
        ("y[i] = x[i]; if (i == 3) ((device uchar*)y)[80] = 1;", "out of bounds: stores 1 bytes at byte 80 of 'y'"),
        ("if (i != 5) y[i] = x[i];", r"elements left unwritten, by output: \{'y': 1\}"),
        ("y[i / 2] = x[i];", "race: element .* of 'y' is written here and written by another thread"),
        ("y[i] = x[i]; y[i ^ 1] = y[i];", "race: element .* of 'y' is written here and written by"),
        ("y[i] = x[i]; if (i == 4 || i == 9) y[i] += y[13 - i];", "of 'y' (is read here and written by|before it is)"),
        ("y[i] += x[i];", "reads element .* of 'y' before it is written"),
        ("((device uchar*)y)[4 * i] = 1;", "of 'y': not whole elements of 4 bytes"),
        ("((device float*)x)[i] = 1; y[i] = 0;", "stores into the input 'x'"),
        ("float4 f = *(const device float4*)(x + i / 2); y[i] = f.x;", "line 5 of the source: a misaligned load"),
        ("float t[4] = {1, 2, 3, 4}; y[i] = t[i];", "an index out of its array's bounds"),
        ("y[i] = 5 / (int(i) - 3);", "an integer division by zero"),
        ("int big = 2147483647 - 18 + int(i); y[i] = big;", "a signed integer addition overflows"),
    ],
)  # fmt: skip
def test_catches(host, body, message):
    with pytest.raises(HostError, match=message):
        copy(host, body)
    assert not host.launches


def test_without_checks_the_guards_still_catch_a_store():
    host = HostMetal(check=False)
    assert mx.array_equal(copy(host, "y[i] = x[i];"), mx.arange(20.0))
    assert host.launches[0].bytes_read == {}
    with pytest.raises(HostError, match="bytes beside 'y' were overwritten"):
        copy(host, "y[i + 1] = x[i]; y[i] = x[i];")


def test_a_failure_leaves_the_harness_usable(host):
    for _ in range(3):
        with pytest.raises(HostError, match="out of bounds"):
            copy(
                host,
                "threadgroup float t[64]; t[i] = x[i]; threadgroup_barrier(mem_flags::mem_none); y[i] = x[i + 1];",
            )
        assert mx.array_equal(copy(host, "y[i] = x[i];"), mx.arange(20.0))


# ---- Arithmetic.


@pytest.mark.parametrize("in_template", [False, True])
def test_bare_literals_are_float(host, in_template):
    template: dict[str, Any] = {"template": [("T", mx.float32)]} if in_template else {}
    x = np.arange(1000, dtype=np.float32)
    header = "inline float tenth(float x) { return x * 0.1; }\n"
    y = copy(host, "y[i] = i % 2 ? x[i] * 0.1 : tenth(x[i]);", n=1000, header=header, **template)
    assert np.array_equal(np.array(y), x * np.float32(0.1))
    assert not np.array_equal(np.array(y), np.float32(np.float64(x) * 0.1))  # what a double would give


def bf16(x):
    """fp32 rounded to the nearest bf16, ties to even, as fp32."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_operation_rounds_to_its_type(host, dtype):
    rounded = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: bf16}[dtype]
    rng = np.random.default_rng(0)
    a, b = (rounded((rng.standard_normal(4000) * 10.0 ** rng.integers(-3, 3, 4000)).astype(np.float32)) for _ in "ab")
    x, z = (mx.array(np.asarray(t, np.float32)).astype(dtype) for t in (a, b))
    body = "uint i = thread_position_in_grid.x; y[i] = x[i] * z[i] + x[i] / z[i] - z[i];"
    (y,) = launch(host, body, {"x": x, "z": z}, {"y": ((4000,), dtype)}, 4000)
    f = np.float32
    with np.errstate(over="ignore"):
        expected = rounded(f(rounded(f(rounded(f(a) * f(b))) + f(rounded(f(a) / f(b))))) - f(b))
    assert np.array_equal(np.array(y.astype(mx.float32)), f(expected))


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_cast_rounds_as_mlx_does(host, dtype):
    rng = np.random.default_rng(0)
    x = mx.concatenate([
        mx.array([0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519, 65520, 1e-8, 6e-8, 3.4e38, 1 + 2**-8, 1 + 3 / 256]),
        mx.array(np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)),  # NaNs that carry
        mx.array((rng.standard_normal(5000) * 10.0 ** rng.uniform(-9, 6, 5000)).astype(np.float32)),
    ])  # fmt: skip
    body = "uint i = thread_position_in_grid.x; y[i] = {}(x[i]); z[i] = float(y[i]);".format(
        "half" if dtype == mx.float16 else "bfloat16_t"
    )
    y, z = launch(host, body, {"x": x}, {"y": (x.shape, dtype), "z": (x.shape, mx.float32)}, x.size)
    assert mx.array_equal(y, x.astype(dtype), equal_nan=True)
    assert mx.array_equal(z, x.astype(dtype).astype(mx.float32), equal_nan=True)


@pytest.mark.parametrize("dtype", [*FLOATS, mx.int32, mx.uint32, mx.int64, mx.uint64, mx.int8, mx.uint8, mx.bool_])
def test_every_dtype_passes_through(host, dtype):
    x = (mx.random.normal((50,), key=mx.random.key(2)) * 100).astype(mx.int32).astype(dtype)
    (y,) = launch(host, "uint i = thread_position_in_grid.x; y[i] = x[49 - i];", {"x": x}, {"y": ((50,), dtype)}, 50)
    assert y.dtype == dtype and mx.array_equal(y, x[::-1])


def test_min_max_clamp_prefer_the_number_to_nan(host):
    n = np.nan
    a, b = mx.array([n, 1, n, 1, 2, -3, 9, n]), mx.array([2, n, n, 5, 1, 0, 9, -n])
    body = """uint i = thread_position_in_grid.x;
        lo[i] = min(x[i], z[i]); hi[i] = metal::max(x[i], z[i]); c[i] = clamp(x[i], -1.0, 1.0); f[i] = fmin(x[i], z[i]);
        k[i] = isnan(x[i]) + 2 * isfinite(x[i]) + 4 * isinf(x[i] / 0.0);"""
    names = {name: ((8,), mx.float32) for name in ("lo", "hi", "c", "f", "k")}
    lo, hi, c, f, k = map(np.array, launch(host, body, {"x": a, "z": b}, names, 8))
    np.testing.assert_array_equal(lo, [2, 1, n, 1, 1, -3, 9, n])
    np.testing.assert_array_equal(hi, [2, 1, n, 5, 2, 0, 9, n])
    np.testing.assert_array_equal(c, [-1, 1, -1, 1, 1, -1, 1, -1])
    np.testing.assert_array_equal(f, lo)
    np.testing.assert_array_equal(k, [1, 6, 1, 6, 6, 6, 6, 1])


MATHS = {
    "metal::precise::sqrt(v)": np.sqrt,
    "rsqrt(v)": lambda v: 1 / np.sqrt(v),
    "fabs(-v)": np.abs,
    "abs(-v)": np.abs,
    "exp(v)": np.exp,
    "metal::log(v)": np.log,
    "pow(v, 1.5)": lambda v: v**1.5,
    "fma(v, v, 0.5)": lambda v: v * v + 0.5,
    "floor(v) + ceil(v) + trunc(-v) + rint(v)": lambda v: np.floor(v) + np.ceil(v) - np.trunc(v) + np.rint(v),
    "select(v, 2.0, v > 1.0)": lambda v: np.where(v > 1, 2, v),
    "copysign(v, -1.0) * sign(-v)": np.abs,
    "float(as_type<uint>(v) >> 20)": lambda v: v.view(np.uint32) >> 20,
    "float(mulhi(as_type<uint>(v), 1000u) + popcount(7u) + clz(1u))": lambda v: (
        (v.view(np.uint32).astype(np.uint64) * 1000 >> 32) + 34
    ),
    "float(rotate(as_type<uint>(v), 8u) & 255u)": lambda v: v.view(np.uint32) >> 24,
    "numeric_limits<float>::infinity() > v ? INFINITY : 0": lambda v: np.full_like(v, np.inf),
    "is_same_v<T, float> ? v : 0": lambda v: v,
    "float4(v, v, 2, 3).y + float2(v).y + vec<float, 2>{v, 1}.x": lambda v: 3 * v,
}


def test_the_standard_library_that_kernels_get(host):
    v = np.random.default_rng(0).uniform(0.1, 3, 64).astype(np.float32)
    stores = "".join(f"y[{len(MATHS)} * i + {j}] = {code};" for j, code in enumerate(MATHS))
    body = f"uint i = thread_position_in_grid.x; float v = x[i]; {stores}"
    outputs = {"y": ((64, len(MATHS)), mx.float32)}
    (y,) = launch(host, body, {"x": mx.array(v)}, outputs, 64, template=[("T", mx.float32)])
    for got, (code, formula) in zip(np.array(y).T, MATHS.items(), strict=True):
        np.testing.assert_allclose(got, formula(v), rtol=3e-7, err_msg=code)


# ---- Memory.


def test_bytes_are_counted_exactly(host):
    n = 1000
    inputs = {"w": mx.ones((n,)), "g": mx.ones((n,), mx.bfloat16), "lr": mx.array(0.5), "o": mx.ones((2,))}
    outputs = {"a": ((n,), mx.float32), "b": ((n // 2,), mx.int64)}
    body = """uint i = thread_position_in_grid.x;
        a[i] = w[i] - lr * g[i] + (i < uint(w_shape[0]) / 2 ? o[1] : 0);
        if (i % 2 == 0) b[i / 2] = 1;"""
    launch(host, body, inputs, outputs, n)
    (seen,) = host.launches
    assert seen.bytes_read == {
        "w": 4 * n,
        "w_shape": 4 * n,
        "g": 2 * n,
        "lr": 4 * n,
        "o": 2 * n,
        "a": 0,
        "b": 0,
    }
    assert seen.bytes_written == {"a": 4 * n, "b": 4 * n}
    assert seen.elements == {"w": n, "w_shape": 1, "g": n, "lr": 1, "o": 2, "a": n, "b": n // 2}
    assert (seen.name, seen.grid, seen.threadgroup) == ("trial", (n, 1, 1), (256, 1, 1))


def test_a_wide_load_and_a_read_back_are_counted_by_their_bytes(host):
    body = """uint i = thread_position_in_grid.x;
        packed_float4 f = ((const device packed_float4*)x)[i];
        for (int k = 0; k < 4; ++k) y[4 * i + k] = f[k];
        z[i] = y[4 * i + (x_ndim + i) % 4];"""
    (y, _) = launch(host, body, {"x": mx.arange(40.0)}, {"y": ((40,), mx.float32), "z": ((10,), mx.float32)}, 10)
    assert mx.array_equal(y, mx.arange(40.0))
    assert host.launches[0].bytes_read == {"x": 160, "x_ndim": 40, "y": 40, "z": 0}
    assert host.launches[0].bytes_written == {"y": 160, "z": 40}


@pytest.mark.parametrize("dtype, size", [(mx.uint8, 1), (mx.bfloat16, 2), (mx.float32, 4), (mx.int64, 8)])
def test_buffers_are_aligned_to_their_element_only(host, dtype, size):
    body = "uint i = thread_position_in_grid.x; z[i] = ulong(x) % 64; y[i] = ulong(y) % 64;"
    z, y = launch(host, body, {"x": mx.zeros((9,), dtype)}, {"z": ((1,), mx.int32), "y": ((1,), dtype)}, 1)
    assert (z.item(), y.item()) == (size, size)


@pytest.mark.parametrize("check", [True, False])
def test_slices_and_transposes_arrive_row_contiguous(check):
    host, x = HostMetal(check=check), mx.arange(60.0).reshape(6, 10)
    body = "uint i = thread_position_in_grid.x; y[i] = x[i]; z[i] = x_strides[0] * 100 + x_strides[1] * 10 + x_ndim;"
    for view in (x[1:], x[1:3], x.T, x[:, 3:8], x[::-2, ::3], mx.broadcast_to(x[0], (3, 10)), x[:1]):
        outputs = {"y": (view.shape, mx.float32), "z": ((view.size,), mx.int32)}
        y, z = launch(host, body, {"x": view}, outputs, view.size)
        assert mx.array_equal(y, view)
        assert (z == view.shape[1] * 100 + 10 + 2).all()


@pytest.mark.parametrize("view", [
    lambda x: x.T, lambda x: x[::-1], lambda x: x[1:, ::-3], lambda x: mx.broadcast_to(x[:, :1], (6, 4)), lambda x: x,
])  # fmt: skip
def test_other_strides_reach_a_kernel_that_asks_for_them(host, view):
    x = view(mx.arange(60).reshape(6, 10).astype(mx.bfloat16))
    body = """uint i = thread_position_in_grid.x;
        y[i] = x[elem_to_loc(long(i), x_shape, x_strides, x_ndim)] + x[(x_shape[0] - 1) * x_strides[0]] * T(0);"""
    outputs = {"y": (x.shape, mx.bfloat16)}
    template = [("T", mx.bfloat16)]
    (y,) = launch(host, body, {"x": x}, outputs, x.size, ensure_row_contiguous=False, template=template)
    assert mx.array_equal(y, x)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (2, 3), (0,)])
def test_scalars_and_small_arrays_are_constants(host, shape):
    x = mx.array(3.0) if shape == () else mx.full(shape, 3.0)
    size = "1" if shape == () else "x_shape[0]"
    code = "x" if shape == () else "(x_shape[0] ? x[x_shape[0] - 1] : 5)"
    (y,) = launch(host, f"y[0] = {code} * {size};", {"x": x}, {"y": ((1,), mx.float32)}, 1)
    assert y.item() == (3.0 * shape[0] if shape else 3.0)
    kind = "const constant float&" if shape == () else f"const {'constant' if x.size < 8 else 'device'} float*"
    assert f"{kind} x [[buffer(0)]]" in host.launches[0].source


def test_python_scalars_are_taken_as_mlx_takes_them(host):
    inputs = {"a": 2, "b": 0.5, "c": True}
    (y,) = launch(host, "y[0] = a * b + c;", inputs, {"y": ((1,), mx.float32)}, 1)
    assert y.item() == 2.0
    assert "constant int32_t& a" in host.launches[0].source and "constant bool& c" in host.launches[0].source


def test_init_value_makes_outputs_readable_and_optional(host):
    for dtype in (mx.float32, mx.bfloat16, mx.int32):
        body = "uint i = thread_position_in_grid.x; if (i != 3) y[i] += 1;"
        (y,) = launch(host, body, {"x": mx.zeros(1)}, {"y": ((9,), dtype)}, 9, init_value=2)
        assert y.tolist() == [3, 3, 3, 2, 3, 3, 3, 3, 3]


def test_reading_what_another_thread_writes_is_a_race_in_either_order():
    body, said = "if (thread_position_in_grid.x == 0) z[0] = y[1]; else y[1] = 5;", set()
    for seed in range(8):
        outputs = {"y": ((2,), mx.float32), "z": ((1,), mx.float32)}
        with pytest.raises(HostError, match="race: element 1 of 'y' is (read|written) here and") as error:
            launch(HostMetal(seed), body, {"x": mx.zeros(1)}, outputs, 2, init_value=2)
        said.add("is read here" in str(error.value))
    assert said == {True, False}


def test_atomic_outputs_may_be_shared(host):
    body = """uint i = thread_position_in_grid.x;
        atomic_fetch_add_explicit(&y[i % 2], x[i], memory_order_relaxed);
        atomic_fetch_max_explicit(&y[2], x[i], memory_order_relaxed);"""
    x = mx.arange(100.0)
    options = {"atomic_outputs": True, "init_value": 0}
    (y,) = launch(host, body, {"x": x}, {"y": ((3,), mx.float32)}, 100, **options)
    assert y.tolist() == [2450.0, 2500.0, 99.0]


# ---- Threads.


def order_of_threads(host, n=100):
    """The turn at which each thread ran."""
    body = """uint i = thread_position_in_grid.x;
        int turn = atomic_fetch_add_explicit(&y[n[0]], 1, memory_order_relaxed);
        atomic_store_explicit(&y[i], turn, memory_order_relaxed);"""
    options = {"atomic_outputs": True, "init_value": 0}
    (y,) = launch(host, body, {"n": mx.array([n])}, {"y": ((n + 1,), mx.int32)}, n, **options)
    return y.tolist()[:n]


def test_threads_run_in_an_order_that_the_seed_shuffles():
    one, again, other = HostMetal(seed=1), HostMetal(seed=1), HostMetal(seed=2)
    orders = [order_of_threads(h) for h in (one, again, other, one)]
    assert all(sorted(order) == list(range(100)) != order for order in orders)
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] and orders[0] != orders[3]


ATTRIBUTES = [
    "thread_position_in_grid", "thread_position_in_threadgroup", "threadgroup_position_in_grid",
    "threadgroups_per_grid", "threads_per_grid", "threads_per_threadgroup", "dispatch_threads_per_threadgroup",
]  # fmt: skip
SCALARS = ["thread_index_in_threadgroup", "thread_index_in_simdgroup", "simdgroup_index_in_threadgroup",
           "simdgroups_per_threadgroup", "threads_per_simdgroup"]  # fmt: skip


@pytest.mark.parametrize("fibers", [False, True])
@pytest.mark.parametrize("grid, group", [
    ((5, 1, 1), (256, 1, 1)), ((100, 1, 1), (64, 1, 1)), ((70, 3, 2), (40, 2, 4)), ((3, 9, 5), (4, 4, 4)),
])  # fmt: skip
def test_threads_know_their_place(host, grid, group, fibers):
    columns = [f"{name}.{axis}" for name in ATTRIBUTES for axis in "xyz"] + SCALARS
    row = "(p.z * threads_per_grid.y + p.y) * threads_per_grid.x + p.x"
    body = f"uint3 p = thread_position_in_grid; uint r = ({row}) * {len(columns)};"
    body += "threadgroup_barrier(mem_flags::mem_none);" if fibers else ""
    body += "".join(f"y[r + {j}] = {name};" for j, name in enumerate(columns))
    outputs = {"y": ((int(np.prod(grid)), len(columns)), mx.uint32)}
    (y,) = launch(host, body, {"x": mx.zeros(1)}, outputs, grid, group)
    assert np.array_equal(np.array(y), places(np.array(grid), np.array(group)))


def places(grid, group):
    """The same by numpy: the group is trimmed to the grid; the last of an axis may be partial."""
    size = np.minimum(grid, group)
    at = np.stack(np.unravel_index(np.arange(grid.prod()), grid[::-1])[::-1], axis=1)
    block, local = at // size, at % size
    extent = np.minimum(size, grid - block * size)
    index = (local[:, 2] * extent[:, 1] + local[:, 1]) * extent[:, 0] + local[:, 0]
    full = np.ones_like(at)
    wide = [at, local, block, full * -(-grid // size), full * grid, extent, full * size]
    narrow = [index, index % 32, index // 32, -(-extent.prod(1) // 32), full[:, 0] * 32]
    return np.concatenate([*wide, np.stack(narrow, axis=1)], axis=1)


# ---- Threadgroups.


@pytest.mark.parametrize("dtype", [*FLOATS, mx.int32])
@pytest.mark.parametrize("n", [1, 31, 32, 50, 96])
def test_simd_functions_work_on_the_active_lanes(host, dtype, n):
    x = (mx.arange(n) % 7 + 1).astype(dtype)
    body = """uint i = thread_position_in_grid.x; T v = x[i]; uint k = 7 * i;
        y[k] = simd_sum(v); y[k + 1] = simd_max(v); y[k + 2] = simd_min(v); y[k + 3] = simd_broadcast_first(v);
        y[k + 4] = simd_prefix_inclusive_sum(v); y[k + 5] = simd_prefix_exclusive_sum(v);
        y[k + 6] = simd_shuffle_xor(v, 0);"""
    options = {"template": [("T", dtype)]}
    (y,) = launch(host, body, {"x": x}, {"y": ((n, 7), dtype)}, n, 96, **options)
    v = np.array(x.astype(mx.float32))
    for lane, row in enumerate(np.array(y.astype(mx.float32))):
        first = lane // 32 * 32
        simd, before = v[first : first + 32], v[first:lane].sum()
        assert row.tolist() == [
            simd.sum(),
            simd.max(),
            simd.min(),
            simd[0],
            before + v[lane],
            before,
            v[lane],
        ]


def test_simd_functions_follow_each_other(host):
    body = """uint i = thread_position_in_grid.x; float v = x[i];
        for (int d = 16; d > 0; d /= 2) v += simd_shuffle_xor(v, d);
        y[i] = v;"""
    x = mx.random.normal((256,), key=mx.random.key(4))
    (y,) = launch(host, body, {"x": x}, {"y": ((256,), mx.float32)}, 256)
    assert mx.allclose(y.reshape(8, 32), x.reshape(8, 32).sum(1, keepdims=True), rtol=1e-5, atol=1e-5)


def test_simd_shuffle_down_keeps_what_lies_beyond_the_simdgroup(host):
    body = "uint i = thread_position_in_grid.x; y[i] = simd_shuffle_down(x[i], 4); z[i] = simd_shuffle_up(x[i], 4);"
    outputs = {"y": ((40,), mx.float32), "z": ((40,), mx.float32)}
    y, z = launch(host, body, {"x": mx.arange(40.0)}, outputs, 40, 64)
    assert y.tolist()[:32] == [*range(4, 32), 28, 29, 30, 31]
    assert y.tolist()[32:36] == [36, 37, 38, 39] and mx.isnan(y[36:]).all()  # lanes that do not exist
    assert z.tolist() == [0, 1, 2, 3, *range(28), 32, 33, 34, 35, 32, 33, 34, 35]


REDUCE = """
  threadgroup float partial[32];
  threadgroup int rows;
  uint row = threadgroup_position_in_grid.x, lane = thread_position_in_threadgroup.x;
  float sum = 0;
  for (uint c = lane; c < uint(x_shape[1]); c += threads_per_threadgroup.x) sum += x[row * x_shape[1] + c];
  sum = simd_sum(sum);
  if (thread_index_in_simdgroup == 0) partial[simdgroup_index_in_threadgroup] = sum;
  if (lane == 0) rows = x_shape[0];
  {barrier}
  float total = 0;
  for (uint s = 0; s < simdgroups_per_threadgroup; ++s) total += partial[s];
  if (lane == 0) y[row] = total + rows;
"""
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SIMD_BARRIER = "simdgroup_barrier(mem_flags::mem_threadgroup);"  # orders only the lanes of one SIMD-group


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("rows, columns, threads", [(1, 1, 1), (5, 100, 64), (3, 1000, 1024), (7, 33, 70)])
def test_rows_reduced_across_simdgroups(check, rows, columns, threads):
    host, x = HostMetal(check=check), mx.random.normal((rows, columns), key=mx.random.key(0))
    body = REDUCE.replace("{barrier}", BARRIER)
    (y,) = launch(host, body, {"x": x}, {"y": ((rows,), mx.float32)}, rows * threads, threads)
    assert mx.allclose(y, x.sum(1) + rows, rtol=1e-5, atol=1e-4)
    if check:
        assert host.launches[0].bytes_read["x"] == 4 * x.size


@pytest.mark.parametrize("body, message", [
    (REDUCE.replace("{barrier}", ""), r"byte \d+ of threadgroup array [12] (before it is|is read after)"),
    (REDUCE.replace("{barrier}", SIMD_BARRIER), r"byte \d+ of threadgroup array [12] (before it is|is read after)"),
    (f"y[i] = x[i]; if (i % 64) {BARRIER}", r"thread \(\d+, 0, 0\): returns while other threads of its group wait"),
    (f"if (i == 3) return; {BARRIER} y[i] = x[i];", r"thread \(3, 0, 0\): returns while other threads"),
    (f"if (i == 3) {BARRIER} else simd_sum(1); y[i] = x[i];", "diverges: lanes of its SIMD-group wait at different"),
    ("y[i] = i == 3 ? simd_max(x[i]) : simd_sum(x[i]);", "diverges: lanes of its SIMD-group wait at different"),
    ("threadgroup float t[64]; y[i] = t[i % 64];", "reads byte .* of threadgroup array 1 before it is written"),
    ("threadgroup float t[64]; t[0] = x[0]; y[i] = t[0];", "race: byte 0 of threadgroup array 1 is written after"),
    ("threadgroup float t[64]; t[i % 64] = 1; {B} t[i % 64] = t[(i + 1) % 64];", "race: byte .* threadgroup array 1"),
    ("threadgroup float t[4]; t[x_shape[0]] = 1; y[i] = 0;", "an index out of its array's bounds"),
    ("threadgroup float t[4]; threadgroup float* p = t; p[x_shape[0] - 20] = 1; y[i] = 0;", "outside its arrays"),
    ("threadgroup float t[9000]; t[0] = 1; y[i] = t[0];", "more than 32 KB of threadgroup memory"),
])  # fmt: skip
def test_catches_in_threadgroups(host, body, message):
    inputs, outputs = {"x": mx.random.normal((5, 64))}, {"y": ((320,), mx.float32)}
    with pytest.raises(HostError, match=message):
        launch(host, f"uint i = thread_position_in_grid.x; {body.replace('{B}', BARRIER)}", inputs, outputs, 320, 64)


def test_lanes_that_returned_take_no_part_in_simd_functions(host):
    body = "uint i = thread_position_in_grid.x; y[i] = 0; if (i >= 20) return; y[i] = simd_sum(x[i]);"
    (y,) = launch(host, body, {"x": mx.ones(32)}, {"y": ((32,), mx.float32)}, 32)
    assert y.tolist() == [20] * 20 + [0] * 12


# ---- The cache.


def test_a_built_kernel_is_found_on_disk(host, monkeypatch, tmp_path):
    from metal_host import toolchain

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    body = "y[i] = x[i] + 1;"
    expected = copy(host, body)
    toolchain.load.cache_clear()
    copy(host, body)
    (library,) = tmp_path.glob("metal_host/*.so")
    (runner,) = tmp_path.glob("metal_host/*.a")
    monkeypatch.setattr(toolchain, "_run", None)  # nothing may be compiled from here on
    toolchain.load.cache_clear()
    assert mx.array_equal(copy(host, body), expected)
    assert {f.name for f in tmp_path.glob("metal_host/*")} == {library.name, runner.name}


def test_workers_that_build_at_once_do_not_disturb_each_other(tmp_path):
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "from test_metal_host import *; assert copy(HostMetal(), 'y[i] = 2 * x[i];')[19].item() == 38"
    workers = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(3)]
    assert [worker.wait(timeout=60) for worker in workers] == [0, 0, 0]
    assert len(list(tmp_path.glob("metal_host/*"))) == 2  # one library, one runner, no debris


def test_a_million_elements_are_run_and_checked(host):
    x, n = mx.random.normal((1_000_000,), key=mx.random.key(3)), 1_000_000
    body = "uint i = thread_position_in_grid.x; y[i] = x[i] * x[i];"
    (y,) = launch(host, body, {"x": x}, {"y": ((n,), mx.float32)}, n)
    assert mx.array_equal(y, x * x)
    assert host.launches[0].bytes_read == {"x": 4 * n, "y": 0}
