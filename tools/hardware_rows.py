"""What the hardware check derives from its measurements: bytes that must move, the share of time that is memory, gains split in two.

Pure functions from numbers to rows, but for `read_shape`, which refuses models whose bytes per step the file alone does not tell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

from hylra_gguf.errors import ModelFileError
from hylra_gguf.gguf_header import model_shape, read_header
from hylra_gguf.policy import Policy

KINDS = ("full", "select", "reuse")
EVENTS = ("instructions", "cycles", "cache-misses")  # names of `perf stat`
NOT_EXPOSED = "not exposed"
# arms of bench-kernels that belong to a kind; the first reads the cache, the others what it has just written
PARTS = {"full": ("full", "full_reduce"), "select": ("select_attend", "select_reduce", "select_pool", "select_choose"),
         "reuse": ("reuse", "reuse_reduce")}


# ---- counters


def parse_perf(text: str) -> dict[str, int | None]:
    """Output of `perf stat -x,` -> event -> count, None where the machine does not count it"""
    found: dict[str, int | None] = dict.fromkeys(EVENTS)
    for line in text.splitlines():
        fields = line.split(",")
        name = fields[2].partition(":")[0] if len(fields) > 2 else ""
        if name in found and fields[0].isdigit():
            found[name] = int(fields[0])
    return found


def difference(more: dict[str, int | None], less: dict[str, int | None], times: int) -> dict[str, float | None]:
    """What one of `times` repetitions adds to a process that else does the same"""
    return {name: None if more[name] is None or less[name] is None else (more[name] - less[name]) / times for name in EVENTS}


def counter_columns(counts: dict[str, float | None]) -> dict:
    return {name.replace("-", "_"): NOT_EXPOSED if counts[name] is None else round(counts[name]) for name in EVENTS}


# ---- one attention layer


def layer_rows(cold: dict, hot: dict, counts: dict[str, dict[str, float | None]]) -> list[dict]:
    """A row per kind from two results of bench-kernels: `cold` is the measurement, `hot` has one thread and cells few enough for the cache.

    memory_ms: the bytes at the read bandwidth of the same run. arithmetic_ms: the time per cell of the hot run, shared by all threads,
    and what follows the attention as it was measured. Gains are those over `full`, of ms, of either part, and of instructions.
    """
    rows = [layer_row(kind, cold, hot, counts[kind]) for kind in KINDS]
    full = rows[0]
    for row in rows:
        row["gain"] = ratio(full["ms"], row["ms"])
        row["memory_gain"] = ratio(full["memory_ms"], row["memory_ms"])
        row["arithmetic_gain"] = ratio(full["arithmetic_ms"], row["arithmetic_ms"])
        row["instruction_gain"] = ratio(full["instructions"], row["instructions"])
    return rows


def layer_row(kind: str, cold: dict, hot: dict, counts: dict[str, float | None]) -> dict:
    attend, *rest = PARTS[kind]
    cells = cold["top_k"] if kind == "reuse" else cold["n_kv"]
    hot_cells = hot["top_k"] if kind == "reuse" else hot["n_kv"]
    rest_ms = sum(cold[f"{name}_ms"] for name in rest)
    ms, size_bytes = cold[f"{attend}_ms"] + rest_ms, cold[f"{attend}_bytes"]
    flops = 4 * cold["heads"] * cold["head_size"] * cells  # q.k and p.v, a product and a sum each
    return {
        **{name: cold[name] for name in ("isa", "type", "n_kv", "top_k", "threads")}, "kind": kind,
        **speeds(ms, size_bytes, flops, cold["read_bytes_per_s"]),
        "memory_ms": round(size_bytes / cold["read_bytes_per_s"] * 1e3, 4),
        "arithmetic_ms": round(hot[f"{attend}_ms"] * cells / hot_cells / cold["threads"] + rest_ms, 4),
        **counter_columns(counts)}


def speeds(ms: float, size_bytes: float, flops: float, read_bytes_per_s: float) -> dict:
    return {"ms": round(ms, 4), "bytes": round(size_bytes), "gb_per_s": round(size_bytes / ms / 1e6, 2),
            "of_read": round(size_bytes / ms * 1e3 / read_bytes_per_s, 3), "flops": round(flops),
            "gflops_per_s": round(flops / ms / 1e6, 2), "flops_per_byte": round(flops / size_bytes, 2)}


def ratio(full: float | str, one: float | str) -> float | str:
    return NOT_EXPOSED if NOT_EXPOSED in (full, one) else round(full / one, 2)


def with_portability(rows: list[dict]) -> list[dict]:
    """`of_fastest_isa`: time of the fastest instruction set in the same case over the time of this one"""
    def case(row: dict) -> tuple:
        return row["type"], row["n_kv"], row["kind"]

    for row in rows:
        row["of_fastest_isa"] = round(min(one["ms"] for one in rows if case(one) == case(row)) / row["ms"], 3)
    return rows


# ---- whole decode steps


@dataclass(frozen=True)
class Shape:
    """What a step of one token reads of a model: every weight once, of the embedding only where it is the output too."""

    layers: int
    heads: int
    head_size_k: int
    head_size_v: int
    heads_kv: int
    weights: int
    weight_bytes: int

    def cell_bytes(self, type_k: str, type_v: str) -> float:
        """Bytes of one cell in one layer, K and V"""
        return self.heads_kv * (self.head_size_k * element_bytes(type_k) + self.head_size_v * element_bytes(type_v))

    def cell_flops(self) -> int:
        return 2 * self.heads * (self.head_size_k + self.head_size_v)


def element_bytes(kind: str) -> float:
    elements, size_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
    return size_bytes / elements


def read_shape(path: str) -> Shape:
    """Raises ModelFileError for layers that differ, sliding windows, experts: a step does not read all of those."""
    header = read_header(path)
    arch, layers, heads_kv = model_shape(header)
    for key in ("attention.sliding_window", "expert_count", "ssm.state_size"):
        if header.get(f"{arch}.{key}"):
            raise ModelFileError(f"{path}: {arch}.{key} is set, so the file does not tell how many bytes a step reads; "
                                 "name a model whose layers all read their whole cache, or leave --model out")
    heads = header.get(f"{arch}.attention.head_count")
    if isinstance(heads, tuple) or isinstance(header.get(f"{arch}.attention.head_count_kv"), tuple):
        raise ModelFileError(f"{path}: its layers have different numbers of heads; name a model whose layers are alike")
    size = header.get(f"{arch}.embedding_length") // heads
    tensors = GGUFReader(path).tensors
    tied = not any(tensor.name == "output.weight" for tensor in tensors)
    read = [tensor for tensor in tensors if tied or tensor.name != "token_embd.weight"]
    return Shape(layers, heads, header.get(f"{arch}.attention.key_length", size), header.get(f"{arch}.attention.value_length", size),
                 heads_kv, int(sum(tensor.n_elements for tensor in read)), int(sum(tensor.n_bytes for tensor in read)))


def cells_read(row: dict, policy: Policy, layers: int) -> float:
    """Cells that a step reads, all layers together, K or V of one as half a cell; a row of `hylra-gguf bench`"""
    depth = row["n_depth"]
    if row["arm"] != "hylra" or not row["hylra_sparse_steps"]:
        return layers * depth
    return layers * depth * (1 - replace(policy, min_context=0).reads_saved(depth))


def step_rows(bench_rows: list[dict], shape: Shape, policy: Policy, read_bytes_per_s: float,
              counts: dict[tuple[int, str], dict[str, float | None]]) -> list[dict]:
    """A row per depth and arm; counts: (depth, arm) -> events of one step. Gains are those over the faster stock arm."""
    rows = []
    for one in bench_rows:
        cells = cells_read(one, policy, shape.layers)
        kv_bytes = cells * shape.cell_bytes(one["type_k"], one["type_v"])
        flops = 2 * shape.weights + cells * shape.cell_flops()
        rows.append({
            **{name: one[name] for name in ("arm", "type_k", "type_v", "n_depth", "n_threads", "fill", "n_generated")},
            **speeds(1e3 / one["median_ts"], shape.weight_bytes + kv_bytes, flops, read_bytes_per_s), "kv_bytes": round(kv_bytes),
            "memory_ms": round((shape.weight_bytes + kv_bytes) / read_bytes_per_s * 1e3, 4),
            **counter_columns(counts[one["n_depth"], one["arm"]])})
    for row in rows:
        stock = faster_stock(rows, row["n_depth"])
        row["gain"], row["memory_gain"] = ratio(stock["ms"], row["ms"]), ratio(stock["memory_ms"], row["memory_ms"])
        row["flops_gain"] = ratio(stock["flops"], row["flops"])
        row["instruction_gain"] = ratio(stock["instructions"], row["instructions"])
    return rows


def faster_stock(rows: list[dict], depth: int) -> dict:
    return min((row for row in rows if row["n_depth"] == depth and row["arm"].startswith("stock")), key=lambda row: row["ms"])


def roof(flops_per_byte: float, read_bytes_per_s: float, peak_flops_per_s: float) -> float:
    """Reachable FLOP/s (Williams, Waterman, Patterson 2009)"""
    return min(peak_flops_per_s, flops_per_byte * read_bytes_per_s)


def spread_of(rows: list[dict]) -> tuple[float, float]:
    """Smallest and largest intensity, a factor of 2 wider: the x axis of the roofline"""
    found = [row["flops_per_byte"] for row in rows]
    return 2.0 ** math.floor(math.log2(min(found)) - 0.5), 2.0 ** math.ceil(math.log2(max(found)) + 1.5)
