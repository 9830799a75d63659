"""Tiny models of many architectures with random weights: per architecture its metadata and tensors, as src/models/*.cpp asks for them.

Tensors are lines `name SHAPE` in ggml's order (columns first), sizes by the letters below. A name that ends neither in `.bias` nor in a
point gets `.weight`; the point is dropped. A layer is of a kind: a attention, w attention in a sliding window, r recurrent, t attention
that is sparse by training.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np

VOCAB, EXPERTS = 96, 4
WINDOW = 64  # cells of a sliding-window layer


@dataclass(frozen=True)
class Architecture:
    arch: str                # general.architecture
    layers: str              # the kind of each layer
    every_layer: str         # tensors of every layer
    keys: dict = field(default_factory=dict)    # metadata without the architecture's prefix
    by_kind: dict = field(default_factory=dict)  # further tensors of the layers of a kind
    model: str = "output_norm E; output E V"    # tensors outside of layers, but for the embedding
    head_kv_count: int = 2   # what a policy must name
    sizes: dict = field(default_factory=dict)   # letters that differ
    sharp: float = 1.5       # of q and of k: attention selective but not blind to the rest
    q8_0: tuple = ()         # names of tensors kept as Q8_0, the same random bytes in every layer


# E width, H heads, G KV heads, D head size, Q K widths of all heads, A all three, F feed-forward, V vocabulary, X experts
SIZES = dict(E=128, H=4, G=2, D=32, Q=128, K=64, A=256, F=96, V=VOCAB, X=EXPERTS)

NORMS = "attn_norm E; ffn_norm E; "
QKV = "attn_q E Q; attn_k E K; attn_v E K; attn_output Q E; "
QKV_BIAS = "attn_q.bias Q; attn_k.bias K; attn_v.bias K; "
QK_NORM = "attn_q_norm D; attn_k_norm D; "
FUSED = "attn_qkv E A; attn_output Q E; "
GATED = "ffn_gate E F; ffn_up E F; ffn_down F E; "
PLAIN = "ffn_up E F; ffn_down F E; "
MOE = "ffn_gate_inp E X; ffn_gate_exps E F X; ffn_up_exps E F X; ffn_down_exps F E X; "
POST_NORMS = "post_attention_norm E; post_ffw_norm E; "
BIASED = ("attn_norm E; attn_norm.bias E; ffn_norm E; ffn_norm.bias E; attn_qkv.bias A; attn_output.bias E; ffn_up.bias F; ffn_down.bias E; "
          + FUSED + PLAIN)
BIASED_OUTPUT = "output_norm E; output_norm.bias E; output E V"
TIED = "output_norm E"
ALTUP = ("inp_gate E U; proj U E; post_norm E; altup_correct_coef 4 4; altup_correct_scale E; altup_predict_coef 4 16; "
         "altup_router E 4; altup_router_norm E; laurel_l E L; laurel_r L E; laurel_post_norm E; ")
MLA = ("attn_q_a E R; attn_q_a_norm R; attn_q_b R B; attn_kv_a_mqa E C; attn_kv_a_norm W; attn_k_b N W H; attn_v_b W M H; attn_output O E; "
       + NORMS)
MLA_KEYS = {"attention.head_count_kv": 1, "attention.key_length": 576, "attention.value_length": 512, "attention.key_length_mla": 192,
            "attention.value_length_mla": 128, "attention.q_lora_rank": 32, "attention.kv_lora_rank": 512, "rope.dimension_count": 64,
            "leading_dense_block_count": 1, "expert_count": EXPERTS, "expert_used_count": 2, "expert_shared_count": 1,
            "expert_feed_forward_length": 96, "expert_weights_scale": 1.0, "expert_gating_func": 2}
# C 576, W 512, N 128 no rope, M 128 value, R 32 rank of q, B heads*192, O heads*128
MLA_SIZES = dict(C=576, W=512, N=128, M=128, R=32, B=4 * 192, O=4 * 128)
HEADS_OF_64 = dict(D=64, Q=256, K=128, A=512)
KEYS_OF_64 = {"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64}
SSM_KEYS = {"ssm.conv_kernel": 4, "ssm.inner_size": 256, "ssm.state_size": 16, "ssm.time_step_rank": 4}
# I 256 inner, S 16 state, T 4 rank or heads
MAMBA = ("ssm_in E 512; ssm_conv1d 4 256; ssm_conv1d.bias 256; ssm_x 256 36; ssm_dt_norm 4; ssm_dt 4 256; ssm_dt.bias 256; ssm_b_norm 16; "
         "ssm_c_norm 16; ssm_a. 16 256; ssm_d. 256; ssm_out 256 E; ")
MAMBA2 = "ssm_in E 580; ssm_conv1d 4 320; ssm_conv1d.bias 320; ssm_dt.bias 4; ssm_a. 1 4; ssm_d. 1 4; ssm_norm 128 2; ssm_out 256 E; "
DELTA = ("attn_qkv E 192; attn_gate E 64; ssm_conv1d 4 192; ssm_dt.bias 4; ssm_a. 4; ssm_ba E 8; ssm_norm 16; ssm_out 64 E; ")


def only(kind: str, layers: str, value: int) -> list[int]:
    """Per layer: the value where the layer is of this kind, else 0."""
    return [value if layer == kind else 0 for layer in layers]


ARCHITECTURES = {
    "llama": Architecture("llama", "aaaaa", NORMS + QKV + GATED),
    "mistral 7B, as llama with 64-wide heads": Architecture("llama", "aaaa", NORMS + QKV + GATED, KEYS_OF_64, sizes=HEADS_OF_64),
    "mistral3": Architecture("mistral3", "aaaa", NORMS + QKV + GATED, KEYS_OF_64, sizes=HEADS_OF_64),
    "qwen2": Architecture("qwen2", "aaaa", NORMS + QKV + QKV_BIAS + GATED),
    "qwen3": Architecture("qwen3", "aaaa", NORMS + QKV + QK_NORM + GATED, KEYS_OF_64, sizes=HEADS_OF_64),
    "qwen3moe": Architecture("qwen3moe", "aaaa", NORMS + QKV + QK_NORM + MOE,
                             {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": 96}),
    "phi3": Architecture("phi3", "aaaa", NORMS + FUSED + "ffn_up E 192; ffn_down F E"),
    "gemma2": Architecture("gemma2", "wawawa", NORMS + QKV + POST_NORMS + GATED,
                           {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0, **KEYS_OF_64}, model=TIED, sizes=HEADS_OF_64),
    "gemma3": Architecture("gemma3", "wwwwwawwwwwawwwwwa", NORMS + QKV + QK_NORM + POST_NORMS + GATED, model=TIED),
    "gemma3n": Architecture("gemma3n", "wwwwa" * 6, NORMS + QKV + QK_NORM + POST_NORMS + GATED + ALTUP, model=TIED
                            + "; altup_proj E E 3; altup_unembd_proj E E 3; per_layer_token_embd 7680 V; per_layer_model_proj E 7680; "
                              "per_layer_proj_norm U", sizes=dict(U=256, L=64), sharp=0.65),
    "gpt-oss": Architecture("gpt-oss", "wawawa", "attn_norm E; post_attention_norm E; attn_output.bias E; attn_sinks H; ffn_gate_inp.bias X; "
                            "ffn_gate_exps.bias F X; ffn_up_exps.bias F X; ffn_down_exps.bias E X; " + QKV + QKV_BIAS + MOE,
                            {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": 96, **KEYS_OF_64}, sizes=HEADS_OF_64),
    "bloom (ALiBi)": Architecture("bloom", "aaaa", BIASED, {"attention.head_count_kv": 4}, model=BIASED_OUTPUT
                                  + "; token_embd_norm E; token_embd_norm.bias E", head_kv_count=4, sizes=dict(K=128, A=384)),
    "mpt (ALiBi, six heads)": Architecture("mpt", "aaaa", BIASED, {"attention.max_alibi_bias": 8.0, "attention.head_count": 6,
                                           "attention.head_count_kv": 6, "embedding_length": 192}, model=BIASED_OUTPUT, head_kv_count=6,
                                           sizes=dict(E=192, H=6, Q=192, K=192, A=576)),
    "falcon": Architecture("falcon", "aaaa", "attn_norm E; attn_norm.bias E; " + FUSED + PLAIN, {"attention.head_count_kv": 1},
                           model=BIASED_OUTPUT, head_kv_count=1, sizes=dict(K=32, A=192)),
    "gpt-neox": Architecture("gptneox", "aaaa", BIASED, {"attention.head_count_kv": 4, "use_parallel_residual": True},
                             model=BIASED_OUTPUT, head_kv_count=4, sizes=dict(K=128, A=384)),
    "deepseek2 (MLA)": Architecture("deepseek2", "aaaa", MLA, MLA_KEYS, head_kv_count=1, sizes=MLA_SIZES),
    "deepseek2 with a draft layer": Architecture("deepseek2", "aaa", MLA, {**MLA_KEYS, "block_count": 4, "nextn_predict_layers": 1},
                                                 head_kv_count=1, sizes=MLA_SIZES),
    "olmo2": Architecture("olmo2", "aaaa", QKV + "attn_q_norm Q; attn_k_norm K; " + POST_NORMS + GATED),
    "olmo3, as olmo2 with a window": Architecture("olmo2", "wwwawwwa", QKV + "attn_q_norm Q; attn_k_norm K; " + POST_NORMS + GATED),
    "command-r": Architecture("command-r", "aaaa", "attn_norm E; " + QKV + GATED, {"logit_scale": 1.0}, model=TIED),
    "cohere2": Architecture("cohere2", "wwwawwwa", "attn_norm E; " + QKV + GATED, {"logit_scale": 1.0}, model=TIED),
    "lfm2 (hybrid)": Architecture("lfm2", "rarara", NORMS + GATED, {"shortconv.l_cache": 3, "attention.head_count_kv": only("a", "rarara", 2)},
                                  {"a": QKV + QK_NORM, "r": "shortconv.conv 3 E; shortconv.in_proj E 384; shortconv.out_proj E E"},
                                  model="token_embd_norm E"),
    "jamba (hybrid)": Architecture("jamba", "rarara", NORMS + GATED, {**SSM_KEYS, "attention.head_count_kv": only("a", "rarara", 2)},
                                   {"a": QKV, "r": MAMBA}),
    "granite-hybrid": Architecture("granitehybrid", "rarara", NORMS + GATED, {**SSM_KEYS, "ssm.group_count": 2,
                                   "attention.head_count_kv": only("a", "rarara", 2)}, {"a": QKV, "r": MAMBA2}),
    "qwen3next (hybrid)": Architecture("qwen3next", "rrrarrra", "attn_norm E; post_attention_norm E; ffn_gate_inp_shexp E; ffn_gate_shexp E F; "
                                       "ffn_up_shexp E F; ffn_down_shexp F E; " + MOE, {"expert_count": EXPERTS, "expert_used_count": 2,
                                       "expert_feed_forward_length": 96, "ssm.conv_kernel": 4, "ssm.inner_size": 64, "ssm.state_size": 16,
                                       "ssm.time_step_rank": 4, "ssm.group_count": 4},
                                       {"a": "attn_q E 256; attn_k E K; attn_v E K; attn_output Q E; " + QK_NORM, "r": DELTA}),
    "falcon-h1 (attention beside Mamba)": Architecture("falcon-h1", "aaaa", "attn_norm E; ffn_norm. E; " + QKV + GATED + MAMBA2,
                                                       {**SSM_KEYS, "ssm.group_count": 2}),
}


# Sparse by training: llama.cpp keeps kinds of caches for them that the engine must leave alone.
TRAINED = {
    "deepseek32 (trained sparsity)": Architecture(
        "deepseek32", "tttt", MLA + "indexer.k_norm 128; indexer.k_norm.bias 128; indexer.proj E 64; indexer.attn_k E 128; indexer.attn_q_b R 8192; ",
        {**MLA_KEYS, "attention.indexer.head_count": 64, "attention.indexer.key_length": 128, "attention.indexer.top_k": 256},
        head_kv_count=1, sizes=MLA_SIZES),
}
# Layer counts and head shapes of large models, their width left small.
LARGE = {
    "QwQ-32B: 64 layers, 40 heads and 8 KV heads of 128": Architecture(
        "llama", "a" * 64, NORMS + QKV + QKV_BIAS + GATED, {"embedding_length": 32, "attention.head_count": 40, "attention.head_count_kv": 8,
        "attention.key_length": 128, "attention.value_length": 128, "rope.dimension_count": 128}, head_kv_count=8,
        sizes=dict(E=32, H=40, D=128, Q=5120, K=1024)),
    "DeepSeek-R1: 61 layers of MLA": Architecture(
        "deepseek2", "a" * 61, MLA, {**MLA_KEYS, "embedding_length": 32, "attention.head_count": 2}, head_kv_count=1,
        sizes={**MLA_SIZES, "E": 32, "H": 2, "B": 2 * 192, "O": 2 * 128}),
    "DeepSeek-R1: 128 heads of MLA": Architecture(
        "deepseek2", "aa", MLA, {**MLA_KEYS, "embedding_length": 32, "attention.head_count": 128}, head_kv_count=1,
        sizes={**MLA_SIZES, "E": 32, "H": 128, "B": 128 * 192, "O": 128 * 128}),
}
# Layers and heads together: 1.1 G weights, most of them what turns a row of the cache into those of 128 heads.
R1_HEADS = LARGE["DeepSeek-R1: 128 heads of MLA"]
WHOLE_R1 = {"DeepSeek-R1: 61 layers of 128 heads of MLA": replace(R1_HEADS, layers="a" * 61, q8_0=("attn_q_b", "attn_k_b", "attn_v_b", "attn_output"))}


def metadata(a: Architecture, context: int) -> dict:
    """Everything but general.* and the tokenizer; llama.cpp takes no notice of keys that an architecture does not read."""
    keys = {"context_length": context, "embedding_length": 128, "block_count": len(a.layers), "feed_forward_length": 96,
            "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.layer_norm_epsilon": 1e-5, "vocab_size": VOCAB, **a.keys}
    return {**keys, "attention.sliding_window": WINDOW} if "w" in a.layers else keys


def add_key(writer: gguf.GGUFWriter, name: str, value) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    kinds[type(value)](name, value)


def tensors(a: Architecture):
    """(name, shape in NumPy's order) of every tensor"""
    sizes = {**SIZES, **a.sizes}
    blocks = [("", f"token_embd E V; {a.model}")]
    for il, kind in enumerate(a.layers):
        blocks.append((f"blk.{il}.", a.every_layer + "; " + a.by_kind.get(kind, "") + "; " + feed_forward(a, il)))
    for prefix, text in blocks:
        for line in filter(None, (part.strip() for part in text.split(";"))):
            name, *shape = line.split()
            full = name[:-1] if name.endswith(".") else name if name.endswith(".bias") else name + ".weight"
            yield prefix + full, tuple(sizes.get(n) or int(n) for n in reversed(shape))


def feed_forward(a: Architecture, il: int) -> str:
    """Of DeepSeek's kind, whose first layer is dense."""
    if a.arch not in ("deepseek2", "deepseek32"):
        return ""
    return GATED if il == 0 else MOE + "exp_probs_b.bias X; ffn_gate_shexp E F; ffn_up_shexp E F; ffn_down_shexp F E"


def value(rng, name: str, shape: tuple[int, ...], sharp: float) -> np.ndarray:
    """Random; norms near 1, decay of a state negative."""
    x = rng.standard_normal(shape)
    if "norm" in name and not name.endswith(".bias"):
        x = (1 + x / 10) * (sharp if "attn_q_norm" in name or "attn_k_norm" in name else 1)
    elif name.endswith("ssm_a"):
        x = -abs(x) - 0.1
    elif name.endswith(".bias"):
        x = x / 5
    elif "sinks" in name:
        x = x + 6  # as large as the larger logits, or they would change nothing
    elif len(shape) > 1 and "token_embd" not in name:
        x = x * (sharp if any(part in name for part in ("attn_q", "attn_k")) else 1) / np.sqrt(shape[-1])
    return x.astype(np.float32)


def q8_0_bytes(shape: tuple[int, ...], sharp: float) -> np.ndarray:
    """uint8 rows of blocks: an F16 scale, then 32 random numbers of 8 bits, as large together as those of value()."""
    blocks = np.zeros((*shape[:-1], shape[-1] // 32, 34), np.uint8)
    blocks[..., :2] = np.frombuffer(np.float16(sharp / 74 / np.sqrt(shape[-1])).tobytes(), np.uint8)  # 74: their standard deviation
    blocks[..., 2:] = np.random.default_rng(0).integers(0, 256, blocks[..., 2:].shape, np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def add_tokenizer(writer: gguf.GGUFWriter, with_tokenizer: bool) -> None:
    """llama.cpp's own for tests makes a token of every five bytes."""
    writer.add_tokenizer_model("test" if with_tokenizer else "no_vocab")
    if with_tokenizer:
        writer.add_token_list([f"tok_{i}" for i in range(VOCAB)])
        writer.add_token_scores([0.0] * VOCAB)


def write_architecture(path: Path, a: Architecture, context=8192, seed=0, with_tokenizer=False) -> Path:
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(path, a.arch)
    for key, item in metadata(a, context).items():
        add_key(w, f"{a.arch}.{key}", item)
    add_tokenizer(w, with_tokenizer)
    kept = {}
    for name, shape in tensors(a):
        part = name.split(".")[-2]
        if part in a.q8_0:
            if part not in kept:
                kept[part] = q8_0_bytes(shape, a.sharp)
            w.add_tensor(name, kept[part], raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            w.add_tensor(name, value(rng, name, shape, a.sharp))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
