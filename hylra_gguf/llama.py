"""`Llama`: llama_cpp.Llama with a policy. Same constructor and methods, plus `hylra=` and `.hylra`."""

from __future__ import annotations

import os
import warnings
from typing import Union

from . import engine
from .errors import PolicyError
from .policy import Policy, read_policy

llama_cpp = engine.activate()

PolicyLike = Union[None, bool, str, "os.PathLike[str]", Policy]


def _file_policy(model_path: str) -> Policy | None:
    """The policy in the model file; one that is malformed counts as none here: the engine reports why.

    Raises ModelFileError, before llama.cpp sees the file: it waits for ever on a FIFO and says no more than "failed to load".
    """
    try:
        return read_policy(model_path)
    except PolicyError:
        return None


class Llama(llama_cpp.Llama):
    """Drop-in for `llama_cpp.Llama`.

    hylra: None  the policy in the model file, if there is one
           False dense: stock llama.cpp
           a Policy, or the path of a policy.json: this one instead of the file's

    A policy needs flash attention, so it is switched on unless `flash_attn` is given. `.hylra` tells whether the policy
    is on, why not, and what it did (see `hylra_gguf.engine.status`). Raises PolicyError if a policy handed over does
    not fit the model, ModelFileError (a ValueError) if the file is no complete GGUF file; a policy in the file that does not
    fit leaves the model dense, with a warning.
    """

    def __init__(self, model_path: str, *, hylra: PolicyLike = None, **kwargs):
        policy = Policy.load(hylra) if isinstance(hylra, (str, os.PathLike)) else hylra
        if policy is True:
            policy = None
        in_file = _file_policy(model_path)
        if policy is not False and (policy or in_file):
            kwargs.setdefault("flash_attn", True)
        super().__init__(model_path, **kwargs)
        if policy is not None:
            self.set_hylra(policy)
        elif self.hylra["reason"].startswith("policy refused"):
            warnings.warn(f"{model_path} runs dense: {self.hylra['reason']}", stacklevel=2)

    def close(self) -> None:
        if hasattr(self, "_stack"):  # not in one that was refused before llama_cpp's constructor; its __del__ comes here too
            super().close()

    @property
    def hylra(self) -> dict:
        """Status: on, reason, layers, left_to_stock with a reason per layer, steps, sparse_steps, captured_mass per select layer."""
        return engine.status(self._ctx.ctx)

    def set_hylra(self, policy: PolicyLike = None) -> None:
        """Changes the policy between calls: None = the model file's, False = dense, a Policy or the path of one."""
        if policy is None or policy is True:
            engine.use_model_policy(self._ctx.ctx)
        elif policy is False:
            engine.set_policy(self._ctx.ctx, None)
        else:
            engine.set_policy(self._ctx.ctx, policy if isinstance(policy, Policy) else Policy.load(policy))


__all__ = ["Llama", "PolicyError"]
