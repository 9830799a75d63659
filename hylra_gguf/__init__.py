"""HyLRA-GGUF: faster long contexts for ordinary GGUF models. `from hylra_gguf import Llama` is llama_cpp.Llama with a policy.

Importing this package makes `llama_cpp` use the patched library too; importing stock `llama_cpp` first is refused.
"""

from __future__ import annotations

from . import engine
from .errors import EngineError, HylraError, ModelFileError, PolicyError, ProfileError
from .policy import Policy

__version__ = "0.1.0"
__all__ = ["Llama", "Policy", "HylraError", "EngineError", "ModelFileError", "PolicyError", "ProfileError"]

engine.prepare()


def __getattr__(name: str):
    # Lazy, so that `hylra-gguf show` and the planner work where no engine is built.
    if name == "Llama":
        from .llama import Llama

        return Llama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
