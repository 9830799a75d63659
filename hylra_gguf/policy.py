"""The policy: which layers are full, which select cells and which reuse them; a malformed one is refused, never half-applied."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple, Union

from .errors import PolicyError, plain_os_errors
from .files import replacing
from .gguf_header import PAD_KEY, PREFIX, Path, Typed, read_header
from .policy_values import MEASURED, SCHEMA_VERSION, TYPES, check_version, gguf_type, measured_value, no_duplicates, short, typed

FULL, SELECT, REUSE = 0, 1, 2
MODE_LETTERS = "FSR"

_REQUIRED = ("version", "layer_count", "head_kv_count", "layer_mode", "layer_source")
_OPTIONAL = ("head_map", "top_k_fraction", "layer_top_k", "sparse_select", "theta", "sensitivity", "overlap")


@dataclass(frozen=True)
class Policy:
    """DESIGN §4; per-layer tuples have n_layer items, `head_map` n_layer * n_head_kv and `overlap` n_layer * n_layer, row by row."""

    layer_mode: Tuple[int, ...]
    layer_source: Tuple[int, ...]
    head_kv_count: int
    lists: int = 1
    head_map: Optional[Tuple[int, ...]] = None
    top_k: int = 2048
    top_k_fraction: Optional[float] = None
    layer_top_k: Optional[Tuple[int, ...]] = None  # cells that a select layer emits, 0 for the others
    sparse_select: Optional[Tuple[int, ...]] = None  # 1: a select layer that attends only to the cells it selects, so reads only their V
    block_size: int = 1
    sink_tokens: int = 4
    recent_tokens: int = 256
    min_context: int = 4096
    prefill: int = 0
    enabled: bool = True
    version: int = SCHEMA_VERSION
    summary: str = ""
    tool: str = ""
    calibration: str = ""
    similarity: str = ""
    theta: Optional[float] = None
    sensitivity: Optional[Tuple[float, ...]] = None
    overlap: Optional[Tuple[float, ...]] = None
    measured: Dict[str, Union[float, str]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Every value takes the type that GGUF stores, floats single precision, so that a policy equals what a file gives back."""
        for key, kind in TYPES.items():
            if key != "layer_count" and not (key in _OPTIONAL and getattr(self, key) is None):
                object.__setattr__(self, key, typed(key, kind, getattr(self, key)))
        if not isinstance(self.measured, dict):
            raise PolicyError(f"measured is {short(self.measured)}, expected names with values")
        object.__setattr__(self, "measured", {key: measured_value(key, value) for key, value in self.measured.items()})
        self.validate()

    @property
    def layer_count(self) -> int:
        return len(self.layer_mode)

    # ---- rules

    def validate(self, layer_count: Optional[int] = None, head_kv_count: Optional[int] = None) -> None:
        """Raises a PolicyError where the policy contradicts itself or the model's own counts."""
        for name, found, expected in (("layers", self.layer_count, layer_count), ("KV heads", self.head_kv_count, head_kv_count)):
            if expected is not None and found != expected:
                raise PolicyError(f"the policy is for {found} {name}, but the model has {expected}; "
                                  "make the policy from this model's own profile")
        self._check_scalars()
        self._check_lengths()
        self._check_budgets()
        for layer in range(self.layer_count):
            self._check_layer(layer)

    def _check_scalars(self) -> None:
        check_version(self.version)
        size = self.block_size
        for key, good, expected in (
            ("head_kv_count", self.head_kv_count >= 1, "at least 1"),
            ("lists", self.lists in (1, self.head_kv_count), f"1 or head_kv_count ({self.head_kv_count})"),
            ("top_k", self.top_k >= 1, "at least 1"),
            ("top_k", self.top_k >= self.sink_tokens + self.recent_tokens,
             f"at least sink_tokens + recent_tokens ({self.sink_tokens} + {self.recent_tokens})"),
            ("block_size", size == 1 or (16 <= size <= 128 and size & (size - 1) == 0), "1, 16, 32, 64 or 128"),
            ("prefill", self.prefill == 0, "0 (dense prefill)"),
            ("theta", self.theta is None or 0 < self.theta <= 1, "above 0 and at most 1"),
            ("top_k_fraction", self.top_k_fraction is None or 0 < self.top_k_fraction <= 1, "above 0 and at most 1"),
        ):
            if not good:
                raise PolicyError(f"{key} is {getattr(self, key)}, expected {expected}")

    def _check_lengths(self) -> None:
        layers = self.layer_count
        if not layers:
            raise PolicyError("layer_mode is empty, expected one mode per layer")
        for key, expected in (("layer_source", layers), ("head_map", layers * self.head_kv_count),
                              ("layer_top_k", layers), ("sparse_select", layers), ("sensitivity", layers), ("overlap", layers * layers)):
            value = getattr(self, key)
            if value is not None and len(value) != expected:
                raise PolicyError(f"{key} has {len(value)} values, expected {expected} "
                                  f"for {layers} layers and {self.head_kv_count} KV heads")
        for index, head in enumerate(self.head_map or ()):
            if not 0 <= head < self.head_kv_count:
                raise PolicyError(f"head_map[{index}] is {head}, expected a KV head from 0 to {self.head_kv_count - 1}")

    def _check_budgets(self) -> None:
        if self.layer_top_k is None:
            return
        if self.top_k_fraction is not None:
            raise PolicyError("layer_top_k and top_k_fraction are both set, expected one of them; remove one")
        forced = max(1, self.sink_tokens + self.recent_tokens)
        for layer, (mode, cells) in enumerate(zip(self.layer_mode, self.layer_top_k)):
            if mode != SELECT and cells:
                raise PolicyError(f"layer_top_k[{layer}] is {cells}, expected 0 for a layer that does not select")
            if mode == SELECT and not forced <= cells <= self.top_k:
                raise PolicyError(f"layer_top_k[{layer}] is {cells}, expected {forced} (sink_tokens + recent_tokens) to {self.top_k} (top_k)")
        if SELECT in self.layer_mode and max(self.layer_top_k) != self.top_k:
            raise PolicyError(f"top_k is {self.top_k}, expected {max(self.layer_top_k)}, the largest of layer_top_k")

    def _check_layer(self, layer: int) -> None:
        mode, source = self.layer_mode[layer], self.layer_source[layer]
        if mode not in (FULL, SELECT, REUSE):
            raise PolicyError(f"layer_mode[{layer}] is {mode}, expected 0 (full), 1 (select) or 2 (reuse)")
        if self.sparse_select is not None and not 0 <= self.sparse_select[layer] <= (mode == SELECT):
            expected = "0 or 1" if mode == SELECT else "0 for a layer that does not select"
            raise PolicyError(f"sparse_select[{layer}] is {self.sparse_select[layer]}, expected {expected}")
        if mode != REUSE:
            expected = -1 if mode == FULL else layer
            if source != expected:
                kind = "full" if mode == FULL else "select"
                raise PolicyError(f"layer_source[{layer}] is {source}, expected {expected} for a {kind} layer")
        elif source == layer:  # its own best cells: for comparison, since it has to score them all
            if self.layer_top_k is not None:
                raise PolicyError(f"layer_source[{layer}] is {source}, its own cells, for which layer_top_k has no budget; remove layer_top_k")
        elif not 0 <= source < layer:
            raise PolicyError(f"layer_source[{layer}] is {source}, expected a select layer before layer {layer}")
        elif self.layer_mode[source] != SELECT:
            raise PolicyError(f"layer_source[{layer}] is {source}, but layer {source} is no select layer; "
                              f"name a select layer before layer {layer}")

    # ---- forms

    def to_dict(self) -> Dict[str, Any]:
        """The JSON form: the GGUF keys without `hylra.`; what is not set is left out."""
        values = {key: getattr(self, key) for key in TYPES}
        measured = {MEASURED + key: value for key, value in self.measured.items()}
        values = {key: value for key, value in {**values, **measured}.items() if value not in (None, "")}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_dict(cls, values: Dict[str, Any]) -> Policy:
        if not isinstance(values, dict):
            raise PolicyError(f"a policy is an object of keys and values, found {short(values)}")
        if "version" in values:
            check_version(typed("version", "u32", values["version"]))  # first: a newer version may have other keys
        for key in _REQUIRED:
            if key not in values:
                raise PolicyError(f"key {key} is missing; write the policy again with hylra-gguf plan")
        own = {key: value for key, value in values.items() if key in TYPES}
        rest = {key: value for key, value in values.items() if key not in TYPES}
        for key in rest:
            if not str(key).startswith(MEASURED):
                raise PolicyError(f"key {short(key)} is not known in version {SCHEMA_VERSION}; "
                                  "remove it or use a newer hylra-gguf")
        layer_count = own.pop("layer_count")
        policy = cls(**own, measured={key[len(MEASURED):]: value for key, value in rest.items()})
        if type(layer_count) is not int or layer_count != policy.layer_count:
            raise PolicyError(f"layer_count is {short(layer_count)}, but layer_mode has {policy.layer_count} values; "
                              "make both the same")
        return policy

    def to_gguf(self) -> Typed:
        """{"hylra.top_k": ("u32", 2048), ...}: every key with its GGUF type."""
        values = self.to_dict()
        return {PREFIX + key: (gguf_type(key), value) for key, value in values.items()}

    @classmethod
    def from_gguf_kv(cls, kv: Typed) -> Policy:
        """The inverse of `to_gguf`; also ignores the padding that `write_policy` adds."""
        named = {key[len(PREFIX):]: value for key, value in kv.items() if key != PAD_KEY}
        if "version" in named:
            check_version(typed("version", "u32", named["version"][1]))
        for key, (kind, value) in named.items():
            if (key in TYPES or key.startswith(MEASURED)) and kind != gguf_type(key):
                raise PolicyError(f"hylra.{key} has type {kind}, expected {gguf_type(key)}; embed the policy again")
            if value is None:
                raise PolicyError(f"hylra.{key} is too large to be read; embed the policy again")
        return cls.from_dict({key: value for key, (_, value) in named.items()})

    def to_json(self) -> str:
        """One key per line, a list on one line."""
        lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in self.to_dict().items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def save(self, path: Path) -> None:
        with plain_os_errors(os.fspath(path)), replacing(os.fspath(path)) as fd, open(fd, "w", encoding="utf-8", closefd=False) as file:
            file.write(self.to_json())

    @classmethod
    def load(cls, path: Path) -> Policy:
        """A policy from a JSON file, or from a model file that carries one."""
        with open(path, "rb") as file:
            start = file.read(4)
            if start == b"GGUF":
                return require_policy(path)
            text = start + file.read()  # one open: the file may be a pipe
        try:
            return cls.from_dict(json.loads(text, object_pairs_hook=no_duplicates))
        except (ValueError, RecursionError) as error:
            raise PolicyError(f"{path}: not a policy in JSON: {error}") from error
        except PolicyError as error:
            raise PolicyError(f"{path}: {error}") from error

    # ---- for people

    def layer_map(self) -> str:
        return "".join(MODE_LETTERS[mode] for mode in self.layer_mode)

    def one_line(self) -> str:
        counts = Counter(self.layer_map())
        state = f"from {self.min_context} cached tokens" if self.enabled else "off (enabled is false)"
        return f"{counts['F']} full, {counts['S']} select, {counts['R']} reuse; top_k {self.top_k}; {state}"

    def reads_saved(self, n_kv: int) -> float:
        """Share of the K and V rows of a dense step that a decode step over `n_kv` cells leaves unread.

        A reuse layer that is its own source is there for comparison and scores every K: it counts as dense, as docs/accuracy.md says.
        """
        if not self.enabled or n_kv < max(self.min_context, 1):
            return 0.0
        saved = sum(1 - min(n_kv, cells) / n_kv for cells in self.reuse_cells(n_kv))
        saved += sum(1 / 2 - cells / n_kv for cells in self.sparse_select_cells(n_kv))  # K of all cells, K and V of the chosen
        return saved / self.layer_count

    def sparse_select_cells(self, n_kv: int) -> list[int]:
        """Cells that each select layer attends to that reads V of its own selection only at a depth of n_kv cells.

        As llama_hylra_policy::selects_sparsely: not where K and V of the selection are as many rows as V of all cells.
        """
        cells = [self.cells_of(layer, n_kv) for layer, sparse in enumerate(self.sparse_select or ()) if sparse]
        return [one for one in cells if n_kv > 2 * one]

    def cells_of(self, source: int, n_kv: int) -> int:
        """Cells that a layer hands out at a depth of n_kv cells, as llama_hylra_policy::top_k_at."""
        share = max(self.top_k, math.ceil((self.top_k_fraction or 0) * n_kv))
        return share if self.layer_top_k is None else self.layer_top_k[source]

    def reuse_cells(self, n_kv: int) -> list[int]:
        """Cells that each reuse layer is given at a depth of n_kv cells, before n_kv itself limits them."""
        return [self.cells_of(source, n_kv)
                for layer, (mode, source) in enumerate(zip(self.layer_mode, self.layer_source)) if mode == REUSE and source != layer]

    def describe(self) -> str:
        """One screen as a Markdown table."""
        state = f"on from {self.min_context} cached tokens" if self.enabled else "off: hylra.enabled is false"
        rows = [("HyLRA", state), *self._rows()]
        width = max(len(name) for name, _ in rows)
        lines = [f"| {name:{width}} | {text} |" for name, text in rows]
        return "\n".join([lines[0], f"| {'-' * width} | --- |", *lines[1:]])

    def _rows(self) -> list[tuple[str, str]]:
        saved = ", ".join(f"{100 * self.reads_saved(n):.0f} % at {n // 1024}K" for n in (4096, 8192, 16384, 32768, 65536))
        best = self.top_k - self.sink_tokens - self.recent_tokens
        share = f", or {100 * self.top_k_fraction:g} % of the cells if more" if self.top_k_fraction else ""
        unit = "cells" if self.block_size == 1 else f"cells in blocks of {self.block_size}"
        rows = [
            ("layers", f"{self.layer_count}: {self.one_line().split(';')[0]}; {self.head_kv_count} KV heads"),
            ("layer map", " ".join(self.layer_map()[at:at + 10] for at in range(0, self.layer_count, 10))),
            ("sparse select", self._sparse_selects()),
            ("reuse", self._spans() or "none"),
            ("lists", ("one per layer" if self.lists == 1 else "one per KV head") + (", with a head map" if self.head_map else "")),
            ("top_k", f"{self.top_k} {unit} = {self.sink_tokens} sink + {self.recent_tokens} recent + {best} best{share}"),
            ("budgets", self._budgets()),
            ("reads saved", saved),
            ("theta", f"{self.theta:g} on {self.similarity or 'similarity'}" if self.theta is not None else ""),
            ("measured", ", ".join(f"{key} {str(value)[:12]}" for key, value in self.measured.items())),
            *((key, getattr(self, key)) for key in ("summary", "calibration", "tool")),
        ]
        return [(name, text.replace("|", "\\|")) for name, text in rows if text]

    def _sparse_selects(self) -> str:
        layers = [layer for layer, sparse in enumerate(self.sparse_select or ()) if sparse]
        return ranges(layers) if layers else ""

    def _budgets(self) -> str:
        """The select layers of each budget, "512: 3 9, 1024: 0"."""
        by_cells: Dict[int, list[int]] = {}
        for layer, cells in enumerate(self.layer_top_k or ()):
            by_cells.setdefault(cells, []).append(layer)
        return ", ".join(f"{cells}: {ranges(layers)}" for cells, layers in sorted(by_cells.items()) if cells)

    def _spans(self) -> str:
        """Every select layer with the layers that reuse its cells, "3 > 4-13"."""
        fed: Dict[int, list[int]] = {}
        for layer, (mode, source) in enumerate(zip(self.layer_mode, self.layer_source)):
            if mode == REUSE:
                fed.setdefault(source, []).append(layer)
        return ", ".join(f"{source} > {ranges(layers)}" for source, layers in sorted(fed.items()))


def read_policy(model_path: Path) -> Optional[Policy]:
    """The policy in a model file, None if there is none; reads the metadata only."""
    kv = read_header(model_path).typed(PREFIX)
    kv.pop(PAD_KEY, None)
    if not kv:
        return None
    try:
        return Policy.from_gguf_kv(kv)
    except PolicyError as error:
        raise PolicyError(f"{os.fspath(model_path)}: {error}") from error


def require_policy(model_path: Path) -> Policy:
    policy = read_policy(model_path)
    if policy is None:
        raise PolicyError(f"{os.fspath(model_path)}: no policy in this model; add one with hylra-gguf embed-policy")
    return policy


def ranges(layers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2 5"; "none" for no layers"""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return " ".join(f"{p[0]}-{p[-1]}" if len(p) > 2 else " ".join(map(str, p)) for p in parts) or "none"
