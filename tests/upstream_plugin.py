"""A pytest plugin for llama-cpp-python's own tests: they run on the patched library, and what they would download lies in STAND_INS."""

from __future__ import annotations

import os
import sys
import types

import hylra_gguf  # noqa: F401  first: from here on llama_cpp loads the patched library

LOCAL = {"Qwen3.5-0.8B-Q8_0.gguf": "language", "tinyllamas/stories15M-q4_0.gguf": "transformer", "mamba-130m-hf.Q2_K.gguf": "recurrent",
         "Falcon-H1-Tiny-90M-Instruct-Q2_K.gguf": "hybrid", "bge-small-en-v1.5-q4_k_m.gguf": "embedding"}


def hf_hub_download(repo_id: str, filename: str) -> str:
    # the one test of Qwen's token ids needs its vocabulary, the others that share the model need one that speaks
    name = "tokens" if "test_real_model" in os.environ["PYTEST_CURRENT_TEST"] else LOCAL[filename]
    return os.path.join(os.environ["STAND_INS"], f"{name}.gguf")


hub = types.ModuleType("huggingface_hub")
hub.hf_hub_download = hf_hub_download
sys.modules["huggingface_hub"] = hub
