"""Which of another framework's parameters is which here: names decide where there are any, and never the order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from checkpoint_runs import bits
from mlx_adagrad import Adagrad
from mlx_adagrad.checkpoint import import_mindspore, import_mlx, import_torch

OURS = [f"layers.{i}.attention.{name}.weight" for i in range(2) for name in ("q", "k", "v", "o")]
SHARED = ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.encoder."]


def number(name: str) -> float:
    """What ``v`` of a parameter is filled with: by its own name, whatever it is called elsewhere."""
    return float(sum(map(ord, name)) * 31 % 97 + 1)


def torch_source(named: dict[str, float]) -> dict[str, Any]:
    state = {i: {"step": 3, "sum": mx.full((4, 4), v)} for i, v in enumerate(named.values())}
    group = {"lr": 0.1, "lr_decay": 0, "eps": 1e-8, "weight_decay": 0, "maximize": False}
    return {"state": state, "param_groups": [group | {"params": list(state), "param_names": list(named)}]}


def torch_source_by_name(named: dict[str, float]) -> dict[str, Any]:
    """As torch.distributed's ``get_optimizer_state_dict`` gives it."""
    state = {name: {"step": 3, "sum": mx.full((4, 4), v)} for name, v in named.items()}
    return {"state": state, "param_groups": [{"lr": 0.1, "params": list(state)}]}


def mlx_source(named: dict[str, float]) -> dict[str, Any]:
    arrays = {f"{name}.v": mx.full((4, 4), v) for name, v in named.items()}
    return {"step": mx.array(3, mx.uint64), "learning_rate": mx.array(0.1), **arrays}


def mindspore_source(named: dict[str, float]) -> dict[str, Any]:
    return {f"accum.{name}": mx.full((4, 4), v) for name, v in named.items()} | {"step_t": mx.array(3)}


FORMS: list[tuple[Callable, Callable]] = [
    (import_torch, torch_source),
    (import_torch, torch_source_by_name),
    (import_mlx, mlx_source),
    (import_mindspore, mindspore_source),
]
IDS = ["torch", "torch_by_name", "mlx", "mindspore"]


def live_optimizer(paths: list[str] = OURS) -> Adagrad:
    optimizer = Adagrad(0.1)
    optimizer.init(tree_unflatten([(path, mx.ones((4, 4))) for path in paths]))
    return optimizer


def check_each_has_its_own(optimizer: Adagrad, owner: Callable[[str], str] = lambda path: path) -> None:
    vs: dict[str, Any] = {path: v for path, v in tree_flatten(optimizer.state) if path.endswith(".v")}
    assert len(vs) == len(OURS)
    for path, v in vs.items():
        assert mx.array_equal(v, mx.full((4, 4), number(owner(path.removesuffix(".v"))))), path


@pytest.mark.parametrize(("function", "source"), FORMS, ids=IDS)
@pytest.mark.parametrize("prefix", SHARED)
def test_names_decide_whatever_the_order_and_a_shared_prefix(function: Callable, source: Callable, prefix: str) -> None:
    live = live_optimizer()
    function(source({prefix + path: number(path) for path in reversed(OURS)}), live)
    check_each_has_its_own(live)
    assert live.step.item() == 3


@pytest.mark.parametrize(("function", "source"), FORMS, ids=IDS)
def test_a_prefix_that_all_share_here_is_stripped(function: Callable, source: Callable) -> None:
    live = live_optimizer(["model." + path for path in OURS])
    function(source({path: number(path) for path in reversed(OURS)}), live)
    check_each_has_its_own(live, lambda path: path.removeprefix("model."))


@pytest.mark.parametrize(("function", "source"), FORMS, ids=IDS)
@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_wrappers_of_torch_around_single_layers_are_stripped(
    function: Callable, source: Callable, wrapper: str
) -> None:
    def wrapped(path: str) -> str:  # the first layer only
        return path.replace("layers.0.", f"layers.0.{wrapper}.")

    live = live_optimizer()
    function(source({"module." + wrapped(path): number(path) for path in reversed(OURS)}), live)
    check_each_has_its_own(live)


def renamed(path: str) -> str:
    return path.replace("0.attention.q", "0.attention.query")


@pytest.mark.parametrize(("function", "source"), FORMS, ids=IDS)
@pytest.mark.parametrize(
    ("theirs", "extra", "lacking"),
    [
        pytest.param([*map(renamed, OURS)], renamed(OURS[0]), OURS[0], id="one_differs"),
        pytest.param([f"module.{renamed(path)}" for path in OURS], f"module.{renamed(OURS[0])}", OURS[0], id="prefix"),
        pytest.param([*OURS[1:], "module." + OURS[0]], "module." + OURS[0], OURS[0], id="prefix_of_one"),
        pytest.param(["encoder." + path for path in OURS[::2]], "none", OURS[1], id="fewer"),
        pytest.param([*OURS, "head.weight"], "head.weight", "none", id="more"),
        pytest.param([f"w{i}" for i in range(len(OURS))], "w0", OURS[0], id="all_differ"),
    ],
)
def test_a_name_without_a_counterpart_is_refused_and_both_sides_are_listed(
    function: Callable, source: Callable, theirs: list[str], extra: str, lacking: str
) -> None:
    live = live_optimizer()
    before = bits(live.state)
    with pytest.raises(ValueError, match="names of parameters are not those here") as error:
        function(source({path: number(path) for path in theirs}), live)
    there, here = str(error.value).split("only here: ")
    assert extra in there and lacking in here and "'names'" in here
    assert bits(live.state) == before


def test_other_roots_on_both_sides_are_no_shared_prefix() -> None:
    live = live_optimizer(["decoder." + path for path in OURS])
    with pytest.raises(ValueError, match=r"only in the file: encoder\..*only here: decoder\."):
        import_mlx(mlx_source({"encoder." + path: number(path) for path in OURS}), live)


def test_one_group_without_names_leaves_nothing_to_the_order() -> None:
    source = torch_source({path: number(path) for path in OURS})
    group = source["param_groups"][0]
    source["param_groups"] = [
        group | {"params": group["params"][:4], "param_names": group["param_names"][:4]},
        {key: value for key, value in group.items() if key != "param_names"} | {"params": group["params"][4:]},
    ]
    with pytest.raises(ValueError, match="only in the file: 4, 5, 6, 7; only here: layers.1"):
        import_torch(source, live_optimizer())


def test_a_torch_file_without_names_goes_by_order() -> None:
    source = torch_source({path: number(path) for path in OURS})
    del source["param_groups"][0]["param_names"]
    live = live_optimizer()
    import_torch(source, live)
    check_each_has_its_own(live)


def test_a_torch_state_that_no_group_refers_to_is_refused() -> None:
    source = torch_source({path: number(path) for path in OURS})
    source["state"] = {str(i): own for i, own in source["state"].items()}  # as through JSON
    with pytest.raises(ValueError, match="which is in none of its groups"):
        import_torch(source, live_optimizer())


@pytest.mark.parametrize(("function", "source"), FORMS, ids=IDS)
def test_names_say_otherwise(function: Callable, source: Callable) -> None:
    theirs = {f"w{i}": number(path) for i, path in enumerate(reversed(OURS))}
    for names in (list(reversed(OURS)), dict(zip(theirs, reversed(OURS), strict=True))):
        live = live_optimizer()
        function(source(theirs), live, names)
        check_each_has_its_own(live)
