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
import warnings
from collections.abc import Callable, Collection, Container, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _ImportHook(MetaPathFinder):
    """Runs the import of some modules through :meth:`execute`.

    Args:
        names: full names of the modules; a name that is removed from here is imported as ever.
    """

    def __init__(self, names: Container[str]) -> None:
        self._names = names
        self._searching: set[str] = set()

    def execute(self, module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
        """Imports a module.

        Args:
            module: new and empty.
            execute: runs its code.
        """
        raise NotImplementedError

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Returns the spec that the other finders have for one of the modules; its loader runs :meth:`execute`."""
        if fullname not in self._names or fullname in self._searching:
            return None
        self._searching.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.discard(fullname)
        loader = spec.loader if spec is not None else None
        if loader is not None:
            theirs = loader.exec_module
            # On this loader alone, which importlib made for this one module.
            loader.exec_module = lambda module: self.execute(module, theirs)  # type: ignore[method-assign]
        return spec


class ImportAfter(_ImportHook):
    """Imports modules right after others that they extend.

    Args:
        followers: name of a module -> name of the module that is imported after it.
    """

    def __init__(self, followers: dict[str, str]) -> None:
        super().__init__(followers)
        self._followers = followers

    def install(self) -> None:
        """Imports the followers of the modules that are imported already, and hooks into the import of the others."""
        for name in list(self._followers):
            if _is_imported(name):
                importlib.import_module(self._followers.pop(name))
        if self._followers:
            sys.meta_path.insert(0, self)

    def execute(self, module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
        """Imports a module, then the one that follows it."""
        execute(module)
        # Only now: an import that fails may be tried again. A reload finds nothing to follow.
        follower = self._followers.pop(module.__name__, None)
        if follower is not None:
            importlib.import_module(follower)


class ImportWithout(_ImportHook):
    """Hides one warning while some modules are imported, and nothing else.

    Args:
        message: regular expression that the start of the warning's text matches.
        names: full names of the modules.
    """

    def __init__(self, message: str, names: Collection[str]) -> None:
        super().__init__(names)
        self._message = message

    def install(self) -> None:
        """Hooks into the import of the modules."""
        sys.meta_path.insert(0, self)

    def execute(self, module: ModuleType, execute: Callable[[ModuleType], None]) -> None:
        """Imports a module without the warning."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=self._message)
            execute(module)


def _is_imported(name: str) -> bool:
    """Returns whether the import of a module has finished."""
    module = sys.modules.get(name)
    return module is not None and not getattr(module.__spec__, "_initializing", False)
