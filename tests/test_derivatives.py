"""First and second derivatives of an update, in everything that enters it, against float64 differences."""

from itertools import combinations_with_replacement

import mlx.core as mx
import numpy as np
import pytest

from cases import options
from mlx_adagrad import Adagrad, Dense
from mlx_adagrad.update import kernels, ops
from mlx_adagrad.update.rule import Rule, Scalars
from reference import adagrad

POINTS = [(0.3, 0.7, 0.5), (2.0, -1.2, 0.0), (-0.6, 0.4, 1e-3), (0.3, 0.0, 0.0)]  # g, w, v
points = pytest.mark.parametrize("point", POINTS, ids=str)
NAMES = ("g", "w", "v", "lr", "eps", "weight_decay", "scale")
LR, SCALE, LIMIT = 0.1, 1.5, 2.5  # the limit clips the scaled gradient of one point
DIFFERENCE = 1e-3  # times the size of a number: rounding leaves 1e-8 of a second derivative, curvature 1e-6


def wanted(rule, x):
    """A mix of the new w and v, in numpy."""
    x = dict(zip(NAMES, x, strict=True))
    decays = {"weight_decay": x["weight_decay"], "decoupled_weight_decay": rule.decoupled_weight_decay}
    [(w, v)] = adagrad(
        x["w"],
        [x["g"]],
        learning_rate=x["lr"],
        eps=x["eps"],
        initial_accumulator_value=x["v"],
        scale=x["scale"],
        low=-LIMIT,
        high=LIMIT,
        maximize=rule.maximize,
        eps_inside_sqrt=rule.eps_inside_sqrt,
        **decays,
    )
    return w + 0.7 * v


def differences(function, x):
    """All first and second derivatives of a function of numbers, by central differences."""
    steps = np.diag(DIFFERENCE * np.maximum(np.abs(x), 0.1))
    at = [(function(x + h), function(x - h)) for h in steps]
    first = [(up - down) / (2 * h.sum()) for (up, down), h in zip(at, steps, strict=True)]
    second = {}
    for i, j in combinations_with_replacement(range(len(x)), 2):
        a, b = steps[i], steps[j]
        corners = function(x + a + b) - function(x + a - b) - function(x - a + b) + function(x - a - b)
        second[i, j] = corners / (4 * a.sum() * b.sum())
    return first, second


def derivatives(function, x):
    """The same by MLX."""
    first = mx.grad(lambda *x: function(*x), argnums=list(range(len(x))))
    second = {}
    for i, j in combinations_with_replacement(range(len(x)), 2):
        second[i, j] = mx.grad(lambda *x, i=i: first(*x)[i], argnums=j)(*x).item()
    return [g.item() for g in first(*x)], second


def numbers(rule, point):
    return np.array([*point, LR, rule.eps, rule.weight_decay, SCALE])


def update(rule, launch=ops.Functions.update):
    """The mix of the new w and v as a function of MLX arrays."""
    form = rule.form(scaled=True, clipped=True)

    def function(g, w, v, lr, eps, weight_decay, scale):
        limit = mx.array(LIMIT, w.dtype)
        scalars = Scalars(lr, eps, weight_decay, scale, -limit, limit)
        functions = ops.functions(form, Dense(), w.dtype)
        if launch is kernels.differentiable_launch:
            new_w, new_v = launch(form, w, g, v, scalars, functions)
        else:
            new_w, new_v = launch(functions, w, g, v, scalars)
        return new_w + 0.7 * new_v

    return function


def assert_equal_derivatives(rule, function, point, dtype, tolerance):
    x = numbers(rule, point)
    variable = [name for name in NAMES if getattr(rule, name, 1.0) != 0]  # what is 0 is no part of the compiled form
    want_first, want_second = differences(lambda x: wanted(rule, x), x)
    first, second = derivatives(function, [mx.array(number, dtype) for number in x])
    for i, name in enumerate(NAMES):
        if name in variable:
            assert first[i] == pytest.approx(want_first[i], rel=tolerance, abs=tolerance), name
        for j in range(i, len(NAMES)):
            if name in variable and NAMES[j] in variable:
                want = pytest.approx(want_second[i, j], rel=tolerance, abs=tolerance)
                assert second[i, j] == want, (name, NAMES[j])


@options
@points
def test_first_and_second_derivatives_in_float64(options, point, cpu):
    rule = Rule(**options)
    assert_equal_derivatives(rule, update(rule), point, mx.float64, 1e-4)


@options
@points
def test_first_and_second_derivatives(options, point):
    rule = Rule(**options)
    assert_equal_derivatives(rule, update(rule), point, mx.float32, 1e-3)


@pytest.mark.usefixtures("kernel_device")
@options
def test_derivatives_of_the_kernel(options):
    rule = Rule(**options)
    assert_equal_derivatives(rule, update(rule, kernels.differentiable_launch), POINTS[0], mx.float32, 1e-3)


@options
@pytest.mark.parametrize("dtype", [mx.float32, mx.float64], ids=str)
def test_no_derivative_is_infinite_where_nothing_has_come(options, dtype, cpu):
    """A gradient and a v of 0: there |g| has no second derivative, but others must not become NaN by it."""
    rule = Rule(**options)
    x = [mx.array(number, dtype) for number in (0.0, 0.0, 0.0, *numbers(rule, POINTS[0])[3:])]
    first, second = derivatives(update(rule), x)
    assert np.isfinite([*first, *second.values()]).all()
    if rule.eps and not rule.eps_inside_sqrt:
        slope = -LR * SCALE / rule.eps * (-1 if rule.maximize else 1)
        assert first[0] == pytest.approx(slope, rel=1e-4)


def test_second_derivatives_through_the_optimizer():
    """``w - lr g / (|g| + eps)``, as the report of the fault had it."""

    def new(g):
        return Adagrad(0.1, eps=0.5).apply_gradients({"w": g}, {"w": mx.array(1.0)})["w"]

    for g, want in ((0.3, 0.1953125), (2.0, 0.0064)):
        assert mx.grad(mx.grad(new))(mx.array(g)).item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("eps", [1e-8, 1e-12])
def test_a_v_of_0_that_never_grows_leaves_eps_alone(eps):
    rule = Rule(eps=eps, update_accumulator=False)
    w = Adagrad.from_rule(0.1, rule).apply_gradients({"w": mx.array(2.0)}, {"w": mx.array(0.0)})["w"]
    assert w.item() == pytest.approx(-0.1 * 2.0 / eps, rel=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("inside", [False, True])
def test_a_denormal_v_counts_as_0(eps, inside):
    rule = Rule(eps=eps, eps_inside_sqrt=inside, update_accumulator=False)
    new = []
    for v in (0.0, 1e-40):
        optimizer = Adagrad.from_rule(0.1, rule)
        optimizer.state = {**optimizer.state, "w": {"v": mx.array(v)}}
        new.append(optimizer.apply_gradients({"w": mx.array(2.0)}, {"w": mx.array(1.0)})["w"].item())
    assert new[0] == new[1] and np.isfinite(new).all()
