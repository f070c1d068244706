"""Tables that get more rows or fewer: what stays goes on bit for bit, what is new starts as a new parameter does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

from checkpoint_runs import bits
from mlx_adagrad import Adagrad, Dense, Quantized, RowSparse, RowWise, checkpoint, presets
from mlx_adagrad.checkpoint import resize
from mlx_adagrad.wrappers import ClipByNorm, ExponentialMovingAverage, GradientAccumulation, SkipNonFinite

WIDTH = 16
MAKERS: dict[str, Callable[[], Any]] = {
    "adagrad": lambda: Adagrad(0.1, initial_accumulator_value=0.1),
    "row_wise": lambda: Adagrad(0.1, accumulator=RowWise(), initial_accumulator_value=0.1),
    "parameter": lambda: Adagrad(0.1, accumulator=Dense("parameter")),
    "quantized": lambda: Adagrad(0.1, accumulator=Quantized(), rounding_seed=3, initial_accumulator_value=0.1),
    "compensated": lambda: Adagrad(0.1, rounding="compensated"),
    "torch": lambda: presets.torch(0.1, initial_accumulator_value=0.1),
    "averaged": lambda: ExponentialMovingAverage(ClipByNorm(Adagrad(0.1), 100.0), 0.9),
    "accumulated": lambda: GradientAccumulation(Adagrad(0.1, initial_accumulator_value=0.1), 3),
    "keras": lambda: presets.keras(0.1, use_ema=True, gradient_accumulation_steps=3),
    "skip": lambda: SkipNonFinite(ExponentialMovingAverage(GradientAccumulation(Adagrad(0.1), 3), 0.9)),
}
ROWS = {
    "more": [*range(6), -1, -1, -1],
    "fewer": [0, 1, 2, 3],
    "none": [],
    "moved": [5, 0, -1, 3],
    "all_new": [-1] * 6,
}


def weights(rows: list[int], dtype: mx.Dtype) -> dict[str, Any]:
    """A table, its bias by row, and a layer beside; row r is what the numbers of r say, and new ones are 0.5."""
    table = mx.random.normal((6, WIDTH), key=mx.random.key(1))
    bias = mx.random.normal((6,), key=mx.random.key(2))
    at = mx.array(rows, mx.int32)
    table = mx.concatenate([table, mx.full((1, WIDTH), 0.5)])[at]
    bias = mx.concatenate([bias, mx.full((1,), 0.5)])[at]
    other = mx.random.normal((3, 2), key=mx.random.key(3))
    tree = {"embed": {"weight": table, "bias": bias}, "layers": [{"weight": other}]}
    return {key: child for key, child in _cast(tree, dtype).items()}


def _cast(tree: Any, dtype: mx.Dtype) -> Any:
    if isinstance(tree, dict):
        return {key: _cast(child, dtype) for key, child in tree.items()}
    return [_cast(child, dtype) for child in tree] if isinstance(tree, list) else tree.astype(dtype)


def gradients(rows: list[int], t: int, dtype: mx.Dtype) -> dict[str, Any]:
    """By row, so that a row has the same gradient wherever it is; a new one has that of a row which never was."""
    every = mx.random.normal((7, WIDTH), key=mx.random.key(100 + t))
    at = mx.array([6 if row < 0 else row for row in rows], mx.int32)
    other = mx.random.normal((3, 2), key=mx.random.key(200 + t))
    return _cast({"embed": {"weight": every[at], "bias": every[at, 0]}, "layers": [{"weight": other}]}, dtype)


def train(optimizer: Any, w: Any, rows: list[int], start: int, stop: int, dtype: mx.Dtype) -> Any:
    for t in range(start, stop):
        w = optimizer.apply_gradients(gradients(rows, t, dtype), w)
        mx.eval(w, optimizer.state)
    return w


def moved(w: Any, rows: list[int], dtype: mx.Dtype) -> Any:
    fresh, at = weights([-1], dtype), mx.array(rows, mx.int32)
    embed = {key: mx.concatenate([w["embed"][key], fresh["embed"][key]])[at] for key in w["embed"]}
    return {**w, "embed": embed}


@pytest.mark.parametrize("case", MAKERS)
@pytest.mark.parametrize("change", ROWS)
def test_rows_that_stay_go_on_as_if_nothing_had_happened(case: str, change: str) -> None:
    dtype = mx.bfloat16 if case in ("parameter", "compensated") else mx.float32
    all_rows, rows = list(range(6)), ROWS[change]
    optimizer, other = MAKERS[case](), MAKERS[case]()
    w = train(optimizer, weights(all_rows, dtype), all_rows, 0, 4, dtype)
    unchanged = train(other, weights(all_rows, dtype), all_rows, 0, 4, dtype)
    w = moved(w, rows, dtype)
    names = {"embed.weight": rows, "embed.bias": rows}
    plain = change in ("more", "fewer", "none")
    assert sorted(resize(optimizer, w, None if plain else names)) == ["embed.bias", "embed.weight"]
    w = train(optimizer, w, rows, 4, 9, dtype)
    unchanged = train(other, unchanged, all_rows, 4, 9, dtype)
    if case == "quantized":
        return  # its random bits are by place: the state is compared below
    for i, row in enumerate(rows):
        if row >= 0:
            assert bits(w["embed"]["weight"][i]) == bits(unchanged["embed"]["weight"][row]), (i, row)
            assert bits(w["embed"]["bias"][i]) == bits(unchanged["embed"]["bias"][row]), (i, row)
    assert bits(w["layers"]) == bits(unchanged["layers"])


@pytest.mark.parametrize("case", ["adagrad", "row_wise", "parameter", "torch"])
def test_a_new_row_starts_as_a_new_parameter_does(case: str) -> None:
    dtype = mx.bfloat16 if case == "parameter" else mx.float32
    rows = ROWS["more"]
    optimizer, fresh = MAKERS[case](), MAKERS[case]()
    w = train(optimizer, weights(rows[:6], dtype), rows[:6], 0, 4, dtype)
    w = moved(w, rows, dtype)
    resize(optimizer, w)
    new = weights([-1] * 3, dtype)
    mx.eval(w)
    a, b = w["embed"]["weight"], new["embed"]["weight"]
    for t in range(4, 7):
        g = gradients(rows, t, dtype)["embed"]["weight"]
        a = optimizer.apply_gradients({"embed": {"weight": g}}, {"embed": {"weight": a}})["embed"]["weight"]
        b = fresh.apply_gradients({"embed": {"weight": g[6:]}}, {"embed": {"weight": b}})["embed"]["weight"]
    assert bits(a[6:]) == bits(b)


@pytest.mark.parametrize("rows", [ROWS["more"], ROWS["fewer"], ROWS["moved"]])
def test_an_8_bit_v_keeps_its_codes(rows: list[int]) -> None:
    optimizer = MAKERS["quantized"]()
    w = train(optimizer, weights(list(range(6)), mx.float32), list(range(6)), 0, 4, mx.float32)
    before = dict(optimizer.state["embed"]["weight"])
    resize(optimizer, moved(w, rows, mx.float32), {"embed.weight": rows, "embed.bias": rows})
    after = optimizer.state["embed"]["weight"]
    for i, row in enumerate(rows):
        for key in before:
            assert row < 0 or bits(after[key][i]) == bits(before[key][row]), key
    train(optimizer, moved(w, rows, mx.float32), rows, 4, 6, mx.float32)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", ["more", "fewer", "moved"])
def test_accumulated_rows_are_those_of_the_same_words(change: str, compiled: bool) -> None:
    rows, optimizer = ROWS[change], GradientAccumulation(Adagrad(1.0), 2)

    def call(table: mx.array, indices: mx.array) -> mx.array:
        values = mx.broadcast_to(mx.arange(1.0, len(indices) + 1)[:, None], (len(indices), 2))
        return optimizer.apply_gradients({"w": RowSparse(indices, values, len(table))}, {"w": table})["w"]

    optimizer.init({"w": mx.zeros((6, 2))})
    step = mx.compile(call, inputs=optimizer.state, outputs=optimizer.state) if compiled else call
    step(mx.zeros((6, 2)), mx.array([0, 5, 3, 6]))  # 6 stands for no row
    table = mx.zeros((len(rows), 2))
    assert resize(optimizer, {"w": table}, {"w": rows}) == ["w"]
    new = step(table, mx.array([1, len(rows), len(rows), len(rows)]))
    touched = {i for i, row in enumerate(rows) if row in (0, 5, 3)} | {1}
    assert {i for i in range(len(rows)) if mx.any(new[i] != 0).item()} == touched


def test_a_module_that_grew_and_a_checkpoint_of_before(tmp_path: Path) -> None:
    def model(words: int) -> nn.Module:
        mx.random.seed(1)
        return nn.Sequential(nn.Embedding(words, 4), nn.Linear(4, 2))

    def optimizer() -> Any:
        return ExponentialMovingAverage(Adagrad(0.1, initial_accumulator_value=0.1), 0.9)

    small, trained = model(5), optimizer()
    for _ in range(3):
        trained.update(small, nn.value_and_grad(small, lambda m: m(mx.arange(5)).sum())(small)[1])
    checkpoint.save(tmp_path / "a", trained, small)

    grown, resumed = model(5), optimizer()
    checkpoint.load(tmp_path / "a", resumed, grown)
    table: Any = grown.layers[0]  # type: ignore[union-attr]
    table.weight = mx.concatenate([table.weight, mx.ones((2, 4))])
    assert resize(resumed, grown) == ["layers.0.weight"]
    assert bits(resumed.state["_mlx_adagrad"]["averages"]["/layers/0/weight"][5:]) == bits(mx.ones((2, 4)))
    step = mx.compile(
        lambda: resumed.update(grown, nn.value_and_grad(grown, lambda m: m(mx.arange(7)).sum())(grown)[1]),
        inputs=[grown.state, resumed.state],
        outputs=[grown.state, resumed.state],
    )
    step()
    checkpoint.save(tmp_path / "b", resumed, grown)
    checkpoint.load(tmp_path / "b", optimizer(), grown)
    assert resize(resumed, grown) == []


REFUSED: list[tuple[dict[str, Any], Any, str]] = [
    ({"w": mx.ones((5, 3))}, None, r"a parameter of shape \(5, 3\) for the state of 'w', whose v has shape \(4, 2\)"),
    ({"w": mx.ones(5)}, None, "a parameter of shape"),
    ({"x": mx.ones((4, 2))}, None, "there is no parameter for the state of 'w'"),
    ({"w": mx.ones((5, 2))}, {"x": [0]}, r"'rows' has x, which has no state here \(w\)"),
    ({"w": mx.ones((2, 2))}, {"w": [0]}, "must be 2 rows, each of the 4 old ones or -1, but got 1: 0"),
    ({"w": mx.ones((2, 2))}, {"w": [0, 4]}, "must be 2 rows"),
    ({"w": mx.ones((2, 2))}, {"w": [0, -2]}, "must be 2 rows"),
    ({"w": mx.ones((2, 2))}, {"w": [1, 1]}, "names an old row twice: 1, 1"),
]


@pytest.mark.parametrize(("parameters", "rows", "message"), REFUSED)
def test_what_is_no_change_of_rows_is_refused(parameters: Any, rows: Any, message: str) -> None:
    optimizer = ExponentialMovingAverage(Adagrad(0.1), 0.9)
    optimizer.init({"w": mx.ones((4, 2))})
    before = bits(optimizer.state)
    with pytest.raises(ValueError, match=message):
        resize(optimizer, parameters, rows)
    assert bits(optimizer.state) == before


def test_other_optimizers_and_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="no mlx_adagrad.Adagrad in Adam"):
        resize(optim.Adam(0.1), {"w": mx.ones(2)})
    wrong: Any = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="'optimizer' must be"):
        resize(wrong, wrong)
