"""A llama model in PyTorch, read from a GGUF file and written back to one, by the tensor names of the file.

Interleaved RoPE as GGUF files have it, tied output. Everything else about the file (tokenizer, chat template) is kept.
"""

from __future__ import annotations

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HEADER_KEYS = {"general.architecture", "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}  # the writer makes them itself


class Config:
    """The shape of a llama GGUF; rope_base overrides the file's."""

    def __init__(self, reader: gguf.GGUFReader, rope_base: float, n_ctx: int):
        def value(key: str):
            return reader.fields[f"llama.{key}"].contents()

        self.n_layer, self.d, self.ff = value("block_count"), value("embedding_length"), value("feed_forward_length")
        self.n_head, self.n_kv, self.eps = value("attention.head_count"), value("attention.head_count_kv"), value("attention.layer_norm_rms_epsilon")
        self.head_size, self.rope_base, self.n_ctx = self.d // self.n_head, rope_base, n_ctx
        self.vocab = int(next(t for t in reader.tensors if t.name == "token_embd.weight").shape[1])


def rope_tables(n: int, c: Config, device) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, head_size / 2] each"""
    frequency = 1.0 / c.rope_base ** (torch.arange(0, c.head_size, 2, device=device, dtype=torch.float32) / c.head_size)
    angle = torch.arange(n, device=device, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [batch, heads, tokens, head_size], pairs (2i, 2i+1)"""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


class Norm(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(c.d)), c.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, self.eps).to(x.dtype)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c = c
        self.attn_norm, self.ffn_norm = Norm(c), Norm(c)
        self.attn_q, self.attn_output = nn.Linear(c.d, c.n_head * c.head_size, False), nn.Linear(c.n_head * c.head_size, c.d, False)
        self.attn_k, self.attn_v = (nn.Linear(c.d, c.n_kv * c.head_size, False) for _ in range(2))
        self.ffn_gate, self.ffn_up, self.ffn_down = nn.Linear(c.d, c.ff, False), nn.Linear(c.d, c.ff, False), nn.Linear(c.ff, c.d, False)

    def heads(self, x: torch.Tensor, n: int) -> torch.Tensor:
        """[batch, tokens, n * head_size] -> [batch, n, tokens, head_size]"""
        return x.unflatten(-1, (n, self.c.head_size)).transpose(1, 2)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h, group = self.attn_norm(x), self.c.n_head // self.c.n_kv
        q = rope(self.heads(self.attn_q(h), self.c.n_head), cos, sin)
        k = rope(self.heads(self.attn_k(h), self.c.n_kv), cos, sin).repeat_interleave(group, 1)
        v = self.heads(self.attn_v(h), self.c.n_kv).repeat_interleave(group, 1)
        x = x + self.attn_output(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Llama(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.c, self.token_embd, self.output_norm = c, nn.Embedding(c.vocab, c.d), Norm(c)
        self.blk = nn.ModuleList(Block(c) for _ in range(c.n_layer))

    def hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """[batch, tokens] -> [batch, tokens, d]"""
        x = self.token_embd(tokens)
        cos, sin = rope_tables(tokens.shape[1], self.c, tokens.device)
        for block in self.blk:
            x = block(x, cos, sin)
        return self.output_norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.token_embd.weight)


def load(path: str, rope_base: float, n_ctx: int) -> tuple[Llama, gguf.GGUFReader]:
    reader = gguf.GGUFReader(path)
    model = Llama(Config(reader, rope_base, n_ctx))
    parameters = dict(model.named_parameters())
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        parameters[tensor.name].data.copy_(torch.from_numpy(values.copy()).view_as(parameters[tensor.name]))
    return model, reader


def save(model: Llama, reader: gguf.GGUFReader, path: str, name: str) -> None:
    """The metadata of the file that was read with the new context and RoPE base, and tensors of its own types."""
    writer = gguf.GGUFWriter(path, "llama")
    changed = {"general.name": name, "llama.context_length": model.c.n_ctx, "llama.rope.freq_base": float(model.c.rope_base)}
    for key, field in reader.fields.items():
        if key not in HEADER_KEYS and not key.startswith("hylra."):
            kind, inner = field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, changed.get(key, field.contents()), kind, inner)
    for tensor in reader.tensors:
        values = model.get_parameter(tensor.name).detach().float().cpu().numpy().astype(np.float32)
        kind = tensor.tensor_type
        data = values if kind == gguf.GGMLQuantizationType.F32 else gguf.quants.quantize(values, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=None if kind == gguf.GGMLQuantizationType.F32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
