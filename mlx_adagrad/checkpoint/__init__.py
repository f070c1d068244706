"""Checkpoints: save and resume a run, and go on with what other frameworks saved, or let them go on.

What belongs here: our own format (``state.py``, ``snapshots.py``, ``safetensors.py``), and ``_<framework>.py`` for each
other one. To add one, read its file into ``Foreign`` (``foreign.py``), which ``install.py`` puts into a live optimizer,
all or nothing; no framework is imported at the top. ``tests/test_checkpoint_dialects.py`` and the damaged files of
``tests/test_checkpoint_damaged.py`` run over it.
"""

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
