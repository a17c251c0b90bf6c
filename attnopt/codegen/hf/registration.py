"""Makes transformers know the class `attnopt`, without importing transformers or torch before the user does.

AutoConfig and AutoModelForCausalLM keep their tables in two modules. If one of them is loaded already, our entry is
added at once; otherwise a finder waits for its import and adds the entry right after it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_CONFIGS = "transformers.models.auto.configuration_auto"
_MODELS = "transformers.models.auto.modeling_auto"


def _register_config(module: ModuleType) -> None:
    from attnopt.codegen.hf.configuration_attnopt import AttnoptConfig

    module.AutoConfig.register(AttnoptConfig.model_type, AttnoptConfig, exist_ok=True)


def _register_model(module: ModuleType) -> None:
    from attnopt.codegen.hf.configuration_attnopt import AttnoptConfig
    from attnopt.codegen.hf.modeling_attnopt import (
        AttnoptForCausalLM,
        AttnoptForImageClassification,
        AttnoptModel,
    )

    module.AutoModelForCausalLM.register(AttnoptConfig, AttnoptForCausalLM, exist_ok=True)
    module.AutoModelForImageClassification.register(AttnoptConfig, AttnoptForImageClassification, exist_ok=True)
    module.AutoModel.register(AttnoptConfig, AttnoptModel, exist_ok=True)


_ACTIONS: dict[str, Callable[[ModuleType], None]] = {_CONFIGS: _register_config, _MODELS: _register_model}


class _ThenRegister(Loader):
    """Loads a module as its own loader would, then adds our entry."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        try:
            _ACTIONS[module.__name__](module)
        except ImportError as error:
            # Someone else is importing transformers here, perhaps a version too old for our class: not their problem.
            warnings.warn(f"the attnopt model class is not available: {error}", stacklevel=2)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _Finder(MetaPathFinder):
    """Steps aside for every module but the two, and for those while it asks the other finders."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self._asking or fullname not in _ACTIONS:
            return None
        self._asking = True
        try:
            spec = find_spec(fullname)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def install() -> None:
    """Register now where transformers is loaded, and on its import where it is not. Safe to call again."""
    for name, action in _ACTIONS.items():
        if name in sys.modules:
            action(sys.modules[name])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
