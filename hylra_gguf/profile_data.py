"""What a profile holds and how it is stored; refuses files of another version or model, and missing, damaged or mixed content.

The file is JSON. Its arrays are whole numbers in units of 1e-4, keyed by what they are; of layer pairs only source <= layer is
kept, means for the fit and the held-out half, quantiles for all samples together.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from .errors import ProfileError, plain_os_errors
from .files import replacing
from .gguf_header import read_header

PROFILE_VERSION = 3
UNIT = 1e-4
HALVES = ("fit", "heldout")
LOW_QUANTILE, HIGH_QUANTILE = 0.1, 0.9
PAIR_STATISTICS = HALVES + ("low",)
LAYER_STATISTICS = HALVES + ("low", "high")
LAYER_NAMES = ("sensitivity", "sparsity", "importance")
AGAIN = "profile the model again"


@dataclass(frozen=True)
class Profile:
    """Read through the accessors. [i, j] is source layer i, later layer j; zero where i > j or one of them is not eligible."""

    model: str
    arch: str
    layer_count: int
    head_kv_count: int
    n_ctx_train: int  # tokens
    contexts: list[int]  # tokens; samples are taken in the later part of each
    samples: int
    heldout_samples: int  # of these; the others are the fit half
    top_k: list[int]
    block_sizes: list[int]
    sink_tokens: int
    recent_tokens: int
    type_kv: str
    texts: list[str]
    eligible: list[bool]  # layers whose attention spans the whole cache
    identity: str  # of the model's weights, see model_identity
    arrays: dict[str, np.ndarray] = field(repr=False)  # see array_shapes
    forward_s: float = 0.0
    analysis_s: float = 0.0
    tool: str = ""
    version: int = PROFILE_VERSION

    # -- what was measured

    def matrix(self, name: str, top_k: int, block_size: int = 1, statistic: str = "mean", lists: str = "layer",
               split: str = "all") -> np.ndarray:
        """[n_layer, n_layer] of "recall", "overlap" or "overlap_free" (overlap without the forced sink and recent cells).

        statistic "low" is the 0.1 quantile over all samples. With lists "head": the mean over KV heads, each under the source head
        that the fit half prefers; cells only. Raises ProfileError for what was not measured.
        """
        one_of("name", name, ("recall", "overlap", "overlap_free"))
        one_of("statistic", statistic, ("mean", "low"))
        one_of("lists", lists, ("layer", "head"))
        self.check_measured(top_k, block_size, lists)
        base = name.replace("_free", "")
        if (base, lists, statistic) == ("recall", "head", "mean"):
            found = self.mapped_recall(top_k, split)
        else:
            found = self.statistic(f"{base}.{lists}.{top_k}" + (f".{block_size}" if lists == "layer" else ""), statistic, split)
        return self.without_forced(found, top_k) if name == "overlap_free" else found.copy()

    def edge_k(self, top_k: int, context: int | None = None) -> int:
        """The measured top_k that is as large a share of the profiled contexts as `top_k` is of `context` tokens (default: n_ctx_train), or the
        nearest to it: what a source's list leaves out grows with the context. Planned at 2048 of 8192 cells, three of five models lost 6 to 17
        points at 32000; planned at 512 of 8192 those that were measured again lost none (docs/accuracy.md)."""
        share = min(1.0, float(np.mean(self.contexts)) / (context or self.n_ctx_train))
        return min(self.top_k, key=lambda k: abs(math.log(k / (top_k * share))))

    def without_forced(self, overlap: np.ndarray, top_k: int) -> np.ndarray:
        """Every two selections share the forced cells, so these can be taken out of any mean or quantile."""
        forced = self.sink_tokens + self.recent_tokens
        free = np.clip((overlap * top_k - forced) / max(top_k - forced, 1), 0, 1)
        return free * np.triu(np.outer(self.eligible, self.eligible))

    def layer(self, name: str, top_k: int | None = None, statistic: str = "mean", lists: str = "layer",
              split: str = "all") -> np.ndarray:
        """[n_layer] of "sensitivity" (of a top_k), "sparsity" or "importance"; with lists "head" every KV head has its own list.

        Sparsity is the smallest share of cells that holds 90 % of the mass, importance 1 - cos(x, x + attention output), NaN where
        the graph does not show it.
        """
        one_of("name", name, LAYER_NAMES)
        one_of("statistic", statistic, ("mean", "low", "high"))
        one_of("lists", lists, ("layer", "head"))
        if name == "sensitivity":
            self.check_measured(top_k, 1, lists)
            return self.statistic(f"{name}.{lists}.{top_k}", statistic, split).copy()
        return self.statistic(name if name == "importance" else f"{name}.{lists}", statistic, split).copy()

    def layer_heads(self, name: str, top_k: int | None = None, split: str = "all") -> np.ndarray:
        """[n_layer, n_head_kv] mean of "sensitivity" (of a top_k) or "sparsity", every KV head with its own list"""
        one_of("name", name, ("sensitivity", "sparsity"))
        if name == "sensitivity":
            self.check_measured(top_k, 1, "head")
        return self.statistic(f"{name}.each_head" + (f".{top_k}" if name == "sensitivity" else ""), "mean", split).copy()

    def head_recall(self, top_k: int, split: str = "all") -> np.ndarray:
        """[n_layer, n_layer, n_head_kv of the source, n_head_kv] mean"""
        self.check_measured(top_k, 1, "head")
        return self.statistic(f"recall.head.{top_k}", "mean", split).copy()

    def head_map(self, top_k: int, source: int, layer: int) -> list[int]:
        """For each KV head of `layer` the head of `source` whose cells hold most of its mass in the fit half"""
        return self.head_recall(top_k, "fit")[source, layer].argmax(0).tolist()

    def mapped_recall(self, top_k: int, split: str) -> np.ndarray:
        chosen = self.head_recall(top_k, "fit").argmax(2)
        return np.take_along_axis(self.head_recall(top_k, split), chosen[:, :, None], axis=2)[:, :, 0].mean(-1)

    def statistic(self, key: str, statistic: str, split: str) -> np.ndarray:
        """One stored statistic, or the mean over all samples from those of the two halves"""
        one_of("split", split, ("all",) + HALVES)
        if statistic != "mean":
            if split != "all":
                raise ProfileError(f"split {split}: quantiles are over all samples; ask for the mean or for split all")
            return self.arrays[f"{key}.{statistic}"]
        if split == "heldout" and not self.heldout_samples:
            raise ProfileError(f"{self.model}: the profile has no held-out samples; profile again with --samples 2 or more")
        if split in HALVES:
            return self.arrays[f"{key}.{split}"]
        share = self.heldout_samples / self.samples
        return (1 - share) * self.arrays[f"{key}.fit"] + share * self.arrays[f"{key}.heldout"]

    def check_measured(self, top_k: int | None, block_size: int, lists: str) -> None:
        if top_k not in self.top_k:
            known = " ".join(map(str, self.top_k))
            raise ProfileError(f"top_k {top_k}: the profile holds {known}; take one of these or profile again with -k {top_k}")
        if lists == "head" and block_size != 1:
            raise ProfileError(f"block size {block_size}: lists per KV head were measured for cells only; "
                               "take block size 1 or lists layer")
        if block_size not in self.block_sizes:
            known = " ".join(map(str, self.block_sizes))
            raise ProfileError(f"block size {block_size}: the profile holds {known}; take one of these")

    def calibration(self) -> str:
        """What was measured on, in one line"""
        lengths = " ".join(map(str, self.contexts))
        return f"{', '.join(self.texts)}; {self.samples} rows of {lengths} tokens, KV {self.type_kv}"

    def check_model(self, path: str) -> None:
        """Raises ProfileError if the weights at `path` are not those that were profiled."""
        if model_identity(path) != self.identity:
            raise ProfileError(f"{path}: the profile is of another model ({self.model}, {self.arch}, {self.layer_count} layers); "
                               "profile this one")

    # -- the file

    def save(self, path: str) -> None:
        with plain_os_errors(path), replacing(path) as fd, open(fd, "w", encoding="utf-8", closefd=False) as file:
            file.write(self.to_json() + "\n")

    def to_json(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "arrays"}
        values["arrays"] = {key: packed(key, array) for key, array in sorted(self.arrays.items())}
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def load(cls, path: str) -> Profile:
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ProfileError(f"{path}: cannot read the profile: {error.strerror or error}") from None
        except (ValueError, RecursionError):
            raise ProfileError(f"{path}: not a profile (no JSON); make one with `hylra-gguf profile MODEL -o PROFILE`") from None
        return profile_from_dict(values, path)


# -- the arrays -------------------------------------------------------------------------------------------------------


def array_shapes(n: int, heads: int, top_k: list[int], block_sizes: list[int]) -> dict[str, tuple[int, ...]]:
    """Every array of a profile; a shape that begins with n, n is of layer pairs."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(key: str, statistics: tuple[str, ...], *shape: int) -> None:
        shapes.update({f"{key}.{statistic}": shape for statistic in statistics})

    for k in top_k:
        for name in ("recall", "overlap"):
            for block_size in block_sizes:
                add(f"{name}.layer.{k}.{block_size}", PAIR_STATISTICS, n, n)
        add(f"recall.head.{k}", HALVES, n, n, heads, heads)
        add(f"recall.head.{k}", ("low",), n, n)
        add(f"overlap.head.{k}", PAIR_STATISTICS, n, n)
        add(f"sensitivity.layer.{k}", LAYER_STATISTICS, n)
        add(f"sensitivity.head.{k}", LAYER_STATISTICS, n)
        add(f"sensitivity.each_head.{k}", HALVES, n, heads)
    add("sparsity.layer", LAYER_STATISTICS, n)
    add("sparsity.head", LAYER_STATISTICS, n)
    add("sparsity.each_head", HALVES, n, heads)
    add("importance", LAYER_STATISTICS, n)
    return shapes


def is_pair(key: str) -> bool:
    return key.startswith(("recall", "overlap"))


def packed(key: str, array: np.ndarray) -> list:
    """Whole numbers in units of UNIT, null for NaN"""
    kept = array[np.triu_indices(len(array))] if is_pair(key) else array
    numbers = np.round(kept.ravel() / UNIT)
    return [None if unknown else int(number) for number, unknown in zip(numbers.tolist(), np.isnan(numbers))]


def unpacked(key: str, numbers: list, shape: tuple[int, ...]) -> np.ndarray:
    """Raises ValueError or TypeError if the numbers are not those of an array of this shape."""
    values = np.array([np.nan if number is None else number for number in numbers], float) * UNIT
    known = np.isfinite(values) | (key.startswith("importance") & np.isnan(values))
    if not known.all() or (values < 0).any() or (is_pair(key) and (values > 1.0001).any()):
        raise ValueError
    if not is_pair(key):
        return values.reshape(shape)
    array = np.zeros(shape)
    rows, columns = np.triu_indices(shape[0])
    array[rows, columns] = values.reshape(len(rows), *shape[2:])
    return array


# -- checks -----------------------------------------------------------------------------------------------------------


def one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ProfileError(f"{what} {value!r}: expected one of {' '.join(known)}")


def profile_from_dict(values: dict, path: str) -> Profile:
    names = {f.name for f in fields(Profile)}
    if not isinstance(values, dict) or "version" not in values:
        raise ProfileError(f"{path}: not a profile (no key 'version'); make one with `hylra-gguf profile MODEL -o PROFILE`")
    if values["version"] != PROFILE_VERSION:
        raise ProfileError(f"{path}: profile version {values['version']!r}, expected {PROFILE_VERSION}; {AGAIN}")
    if set(values) != names:
        raise ProfileError(f"{path}: keys missing or unknown: {' '.join(sorted(set(values) ^ names))}; {AGAIN}")
    check_numbers(values, path)
    return Profile(**{**values, "arrays": read_arrays(values, path)})


def check_numbers(values: dict, path: str) -> None:
    lowest = {"layer_count": 1, "head_kv_count": 1, "n_ctx_train": 1, "samples": 1, "heldout_samples": 0, "sink_tokens": 0, "recent_tokens": 0}
    for name, least in lowest.items():
        if type(values[name]) is not int or values[name] < least:
            raise ProfileError(f"{path}: {name} is {values[name]!r}, expected a whole number of {least} or more; {AGAIN}")
    for name in ("contexts", "top_k", "block_sizes"):
        if not list_of(values[name], int) or min(values[name]) < 1 or len(set(values[name])) < len(values[name]):
            raise ProfileError(f"{path}: {name} is {values[name]!r}, expected different whole numbers of 1 or more; {AGAIN}")
    for name in ("model", "arch", "type_kv", "identity", "tool"):
        if not isinstance(values[name], str):
            raise ProfileError(f"{path}: {name} is {values[name]!r}, expected text; {AGAIN}")
    for name in ("forward_s", "analysis_s"):
        if type(values[name]) not in (int, float) or not values[name] >= 0:
            raise ProfileError(f"{path}: {name} is {values[name]!r}, expected seconds; {AGAIN}")
    check_together(values, path)


def check_together(values: dict, path: str) -> None:
    if not list_of(values["texts"], str):
        raise ProfileError(f"{path}: texts is {values['texts']!r}, expected names; {AGAIN}")
    if not list_of(values["eligible"], bool) or len(values["eligible"]) != values["layer_count"]:
        raise ProfileError(f"{path}: eligible is not {values['layer_count']} times true or false; {AGAIN}")
    if values["heldout_samples"] >= values["samples"]:
        raise ProfileError(f"{path}: {values['heldout_samples']} of {values['samples']} samples held out, expected fewer; {AGAIN}")
    forced = values["sink_tokens"] + values["recent_tokens"]
    if min(values["top_k"]) < forced:
        raise ProfileError(f"{path}: top_k {min(values['top_k'])} is below the {forced} sink and recent tokens; {AGAIN}")


def list_of(values: object, kind: type) -> bool:
    return isinstance(values, list) and bool(values) and all(type(value) is kind for value in values)


def read_arrays(values: dict, path: str) -> dict[str, np.ndarray]:
    shapes = array_shapes(values["layer_count"], values["head_kv_count"], values["top_k"], values["block_sizes"])
    found = values["arrays"]
    if not isinstance(found, dict) or set(found) != set(shapes):
        odd = sorted(set(found if isinstance(found, dict) else ()) ^ set(shapes))
        raise ProfileError(f"{path}: {len(odd)} arrays missing or unknown, first {odd[0]}; {AGAIN}")
    arrays = {}
    for key, shape in shapes.items():
        try:
            arrays[key] = unpacked(key, found[key], shape)
        except (TypeError, ValueError, OverflowError):
            raise ProfileError(f"{path}: array {key} does not hold the expected numbers of shape {list(shape)}; {AGAIN}") from None
    return arrays


# -- the model --------------------------------------------------------------------------------------------------------


def model_identity(path: str) -> str:
    """Hash of the tensor names, shapes and types and of 64 pieces of the tensor data; a policy in the file leaves it as it is."""
    header = read_header(Path(path))
    digest, piece_bytes = hashlib.sha256(), 1 << 16
    with plain_os_errors(header.path), open(header.path, "rb") as file:
        file.seek(header.infos[0])
        digest.update(file.read(header.infos[1] - header.infos[0]))
        for offset in np.linspace(0, max(0, header.size_bytes - header.data_start - piece_bytes), 64):
            file.seek(header.data_start + int(offset))
            digest.update(file.read(piece_bytes))
    return digest.hexdigest()[:32]


def tool_version() -> str:
    from . import __version__  # here, since the package imports its modules first

    return f"hylra-gguf {__version__}"
