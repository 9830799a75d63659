"""Synthetic profiles for tests of what is built on them."""

from __future__ import annotations

import numpy as np

from hylra_gguf.profile_data import Profile, array_shapes, is_pair


def make_profile(similarity, eligible=None, sensitivity=None, heads=2, top_k=(300, 512), block_sizes=(1,), **changes) -> Profile:
    """Every recall is `similarity`, every overlap half of it, each KV head matches the mirrored head of the source."""
    similarity = np.triu(np.array(similarity, float))
    n = len(similarity)
    layers = np.array(sensitivity if sensitivity is not None else [0.01] * n, float)
    arrays = {}
    for key, shape in array_shapes(n, heads, list(top_k), list(block_sizes)).items():
        base = similarity / (2 if key.startswith("overlap") else 1) if is_pair(key) else layers
        arrays[key] = np.broadcast_to(base.reshape(base.shape + (1,) * (len(shape) - base.ndim)), shape).copy()
        if len(shape) == 4:
            arrays[key] *= 0.5 + 0.5 * np.eye(heads)[::-1]
    return Profile(**{**dict(
        model="tiny.gguf", arch="llama", layer_count=n, head_kv_count=heads, n_ctx_train=4096, contexts=[4096], samples=2, heldout_samples=1,
        top_k=list(top_k), block_sizes=list(block_sizes), sink_tokens=4, recent_tokens=256, type_kv="f16", texts=["synthetic"],
        eligible=eligible or [True] * n, identity="0" * 32, arrays=arrays), **changes})
