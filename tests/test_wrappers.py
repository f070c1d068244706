"""What holds for every wrapper around every optimizer: state, compilation, continuing, laziness, errors."""

from __future__ import annotations

import copy
import threading
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from cases import memory_before
from mlx_adagrad import Adagrad, RowSparse
from mlx_adagrad.wrappers import (
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    Constraint,
    DynamicLossScale,
    ExponentialMovingAverage,
    GradientAccumulation,
    LossScale,
    SkipNonFinite,
    Wrapper,
)


def rate(n):
    return 0.1 / (1 + 0.1 * n)


def is_bias(path, _):
    return path.endswith("bias")


# compiling for the CPU calls g++ for each new kernel: "multi" stands for Adam too where steps are compiled
INNER = {
    "adagrad": lambda: Adagrad(rate),
    "adam": lambda: optim.Adam(rate),
    "multi": lambda: optim.MultiOptimizer([optim.Adam(rate), Adagrad(rate)], [is_bias]),
}
WRAPPED = {
    "value": lambda inner: ClipByValue(inner, 0.05),
    "norm": lambda inner: ClipByNorm(inner, 0.05),
    "global_norm": lambda inner: ClipByGlobalNorm(inner, 0.1),
    "average": lambda inner: ExponentialMovingAverage(inner, 0.7, 3),
    "accumulation": lambda inner: GradientAccumulation(inner, 3),
    "loss_scale": lambda inner: LossScale(inner, 16.0),
    "dynamic_loss_scale": lambda inner: DynamicLossScale(inner, 16.0, 3),
    "skip": lambda inner: SkipNonFinite(inner),
    "constraint": lambda inner: Constraint(inner, {"*bias": "non_neg", "*": "max_norm"}),
    "all": lambda inner: SkipNonFinite(
        LossScale(
            Constraint(
                ExponentialMovingAverage(
                    GradientAccumulation(ClipByValue(ClipByGlobalNorm(inner, 0.2), 0.1), 2), 0.8, 2
                ),
                {"*bias": "non_neg"},
            ),
            4.0,
        )
    ),
}
inner = pytest.mark.parametrize("inner", INNER)
compiled_inner = pytest.mark.parametrize("inner", ["adagrad", "multi"])
wrapper = pytest.mark.parametrize("wrapper", WRAPPED)


def leaves(tree) -> dict[str, Any]:
    return dict(tree_flatten(tree))


def arrays(*trees):
    """The arrays of trees as numpy has them, by path."""
    return {path: np.array(a) for path, a in leaves(list(trees)).items()}


class Model(nn.Module):
    """Two layers in a list, a frozen one, and something quantised: all that ``update`` passes on."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(6, 5), nn.Linear(5, 3)]
        self.norm = nn.BatchNorm(5)
        self.base = nn.Linear(6, 6)
        self.base.freeze()
        self.table = nn.QuantizedEmbedding(4, 64)
        self.scale = mx.array(1.5)

    def __call__(self, x):
        x = self.layers[0](self.base(x) + self.table(mx.array([1]))[:, :6])
        return self.scale * self.layers[1](nn.relu(self.norm(x)))


def batches(n):
    rng = np.random.default_rng(5)
    return [
        (mx.array(rng.normal(size=(8, 6)), mx.float32), mx.array(rng.normal(size=(8, 3)), mx.float32)) for _ in range(n)
    ]


class Run:
    """A model, its optimizer, and a step that may be compiled with the state as it is at the start."""

    def __init__(self, wrapper, inner, compiled=False, parameters=None):
        mx.random.seed(3)
        self.model = Model()
        if parameters is not None:
            self.model.update(parameters)
        self.optimizer = WRAPPED[wrapper](INNER[inner]())
        self.traces = 0
        self.state = [self.model.state, self.optimizer.state]
        # g++ compiles what MLX fuses, once for each kernel: the forward pass is compiled too for "all" only
        if compiled:
            part = "step" if wrapper == "all" else "update"
            setattr(self, part, mx.compile(getattr(self, part), inputs=self.state, outputs=self.state))

    def step(self, x, y):
        self.update(self._gradients(x, y))

    def update(self, gradients):
        self.traces += 1
        self.optimizer.update(self.model, gradients)

    def _gradients(self, x, y):
        def loss(x, y):
            return self.optimizer.scale_loss(((self.model(x) - y) ** 2).mean())

        return nn.value_and_grad(self.model, loss)(x, y)[1]

    def train(self, data):
        for x, y in data:
            self.step(x, y)
            mx.eval(self.state)
        return self

    def arrays(self):
        return {
            f"{name}.{path}": np.array(a)
            for name, tree in (("model", self.model.state), ("optimizer", self.optimizer.state))
            for path, a in tree_flatten(tree)
        }


def assert_equal(got, want, exact=True):
    assert got.keys() == want.keys()
    for name, a in got.items():
        assert a.dtype == want[name].dtype and a.shape == want[name].shape, name
        if exact:
            assert a.tobytes() == want[name].tobytes(), name
        else:
            np.testing.assert_allclose(a, want[name], rtol=2e-5, atol=2e-6, err_msg=name)


@compiled_inner
@wrapper
def test_compiled_from_the_start_equals_eager_in_one_more_trace(wrapper, inner):
    eager, compiled = Run(wrapper, inner).train(batches(8)), Run(wrapper, inner, compiled=True).train(batches(8))
    assert_equal(compiled.arrays(), eager.arrays(), exact=False)
    assert compiled.traces == 2  # the second sees the state that the first made


@compiled_inner
@wrapper
def test_after_init_there_is_one_trace_and_the_state_keeps_its_form(wrapper, inner):
    run = Run(wrapper, inner, compiled=True)
    run.optimizer.init(run.model.trainable_parameters())
    before = {path: (a.shape, a.dtype) for path, a in leaves(run.optimizer.state).items()}
    run.train(batches(5))
    assert run.traces == 1
    assert before == {path: (a.shape, a.dtype) for path, a in leaves(run.optimizer.state).items()}
    assert_equal(run.arrays(), Run(wrapper, inner).train(batches(5)).arrays(), exact=False)


@pytest.mark.parametrize(
    ("inner", "compiled"),
    [("adagrad", False), ("adam", False), ("multi", False), ("adagrad", True), ("multi", True)],
)
@wrapper
def test_saved_and_continued_equals_never_stopped_bit_for_bit(wrapper, inner, compiled, tmp_path):
    whole = Run(wrapper, inner, compiled).train(batches(9))
    first = Run(wrapper, inner, compiled).train(
        batches(9)[:4]
    )  # in the middle of a window of 3, and at the end of one of 2
    mx.save_safetensors(str(tmp_path / "state"), dict(tree_flatten(first.optimizer.state)))
    second = Run(wrapper, inner, compiled, parameters=first.model.parameters())
    if inner == "multi":  # its own setter wants every state
        second.optimizer.init(second.model.trainable_parameters())
    loaded: Any = mx.load(str(tmp_path / "state.safetensors"))
    second.optimizer.state = tree_unflatten(loaded)
    second.train(batches(9)[4:])
    assert_equal(second.arrays(), whole.arrays())


def test_saved_in_the_middle_of_the_second_call_of_a_window():
    whole, first = Run("all", "adagrad").train(batches(9)), Run("all", "adagrad").train(batches(9)[:5])
    second = Run("all", "adagrad", parameters=first.model.parameters())
    second.optimizer.state = tree_unflatten(tree_flatten(first.optimizer.state))
    assert_equal(second.train(batches(9)[5:]).arrays(), whole.arrays())


@compiled_inner
@wrapper
def test_a_compiled_step_goes_on_with_state_that_is_loaded_into_it(wrapper, inner):
    whole = Run(wrapper, inner, compiled=True).train(batches(9))
    source = Run(wrapper, inner, compiled=True).train(batches(9)[:4])
    run = Run(wrapper, inner, compiled=True).train(batches(9)[5:8])
    traces, state = run.traces, run.optimizer.state
    run.model.update(source.model.parameters())
    run.optimizer.state = source.optimizer.state
    assert run.optimizer.state is state
    run.train(batches(9)[4:])
    assert_equal(run.arrays(), whole.arrays())
    assert run.traces == traces
    source.train(batches(1))  # the two share no dict
    assert_equal(run.arrays(), whole.arrays())


@inner
@wrapper
def test_there_is_one_state_dict_with_the_inner_ones_in_it(wrapper, inner):
    run = Run(wrapper, inner)
    state = run.optimizer.state
    dicts = {}

    def collect(optimizer, found):
        if isinstance(optimizer, Wrapper):
            found[id(optimizer)] = optimizer.state
            collect(optimizer.optimizer, found)
        elif isinstance(optimizer, optim.MultiOptimizer):
            for part in optimizer.optimizers:
                collect(part, found)
        else:
            found[id(optimizer)] = optimizer.state
        return found

    dicts = collect(run.optimizer, {})
    run.train(batches(2))
    run.optimizer.state = tree_map(lambda a: a, run.optimizer.state)
    run.optimizer.state = run.optimizer.state
    after = collect(run.optimizer, {})
    assert run.optimizer.state is state is dicts[id(run.optimizer)]
    assert all(after[key] is dicts[key] for key in dicts)
    node, optimizer = state, run.optimizer
    while isinstance(optimizer, Wrapper):
        assert node.keys() == {"inner", "_mlx_adagrad"}
        node, optimizer = node["inner"], optimizer.optimizer
    if inner != "multi":
        assert node is optimizer.state


@inner
@wrapper
def test_nothing_is_evaluated(wrapper, inner):
    optimizer = WRAPPED[wrapper](INNER[inner]())
    size = 2**16
    parameters = {"weight": mx.random.normal((size, 2)), "bias": mx.random.normal((size,))}
    gradients = tree_map(lambda w: w * 0.5, parameters)
    before = memory_before()
    for _ in range(4):
        parameters = optimizer.apply_gradients(gradients, parameters)
    assert mx.get_peak_memory() < before + size  # scalars only
    mx.eval(parameters)
    assert mx.get_peak_memory() > before + 4 * size


@inner
@pytest.mark.parametrize(
    ("wrapper", "dtype"),
    [(w, dtype) for w in WRAPPED for dtype in (mx.float16, mx.bfloat16)] + [("all", mx.float64)],
)
def test_parameters_keep_their_dtype_and_own_state_is_wide(wrapper, inner, dtype, cpu):
    optimizer = WRAPPED[wrapper](INNER[inner]())
    parameters = {"weight": mx.ones((3, 2), dtype), "bias": mx.ones((2,), dtype), "ids": mx.array([1, 2])}
    for _ in range(4):
        new = optimizer.apply_gradients({k: w * 0.25 for k, w in parameters.items() if k != "ids"}, parameters)
        assert {w.dtype for k, w in new.items() if k != "ids"} == {dtype}
        parameters |= new
    while isinstance(optimizer, Wrapper):
        for path, a in leaves(optimizer.state["_mlx_adagrad"]).items():
            if "/" in path:
                assert a.dtype == (dtype if dtype == mx.float64 else mx.float32), path
                assert "ids" not in path
        optimizer = optimizer.optimizer
    mx.eval(parameters)
    assert parameters["ids"].dtype == mx.int32


@inner
@wrapper
def test_absent_gradients_and_empty_trees(wrapper, inner):
    optimizer = WRAPPED[wrapper](INNER[inner]())
    optimizer.apply_gradients({}, {})
    assert not mx.isnan(optimizer.step + 0.0).item()
    optimizer = WRAPPED[wrapper](INNER[inner]())
    parameters = {
        "weight": mx.ones((3, 2)),
        "bias": mx.ones((2,)),
        "list": [mx.ones((2,)), mx.ones(())],
        "none": mx.ones((2,)),
    }
    moved = {k: tree_map(lambda w: w * 0.25, v) for k, v in parameters.items() if k in ("weight", "bias")}
    for t in range(5):
        gradients = moved | {"list": [None if t % 3 == 0 else mx.array([0.1, 0.2]), {}], "none": None}
        new = optimizer.apply_gradients(gradients, parameters)
        assert isinstance(new["list"][0], mx.array)
        if wrapper in ("average", "all"):  # they return every weight
            assert isinstance(new["list"][1], mx.array)
        else:
            assert new["list"][1] == {}
        parameters |= new | {"list": [new["list"][0], parameters["list"][1]]}
    mx.eval(parameters)
    assert mx.array_equal(parameters["none"], mx.ones((2,)))
    assert mx.array_equal(parameters["list"][1], mx.ones(()))
    assert not mx.array_equal(parameters["list"][0], mx.ones((2,)))
    assert not any(mx.array_equal(parameters[k], mx.ones_like(parameters[k])) for k in ("weight",))


@wrapper
def test_everything_of_the_optimizer_inside_is_reached_from_outside(wrapper):
    adagrad: Any = Adagrad(0.5, groups=[{"params": "bias", "lr": 0.25}])
    optimizer: Any = WRAPPED[wrapper](adagrad)
    assert optimizer.learning_rate.item() == 0.5
    optimizer.learning_rate = 0.0
    assert adagrad.learning_rate.item() == float(np.array(optimizer.learning_rate)) == 0.0
    optimizer.learning_rate = lambda step: 0.125
    assert adagrad.learning_rate.item() == 0.125
    optimizer.set_group(0, lr=2.0)
    optimizer.add_group({"params": "weight", "lr": 3.0})
    assert [group["learning_rate"].item() for group in adagrad.state["_mlx_adagrad"]["groups"]] == [2.0, 3.0]
    adagrad.state["step"] = mx.array(7, mx.uint64)
    assert optimizer.step.item() == 7
    multi = WRAPPED[wrapper](optim.MultiOptimizer([optim.Adam(0.5), optim.SGD(0.25)], [is_bias]))
    assert multi.step.item() == 0 and multi.learning_rate.item() == 0.5
    with pytest.raises(TypeError, match="MultiOptimizer has no parameter groups; use mlx_adagrad.Adagrad"):
        unnested(multi).add_group({"params": "*"})
    with pytest.raises(TypeError, match="only an optimizer that mlx_adagrad.presets returned has a config"):
        optimizer.get_config()


def unnested(optimizer):
    while isinstance(optimizer.optimizer, Wrapper):
        optimizer = optimizer.optimizer
    return optimizer


@wrapper
def test_without_an_average_values_stay_as_they_are(wrapper):
    optimizer, model = WRAPPED[wrapper](Adagrad(0.1)), Model()
    tree = {"weight": mx.array([1.0])}
    before = tree_flatten(model.parameters())
    if wrapper in ("average", "all"):  # and so they do with one that has seen nothing yet
        assert optimizer.finalize_variable_values(tree)["weight"].item() == 1.0
    else:
        assert optimizer.finalize_variable_values(tree) is tree
    optimizer.finalize_variable_values(model)
    with optimizer.averaged(model) as same:
        assert same is model
        assert all(a is b for (_, a), (_, b) in zip(tree_flatten(model.parameters()), before, strict=True))
    stock = WRAPPED[wrapper](optim.Adam(0.1)).finalize_variable_values(model)
    assert [path for path, _ in tree_flatten(stock)] == [path for path, _ in before]


@inner
@pytest.mark.parametrize("wrapper", [w for w in WRAPPED if w not in ("dynamic_loss_scale", "all")])
def test_a_nan_batch_leaves_everything_bit_equal_under_skip_non_finite(wrapper, inner):
    optimizer = SkipNonFinite(WRAPPED[wrapper](INNER[inner]()))
    parameters = {"weight": mx.ones((3, 2)), "bias": mx.array([0.5, -1.0])}
    good = {"weight": mx.full((3, 2), 0.25), "bias": mx.array([1.0, -2.0])}
    for _ in range(5):
        for bad in (mx.nan, mx.inf, -mx.inf):
            optimizer.init(parameters)
            before = arrays(parameters, optimizer.state["inner"])
            parameters = parameters | optimizer.apply_gradients(good | {"bias": mx.array([1.0, bad])}, parameters)
            assert_equal(arrays(parameters, optimizer.state["inner"]), before)
        parameters = parameters | optimizer.apply_gradients(good, parameters)
    assert optimizer.skipped_steps.item() == 15
    assert optimizer.step.item() == (1 if wrapper == "accumulation" else 5)
    assert all(mx.isfinite(w).all().item() for w in leaves([parameters, optimizer.state]).values())


@wrapper
def test_a_differentiated_update_through_a_wrapper(wrapper):
    def after(lr, w, g):
        optimizer = WRAPPED[wrapper](Adagrad(lr, differentiable=True))
        for _ in range(3):
            w = w | optimizer.apply_gradients(g, w)
        return (w["weight"] ** 2).sum() + (w["bias"] ** 2).sum()

    w = {"weight": mx.array([[0.3, -0.4]]), "bias": mx.array([0.2])}
    for g in (
        {"weight": mx.array([[0.1, 0.2]]), "bias": mx.array([0.3])},
        {"weight": mx.zeros((1, 2)), "bias": mx.zeros((1,))},
    ):
        by_rate, by_gradient = mx.grad(after, argnums=(0, 2))(mx.array(0.1), w, g)
        step = 1e-3
        numeric = (after(mx.array(0.1 + step), w, g) - after(mx.array(0.1 - step), w, g)) / (2 * step)
        np.testing.assert_allclose(by_rate.item(), numeric.item(), rtol=2e-2, atol=2e-4)
        assert all(mx.isfinite(x).all().item() for x in leaves(by_gradient).values())


@wrapper
def test_a_failed_call_changes_nothing(wrapper):
    optimizer = WRAPPED[wrapper](Adagrad(0.1))
    parameters = {"weight": mx.ones((2,)), "bias": mx.ones((2,))}
    optimizer.apply_gradients(parameters, parameters)
    wrong = [
        ({"weight": mx.ones((3,)), "bias": mx.ones((2,))}, "shape"),
        ({"weight": mx.ones((2,)), "other": mx.ones((2,))}, "'other'"),
        ({"weight": mx.ones((2,), mx.complex64), "bias": mx.ones((2,))}, "complex64"),
    ]
    before = arrays(optimizer.state)
    for gradients, message in wrong:
        with pytest.raises(ValueError, match=message):
            optimizer.apply_gradients(gradients, parameters)
        assert_equal(arrays(optimizer.state), before)
    mx.eval(optimizer.apply_gradients(parameters, parameters), optimizer.state)


def test_what_constructors_refuse():
    adagrad: Any = Adagrad(0.1)
    wrong: Any = {3: 3, "name": "non_neg", "half": 2.5}
    for make, kind, message in [
        (
            lambda: ClipByValue(wrong, 1.0),
            TypeError,
            r"\[ClipByValue\] 'optimizer' must be an mlx.optimizers.Optimizer",
        ),
        (lambda: ClipByValue(adagrad, -1.0), ValueError, r"\[ClipByValue\] 'value' must be non-negative but got -1.0."),
        (
            lambda: ClipByNorm(adagrad, -0.5),
            ValueError,
            r"\[ClipByNorm\] 'max_norm' must be non-negative but got -0.5.",
        ),
        (lambda: ClipByGlobalNorm(adagrad, mx.inf), ValueError, "'max_norm' must be finite in fp32 but got inf."),
        (lambda: ClipByGlobalNorm(adagrad, True), TypeError, "'max_norm' must be a real number but got True."),
        (lambda: ClipByGlobalNorm(adagrad, 1.0, rule="mlx"), ValueError, "'rule' must be 'keras' or 'torch'"),
        (lambda: ExponentialMovingAverage(adagrad, 1.1), ValueError, r"'momentum' must be in the range \[0, 1\]"),
        (lambda: ExponentialMovingAverage(adagrad, mx.nan), ValueError, r"'momentum' must be in the range \[0, 1\]"),
        (lambda: ExponentialMovingAverage(adagrad, 0.9, 0), ValueError, "'overwrite_frequency' must be at least 1"),
        (
            lambda: ExponentialMovingAverage(adagrad, 0.9, wrong["half"]),
            TypeError,
            "'overwrite_frequency' must be an integer",
        ),
        (lambda: GradientAccumulation(adagrad, 0), ValueError, r"\[GradientAccumulation\] 'steps' must be at least 1"),
        (lambda: GradientAccumulation(adagrad, wrong["half"]), TypeError, "'steps' must be an integer but got 2.5."),
        (lambda: GradientAccumulation(adagrad, True), TypeError, "'steps' must be an integer but got True."),
        (lambda: LossScale(adagrad, 0), ValueError, r"\[LossScale\] 'factor' must be positive but got 0.0."),
        (lambda: DynamicLossScale(adagrad, -2.0), ValueError, "'initial_scale' must be non-negative but got -2.0."),
        (lambda: DynamicLossScale(adagrad, 2.0, 0), ValueError, "'dynamic_growth_steps' must be at least 1"),
        (lambda: SkipNonFinite(adagrad, wrong[3]), TypeError, "'on_skip' must be None or callable"),
        (lambda: SkipNonFinite(ClipByNorm(DynamicLossScale(adagrad), 1.0)), ValueError, "leave SkipNonFinite out"),
        (lambda: Constraint(adagrad, {"*": "positive"}), ValueError, "there is no constraint 'positive', only non_neg"),
        (lambda: Constraint(adagrad, {"*": wrong[3]}), TypeError, "must be a name or a callable but got 3."),
        (lambda: Constraint(adagrad, {3: "non_neg"}), TypeError, "must be a glob or a predicate but got 3."),
        (lambda: Constraint(adagrad, wrong["name"]), TypeError, "'constraints' must map patterns to constraints"),
    ]:
        with pytest.raises(kind, match=message):
            make()


def test_states_that_do_not_fit_are_refused_before_anything_changes():
    optimizer = ClipByNorm(ExponentialMovingAverage(Adagrad(0.1), 0.9), 1.0)
    optimizer.apply_gradients({"w": mx.ones((2,))}, {"w": mx.ones((2,))})
    before = arrays(optimizer.state)
    other = GradientAccumulation(Adagrad(0.1), 2).state
    for state, message in [
        ({"step": mx.array(0)}, r"\[ClipByNorm\] 'state' must be a dict with 'inner'"),
        ([], "'state' must be a dict with 'inner'"),
        ({"inner": {"step": mx.array(0)}}, r"\[ExponentialMovingAverage\] 'state' must be a dict with 'inner'"),
        ({"inner": other}, "the state has 'gradients', which belongs to another wrapper"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.state = state
        assert_equal(arrays(optimizer.state), before)
    multi = ClipByNorm(optim.MultiOptimizer([optim.SGD(0.1)]), 1.0)
    with pytest.raises(ValueError, match="must have 'states', 1 of them"):
        multi.state = {"inner": {"states": []}}


def test_a_state_is_refused_inside_before_the_wrapper_outside_changes():
    optimizer = SkipNonFinite(ExponentialMovingAverage(Adagrad(0.1), 0.9))
    with pytest.raises(ValueError, match=r"\[ExponentialMovingAverage\] 'state' must be a dict with 'inner'"):
        optimizer.state = {"inner": {}, "_mlx_adagrad": {"skipped_steps": mx.array(7, mx.uint64)}}
    assert optimizer.skipped_steps.item() == 0


def test_what_a_loaded_state_lacks_is_gone():
    one, two = (ExponentialMovingAverage(Adagrad(0.1), 0.9) for _ in range(2))
    a, b = {"a": mx.ones((2,))}, {"a": mx.ones((2,)), "b": {"c": [mx.ones((2,)), mx.ones((2,))]}}
    one.apply_gradients(a, a)
    two.apply_gradients(b, b)
    two.state = one.state
    assert_equal(arrays(two.state), arrays(one.state))
    two.apply_gradients(b, b)
    assert len(two.state["_mlx_adagrad"]["averages"]) == 3


def test_a_stock_optimizer_keeps_the_state_it_has_without_wrappers_in_bf16():
    w = {"w": mx.ones((3,), mx.bfloat16)}
    bare, wrapped = optim.Adam(0.1), ClipByGlobalNorm(LossScale(optim.Adam(0.1), 2.0), 1.0)
    bare.apply_gradients(w, w)
    for _ in range(2):
        wrapped.apply_gradients(w, w)
    inner = wrapped.state["inner"]["inner"]
    assert {k: a.dtype for k, a in leaves(inner).items()} == {k: a.dtype for k, a in leaves(bare.state).items()}


def test_an_older_state_without_own_entries_starts_them_afresh():
    run = Run("all", "adagrad").train(batches(3))
    state = run.optimizer.state
    skip = {"inner": state["inner"]}
    run.optimizer.state = skip
    assert run.optimizer.skipped_steps.item() == 0
    run.train(batches(1))


def test_a_wrapper_inside_a_multi_optimizer_and_around_one():
    inside = optim.MultiOptimizer([ClipByNorm(optim.SGD(1.0), 0.5), GradientAccumulation(Adagrad(0.1), 2)], [is_bias])
    optimizer = LossScale(inside, 2.0)
    parameters = {"weight": mx.ones((2,)), "bias": mx.ones((2,))}
    new = optimizer.apply_gradients({"weight": mx.array([2.0, -2.0]), "bias": mx.array([6.0, 8.0])}, parameters)
    np.testing.assert_allclose(new["bias"], [1 - 0.3, 1 - 0.4], rtol=1e-6)
    assert mx.array_equal(new["weight"], parameters["weight"])
    new = optimizer.apply_gradients({"weight": mx.array([2.0, -2.0]), "bias": mx.array([6.0, 8.0])}, parameters)
    np.testing.assert_allclose(new["weight"], [0.9, 1.1], rtol=1e-6)
    fresh = LossScale(
        optim.MultiOptimizer([ClipByNorm(optim.SGD(1.0), 0.5), GradientAccumulation(Adagrad(0.1), 2)], [is_bias]), 2.0
    )
    fresh.state = tree_unflatten(tree_flatten(optimizer.state))
    assert_equal(arrays(fresh.state), arrays(optimizer.state))


def test_the_schedules_of_a_stock_optimizer_come_back_after_an_error():
    adam: Any = optim.Adam(rate)
    schedules = adam._schedulers
    optimizer = GradientAccumulation(adam, 1)
    adam.apply_single = None  # fails in the middle
    with pytest.raises(TypeError):
        optimizer.apply_gradients({"w": mx.ones((2,))}, {"w": mx.ones((2,))})
    assert adam._schedulers is schedules


def test_an_optimizer_inside_that_takes_no_such_gradient_says_so():
    rows, w = {"w": RowSparse(mx.array([0]), mx.ones((1, 2)), 2)}, {"w": mx.ones((2, 2))}
    for make in (
        lambda: LossScale(optim.Adam(0.1), 2.0),
        lambda: ClipByNorm(optim.SGD(0.1), 2.0),
        lambda: GradientAccumulation(optim.SGD(0.1), 2),
    ):
        with pytest.raises(TypeError, match="gradient of 'w' is a RowSparse, which only mlx_adagrad.Adagrad takes"):
            make().apply_gradients(rows, w)


@wrapper
def test_another_thread_and_a_copy(wrapper):
    results = []

    def work(optimizer):
        w = {"weight": mx.ones((2,)), "bias": mx.ones((2,))}
        for _ in range(4):
            w = w | optimizer.apply_gradients({"weight": mx.array([0.5, 0.1]), "bias": mx.array([0.5, 0.1])}, w)
        mx.eval(w, optimizer.state)
        results.append({k: np.array(x) for k, x in w.items()})

    work(WRAPPED[wrapper](Adagrad(0.1)))
    thread = threading.Thread(target=work, args=(WRAPPED[wrapper](Adagrad(0.1)),))
    thread.start()
    thread.join()
    original = WRAPPED[wrapper](Adagrad(0.1))
    duplicate = copy.deepcopy(original)
    assert duplicate.state["inner"] is duplicate.optimizer.state
    work(duplicate)
    assert original.step.item() == 0
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


def test_a_step_with_every_wrapper_exports(tmp_path):
    optimizer = WRAPPED["all"](Adagrad(0.1))
    parameters = {"weight": mx.ones((3,)), "bias": mx.ones((2,))}
    optimizer.init(parameters)
    names = [path for path, _ in tree_flatten(optimizer.state)]

    def step(w, b, *arrays):
        fresh = WRAPPED["all"](Adagrad(0.1))
        fresh.state = tree_unflatten(list(zip(names, arrays, strict=True)))
        new = fresh.apply_gradients({"weight": w * 0.5, "bias": b * 0.5}, {"weight": w, "bias": b})
        return [new["weight"], new["bias"], *(dict(tree_flatten(fresh.state))[name] for name in names)]

    inputs = [parameters["weight"], parameters["bias"], *(a for _, a in tree_flatten(optimizer.state))]
    mx.export_function(str(tmp_path / "step.mlxfn"), step, *inputs)
    exported: Any = mx.import_function(str(tmp_path / "step.mlxfn"))
    got = want = inputs
    for _ in range(4):
        got, want = exported(*got), step(*want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
