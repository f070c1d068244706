"""What optimizers of ``presets`` have in common: they know the call that made them."""

from __future__ import annotations

from typing import Any


class Configurable:
    """Mixin for optimizers that :mod:`mlx_adagrad.presets` returns, ready-made or around others."""

    _recipe: Any = None

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
