"""Measure on one dense pass over calibration text what each attention layer needs and whose cells would serve it.

Sampled rows of a prefill are the rows a decode would compute, so one pass gives decode statistics. Refuses a text or context that
leaves no more visible cells than top_k: every layer would then look perfect.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from . import measure
from .errors import ModelFileError, ProfileError, plain_os_errors
from .files import replacing
from .measure import Collector, SampledRow
from .texts import calibration_text, read_texts

PROFILE_VERSION = 1
TOP_K = (512, 1024, 2048)
SAMPLES = 16
SINK_TOKENS = 4
RECENT_TOKENS = 256
MAX_CONTEXT = 8192  # longest context profiled without -c: minutes on two cores for a small model
MIN_DEPTH = 1.25  # a sample sees at least this many times top_k cells
N_UBATCH = 512
CHARS_PER_TOKEN = 8  # English prose has 4 to 5, so this is ample
MAX_CHARS_PER_TOKEN = 64  # of a longer text only this much is tokenized
GGML_TYPES = {name.lower(): number for number, name in measure.KV_TYPES.items()}


# -- the result -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """Arrays are per top_k; [i, j] is source layer i, later layer j, zero where i > j or a layer is not eligible."""

    model: str
    arch: str
    layer_count: int
    head_kv_count: int
    context: int  # tokens of the pass
    samples: int
    top_k: list[int]
    sink_tokens: int
    recent_tokens: int
    type_kv: str
    text: str
    eligible: list[bool]  # layers whose attention spans the whole cache
    sensitivity: dict[int, np.ndarray]  # [n_layer] mean over samples, one list per layer
    sensitivity_high: dict[int, np.ndarray]  # [n_layer] the 0.9 quantile of the same
    sensitivity_heads: dict[int, np.ndarray]  # [n_layer] mean, one list per KV head
    overlap: dict[int, np.ndarray]  # [n_layer, n_layer]
    recall: dict[int, np.ndarray]  # [n_layer, n_layer] mean; the diagonal is a layer's mass on its own cells
    recall_low: dict[int, np.ndarray]  # [n_layer, n_layer] the 0.1 quantile
    head_recall: dict[int, np.ndarray]  # [n_layer, n_layer, n_head_kv] mean recall of each KV head under its best source head
    head_map: dict[int, np.ndarray]  # [n_layer, n_layer, n_head_kv] that source head
    forward_s: float = 0.0
    analysis_s: float = 0.0
    tool: str = ""
    version: int = PROFILE_VERSION

    def calibration(self) -> str:
        return f"{self.text}; {self.samples} rows of {self.context} tokens, KV {self.type_kv}"

    def save(self, path: str) -> None:
        with plain_os_errors(path), replacing(path) as fd, open(fd, "w", encoding="utf-8", closefd=False) as file:
            file.write(self.to_json() + "\n")

    def to_json(self) -> str:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ARRAYS:
            values[name] = {str(k): np.round(array, 5).tolist() for k, array in values[name].items()}
        return json.dumps(values)

    @classmethod
    def load(cls, path: str) -> Profile:
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ProfileError(f"{path}: cannot read the profile: {error.strerror or error}") from None
        except ValueError:
            raise ProfileError(f"{path}: not a profile (no JSON); make one with `hylra-gguf profile MODEL -o PROFILE`") from None
        return profile_from_dict(values, path)


ARRAYS = measure.STATISTICS


def profile_from_dict(values: dict, path: str) -> Profile:
    names = {f.name for f in fields(Profile)}
    if not isinstance(values, dict) or "version" not in values:
        raise ProfileError(f"{path}: not a profile (no key 'version'); make one with `hylra-gguf profile MODEL -o PROFILE`")
    if values["version"] != PROFILE_VERSION:
        raise ProfileError(f"{path}: profile version {values['version']}, expected {PROFILE_VERSION}; profile the model again")
    if set(values) != names:
        odd = " ".join(sorted(set(values) ^ names))
        raise ProfileError(f"{path}: keys missing or unknown: {odd}; profile the model again")
    try:
        for name in ARRAYS:
            kind = int if name == "head_map" else float
            values[name] = {int(k): np.array(array, kind) for k, array in values[name].items()}
        profile = Profile(**values)
        check_profile(profile, path)
    except (TypeError, ValueError, AttributeError, OverflowError):
        raise ProfileError(f"{path}: a value has the wrong type; profile the model again") from None
    return profile


def check_profile(profile: Profile, path: str) -> None:
    n, heads = profile.layer_count, profile.head_kv_count
    for name in ("layer_count", "head_kv_count", "samples", "sink_tokens", "recent_tokens"):
        if type(getattr(profile, name)) is not int or getattr(profile, name) < (0 if name.endswith("tokens") else 1):
            raise ProfileError(f"{path}: {name} is {getattr(profile, name)!r}, expected a number of 1 or more; profile the model again")
    if not profile.top_k:
        raise ProfileError(f"{path}: top_k is empty, expected one budget or more; profile the model again")
    if len(profile.eligible) != n:
        raise ProfileError(f"{path}: eligible has {len(profile.eligible)} flags, expected {n}; profile the model again")
    for name in ARRAYS:
        shape = (n,) if name.startswith("sensitivity") else (n, n, heads) if name.startswith("head") else (n, n)
        for k in profile.top_k:
            array = getattr(profile, name).get(k)
            if array is None or array.shape != shape or not np.isfinite(array).all():
                raise ProfileError(f"{path}: {name} for top_k {k} is not {list(shape)} finite numbers; profile the model again")
        if name == "head_map" and any(not ((0 <= a) & (a < heads)).all() for a in profile.head_map.values()):
            raise ProfileError(f"{path}: head_map names a KV head outside 0 to {heads - 1}; profile the model again")


def tool_version() -> str:
    from . import __version__  # here, since the package imports its modules first

    return f"hylra-gguf {__version__}"


# -- what to sample ---------------------------------------------------------------------------------------------------


def choose_top_ks(n_ctx: int, asked: list[int] | None, forced: int) -> list[int]:
    """The budgets to measure; without a wish those of TOP_K that the context can tell apart from dense."""
    top_k = sorted(set(asked)) if asked else [k for k in TOP_K if first_depth(k) < n_ctx]
    if not top_k:
        raise ProfileError(f"context {n_ctx} is too short for top_k {TOP_K[0]}: samples must see more than "
                           f"{first_depth(TOP_K[0])} tokens; raise -c or lower --top-k")
    if top_k[0] < max(forced, 1):
        raise ProfileError(f"top_k {top_k[0]} is below the {forced} sink and recent tokens; raise --top-k")
    if first_depth(top_k[-1]) >= n_ctx:
        raise ProfileError(f"context {n_ctx} is too short for top_k {top_k[-1]}: samples must see more than "
                           f"{first_depth(top_k[-1])} tokens; raise -c or lower --top-k")
    return top_k


def first_depth(top_k: int) -> int:
    return math.ceil(MIN_DEPTH * top_k)


def sample_positions(n_tokens: int, samples: int, top_k: int) -> list[int]:
    """Spread over the later half of the context, beyond the depth where top_k leaves cells out."""
    first = max(first_depth(top_k), n_tokens // 2)
    if samples < 1:
        raise ProfileError(f"--samples {samples}: expected 1 or more")
    if samples > n_tokens - first:
        raise ProfileError(f"--samples {samples}: only {n_tokens - first} positions to sample; raise -c or lower --samples")
    return np.linspace(n_tokens - 1, first, samples).round().astype(int)[::-1].tolist()


def ubatches(n_tokens: int) -> list[range]:
    """Prefill batches; a short rest is left out, since decode-sized batches may take another path in the engine."""
    spans = [range(start, min(start + N_UBATCH, n_tokens)) for start in range(0, n_tokens, N_UBATCH)]
    return [span for span in spans if len(span) >= 64]


# -- the pass ---------------------------------------------------------------------------------------------------------


class DensePass:
    """A model on the CPU whose attention nodes go to a Collector while it reads a text."""

    def __init__(self, model_path: str) -> None:
        from . import engine

        if not Path(model_path).is_file():
            raise ModelFileError(f"{model_path}: no such file; name a GGUF model")
        llama_cpp = engine.activate()
        from llama_cpp._logger import set_verbose

        set_verbose(False)
        self.api, self.engine, self.path = llama_cpp, engine, model_path
        self.ctx, self.collector, self.sampled, self.failure = None, None, [], None
        self.trace = engine.ffi.new("struct hylra_attn *")
        self.analysis_s = 0.0
        self.api.llama_backend_init()
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = 0  # the callback reads the tensors where they are
        self.model = self.api.llama_model_load_from_file(os.fsencode(model_path), params)
        if not self.model:
            raise ModelFileError(f"{model_path}: llama.cpp cannot load this model; check that the GGUF file is whole")
        self.vocab = self.api.llama_model_get_vocab(self.model)

    def __enter__(self) -> DensePass:
        return self

    def __exit__(self, *_) -> None:
        if self.ctx:
            self.api.llama_free(self.ctx)
        self.api.llama_model_free(self.model)

    def open_context(self, n_ctx: int, type_kv: str, n_threads: int) -> None:
        self.callback = self.api.ggml_backend_sched_eval_callback(self.on_node)  # must outlive the context
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = n_ctx, N_UBATCH, N_UBATCH, 1
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k = params.type_v = GGML_TYPES[type_kv]
        params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.offload_kqv = params.op_offload = False
        params.cb_eval = self.callback
        self.ctx = self.api.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise ProfileError(f"{self.path}: llama.cpp cannot open a context of {n_ctx} tokens with KV {type_kv}; "
                               "lower -c or take another -ctk")

    def meta(self, key: str) -> str:
        value = ctypes.create_string_buffer(256)
        found = self.api.llama_model_meta_val_str(self.model, key.encode(), value, len(value))
        return value.value.decode("utf-8", "replace") if found >= 0 else ""

    def tokenize(self, text: str) -> list[int]:
        data = text.encode("utf-8", "replace")
        tokens = (self.api.llama_token * (len(data) + 8))()
        n_tokens = self.api.llama_tokenize(self.vocab, data, len(data), tokens, len(tokens), True, False)
        return tokens[:max(n_tokens, 0)]

    def read(self, tokens: list[int], positions: list[int], first_sample: int, progress) -> None:
        """Prefill one text; the rows at positions become samples first_sample, first_sample + 1, ..."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.ctx), True)
        for span in ubatches(len(tokens)):
            self.sampled = [SampledRow(first_sample + i, position - span.start, position)
                            for i, position in enumerate(positions) if position in span]
            self.collector.begin_ubatch()
            batch_tokens = (self.api.llama_token * len(span))(*tokens[span.start:span.stop])
            code = self.api.llama_decode(self.ctx, self.api.llama_batch_get_one(batch_tokens, len(span)))
            if self.failure:
                raise self.failure
            if code:
                raise ProfileError(f"{self.path}: llama.cpp stopped with code {code} at token {span.start}; lower -c")
            progress.update(len(span))

    def on_node(self, node: int, ask: bool, _user_data) -> bool:
        """ask: is this node wanted? Otherwise its data is ready. An exception must not cross the C code in between."""
        if self.failure or not self.sampled:
            return False
        try:
            tensor = self.engine.ffi.cast("void *", node)
            wanted = self.engine.lib.hylra_trace_node(tensor, self.trace) == self.engine.TRACE_STOCK
            if wanted and not ask:
                self.take_layer()
            return wanted
        except BaseException as error:
            self.failure = error
            return False

    def take_layer(self) -> None:
        started_s = time.perf_counter()
        tokens, n_cells = [row.token for row in self.sampled], self.sampled[-1].position + 1
        rows = measure.rows_from_trace(self.trace, tokens, n_cells, self.engine.ffi.buffer)
        self.collector.add_layer(self.trace.layer, self.sampled, rows)
        self.analysis_s += time.perf_counter() - started_s


def profile_model(model_path: str, texts: list[str] | None = None, n_ctx: int | None = None, *, top_k: list[int] | None = None,
                  samples: int = SAMPLES, sink_tokens: int = SINK_TOKENS, recent_tokens: int = RECENT_TOKENS,
                  type_kv: str = "f16", n_threads: int | None = None, progress: bool = True, text_name: str = "") -> Profile:
    """One pass over each text (default: text that ships with Python), n_ctx tokens of each (default: up to MAX_CONTEXT)."""
    if type_kv not in GGML_TYPES:
        raise ProfileError(f"-ctk {type_kv}: expected one of {' '.join(GGML_TYPES)}")
    with DensePass(model_path) as dense:
        n_ctx = n_ctx or min(dense.api.llama_model_n_ctx_train(dense.model), MAX_CONTEXT)
        top_k = choose_top_ks(n_ctx, top_k, sink_tokens + recent_tokens)
        n_tokens = sum(map(len, ubatches(n_ctx)))
        token_lists, text_name = calibration_tokens(dense, texts, n_tokens, text_name)
        plan = split_samples(n_tokens, samples, len(token_lists), top_k[-1])
        layers, heads = dense.api.llama_model_n_layer(dense.model), dense.api.llama_model_n_head_kv(dense.model)
        dense.collector = Collector(layers, heads, samples, top_k, sink_tokens, recent_tokens)
        dense.open_context(n_ctx, type_kv, n_threads or cpu_count())
        pass_s = read_all(dense, token_lists, plan, progress)
        arch = dense.meta("general.architecture")
    found = dense.collector.results()
    if not any(found["eligible"]):
        raise ProfileError(f"{model_path}: no layer of this {arch} model attends to its whole KV cache; there is nothing to plan")
    return Profile(
        model=Path(model_path).name, arch=arch, layer_count=layers, head_kv_count=heads, context=n_tokens, samples=samples,
        top_k=top_k, sink_tokens=sink_tokens, recent_tokens=recent_tokens, type_kv=type_kv, text=text_name,
        forward_s=round(pass_s - dense.analysis_s, 2), analysis_s=round(dense.analysis_s, 2), tool=tool_version(), **found)


def calibration_tokens(dense: DensePass, texts: list[str] | None, n_tokens: int, text_name: str) -> tuple[list[list[int]], str]:
    """n_tokens tokens of each text"""
    if not texts:
        text, text_name = calibration_text(n_tokens * CHARS_PER_TOKEN)
        texts = [text]
    token_lists = [dense.tokenize(text[:n_tokens * MAX_CHARS_PER_TOKEN]) for text in texts]
    for number, tokens in enumerate(token_lists, 1):
        if len(tokens) < n_tokens:
            raise ProfileError(f"text {number} has {len(tokens)} tokens, the context asks for {n_tokens}; "
                               "lower -c or give a longer text with -f")
    return [tokens[:n_tokens] for tokens in token_lists], text_name or f"{len(texts)} text(s)"


def split_samples(n_tokens: int, samples: int, n_texts: int, top_k: int) -> list[list[int]]:
    """Positions to sample in each text; the earlier texts take what does not divide evenly."""
    if samples < n_texts:
        raise ProfileError(f"--samples {samples}: expected at least one for each of {n_texts} texts; raise --samples")
    shares = [samples // n_texts + (i < samples % n_texts) for i in range(n_texts)]
    return [sample_positions(n_tokens, share, top_k) for share in shares]


def read_all(dense: DensePass, token_lists: list[list[int]], plan: list[list[int]], progress: bool) -> float:
    """Seconds of the whole pass"""
    from tqdm import tqdm

    started_s, first_sample = time.perf_counter(), 0
    total = sum(map(len, token_lists))
    with tqdm(total=total, unit="tok", desc="profile", disable=None if progress else True) as bar:
        for tokens, positions in zip(token_lists, plan):
            dense.read(tokens, positions, first_sample, bar)
            first_sample += len(positions)
    return time.perf_counter() - started_s


def cpu_count() -> int:
    """The processors this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- command ----------------------------------------------------------------------------------------------------------


def describe(profile: Profile) -> str:
    lines = [f"{profile.model}: {profile.layer_count} layers, {sum(profile.eligible)} can take part; {profile.calibration()}",
             f"forward {profile.forward_s:.0f} s, analysis {profile.analysis_s:.0f} s"]
    for k in profile.top_k:
        layers = np.flatnonzero(profile.eligible)
        own = np.diagonal(profile.recall[k])[layers]
        next_layer = profile.recall[k][layers[:-1], layers[1:]]
        lines.append(f"top_k {k}: own mass mean {own.mean():.3f} min {own.min():.3f}; "
                     + (f"recall of the next layer mean {next_layer.mean():.3f}; " if len(next_layer) else "")
                     + f"sensitivity max {profile.sensitivity[k].max():.3f} (layer {int(profile.sensitivity[k].argmax())})")
    return "\n".join(lines)


def cmd_profile(args) -> None:
    option = vars(args).get
    if args.output and not os.access(Path(args.output).resolve().parent, os.W_OK):
        raise ProfileError(f"{args.output}: cannot write here; choose a folder that exists and is writable")
    paths = option("file") or []
    profile = profile_model(
        args.model, read_texts(paths), option("ctx_size"), top_k=option("top_k"), samples=option("samples") or SAMPLES,
        type_kv=option("cache_type_k") or "f16", n_threads=option("threads"), progress=not option("no_progress"),
        text_name=", ".join(Path(path).name for path in paths))
    print(describe(profile), file=sys.stderr)
    if args.output:
        profile.save(args.output)
    else:
        print(profile.to_json())
