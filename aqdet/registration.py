"""Registers aqdet with Detectron2 when Detectron2 is imported.

A program that runs an exported detector imports ``aqdet.runtime``, and Python imports ``aqdet`` before it. If that
imported Detectron2, a small program would load PyTorch for seconds and would not use it. So each part of aqdet
that registers something is imported right after the part of Detectron2 that holds the registry, whether ``aqdet``
was imported before or after it. Detectron2 itself is not changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class ImportAfter(MetaPathFinder):
    """Imports modules right after others that they extend.

    Args:
        followers: name of a module -> name of the module that is imported after it.
    """

    def __init__(self, followers: dict[str, str]) -> None:
        self._followers = followers
        self._searching: set[str] = set()

    def install(self) -> None:
        """Imports what follows modules that are imported already, and waits for the others."""
        for name in list(self._followers):
            if _is_imported(name):
                importlib.import_module(self._followers.pop(name))
        if self._followers:
            sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The other finders' answer for a module that is waited for, its loader followed by the import."""
        if fullname not in self._followers or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.discard(fullname)
        loader = spec.loader if spec is not None else None
        if loader is not None:
            execute = loader.exec_module

            def execute_then_follow(module: ModuleType) -> None:
                execute(module)
                # Only now: an import that fails may be tried again. A reload finds nothing to follow.
                follower = self._followers.pop(fullname, None)
                if follower is not None:
                    importlib.import_module(follower)

            # On this loader alone, which importlib made for this one module.
            loader.exec_module = execute_then_follow  # type: ignore[method-assign]
        return spec


def _is_imported(name: str) -> bool:
    """Whether a module is imported to its end."""
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)
