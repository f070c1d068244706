"""Groups changed in mid-run: every option, through wrappers and in compiled steps, in configs and in checkpoints."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_adagrad import Adagrad, checkpoint, presets, schedules
from mlx_adagrad.wrappers import ClipByGlobalNorm, DynamicLossScale, ExponentialMovingAverage, GradientAccumulation

GROUP: dict[str, Any] = {"params": "a", "lr": 0.2, "weight_decay": 0.1}
CHANGES: dict[str, dict[str, Any]] = {
    "lr": {"lr": 0.01},
    "a schedule": {"lr": schedules.torch_exponential_lr(0.3, 0.5)},
    "no rate of its own": {"lr": None},
    "lr_decay": {"lr_decay": 0.5},
    "eps": {"eps": 0.25},
    "weight_decay": {"weight_decay": 0.7},
    "no decay": {"weight_decay": 0.0},
    "maximize": {"maximize": True},
    "params": {"params": ["b"]},
    "several": {"lr": 0.4, "eps": mx.array([0.1]), "weight_decay": np.float32(0.3), "maximize": True},
}
WRAPS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda o: o,
    "clip": lambda o: ClipByGlobalNorm(o, 0.5),
    "stack": lambda o: DynamicLossScale(ExponentialMovingAverage(GradientAccumulation(o, 1), 0.5), 2.0),
}


def gradients(t: int) -> dict[str, mx.array]:
    return {"a": mx.array([0.5, -0.25]) * (t + 1), "b": mx.array([1.0, 0.125]) - t}


class Run:
    """An optimizer with its weights, stepped eagerly or compiled with the state captured."""

    def __init__(self, optimizer: Any, compiled: bool):
        self.optimizer, self.w, self.traces = optimizer, {"a": mx.ones((2,)), "b": mx.ones((2,))}, 0
        optimizer.init(self.w)
        state = [self.w, optimizer.state]

        def step(g: dict[str, mx.array]) -> None:
            self.traces += 1
            self.w.update(optimizer.apply_gradients(g, self.w))

        self.step = mx.compile(step, inputs=state, outputs=state) if compiled else step

    def steps(self, *numbers: int) -> list[list[float]]:
        for t in numbers:
            self.step(gradients(t))
            mx.eval(self.w, self.optimizer.state)
        return [np.array(self.w[key]).tolist() for key in ("a", "b")]


def made(change: dict[str, Any] | None = None, wrap: str = "bare") -> Any:
    group = GROUP | (change or {})
    return WRAPS[wrap](Adagrad(0.1, lr_decay=0.1, groups=[{k: v for k, v in group.items() if v is not None}]))


def moved(source: Any, target: Any) -> None:
    """Put the state of one optimizer into another whose group has a rate of its own, or has none."""
    rates = copy.deepcopy([e.get("learning_rate") for e in entries(target)])
    target.state = tree_unflatten(tree_flatten(source.state))
    for entry, rate in zip(entries(target), rates, strict=True):
        entry.pop("learning_rate", None)
        entry.update({} if rate is None else {"learning_rate": rate})


def entries(optimizer: Any) -> list[dict[str, Any]]:
    while not isinstance(optimizer, Adagrad):
        optimizer = optimizer.optimizer
    return optimizer.groups.states(optimizer.state)


CASES = [(kind, wrap, False) for kind in CHANGES for wrap in WRAPS]
CASES += [(kind, wrap, True) for kind in CHANGES for wrap in WRAPS if wrap == "bare" or kind == "several"]


@pytest.mark.parametrize(("kind", "wrap", "compiled"), CASES)
def test_a_changed_group_goes_on_as_if_made_so(kind: str, wrap: str, compiled: bool) -> None:
    run, other = Run(made(wrap=wrap), compiled), Run(made(CHANGES[kind], wrap), False)
    run.steps(0, 1)
    if kind == "params":  # here the steps before the change were those of another group
        other = Run(made(wrap=wrap), False)
        other.steps(0, 1)
        source, other.optimizer = other.optimizer, made(CHANGES[kind], wrap)
        before = Run(other.optimizer, False)
        before.w.update(other.w)
        moved(source, before.optimizer)
        other = before
    else:
        moved(run.optimizer, other.optimizer)
        other.w.update(run.w)
    run.optimizer.set_group(0, **CHANGES[kind])
    np.testing.assert_allclose(run.steps(2, 3), other.steps(2, 3), rtol=2e-6)
    assert run.optimizer.step.item() == 4


@pytest.mark.parametrize("compiled", [False, True])
def test_back_and_forth(compiled: bool) -> None:
    """An earlier trace is never taken for the present rule, also after older state has been put back."""
    run, eager = Run(made(), compiled), Run(made(), False)
    older = None
    for t, weight_decay in enumerate([0.1, 0.9, 0.1, 0.0, 0.9, 0.1]):
        for r in (run, eager):
            r.optimizer.set_group(-1, weight_decay=weight_decay)
        np.testing.assert_allclose(run.steps(t), eager.steps(t), rtol=2e-6)
        if older is None:
            older = tree_unflatten(tree_flatten(run.optimizer.state))
        for r in (run, eager):
            r.optimizer.state = older
        np.testing.assert_allclose(run.steps(t), eager.steps(t), rtol=2e-6)


def test_only_what_a_trace_holds_is_traced_again() -> None:
    run = Run(made(), True)
    run.steps(0, 1)
    for change, traces in (({"lr": 0.3}, 1), ({"weight_decay": 0.1}, 1), ({"weight_decay": 0.2}, 2), ({"lr": 0.4}, 2)):
        run.optimizer.set_group(0, **change)
        run.steps(2, 3)
        assert run.traces == traces
    run.optimizer.learning_rate = 0.5
    run.steps(4)
    assert run.traces == 2


@pytest.mark.parametrize("wrap", WRAPS)
def test_other_changes_reach_a_compiled_step(wrap: str) -> None:
    """A new group, and a schedule put in the place of a rate or taken away."""
    changes: list[Callable[[Any], Any]] = [
        lambda o: o.add_group({"params": "b", "weight_decay": 0.5, "maximize": True}),
        lambda o: setattr(o, "learning_rate", schedules.torch_exponential_lr(0.3, 0.5)),
        lambda o: setattr(o, "learning_rate", schedules.torch_exponential_lr(0.3, 0.9)),
        lambda o: setattr(o, "learning_rate", 0.7),
    ]
    runs = Run(made(wrap=wrap), True), Run(made(wrap=wrap), False)
    for t, change in enumerate(changes):
        for run in runs:
            run.steps(2 * t)
            change(run.optimizer)
        np.testing.assert_allclose(runs[0].steps(2 * t + 1), runs[1].steps(2 * t + 1), rtol=2e-6)
        assert runs[0].optimizer.learning_rate.item() == pytest.approx(runs[1].optimizer.learning_rate.item())


def boom(step: mx.array) -> mx.array:
    raise RuntimeError("no rate today")


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(
    ("index", "options", "error", "message"),
    [
        (0, {"lr": 0.5, "eps": -1.0}, ValueError, r"\[Adagrad groups\[0\]\] 'eps' must be non-negative but got -1.0"),
        (0, {"lr": 0.5, "eps": 0.0}, ValueError, "'eps' should be >0"),
        (0, {"weight_decay": 0.5, "lr": -1.0}, ValueError, "'lr' must be non-negative"),
        (0, {"weight_decay": 0.5, "lr": boom}, RuntimeError, "no rate today"),
        (0, {"weight_decay": "0.5"}, TypeError, "'weight_decay' must be a real number but got '0.5'"),
        (0, {"weight_decay": mx.ones(2)}, ValueError, "'weight_decay' must have one element"),
        (0, {"maximize": 1}, TypeError, "'maximize' must be True or False"),
        (0, {"lr": 0.5, "momentum": 0.9}, ValueError, "unknown key 'momentum': a group may have params, lr"),
        (0, {"params": []}, ValueError, "'params' must not be empty"),
        (0, {"params": "b"}, ValueError, "the pattern 'b' is given twice"),
        (2, {"lr": 0.5}, ValueError, "there is no group 2: there are 2"),
        (-3, {"lr": 0.5}, ValueError, "there is no group -3"),
        ("a", {"lr": 0.5}, TypeError, "'index' must be an integer but got 'a'"),
    ],
)
def test_a_refused_change_changes_nothing(index: Any, options: Any, error: Any, message: str, wrap: str) -> None:
    run, same = (Run(made(wrap=wrap), False) for _ in range(2))
    for r in (run, same):
        r.optimizer.add_group({"params": "b"})
        r.steps(0, 1)
    before = [id(x) for _, x in tree_flatten(run.optimizer.state)]
    with pytest.raises(error, match=message):
        run.optimizer.set_group(index, **options)
    if "lr" in options and error is not ValueError and callable(options["lr"]):
        with pytest.raises(error, match=message):
            run.optimizer.add_group({"params": "c", **options})
    assert [id(x) for _, x in tree_flatten(run.optimizer.state)] == before
    assert run.steps(2, 3) == same.steps(2, 3)


def test_a_parameter_that_is_not_decayed_takes_the_other_options() -> None:
    def masked(group: dict[str, Any]) -> Adagrad:
        return Adagrad(0.1, groups=[group], weight_decay_mask=lambda path, w: path == "b")

    run, other = Run(masked(GROUP), False), Run(masked(GROUP | CHANGES["several"]), False)
    run.steps(0, 1)
    moved(run.optimizer, other.optimizer)
    other.w.update(run.w)
    run.optimizer.set_group(0, **CHANGES["several"])
    assert run.steps(2, 3) == other.steps(2, 3)


def test_new_params_must_match_something() -> None:
    run = Run(made(), False)
    run.steps(0, 1)
    run.optimizer.set_group(0, params="c.*")
    with pytest.raises(ValueError, match="'params' 'c.\\*' matches no parameter"):
        run.steps(2)


def test_without_groups_the_fix_is_named() -> None:
    with pytest.raises(ValueError, match=r"there is no group 0: there are 0; .* groups=\[\{'params': '\*'\}\]"):
        presets.torch(0.1).set_group(0, weight_decay=0.1)


@pytest.mark.parametrize("kind", [kind for kind in CHANGES if kind != "params"])
def test_configs_tell_what_is_now(kind: str) -> None:
    optimizer = presets.torch(0.1, lr_decay=0.1, groups=[GROUP])
    optimizer.set_group(0, **CHANGES[kind])
    group = {k: v for k, v in (GROUP | CHANGES[kind]).items() if v is not None}
    assert optimizer.get_config() == presets.torch(0.1, lr_decay=0.1, groups=[group]).get_config()
    again = presets.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()
    runs = [Run(o, False) for o in (optimizer, again)]
    assert runs[0].steps(0, 1) == runs[1].steps(0, 1)


@pytest.mark.parametrize("kind", ["eps", "weight_decay", "maximize", "params", "a schedule"])
def test_checkpoints_tell_what_is_now(kind: str, tmp_path: Any) -> None:
    path, change = tmp_path / "run.safetensors", CHANGES[kind]
    run = Run(made(), False)
    run.steps(0, 1)
    run.optimizer.set_group(0, **change)
    run.steps(2)
    checkpoint.save(path, run.optimizer, run.w)
    ends = run.steps(3, 4)
    unchanged = Run(made(), False)
    with pytest.raises(ValueError, match="groups"):
        checkpoint.load(path, unchanged.optimizer, unchanged.w)
    set_so, made_so = Run(made(), True), Run(made(change), True)
    set_so.steps(0)
    made_so.steps(0)
    set_so.optimizer.set_group(0, **change)
    for again in (set_so, made_so):
        checkpoint.load(path, again.optimizer, again.w)
        np.testing.assert_allclose(again.steps(3, 4), ends, rtol=2e-6)


def test_copies_and_pickles_go_on() -> None:
    run = Run(made(), False)
    run.steps(0)
    run.optimizer.set_group(0, weight_decay=0.5)
    again = [copy.deepcopy(run.optimizer), pickle.loads(pickle.dumps(run.optimizer))]
    w = dict(run.w)
    ends = run.steps(1, 2)
    for optimizer in again:
        other = Run(optimizer, True)
        other.w.update(w)
        np.testing.assert_allclose(other.steps(1, 2), ends, rtol=2e-6)
