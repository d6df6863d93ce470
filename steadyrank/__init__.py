"""steadyrank: train multitask ranking models that do not blow up.

These names are for your own training loop; reading logs is in `steadyrank.data`, whole runs in `steadyrank.config`.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .public import *  # noqa: F403

__version__ = "0.1.0"
_TWINS = ("evaluate", "guard")
"""Functions in a module of their own name."""


class _Package(ModuleType):
    """Loads what is asked for, and torch only with it: `steadyrank --help` does without."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
        if name not in _TWINS and find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        return getattr(import_module(f"{__name__}.public"), name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(import_module(f"{__name__}.public"))})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _TWINS and isinstance(value, ModuleType):
            return  # the module would hide its twin once it is loaded
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
