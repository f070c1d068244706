"""A saved state in the way that the live optimizer keeps it: ``v`` in other bits, and compensations and a seed."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ..state import SEED
from ..update.accumulators import EXPONENTS, dense_v, quantized_problem, stored_like
from ..update.storage import COMPENSATION
from .safetensors import Entry, entry_of
from .trees import OWN, children


def fitted(saved: Any, live: Any) -> Any:
    """The tree of entries ``saved`` with what can be converted to fit ``live``; all else stays as it is."""
    if isinstance(saved, list) and isinstance(live, list | tuple):
        here = children(live)
        return [fitted(child, here.get(i)) for i, child in enumerate(saved)]
    if not isinstance(saved, dict) or not isinstance(live, dict):
        return saved
    if isinstance(saved.get("v"), Entry) and isinstance(live.get("v"), mx.array):
        return _fitted_state(saved, live)
    return _with_seed({key: fitted(child, live.get(key)) for key, child in saved.items()}, live)


def _fitted_state(saved: dict[str, Any], live: dict[str, Any]) -> dict[str, Any]:
    """The state of one parameter; where shapes do not fit it stays as it is, for the comparison to name."""
    rest = {key: child for key, child in saved.items() if key not in ("v", EXPONENTS, COMPENSATION)}
    if COMPENSATION in live:
        rest[COMPENSATION] = saved.get(COMPENSATION, entry_of(mx.zeros_like(live[COMPENSATION])))
    kept = {key: saved[key] for key in ("v", EXPONENTS) if key in saved}
    if not all(isinstance(entry, Entry) for entry in kept.values()) or saved["v"].shape != live["v"].shape:
        return {**rest, **kept}
    arrays = {key: entry.read() for key, entry in kept.items()}
    readable = quantized_problem(arrays) is None if EXPONENTS in arrays else arrays["v"].dtype != mx.uint8
    same = {key: (x.shape, x.dtype) for key, x in arrays.items()} == {
        key: (live[key].shape, live[key].dtype) for key in ("v", EXPONENTS) if key in live
    }
    if not readable or same:
        return {**rest, **kept}
    return rest | {key: entry_of(x) for key, x in stored_like(live, dense_v(arrays)).items()}


def _with_seed(saved: dict[str, Any], live: dict[str, Any]) -> dict[str, Any]:
    """The seed of the live optimizer where the file has none, and none where the optimizer has none."""
    own, here = saved.get(OWN), live.get(OWN)
    seed = here.get(SEED) if isinstance(here, dict) else None
    if isinstance(seed, mx.array) and (own is None or (isinstance(own, dict) and SEED not in own)):
        return {**saved, OWN: {**(own or {}), SEED: entry_of(seed)}}
    if seed is None and isinstance(own, dict) and isinstance(own.get(SEED), Entry):
        return {**saved, OWN: {key: child for key, child in own.items() if key != SEED}}
    return saved
