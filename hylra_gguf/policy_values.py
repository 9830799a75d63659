"""The values of a policy: their types in GGUF, and what each takes from JSON, NumPy and metadata; a wrong one is refused in one line."""

from __future__ import annotations

import math
import operator
import re
import unicodedata
from collections import Counter
from typing import Any, Dict, Union

import numpy as np

from .errors import PolicyError

SCHEMA_VERSION = 1

# the field's name is its key in JSON and, behind "hylra.", in GGUF
TYPES = {
    "version": "u32", "enabled": "bool", "layer_count": "u32", "head_kv_count": "u32",
    "layer_mode": "u32[]", "layer_source": "i32[]", "lists": "u32", "head_map": "i32[]",
    "top_k": "u32", "top_k_fraction": "f32", "layer_top_k": "u32[]", "sparse_select": "u32[]",
    "block_size": "u32", "sink_tokens": "u32", "recent_tokens": "u32", "min_context": "u32", "prefill": "u32",
    "summary": "string", "tool": "string", "calibration": "string", "theta": "f32", "similarity": "string",
    "sensitivity": "f32[]", "overlap": "f32[]",
}
MEASURED = "measured."
TEXT_MEASURED = "model_sha256"
_MAX_TEXT_BYTES = 64 << 10


def gguf_type(key: str) -> str:
    return TYPES.get(key) or ("string" if key == MEASURED + TEXT_MEASURED else "f32")


def check_version(version: int) -> None:
    if version != SCHEMA_VERSION:
        what = "use a newer hylra-gguf" if version > SCHEMA_VERSION else "write the policy again"
        raise PolicyError(f"the policy has version {version}, expected {SCHEMA_VERSION}; {what}")


def typed(key: str, kind: str, value: Any) -> Any:
    if kind.endswith("[]"):
        if isinstance(value, np.ndarray):
            value = value.ravel().tolist()
        if not isinstance(value, (list, tuple)):
            raise PolicyError(f"{key} is {short(value)}, expected a list")
        return tuple(typed(f"{key}[{index}]", kind[:-2], item) for index, item in enumerate(value))
    if kind == "string":
        return _text(key, value)
    if kind == "bool":
        if not isinstance(value, (bool, np.bool_)):
            raise PolicyError(f"{key} is {short(value)}, expected true or false")
        return bool(value)
    return _single(key, value) if kind == "f32" else _integer(key, kind, value)


def _integer(key: str, kind: str, value: Any) -> int:
    lowest = 0 if kind == "u32" else -2**31
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or not lowest <= number < 2**31:
        raise PolicyError(f"{key} is {short(value)}, expected a whole number from {lowest} to {2**31 - 1}")
    return number


def _single(key: str, value: Any) -> float:
    """The shortest decimal that names the same single-precision number: 0.95 stays 0.95 on its way through GGUF."""
    number = math.nan
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        with np.errstate(over="ignore"):
            number = float(str(np.float32(value))) if abs(value) < 1e39 else math.inf
    if not math.isfinite(number):
        raise PolicyError(f"{key} is {short(value)}, expected a finite number")
    return number


def _text(key: str, value: Any) -> str:
    # control characters of a foreign file must not reach the terminal
    if not isinstance(value, str) or any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in value):
        raise PolicyError(f"{key} is {short(value)}, expected one line of text")
    if len(value.encode()) > _MAX_TEXT_BYTES:
        raise PolicyError(f"{key} has {len(value.encode())} bytes, expected at most {_MAX_TEXT_BYTES}")
    return value


def measured_value(key: Any, value: Any) -> Union[float, str]:
    if not isinstance(key, str) or not re.fullmatch(r"[a-z0-9_]{1,64}", key):
        raise PolicyError(f"measured.{short(key)} is no key; use lower-case letters, digits and _")
    if key != TEXT_MEASURED:
        return _single(MEASURED + key, value)
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise PolicyError(f"{MEASURED}{key} is {short(value)}, expected 64 hexadecimal digits")
    return value


def short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def no_duplicates(pairs: list[tuple[str, Any]]) -> Dict[str, Any]:
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise PolicyError(f"key {short(key)} stands there twice; remove one")
    return dict(pairs)
