"""Checkpoints: save and resume a run, and go on with what other frameworks saved, or let them go on."""

from ._keras import import_keras
from ._mindspore import import_mindspore
from ._mlx import export_mlx, import_mlx
from ._torch import export_torch, import_torch
from .callback import Callback
from .resizing import resize
from .snapshots import Snapshot, snapshot
from .state import load, read_notes, save

__all__ = [
    "Callback",
    "Snapshot",
    "export_mlx",
    "export_torch",
    "import_keras",
    "import_mindspore",
    "import_mlx",
    "import_torch",
    "load",
    "read_notes",
    "resize",
    "save",
    "snapshot",
]
