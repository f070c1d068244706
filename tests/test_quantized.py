"""v in 8 and 16 bits: what it costs, that it neither stands still nor drifts, and how checkpoints keep it."""

import json

import mlx.core as mx
import numpy as np
import pytest

from cases import bits, flat, run, to_numpy
from mlx_adagrad import Adagrad, Dense, Quantized, RowWise, checkpoint
from mlx_adagrad.checkpoint import safetensors
from mlx_adagrad.update import quantization
from mlx_adagrad.wrappers import ClipByGlobalNorm
from storages import smooth, v_of

pytestmark = pytest.mark.usefixtures("op_by_op")
QUANTIZED = Quantized(block=32, min_size=1)


# ---- The format.


def every_code(exponent):
    codes = mx.arange(256, dtype=mx.uint8).reshape(1, 256)
    return codes, mx.array([[exponent]], mx.uint8)


@pytest.mark.parametrize("exponent", [19, 20, 100, 127, 253, 254])
def test_codes_are_an_unsigned_float_with_gradual_underflow(exponent):
    codes, exponents = every_code(exponent)
    c = np.arange(256)
    units = np.where(c < 16, c, (c % 16 + 16) * 2.0 ** (c // 16 - 1))
    v = np.array(quantization.decode(codes, exponents)).astype(np.float64)[0]
    assert np.array_equal(v, units * 2.0 ** (exponent - 145.0))
    for random in (0, 0xFFFFFFFF):  # what can be held comes back, whatever the bits
        back = quantization.encode(mx.array(v, mx.float32)[None], exponents, mx.full((1, 256), random, mx.uint32))
        assert mx.array_equal(back[0], codes) and mx.array_equal(back[1], exponents)


def test_a_grown_block_shifts_codes_without_rounding_them():
    codes, exponents = every_code(120)
    v = quantization.decode(codes, exponents)[:, 32:]
    grown, new = quantization.encode(v, exponents + 1, mx.full(v.shape, 0xFFFFFFFF, mx.uint32))
    assert mx.array_equal(quantization.decode(grown, new), v)
    assert mx.array_equal(grown, codes[:, 32:] - 16)


def test_between_two_codes_the_mean_is_exact():
    rng = np.random.default_rng(0)
    v = np.concatenate([10.0 ** rng.uniform(-6, 0, 200), [0.0, 1.0, 2.0**-18 / 3, 1.9]]).astype(np.float32)
    draws = 2**14
    random = (np.arange(draws, dtype=np.uint64) * 2**18 + 2**17).astype(np.uint32)  # all bits, evenly thinned out
    many = mx.broadcast_to(mx.array(v), (draws, len(v)))
    codes = quantization.coded(many, mx.array(127, mx.uint8), mx.broadcast_to(mx.array(random)[:, None], many.shape))
    got = np.array(quantization.decoded(codes, mx.array(127, mx.uint8))).astype(np.float64)
    unit = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(v, 1e-9))) - 4, -18)
    assert (np.abs(got - v) < unit).all()
    assert (np.abs(got.mean(0) - v) <= 2 * unit / draws).all()


@pytest.mark.parametrize(
    "shape, want",
    [
        ((4096, 1024), (4096, 4)),  # blocks lie inside a row
        ((300, 257), (300, 2)),
        ((100, 64), (100, 1)),
        ((100, 34), (100, 1)),
        ((1000, 33), (143,)),  # a block of whole rows: 7 x 33 elements
        ((1000, 8), (32,)),
        ((5000,), (20,)),
        ((64, 3, 3, 32), (64, 2)),
        ((), (1,)),
    ],
    ids=str,
)
def test_blocks(shape, want):
    exponents = quantization.exponents_shape(shape, 256)
    assert exponents == want
    blocks = quantization.Blocks.of(shape, exponents)
    assert blocks.unit <= 256 and quantization.fits(shape, exponents)
    rows, columns = quantization.rows_and_columns(shape)
    assert blocks.unit <= columns or blocks.unit % columns == 0


@pytest.mark.parametrize("shape", [(4096, 1024), (100, 64), (4096, 34), (1000, 33), (100_001,), (64, 3, 3, 32)])
def test_costs_at_most_1_03_bytes_an_element(shape):
    optimizer = Adagrad(0.1, accumulator=Quantized())
    optimizer.init({"w": mx.zeros(shape)})
    state = optimizer.state["w"]
    assert sum(x.nbytes for x in state.values()) <= 1.03 * state["v"].size


def test_small_tensors_stay_fp32():
    optimizer = Adagrad(0.1, accumulator=Quantized())
    optimizer.init({"bias": mx.zeros((4095,)), "w": mx.zeros((64, 64)), "none": mx.zeros((0, 8))})
    dtypes = {path: x.dtype for path, x in flat(optimizer.state) if path.endswith(".v")}
    assert dtypes == {"bias.v": mx.float32, "w.v": mx.uint8, "none.v": mx.float32}
    plain, g = Adagrad(0.1), mx.ones((4095,))
    one, two = (o.apply_gradients({"bias": g}, {"bias": g}) for o in (optimizer, plain))
    assert bits(one) == bits(two) and bits(optimizer.state["bias"]) == bits(plain.state["bias"])


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, 1e30])
@pytest.mark.parametrize("accumulator", [QUANTIZED, Dense("bfloat16")], ids=["8bit", "bf16"])
def test_initial_accumulator_value(value, accumulator):
    optimizer = Adagrad(0.1, initial_accumulator_value=value, accumulator=accumulator)
    optimizer.init({"w": mx.zeros((50, 200))})
    v = v_of(optimizer.state["w"])
    np.testing.assert_allclose(v.mean(), value, rtol=1e-3)
    np.testing.assert_allclose(v, value, rtol=2.0**-4)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Quantized(block=0), ValueError, r"\[Quantized\] 'block' must be between 16 and 65536 but got 0"),
        (lambda: Quantized(block=64.0), TypeError, r"\[Quantized\] 'block' must be an integer but got 64.0"),  # type: ignore
        (lambda: Quantized(min_size=-1), ValueError, r"\[Quantized\] 'min_size' must be at least 0 but got -1"),
        (lambda: Quantized(min_size=None), TypeError, r"\[Quantized\] 'min_size' must be an integer but got None"),  # type: ignore
        (lambda: Dense("float16"), ValueError, r"\[Dense\] 'dtype' must be one of .*'bfloat16' but got 'float16'"),
        (lambda: RowWise("int8"), ValueError, r"\[RowWise\] 'dtype' must be one of"),
    ],
)
def test_wrong_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- It goes on growing.


def grown(accumulator, steps=5_000, shape=(64, 256)):
    """sqrt(v / exact v) after so many steps, gradients over two decades, the same for every accumulator."""
    rng = np.random.default_rng(1)
    scale = mx.array(10.0 ** rng.uniform(-2, 0, size=shape), mx.float32)
    noise = [mx.array(rng.standard_normal(shape), mx.float32) for _ in range(50)]
    optimizer = Adagrad(0.1, accumulator=accumulator, rounding_seed=0)
    w, exact = {"w": mx.zeros(shape, mx.bfloat16)}, np.zeros(shape)
    optimizer.init(w)
    step = mx.compile(lambda g, w: optimizer.apply_gradients({"w": g}, w), optimizer.state, optimizer.state)
    for t in range(steps):
        w = step(noise[t % 50] * scale, w)
        if t % 20 == 0:
            mx.eval(w, optimizer.state)
    squares = np.sum([np.array(x * scale).astype(np.float64) ** 2 for x in noise], axis=0)
    exact = squares * (steps / 50)
    return np.sqrt(v_of(optimizer.state["w"]) / exact)


def nearest_8_bits(v):
    """The rival: 4 bits of mantissa, rounded to the nearest, as bitsandbytes rounds its codes."""
    codes = (v.view(mx.uint32) + (1 << 18)) >> 19
    return (codes << 19).view(mx.float32)


@pytest.mark.parametrize("accumulator, sd", [(Dense("bfloat16"), 0.03), (Quantized(), 0.09)], ids=["bf16", "8bit"])
def test_is_unbiased_after_5000_steps(accumulator, sd, compiling):
    ratio = grown(accumulator)
    assert 0.98 < ratio.mean() < 1.02 and ratio.std() < sd


def test_the_rivals_that_round_to_nearest_are_not(compiling):
    assert not 0.98 < grown(Dense("parameter")).mean() < 1.02  # bf16 weights: torch, Keras, stock MLX
    rng = np.random.default_rng(1)
    scale, v, exact = 10.0 ** rng.uniform(-2, 0, size=(64, 256)), mx.zeros((64, 256)), 0.0
    for _ in range(5_000):
        g = mx.array(rng.standard_normal((64, 256)) * scale, mx.float32)
        v = nearest_8_bits(v + g * g)
        mx.eval(v)
        exact = exact + np.array(g).astype(np.float64) ** 2
    assert not 0.98 < np.sqrt(to_numpy(v) / exact).mean() < 1.02


# ---- Checkpoints.

SHAPE = (9, 40)


def trained(accumulator, steps=3, **options):
    optimizer = Adagrad(0.1, accumulator=accumulator, rounding_seed=1, **options)
    gs = [mx.array(g, mx.float32) for g in smooth(SHAPE, steps)]
    w, _ = run(optimizer, mx.ones(SHAPE, mx.bfloat16), gs)
    return optimizer, w


def assert_near(got, want, unit=2.0**-4):
    """``got`` is within a unit of ``want``; the smallest numbers of a block have larger units."""
    np.testing.assert_allclose(got, want, rtol=unit, atol=want.max() * 2.0**-17 if unit == 2.0**-4 else 0)


KINDS = {
    "fp32": Dense(),
    "bf16": Dense("bfloat16"),
    "8bit": QUANTIZED,
    "8bit_256": Quantized(min_size=1),
}


@pytest.mark.parametrize("there", KINDS)
@pytest.mark.parametrize("here", KINDS)
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "live"])
def test_checkpoints_are_converted_on_request(here, there, fresh, tmp_path):
    saved, w = trained(KINDS[there])
    path = tmp_path / "run.safetensors"
    checkpoint.save(path, saved, {"w": w})
    optimizer = Adagrad(0.1, accumulator=KINDS[here])
    if not fresh:
        optimizer.init({"w": w})
    before = bits(optimizer.state)
    if here != there:
        with pytest.raises(ValueError, match="accumulator"):
            checkpoint.load(path, optimizer)
        assert bits(optimizer.state) == before
    checkpoint.load(path, optimizer, strict=False)
    want = v_of(saved.state["w"])
    new = optimizer.apply_gradients({"w": mx.zeros(SHAPE)}, {"w": w})
    assert_near(v_of(optimizer.state["w"]), want, 2.0**-4 if "8bit" in here else 2.0**-7 if here == "bf16" else 1e-7)
    assert set(optimizer.state["w"]) == set(trained(KINDS[here])[0].state["w"]) and bits(new) == bits({"w": w})
    assert optimizer.state["w"]["v"].dtype == trained(KINDS[here])[0].state["w"]["v"].dtype


@pytest.mark.parametrize(
    "there, here", [("nearest", "compensated"), ("compensated", "nearest"), ("compensated", "stochastic")]
)
def test_another_rounding_goes_on_on_request(there, here, tmp_path):
    saved, w = trained(QUANTIZED, rounding=there)
    path = tmp_path / "run.safetensors"
    checkpoint.save(path, saved, {"w": w})
    optimizer = Adagrad(0.1, accumulator=QUANTIZED, rounding=here)
    optimizer.init({"w": w})
    with pytest.raises(ValueError, match="rounding"):
        checkpoint.load(path, optimizer)
    checkpoint.load(path, optimizer, strict=False)
    optimizer.apply_gradients({"w": mx.ones(SHAPE)}, {"w": w})
    assert ("compensation" in optimizer.state["w"]) == (here == "compensated")


def test_a_state_of_another_accumulator_is_taken_over():
    for there in KINDS.values():
        for here in KINDS.values():
            saved, w = trained(there)
            optimizer = Adagrad(0.1, accumulator=here)
            optimizer.state = saved.state
            optimizer.apply_gradients({"w": mx.zeros(SHAPE)}, {"w": w})
            assert_near(v_of(optimizer.state["w"]), v_of(saved.state["w"]))


def damaged(path, change):
    """Rewrite a checkpoint with its arrays changed."""
    with open(path, "rb") as stream:
        entries, metadata = safetensors.read(stream)
        arrays = {name: entry.read() for name, entry in entries.items()}
    mx.eval(arrays)
    change(arrays)
    with open(path, "wb") as stream:
        safetensors.write(stream, arrays, metadata)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "live"])
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "converting"])
@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.update({"optimizer.w.exponents": mx.zeros((9, 33), mx.uint8)}),
        lambda a: a.update({"optimizer.w.exponents": mx.zeros((9, 0), mx.uint8)}),
        lambda a: a.update({"optimizer.w.exponents": mx.zeros((1000,), mx.uint8)}),
        lambda a: a.update({"optimizer.w.exponents": mx.zeros((9, 2, 1), mx.uint8)}),
        lambda a: a.update({"optimizer.w.exponents": mx.zeros((9, 2), mx.int32)}),
        lambda a: a.update({"optimizer.w.v": mx.zeros((40, 9), mx.uint8)}),
        lambda a: a.update({"optimizer.w.v": mx.zeros((9, 40), mx.int8)}),
        lambda a: a.update({"optimizer.w.v": mx.zeros((9, 40))}),
    ],
)
def test_a_damaged_file_is_refused(change, strict, fresh, tmp_path):
    saved, w = trained(QUANTIZED)
    path = tmp_path / "run.safetensors"
    checkpoint.save(path, saved)
    damaged(path, change)
    optimizer = Adagrad(0.1, accumulator=QUANTIZED)
    if not fresh:
        optimizer.init({"w": w})
    before = bits(optimizer.state)
    with pytest.raises(ValueError, match="w|exponents"):
        checkpoint.load(path, optimizer, strict=strict)
        assert fresh  # such a state is compared with the parameters at the first step
        before = bits(optimizer.state)
        optimizer.apply_gradients({"w": mx.ones(SHAPE)}, {"w": w})
    assert bits(optimizer.state) == before


@pytest.mark.parametrize("exponent", range(0, 256, 5))
def test_every_code_and_exponent_can_be_gone_on_from(exponent):
    optimizer = Adagrad(0.1, accumulator=Quantized(min_size=1))
    w = {"w": mx.zeros((1, 256))}
    optimizer.init(w)
    optimizer.state["w"]["v"], optimizer.state["w"]["exponents"] = every_code(exponent)
    for _ in range(2):
        w = optimizer.apply_gradients({"w": mx.full((1, 256), 0.1)}, w)
    assert mx.isfinite(w["w"]).all() and not np.isnan(v_of(optimizer.state["w"])).any()


def test_imports_and_exports():
    exact = Adagrad(0.1)
    gs = [mx.array(g, mx.float32) for g in smooth(SHAPE, 3)]
    run(exact, mx.ones(SHAPE), gs)
    source = checkpoint.export_mlx(exact)
    for optimizer in (Adagrad(0.1, accumulator=QUANTIZED), Adagrad(0.1, accumulator=QUANTIZED, rounding="compensated")):
        for _ in range(2):  # without state, and into one
            checkpoint.import_mlx(source, optimizer)
            w = {"w": mx.ones(SHAPE, mx.bfloat16)}
            optimizer.apply_gradients({"w": mx.zeros(SHAPE)}, w)
            assert optimizer.state["w"]["v"].dtype == mx.uint8
            assert_near(v_of(optimizer.state["w"]), to_numpy(exact.state["w"]["v"]))
    for accumulator in (QUANTIZED, Dense("bfloat16")):
        optimizer, _ = trained(accumulator)
        (v,) = (x for name, x in checkpoint.export_mlx(optimizer).items() if name == "w.v")
        assert v.dtype == mx.float32 and np.array_equal(to_numpy(v), v_of(optimizer.state["w"]))


def test_import_torch_into_8_bits():
    torch_state = {
        "state": {0: {"step": 3.0, "sum": np.array(smooth(SHAPE, 1)[0] ** 2, np.float32)}},
        "param_groups": [{"lr": 0.1, "lr_decay": 0, "eps": 1e-8, "weight_decay": 0, "initial_accumulator_value": 0,
                          "maximize": False, "params": [0]}],
    }  # fmt: skip
    optimizer = Adagrad(0.1, accumulator=QUANTIZED)
    optimizer.init({"w": mx.ones(SHAPE)})
    checkpoint.import_torch(torch_state, optimizer, ["w"])
    assert_near(v_of(optimizer.state["w"]), torch_state["state"][0]["sum"])
    back = checkpoint.export_torch(optimizer, ["w"])
    np.testing.assert_array_equal(np.array(back["state"][0]["sum"]), v_of(optimizer.state["w"]))


def test_the_file_says_what_it_is(tmp_path):
    saved, _ = trained(QUANTIZED, rounding="stochastic")
    checkpoint.save(tmp_path / "run.safetensors", ClipByGlobalNorm(saved, 1.0))
    with open(tmp_path / "run.safetensors", "rb") as stream:
        _, metadata = safetensors.read(stream)
    config = json.loads(metadata["config"])["optimizer"]
    assert config["accumulator"] == {"class": "Quantized", "dtype": "float32", "block": 32, "min_size": 1}
    assert config["rounding"] == "stochastic"
