"""The random bits, and rounding to half precision with them: published values, statistics, and the law of the mean."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from cases import HALF, to_numpy
from mlx_adagrad import Adagrad
from mlx_adagrad.update import rounding

SIZE = 2**18
KEYS = [(0, 0), (1, 0), (0, 1), (0x243F6A88, 0x85A308D3)]


def u32(*values):
    return mx.array(values, mx.uint32)


# ---- The generator.


# The known answers of Random123 1.14, tests/kat_vectors, "philox4x32 10".
@pytest.mark.parametrize(
    "counter, key, answer",
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    got = rounding.philox(map(u32, counter), map(u32, key))
    assert tuple(word.item() for word in got) == answer


def test_keys_are_philox_of_parameter_step_and_seed():
    seed, step, path = 2**40 + 7, 2**33 + 5, ("layers", 0, "weight")
    key = rounding.Keys(mx.array(seed, mx.uint64), mx.array(step, mx.uint64)).of(path)
    counter = (*rounding.digest(path), step % 2**32, step >> 32)
    want = rounding.philox(map(u32, counter), map(u32, (seed % 2**32, seed >> 32)))
    assert key.tolist() == [word.item() for word in want]


def lowbias32(x):
    """Wellons' hash, in numpy."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def drawn(key, size=SIZE):
    return np.array(rounding.all_words((size,), u32(*key)))


def test_words_under_the_key_0_are_lowbias32():
    assert np.array_equal(drawn((0, 0)), lowbias32(np.arange(SIZE, dtype=np.uint32)))


def test_halves_are_the_halves_of_words():
    key, pairs = u32(3, 4), drawn((3, 4), 500).view(np.uint16)
    for shape in [(999,), (1000,), (10, 99), ()]:
        size = int(np.prod(shape))
        assert np.array_equal(np.array(rounding.all_halves(shape, key)), pairs[:size].reshape(shape))
        assert np.array_equal(np.array(rounding.halves(rounding.numbers(shape), key)), pairs[:size].reshape(shape))


def uniform(words):
    return words.astype(np.float64) / 2**32 - 0.5


@pytest.mark.parametrize("key", KEYS)
def test_words_are_uniform(key):
    words = drawn(key)
    for shift in range(0, 32, 8):  # chi-square of each byte: 255 degrees of freedom, 6 standard deviations
        counts = np.bincount((words >> np.uint32(shift)) & np.uint32(255), minlength=256)
        chi_square = ((counts - SIZE / 256) ** 2 / (SIZE / 256)).sum()
        assert abs(chi_square - 255) < 6 * np.sqrt(2 * 255)
    ones = (words[:, None] >> np.arange(32, dtype=np.uint32)) & np.uint32(1)
    assert np.abs(ones.mean(0) - 0.5).max() < 6 * 0.5 / np.sqrt(SIZE)
    pairs = np.corrcoef(ones.T.astype(np.float32))  # of the bits of a word
    assert np.abs(pairs - np.eye(32)).max() < 6 / np.sqrt(SIZE)


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 8, 64, 256, 1024])
def test_elements_are_not_correlated(lag):
    x = uniform(drawn((5, 6)))
    assert abs(np.mean(x[lag:] * x[:-lag])) * 12 < 6 / np.sqrt(SIZE)


@pytest.mark.parametrize("what", ["seed", "step"])
def test_one_bit_of_the_seed_or_of_the_step_gives_other_bits(what):
    size, base = 2**13, 0x1E3779B97F4A7C15
    draws = []
    for number in [base ^ (1 << bit) for bit in range(63)] + [base]:
        numbers = {"seed": base, "step": base} | {what: number}
        key = rounding.Keys(**{name: mx.array(n, mx.uint64) for name, n in numbers.items()}).of(("w",))
        draws += [uniform(np.array(rounding.all_words((size,), key[:2])))]
    assert np.abs(np.corrcoef(np.stack(draws)) - np.eye(64)).max() < 6.5 / np.sqrt(size)


def test_steps_parameters_and_seeds_give_other_bits():
    size, draws = 2**12, []
    for seed, step, path in [(s, t, (p,)) for s in (0, 1) for t in range(20) for p in "ab"]:
        key = rounding.Keys(mx.array(seed, mx.uint64), mx.array(step, mx.uint64)).of(path)
        draws += [np.array(rounding.all_words((size,), k)) for k in (key[:2], key[2:])]
    correlation = np.corrcoef(uniform(np.stack(draws))) - np.eye(len(draws))
    assert np.abs(correlation).max() < 6.5 / np.sqrt(size)
    series = uniform(np.stack(draws))[::4]  # one element over the steps: its own bits must be uniform too
    assert abs((series * 12**0.5).mean(0)).max() < 6.5 / np.sqrt(len(series))


# ---- Rounding.

SPREAD = np.random.default_rng(0).normal(size=400) * 10.0 ** np.random.default_rng(1).integers(-7, 5, 400)
EDGES = [0.0, -0.0, 2.0**-24, 2.0**-25, -(2.0**-24) * 1.3, 2.0**-14 * 0.999, 65503.0, 1e-30, np.inf, -np.inf]


def finest(dtype, x):
    """The distance of the neighbours of each number in ``dtype``."""
    digits, smallest = (10, -24) if dtype == mx.float16 else (7, -133)
    return 2.0 ** np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-45))) - digits, smallest)


@pytest.mark.parametrize("dtype", HALF)
def test_the_mean_is_exact(dtype):
    x = np.concatenate([SPREAD, EDGES[:-2]]).astype(np.float32)
    every = np.arange(0, 2**16, 16, dtype=np.uint32) + 8  # all random bits, evenly thinned out
    many = mx.broadcast_to(mx.array(x), (len(every), len(x)))
    got = to_numpy(rounding.stochastic(many, mx.broadcast_to(mx.array(every)[:, None], many.shape), dtype))
    unit = finest(dtype, x)
    assert (np.abs(got - x) < unit).all()  # one of the two neighbours
    assert (np.abs(got.mean(0) - x) <= unit / len(every)).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bits", [0, 0xFFFF])
def test_what_the_dtype_holds_stays(dtype, bits):
    every = mx.arange(2**16, dtype=mx.uint32).astype(mx.uint16).view(dtype)
    got = rounding.stochastic(every.astype(mx.float32), mx.full(every.shape, bits, mx.uint32), dtype)
    same = got.view(mx.uint16) == every.view(mx.uint16)
    assert mx.all(mx.logical_or(same, mx.logical_and(mx.isnan(got), mx.isnan(every))))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bits", [0, 0xFFFF])
def test_overflow_is_where_the_nearest_number_has_it(dtype, bits):
    largest = 65504.0 if dtype == mx.float16 else float((2 - 2.0**-7) * 2.0**127)
    beyond = largest * np.array([1.00001, 1.0002, 1.001, 1.003], np.float64)
    x = mx.array(np.concatenate([beyond, -beyond, [3.4e38, np.nan]]).astype(np.float32))
    got = rounding.stochastic(x, mx.full(x.shape, bits, mx.uint32), dtype)
    assert mx.array_equal(got, x.astype(dtype), equal_nan=True)


@pytest.mark.parametrize("dtype", HALF)
def test_compensated_keeps_what_rounding_drops(dtype):
    x = np.concatenate([SPREAD, EDGES]).astype(np.float32)
    w, rest = rounding.compensated(mx.array(x), dtype)
    assert mx.array_equal(w, mx.array(x).astype(dtype))
    finite = np.isfinite(x)
    error = np.abs(to_numpy(w)[finite] + to_numpy(rest)[finite] - x[finite])
    assert (error <= np.maximum(np.abs(x[finite]) * finest(dtype, 1.0) ** 2 / 2, finest(dtype, 0.0) / 2)).all()
    assert not to_numpy(rest)[~finite].any()


# ---- Weights that arrive.

N = 256


def arrives(dtype, seed=0, steps=5_000, **options):
    """Weights after ``steps`` with g = 0.1 from 0, and the exact one."""
    optimizer = Adagrad(0.1, rounding_seed=seed, **options)
    w, g, exact = mx.zeros((N,), dtype), mx.full((N,), 0.1), 0.0
    step = mx.compile(lambda w: optimizer.apply_gradients({"w": g}, {"w": w})["w"], optimizer.state, optimizer.state)
    optimizer.init({"w": w})
    for t in range(steps):
        w = step(w)
        if t % 100 == 0:
            mx.eval(w, optimizer.state)
    for t in range(steps):
        exact -= 0.1 / np.sqrt(t + 1)
    return to_numpy(w), exact


@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_weights_arrive_on_average(dtype):
    w, exact = arrives(dtype, rounding="stochastic")
    error = w.std() / np.sqrt(N)
    assert abs(w.mean() - exact) < min(4 * error, 0.01 * abs(exact))
    assert w.std() < 0.1 * abs(exact)


def test_compensated_weights_arrive():
    for dtype in HALF:
        w, exact = arrives(dtype, rounding="compensated")
        assert np.abs(w - exact).max() < 0.01 * abs(exact)


def test_nearest_weights_do_not_arrive():
    w, exact = arrives(mx.bfloat16, rounding="nearest")
    assert abs(w.mean() - exact) > 0.75 * abs(exact)


# ---- The seed.


def seed_of(optimizer: Any) -> Any:
    return optimizer.state["_mlx_adagrad"]["rounding_seed"]


def test_the_seed_is_drawn_from_mlx_and_saved():
    def seed(**options):
        return seed_of(Adagrad(0.1, rounding="stochastic", **options))

    mx.random.seed(4)
    first = seed()
    assert first.dtype == mx.uint64 and first.shape == ()
    assert seed().item() != first.item()
    mx.random.seed(4)
    assert seed().item() == first.item()
    for given in (0, 7, 2**64 - 1):
        assert seed(rounding_seed=given).item() == given


@pytest.mark.parametrize("rounding", ["nearest", "compensated"])
def test_without_random_bits_no_seed_is_drawn(rounding):
    state: Any = mx.random.state
    before = state[0].tolist()
    optimizer = Adagrad(0.1, rounding=rounding)
    assert "_mlx_adagrad" not in optimizer.state and state[0].tolist() == before


def test_another_state_keeps_the_seed_unless_it_has_one():
    optimizer = Adagrad(0.1, rounding="stochastic", rounding_seed=5)
    optimizer.state = {"step": mx.array(0, mx.uint64), "learning_rate": mx.array(0.1)}
    assert seed_of(optimizer).item() == 5
    optimizer.state = Adagrad(0.1, rounding="stochastic", rounding_seed=6).state
    assert seed_of(optimizer).item() == 6


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"rounding": "up"}, ValueError, "'rounding' must be one of 'nearest', 'stochastic', 'compensated' but got"),
        ({"rounding": None}, ValueError, "'rounding' must be one of .* but got None"),
        ({"rounding_seed": -1}, ValueError, "'rounding_seed' must be between 0 and 18446744073709551615 but got -1"),
        ({"rounding_seed": 2**64}, ValueError, "'rounding_seed' must be between"),
        ({"rounding_seed": 1.5}, TypeError, "'rounding_seed' must be an integer but got 1.5"),
        ({"rounding_seed": True}, TypeError, "'rounding_seed' must be an integer but got True"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Adagrad(0.1, **options)
