"""Loads the patched libllama: points llama-cpp-python at it before its first import, and binds the hylra_* functions.

Refuses to run when stock llama_cpp was imported first or its version is not the one that the library was built for.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path

from .errors import EngineError, PolicyError
from .policy import Policy

LLAMA_CPP_VERSION = "0.3.36"


def _lib_dir() -> Path:
    """Beside this file; a checkout has none, so there that of the installed package, which then only lends its library."""
    own = Path(__file__).resolve().parent / "lib"
    try:
        installed = Path(importlib.metadata.distribution("hylra-gguf").locate_file("hylra_gguf/lib"))
    except importlib.metadata.PackageNotFoundError:
        return own
    return own if own.is_dir() else installed


LIB_DIR = _lib_dir()

TRACE_STOCK, TRACE_ATTEND, TRACE_REDUCE, TRACE_CHOOSE = 1, 2, 3, 4  # enum hylra_trace

_loaded: dict = {}


def library_dir() -> Path:
    """The directory that holds the patched libllama; LLAMA_CPP_LIB_PATH, if set, is respected."""
    chosen = os.environ.get("LLAMA_CPP_LIB_PATH")
    return Path(chosen) if chosen else LIB_DIR


def library_path() -> Path:
    for suffix in (".so", ".dylib"):
        path = library_dir() / f"libllama{suffix}"
        if path.exists():
            return path
    raise EngineError(f"no libllama in {library_dir()}: the engine is not built; run: pip install .")


def _check_binding_version() -> None:
    try:
        found = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        raise EngineError(f"llama-cpp-python is not installed; run: pip install llama-cpp-python=={LLAMA_CPP_VERSION}") from None
    if found != LLAMA_CPP_VERSION:
        raise EngineError(
            f"llama-cpp-python {found} is installed, the engine is built for {LLAMA_CPP_VERSION}; "
            f"run: pip install llama-cpp-python=={LLAMA_CPP_VERSION}"
        )


def _check_import_order() -> None:
    """A llama_cpp that is loaded already must have loaded our library."""
    module = sys.modules.get("llama_cpp.llama_cpp")
    if module is not None and not hasattr(module._lib, "hylra_version"):
        raise EngineError(
            "llama_cpp was imported before hylra_gguf, so the stock library is in use; import hylra_gguf first"
        )


def prepare() -> None:
    """Called by `import hylra_gguf`: from here on `import llama_cpp` loads the patched library. Imports nothing itself.

    Raises EngineError if stock llama_cpp was imported first. Without a built engine it does nothing: the tools that
    only read and write files work all the same.
    """
    _check_import_order()
    if any(LIB_DIR.glob("libllama.*")):
        os.environ.setdefault("LLAMA_CPP_LIB_PATH", str(LIB_DIR))


def activate():
    """Imports llama_cpp on the patched library and returns the module.

    Raises EngineError: another version of llama_cpp installed, library not built, or not ours.
    """
    if "llama_cpp" not in _loaded:
        _check_binding_version()
        prepare()
        path = library_path()
        import llama_cpp

        if not hasattr(llama_cpp.llama_cpp._lib, "hylra_version"):
            raise EngineError(f"{path} is a stock libllama without HyLRA; unset LLAMA_CPP_LIB_PATH")
        _loaded["ffi"], _loaded["lib"] = _bind(path)
        _loaded["llama_cpp"] = llama_cpp
    return _loaded["llama_cpp"]


def _declarations(header: Path) -> str:
    """hylra.h without what cffi does not parse: the preprocessor and the export marks."""
    text = re.sub(r"#ifdef __cplusplus.*?#endif", "", header.read_text(), flags=re.DOTALL)
    return re.sub(r"^#.*$", "", text, flags=re.MULTILINE).replace("HYLRA_API ", "")


def _bind(path: Path):
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(_declarations(path.parent / "hylra.h"))
    return ffi, ffi.dlopen(str(path))


def __getattr__(name: str):
    """`engine.lib` and `engine.ffi`: the cffi handles, loaded at first use."""
    if name in ("lib", "ffi"):
        activate()
        return _loaded[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- one context


def pointer(ctx) -> "ffi.CData":
    """cffi pointer of a llama_context that ctypes (llama_cpp) holds."""
    import ctypes

    return _loaded["ffi"].cast("struct llama_context *", ctypes.cast(ctx, ctypes.c_void_p).value)


def policy_struct(policy: Policy):
    """(struct hylra_policy *, list of arrays that must stay alive as long as it)."""
    ffi = _loaded["ffi"]
    mode = ffi.new("uint32_t[]", list(policy.layer_mode))
    source = ffi.new("int32_t[]", list(policy.layer_source))
    head_map = ffi.new("int32_t[]", list(policy.head_map)) if policy.head_map else ffi.NULL
    layer_top_k, sparse_select = (ffi.new("uint32_t[]", list(values)) if values else ffi.NULL
                                  for values in (policy.layer_top_k, policy.sparse_select))
    struct = ffi.new(
        "struct hylra_policy *",
        {
            "version": policy.version,
            "enabled": int(policy.enabled),
            "layer_count": policy.layer_count,
            "head_kv_count": policy.head_kv_count,
            "layer_mode": mode,
            "layer_source": source,
            "head_map": head_map,
            "lists": policy.lists,
            "top_k": policy.top_k,
            "layer_top_k": layer_top_k,
            "sparse_select": sparse_select,
            "top_k_fraction": policy.top_k_fraction or 0.0,
            "block_size": policy.block_size,
            "sink_tokens": policy.sink_tokens,
            "recent_tokens": policy.recent_tokens,
            "min_context": policy.min_context,
            "prefill": policy.prefill,
        },
    )
    return struct, [mode, source, head_map, layer_top_k, sparse_select]


def set_policy(ctx, policy: Policy | None) -> None:
    """Hands a policy to a context (None: dense). Raises PolicyError if it does not fit the model; the context is dense then."""
    activate()
    ffi, lib = _loaded["ffi"], _loaded["lib"]
    struct, _alive = policy_struct(policy) if policy is not None else (ffi.NULL, [])
    error = ffi.new("char[]", 512)
    if lib.hylra_set_policy(pointer(ctx), struct, error, 512) != 0:
        raise PolicyError(ffi.string(error).decode())


def use_model_policy(ctx) -> bool:
    """Back to the policy of the model file; False if it has none that fits."""
    activate()
    return bool(_loaded["lib"].hylra_use_model_policy(pointer(ctx)))


def reset_counters(ctx) -> None:
    activate()
    _loaded["lib"].hylra_reset_counters(pointer(ctx))


def status(ctx) -> dict:
    """Is it on, why not, counters, captured mass per select layer, and why which layer was left to llama.cpp (empty before the first sparse step)."""
    activate()
    ffi, lib = _loaded["ffi"], _loaded["lib"]
    raw = ffi.new("struct hylra_status *")
    lib.hylra_get_status(pointer(ctx), raw)
    mass, n = ffi.new("double[]", raw.n_layer), ffi.new("uint64_t[]", raw.n_layer)
    lib.hylra_captured_mass(pointer(ctx), mass, n, raw.n_layer)
    return {
        "on": bool(raw.on),
        "reason": ffi.string(lib.hylra_reason(pointer(ctx))).decode(),
        "layers": {"full": raw.n_full, "select": raw.n_select, "reuse": raw.n_reuse},
        "left_to_stock": left_to_stock(ctx, raw.n_layer),
        "top_k": raw.top_k,
        "min_context": raw.min_context,
        "device_min_context": raw.device_min_context,
        "steps": raw.n_step,
        "sparse_steps": raw.n_step_sparse,
        "captured_mass": {il: mass[il] / n[il] for il in range(raw.n_layer) if n[il]},
    }


def left_to_stock(ctx, n_layer: int) -> dict[int, str]:
    """Why, per layer that the last sparse graph left to llama.cpp."""
    ffi, lib = _loaded["ffi"], _loaded["lib"]
    states = ffi.new("uint32_t[]", n_layer)
    lib.hylra_layer_states(pointer(ctx), states, n_layer)
    return {il: ffi.string(lib.hylra_layer_text(state)).decode() for il, state in enumerate(states)
            if state not in (lib.HYLRA_LAYER_UNKNOWN, lib.HYLRA_LAYER_SERVED)}


def version() -> str:
    activate()
    return _loaded["ffi"].string(_loaded["lib"].hylra_version()).decode()


def isa() -> str:
    """Instruction set of the CPU kernels: avx512vnni, avx512, avx2 or base"""
    activate()
    return _loaded["ffi"].string(_loaded["lib"].hylra_isa()).decode()


def environment() -> dict:
    """What `hylra-gguf env` shows: versions, library, CPU flags as llama.cpp reports them."""
    llama_cpp = activate()
    return {
        "hylra_gguf": importlib.metadata.version("hylra-gguf"),
        "engine": version(),
        "isa": isa(),
        "llama_cpp_python": llama_cpp.__version__,
        "library": str(library_path()),
        "LLAMA_CPP_LIB_PATH": os.environ["LLAMA_CPP_LIB_PATH"],
        "HYLRA": os.environ.get("HYLRA", ""),
        "system": llama_cpp.llama_print_system_info().decode(),
    }


def cmd_env(args) -> int:
    for key, value in environment().items():
        print(f"{key:20} {value}")
    return 0
