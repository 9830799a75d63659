"""Local models in the place of those that llama-cpp-python's own tests download: real vocabularies of llama.cpp, random weights.

Two are made to measure, because a test wants certain answers: `tokens` has Qwen's vocabulary with two pairs of ids exchanged, so that
"Hello, world!" has the ids of Qwen 3.5; `language` knows which token follows which in the sentences of the tests, and nothing else.
"""

from __future__ import annotations

import dataclasses
import os
import tarfile
from pathlib import Path

import gguf
import numpy as np
from architectures import ARCHITECTURES, GATED, NORMS, PLAIN, QKV, TIED, Architecture, add_key, metadata, tensors, value

MAMBA = ("attn_norm E; ssm_in E 512; ssm_conv1d 4 256; ssm_conv1d.bias 256; ssm_x 256 36; ssm_dt 4 256; ssm_dt.bias 256; ssm_a. 16 256; ssm_d. 256; "
         "ssm_out 256 E")
SSM_KEYS = {"ssm.conv_kernel": 4, "ssm.inner_size": 256, "ssm.state_size": 16, "ssm.time_step_rank": 4}
BERT = "attn_output_norm E; attn_output_norm.bias E; layer_output_norm E; layer_output_norm.bias E; " + QKV + PLAIN
# name of the stand-in -> (architecture, vocabulary of llama.cpp)
STAND_INS = {
    "tokens": (Architecture("llama", "aa", NORMS + QKV + GATED, {"embedding_length": 32, "attention.head_count": 1, "attention.head_count_kv": 1},
                            model=TIED, sizes=dict(E=32, Q=32, K=32)), "qwen35"),
    "transformer": (Architecture("llama", "aaaa", NORMS + QKV + GATED, model=TIED), "llama-spm"),
    "recurrent": (Architecture("mamba", "rr", MAMBA, SSM_KEYS, model=TIED), "gpt-neox"),
    "hybrid": (dataclasses.replace(ARCHITECTURES["falcon-h1 (attention beside Mamba)"], model=TIED), "gpt-2"),
    "language": (Architecture("llama", "aa", NORMS + QKV + GATED), "gpt-2"),
    "embedding": (Architecture("bert", "aa", BERT, {"context_length": 512, "attention.head_count_kv": 4, "attention.causal": False, "pooling_type": 2},
                               model="token_types E 2; position_embd E 512; token_embd_norm E; token_embd_norm.bias E", sizes=dict(K=128)), "bert-bge"),
}


def sdist() -> Path:
    """The one that the build took: named by the user, or kept beside the build tree."""
    named = os.environ.get("HYLRA_LLAMA_CPP_SDIST")
    return Path(named) if named else next((Path(__file__).resolve().parents[1] / "build" / "sdist").glob("*.tar.gz"))


def unpack(sdist: Path, folder: Path) -> Path:
    """llama-cpp-python's tests and llama.cpp's vocabularies, in the folder of their sdist."""
    with tarfile.open(sdist) as archive:
        root = Path(archive.getnames()[0]).parts[0]
        wanted = [member for member in archive.getmembers() if member.name.startswith((f"{root}/tests/", f"{root}/vendor/llama.cpp/models/ggml-vocab-"))]
        archive.extractall(folder, wanted)
    return folder / root


EXCHANGED = {9707: 9419, 1879: 1814}  # "Hello" and " world" in Qwen 2.5's ids and in Qwen 3.5's
SENTENCES = ("The quick brown fox jumps over the lazy dog.", "?:\ntrue", *(f"?:\n{digit}" for digit in range(1, 8)), "is parrot")


def tokenizer_fields(name: str, path: Path) -> dict:
    """key -> (value, GGUF type, item type)"""
    fields = {key: (field.contents(), field.types[0], field.types[-1]) for key, field in gguf.GGUFReader(path).fields.items() if key.startswith("tokenizer.")}
    if name == "tokens":
        words = fields["tokenizer.ggml.tokens"][0]
        for a, b in EXCHANGED.items():
            words[a], words[b] = words[b], words[a]
    return fields


def followers(vocabulary: Path) -> set[tuple[int, int]]:
    """(token, one that follows it)"""
    from hylra_gguf import Llama

    llama = Llama(str(vocabulary), vocab_only=True, verbose=False)
    pairs = set()
    for sentence in SENTENCES:
        head, tail = (sentence[:-3], "rot") if sentence.endswith("rot") else (sentence, "")
        tokens = [*llama.tokenize(head.encode()), *(llama.tokenize(tail.encode()) if tail else [])]
        pairs |= set(zip(tokens, tokens[1:]))
    return pairs


def made_to_measure(tensor: str, x: np.ndarray, embedding: np.ndarray, pairs: set[tuple[int, int]]) -> np.ndarray:
    """A residual stream that stays the token's embedding, and an output that finds those which precede each token."""
    if "attn_v" in tensor or "ffn_down" in tensor:
        return np.zeros_like(x)
    if tensor != "output.weight":
        return x
    out = np.zeros_like(x)
    for before, after in pairs:
        out[after] += 2 * embedding[before] / np.linalg.norm(embedding[before])
    return out


def write_stand_in(path: Path, name: str, vocabularies: Path) -> Path:
    a, vocabulary = STAND_INS[name]
    vocabulary = vocabularies / f"ggml-vocab-{vocabulary}.gguf"
    fields = tokenizer_fields(name, vocabulary)
    n_vocab = len(fields["tokenizer.ggml.tokens"][0])
    a = dataclasses.replace(a, sizes={**a.sizes, "V": n_vocab}, keys={**a.keys, "vocab_size": n_vocab})
    writer, rng = gguf.GGUFWriter(path, a.arch), np.random.default_rng(0)
    for key, item in metadata(a, a.keys.get("context_length", 2048)).items():
        add_key(writer, f"{a.arch}.{key}", item)
    for key, (item, kind, item_kind) in fields.items():
        writer.add_key_value(key, item, kind, sub_type=item_kind if kind == gguf.GGUFValueType.ARRAY else None)
    weights = {tensor: value(rng, tensor, shape, a.sharp) for tensor, shape in tensors(a)}
    if name == "language":
        pairs = followers(vocabulary)
        weights = {tensor: made_to_measure(tensor, x, weights["token_embd.weight"], pairs) for tensor, x in weights.items()}
    for tensor, x in weights.items():
        writer.add_tensor(tensor, x)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    return path
