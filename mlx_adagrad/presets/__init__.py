"""Each framework's Adagrad by its own signature: its argument names, its defaults, its order of operations.

Every function returns an ``mlx.optimizers.Optimizer``, :class:`~mlx_adagrad.Adagrad` with the rule of that framework
and, where whole-run options ask for them, :mod:`~mlx_adagrad.wrappers` around it::

    optimizer = presets.torch(lr=0.05, weight_decay=1e-4)

A learning rate is a number, a schedule of the number of calls so far (a uint64 array, 0 first; see
:mod:`~mlx_adagrad.schedules`), a callable without arguments, or a Keras schedule object, which is read, not called.
What each does differently from its framework, on purpose, is listed in ``docs/coming_from``.

What belongs here: signatures and defaults of other frameworks, one module each, and no arithmetic. To add one, write a
function under ``@preset`` (``recipe.py``) with the framework's argument names, order and defaults; make a ``Rule`` of
what acts on each element and put wrappers around :class:`~mlx_adagrad.Adagrad` for what acts on the whole tree or run;
name it below; and add recorded runs of the framework to ``tests/golden`` (see ``tests/replay.py``). Configs, copies and
pickles are then tested without further code.
"""

from ._functional import mlx, optax, paper
from ._keras import keras, tf_keras
from ._mindspore import mindspore, mindspore_nn
from ._torch import torch
from .recipe import from_config

__all__ = ["from_config", "keras", "mindspore", "mindspore_nn", "mlx", "optax", "paper", "tf_keras", "torch"]
