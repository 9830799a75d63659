"""Writes a GGUF of a known shape with random weights, and a policy for it: for measuring speed where no such model can be had.

    python tools/random_model.py llama-3.2-1b model.gguf --type q4_0 --policy policy.json --every 4

The model says nothing sensible and has no tokenizer. The policy: layer 0 full, then one select layer at the head of every N.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gguf
import numpy as np

from hylra_gguf.policy import FULL, REUSE, SELECT, Policy

# layers, width, feed-forward, heads, KV heads, head size, vocabulary, context
SHAPES = {
    "smollm2-135m": (30, 576, 1536, 9, 3, 64, 49152, 32768),
    "llama-3.2-1b": (16, 2048, 8192, 32, 8, 64, 128256, 131072),
    "llama-3.1-8b": (32, 4096, 14336, 32, 8, 128, 128256, 131072),
    "qwq-32b": (64, 5120, 27648, 40, 8, 128, 152064, 131072),
    "qwen3-32b": (64, 5120, 25600, 64, 8, 128, 151936, 131072),
}
TYPES = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
POOL_BLOCKS = 1 << 16  # random blocks that are repeated: as good for speed, and a hundred times quicker to make


def random_tensor(rng: np.random.Generator, kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    """uint8 [rows, bytes per row]: blocks { F16 scale; quants } with scales that keep activations near 1"""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    pool = rng.integers(0, 256, (POOL_BLOCKS, block_bytes), dtype=np.uint8)
    largest = 127 if kind == gguf.GGMLQuantizationType.Q8_0 else 8
    scale = np.float16(1.7 / largest / np.sqrt(columns))  # uniform quants have a spread of largest/sqrt(3)
    pool[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return np.resize(pool, (rows, columns // block * block_bytes))


def tensors(shape: tuple[int, ...]):
    """(name, rows, columns) of every matrix"""
    layers, width, ff, heads, kv_heads, head_size, vocab, _ = shape
    yield "token_embd.weight", vocab, width
    for i in range(layers):
        yield f"blk.{i}.attn_q.weight", heads * head_size, width
        yield f"blk.{i}.attn_k.weight", kv_heads * head_size, width
        yield f"blk.{i}.attn_v.weight", kv_heads * head_size, width
        yield f"blk.{i}.attn_output.weight", width, heads * head_size
        yield f"blk.{i}.ffn_gate.weight", ff, width
        yield f"blk.{i}.ffn_up.weight", ff, width
        yield f"blk.{i}.ffn_down.weight", width, ff


def write_metadata(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...]) -> None:
    layers, width, ff, heads, kv_heads, head_size, vocab, context = shape
    writer.add_name(f"random weights in the shape of {name}")
    for add, value in ((writer.add_context_length, context), (writer.add_embedding_length, width), (writer.add_block_count, layers),
                       (writer.add_feed_forward_length, ff), (writer.add_head_count, heads), (writer.add_head_count_kv, kv_heads),
                       (writer.add_key_length, head_size), (writer.add_value_length, head_size), (writer.add_rope_dimension_count, head_size),
                       (writer.add_layer_norm_rms_eps, 1e-5), (writer.add_vocab_size, vocab), (writer.add_rope_freq_base, 500000.0)):
        add(value)
    writer.add_tokenizer_model("no_vocab")


def write_model(path: str, name: str, kind: gguf.GGMLQuantizationType, seed: int = 0) -> None:
    """Tied embedding, norms of ones; memory stays that of one matrix."""
    shape, rng = SHAPES[name], np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=False)
    write_metadata(writer, name, shape)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    norms = ["output_norm.weight", *(f"blk.{i}.{norm}.weight" for i in range(shape[0]) for norm in ("attn_norm", "ffn_norm"))]
    for norm in norms:
        writer.add_tensor_info(norm, (shape[1],), np.dtype(np.float32), 4 * shape[1])
    for tensor, rows, columns in tensors(shape):
        row_bytes = columns // block * block_bytes
        writer.add_tensor_info(tensor, (rows, row_bytes), np.dtype(np.uint8), rows * row_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _ in norms:
        writer.write_tensor_data(np.ones(shape[1], np.float32))
    for _, rows, columns in tensors(shape):
        writer.write_tensor_data(random_tensor(rng, kind, rows, columns))
    writer.close()


def every(layers: int, n: int) -> str:
    """Roles: layer 0 full; of the others the first of every n selects."""
    roles = "F" + "".join("R" if (i - 1) % n else "S" for i in range(1, layers))
    return roles[:-1] + "F" if roles[-1] == "S" else roles  # a selection that nobody reuses


def policy_of(roles: str, kv_heads: int, top_k: int, lists: int, sparse_select: bool = False) -> Policy:
    """F full, S select, R reuse of the nearest S before it; sparse_select: S attends only to what it selects"""
    source = [-1 if role == "F" else roles.rindex("S", 0, i + 1) for i, role in enumerate(roles)]
    mode = [{"F": FULL, "S": SELECT, "R": REUSE}[role] for role in roles]
    sparse = [int(role == "S") for role in roles] if sparse_select else None
    return Policy(layer_mode=mode, layer_source=source, head_kv_count=kv_heads, lists=lists, top_k=top_k, sparse_select=sparse, summary=roles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("output", metavar="MODEL", help="GGUF file to write; one that exists is left alone, for further policies")
    parser.add_argument("--type", choices=TYPES, default="q8_0")
    parser.add_argument("--policy", metavar="POLICY", help="write a policy for it too")
    parser.add_argument("--every", type=int, default=4, metavar="N", help="one select layer at the head of every N (default 4)")
    parser.add_argument("--roles", metavar="ROLES", help="instead of --every: F (full), S (select) or R (reuse) for each layer")
    parser.add_argument("--lists", type=int, choices=(1, 0), default=1, help="1: one list for all heads (default), 0: one per KV head")
    parser.add_argument("--sparse-select", action="store_true", help="select layers attend only to what they select")
    parser.add_argument("--top-k", type=int, default=2048, metavar="K")
    args = parser.parse_args()
    if not Path(args.output).exists():
        write_model(args.output, args.shape, TYPES[args.type])
    elif not args.policy:
        sys.exit(f"{args.output}: this file exists; choose another")
    if args.policy:
        layers, kv_heads = SHAPES[args.shape][0], SHAPES[args.shape][4]
        policy_of(args.roles or every(layers, args.every), kv_heads, args.top_k, args.lists or kv_heads, args.sparse_select).save(args.policy)


if __name__ == "__main__":
    main()
