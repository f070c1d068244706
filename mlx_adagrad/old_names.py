"""Modules by the names that they had in version 0.1, so that pickles written then load."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NEW_NAMES = {
    "accumulators": "update.accumulators",
    "embedding": "sparse.embedding",
    "modifiers": "update.modifiers",
    "rows": "sparse.gradient",
    "rule": "update.rule",
    "schedule_formulas": "schedules",
    "schedule_formulas.named": "schedules.named",
}


class OldNames:
    """Finds a module under its old name; the module is the new one itself.

    It is finder and loader by its methods: the base classes in importlib.abc take as long to import as this package.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        known = package == __package__ and name in NEW_NAMES
        return ModuleSpec(fullname, self) if known else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """None: as Python makes modules."""

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = importlib.import_module(f".{NEW_NAMES[name.partition('.')[2]]}", __package__)


sys.meta_path.insert(0, OldNames())  # a folder that is now another's would be found a second time otherwise
