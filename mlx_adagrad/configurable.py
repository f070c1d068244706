"""What every optimizer of this package has in addition to the interface of ``mlx.optimizers``, wrapped or not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx
from mlx.nn import Module

from . import checks


class Configurable:
    """Mixin: the config of an optimizer, and the methods that wrappers add, as they are without any wrapper: a training
    loop may call them on every optimizer of this package.
    """

    _recipe: Any = None
    step: Any
    _updated_on: int | None = None

    def get_config(self) -> dict[str, Any]:
        """The preset and its arguments as they stand now, for JSON and :func:`mlx_adagrad.presets.from_config`.

        A learning rate set since, and groups added since, are in it; the state is not (see ``checkpoint``).

        Raises:
            TypeError: If the optimizer was put together by hand, or depends on a function, which JSON cannot hold.
        """
        if self._recipe is None:
            name = type(self).__name__
            raise TypeError(f"[{name}] only an optimizer that mlx_adagrad.presets returned has a config.")
        return self._recipe.config(self)

    def update(self, model: Module, gradients: dict) -> None:
        """Update the parameters of ``model`` in place.

        Args:
            model: A module.
            gradients: A tree of gradients, as :func:`mlx.nn.value_and_grad` returns it.

        Raises:
            TypeError: If ``model`` is no module: what is not changed in place would go on as if nothing had happened.
        """
        checks.module(type(self).__name__, model, gradients)
        model.update(self.apply_gradients(gradients, model))

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """Return the updated parameters, a tree in the shape of ``gradients``."""
        raise NotImplementedError

    def flush(self, model_or_tree: Any) -> Any:
        """Update by the gradients that wait in an accumulation: without one there are none, and nothing changes."""
        checks.tree(type(self).__name__, [None], model_or_tree)
        return model_or_tree.parameters() if isinstance(model_or_tree, Module) else model_or_tree

    @property
    def updated_on(self) -> int | None:
        """The thread of the last update, by its ``ident``; None before."""
        return self._updated_on

    @property
    def iterations(self) -> mx.array:
        """The number of updates made, as Keras names it; calls that only accumulate gradients make none."""
        return self.step

    def scale_loss(self, loss: mx.array) -> mx.array:
        """The loss to differentiate: without a loss scale, ``loss`` itself."""
        return loss

    def finalize_variable_values(self, model_or_tree: Any) -> Any:
        """The parameters to evaluate and save: without an average of them, those of the model or tree as they are."""
        return model_or_tree.parameters() if isinstance(model_or_tree, Module) else model_or_tree

    def averaged(self, model: Module) -> AbstractContextManager[Module]:
        """A context in which ``model`` holds the averages of its parameters: without an average it stays as it is."""
        return nullcontext(model)

    def _is_idle(self, gradients: Any) -> bool:
        """Whether a call with these gradients does not count, where the preset's framework has such a rule."""
        return self._recipe is not None and self._recipe.is_idle(gradients)
