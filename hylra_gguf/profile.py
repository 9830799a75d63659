"""Measure on one dense pass over calibration texts what each attention layer needs and whose cells would serve it.

Sampled rows of a prefill are the rows a decode would compute, so one pass over a text gives decode statistics at every length up
to its own. Refuses a text shorter than the longest context and samples that do not fit.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .attention_trace import rows_from_trace
from .collect import Collector, SampledRow
from .errors import ProfileError
from .forward import GGML_TYPES, Forward, cpu_count, kv_names, ubatches
from .gguf_header import model_shape, read_header
from .measure import Budget
from .profile_data import PROFILE_VERSION, Profile, model_identity, tool_version
from .residual import ResidualStream
from .resume import Partial, Place
from .samples import Sample, at_repeats, choose_top_ks, plan_samples
from .texts import lookup_text, read_texts

SAMPLES = 32
SINK_TOKENS = 4
RECENT_TOKENS = 256
BLOCK_SIZES = (1, 16, 32, 64, 128)
MAX_CONTEXT = 8192  # longest context profiled without -c: minutes on two cores for a small model
CHARS_PER_TOKEN = 8  # English prose has 4 to 5, so this is ample
KV_TYPES = [name for name in GGML_TYPES if name != "f32"]  # llama.cpp copies an F32 cache to F16, so its attention shows no cache
MAX_CHARS_PER_TOKEN = 64  # of a longer text only this much is tokenized


@dataclass(frozen=True)
class Options:
    """What to measure; None means the default for the model."""

    contexts: list[int] | None = None
    top_k: list[int] | None = None
    block_sizes: tuple[int, ...] = BLOCK_SIZES
    samples: int = SAMPLES
    sink_tokens: int = SINK_TOKENS
    recent_tokens: int = RECENT_TOKENS
    type_kv: str = "f16"  # or one each for K and V: "q8_0/f16"
    n_threads: int | None = None
    progress: bool = True


# -- the pass ---------------------------------------------------------------------------------------------------------


class LayerVisitor:
    """Hands the sampled rows of each attention node to a Collector, and of the sum that follows it the importance."""

    def __init__(self, collector: Collector, engine) -> None:
        self.collector, self.engine = collector, engine
        self.residual, self.layer, self.analysis_s = ResidualStream(), -1, 0.0

    def begin_ubatch(self, sampled: list[SampledRow]) -> None:
        self.sampled = sampled
        self.residual.stop()
        self.collector.begin_ubatch()

    def wants(self, node: int, kind: int, _trace) -> bool:
        return kind == self.engine.TRACE_STOCK or self.residual.wants(node)

    def take(self, node: int, kind: int, trace) -> None:
        started_s = time.perf_counter()
        if kind == self.engine.TRACE_STOCK:
            self.take_layer(node, trace)
        else:
            turned = self.residual.take(node)
            if turned is not None:
                self.collector.state["importance"][[row.sample for row in self.sampled], self.layer] = turned
        self.analysis_s += time.perf_counter() - started_s

    def take_layer(self, node: int, trace) -> None:
        tokens, n_cells = [row.token for row in self.sampled], self.sampled[-1].position + 1
        rows = rows_from_trace(trace, tokens, n_cells, self.engine.ffi.buffer)
        self.residual.stop()
        if self.collector.add_layer(trace.layer, self.sampled, rows):
            self.layer = trace.layer
            self.residual.start(node, tokens)


class Pass:
    """All texts through one context, from wherever an earlier run was interrupted."""

    def __init__(self, forward: Forward, token_lists: list[list[int]], samples: list[Sample], visitor: LayerVisitor,
                 partial: Partial) -> None:
        self.forward, self.token_lists, self.samples = forward, token_lists, samples
        self.visitor, self.partial, self.state = visitor, partial, visitor.collector.state
        self.place = Place()

    def run(self, progress: bool) -> None:
        from tqdm import tqdm

        found = self.partial.load()
        if found:
            self.place = self.partial.load_kv(self.forward, found[0])
            self.take_state(found[1])
        done = sum(map(len, self.token_lists[:self.place.text])) + self.place.tokens
        total = sum(map(len, self.token_lists))
        with tqdm(total=total, initial=done, unit="tok", desc="profile", disable=None if progress else True) as bar:
            while self.place.text < len(self.token_lists):
                self.read_text(bar)

    def take_state(self, found: dict[str, np.ndarray]) -> None:
        """Rows of samples that this run will meet again are forgotten."""
        for name, array in found.items():
            self.state[name][...] = array
        again = [self.place.text < s.text or (s.text == self.place.text and s.position >= self.place.tokens) for s in self.samples]
        self.state["seen"][again] = False

    def read_text(self, bar) -> None:
        place, tokens = self.place, self.token_lists[self.place.text]
        if not place.tokens:
            self.forward.clear()
        for span in ubatches(len(tokens)):
            if span.start >= place.tokens:
                self.read_ubatch(tokens, span)
                place.tokens = span.stop
                bar.update(len(span))
                self.partial.save_kv(self.forward, place, self.state)
        self.place = Place(place.text + 1, 0, place.forward_s, place.analysis_s)
        self.partial.save(self.place, self.state)

    def read_ubatch(self, tokens: list[int], span: range) -> None:
        sampled = [SampledRow(i, s.position - span.start, s.position) for i, s in enumerate(self.samples)
                   if s.text == self.place.text and s.position in span]
        self.forward.visitor = self.visitor if sampled else None
        if sampled:
            self.visitor.begin_ubatch(sampled)
        started_s, analysis_s = time.perf_counter(), self.visitor.analysis_s
        self.forward.decode(tokens[span.start:span.stop], span.start, [row.token for row in sampled])
        analysis_s = self.visitor.analysis_s - analysis_s
        self.place.analysis_s += analysis_s
        self.place.forward_s += time.perf_counter() - started_s - analysis_s


# -- a profile --------------------------------------------------------------------------------------------------------


def profile_model(model_path: str, texts: list[tuple[str, str]] | None = None, options: Options = Options(),
                  output: str | None = None) -> Profile:
    """One pass over each text (name, content), default one that ships with Python; progress is kept beside the file `output`.

    Raises ProfileError or ModelFileError in one line for what cannot be measured.
    """
    check_options(options)
    with Forward(model_path) as forward:
        n_ctx_train = forward.api.llama_model_n_ctx_train(forward.model.handle)
        contexts = choose_contexts(options.contexts, n_ctx_train)
        budget = Budget(choose_top_ks(contexts[0], options.top_k, options.sink_tokens + options.recent_tokens),
                        options.sink_tokens, options.recent_tokens)
        names, token_lists = calibration_tokens(forward, texts, contexts[-1])
        samples = plan_samples(len(names), contexts, options.samples, budget.top_k[-1])
        samples = at_repeats(samples, token_lists, options.recent_tokens)
        arch, layers, heads = model_shape(read_header(model_path))  # llama_model_n_head_kv is that of layer 0, which may be recurrent
        collector = Collector(layers, heads, len(samples), budget, sorted(set(options.block_sizes) | {1}))
        identity = model_identity(model_path)
        partial = Partial(output, settings_of(identity, token_lists, contexts, collector, options))
        forward.open_context(contexts[-1], options.type_kv, options.n_threads or cpu_count())
        reading = Pass(forward, token_lists, samples, LayerVisitor(collector, forward.engine), partial)
        reading.run(options.progress)
    if not collector.eligible().any():
        raise ProfileError(f"{model_path}: no layer of this {arch} model attends to its whole KV cache; there is nothing to plan")
    heldout = np.array([sample.heldout for sample in samples])
    return Profile(
        model=Path(model_path).name, arch=arch, layer_count=layers, head_kv_count=heads, n_ctx_train=n_ctx_train, contexts=contexts,
        samples=len(samples), heldout_samples=int(heldout.sum()), top_k=budget.top_k, block_sizes=collector.block_sizes, sink_tokens=options.sink_tokens,
        recent_tokens=options.recent_tokens, type_kv=options.type_kv, texts=names, eligible=collector.eligible().tolist(),
        identity=identity, arrays=collector.arrays(heldout), forward_s=round(reading.place.forward_s, 2),
        analysis_s=round(reading.place.analysis_s, 2), tool=tool_version())


def check_options(options: Options) -> None:
    for flag, name in zip(("-ctk", "-ctv"), kv_names(options.type_kv)):
        if name not in KV_TYPES:
            raise ProfileError(f"{flag} {name}: expected one of {' '.join(KV_TYPES)}")
    odd = [size for size in options.block_sizes if size not in BLOCK_SIZES]
    if odd:
        raise ProfileError(f"--block-sizes {odd[0]}: expected {' '.join(map(str, BLOCK_SIZES))}, as a policy takes them")


def choose_contexts(asked: list[int] | None, n_ctx_train: int) -> list[int]:
    """Ascending token counts that whole ubatches reach"""
    wanted = asked or [min(n_ctx_train, MAX_CONTEXT)]
    if max(wanted) > n_ctx_train:
        raise ProfileError(f"-c {max(wanted)}: beyond the {n_ctx_train} tokens that this model was trained for; lower -c")
    counts = sorted({sum(map(len, ubatches(n_ctx))) for n_ctx in wanted})
    if counts[0] == 0:
        raise ProfileError(f"-c {min(wanted)}: too short to profile; expected some thousand tokens, for example 4096")
    return counts


def calibration_tokens(forward: Forward, texts: list[tuple[str, str]] | None, n_tokens: int) -> tuple[list[str], list[list[int]]]:
    """Names and the first n_tokens tokens of each text"""
    if not texts:
        text, name = lookup_text(n_tokens * CHARS_PER_TOKEN)
        texts = [(name, text)]
    token_lists = [forward.tokenize(text[:n_tokens * MAX_CHARS_PER_TOKEN]) for _, text in texts]
    for (name, _), tokens in zip(texts, token_lists):
        if len(tokens) < n_tokens:
            raise ProfileError(f"{name}: {len(tokens)} tokens, shorter than the context of {n_tokens}; "
                               "lower -c or give a longer text with -f")
    return [name for name, _ in texts], [tokens[:n_tokens] for tokens in token_lists]


def settings_of(identity: str, token_lists: list[list[int]], contexts: list[int], collector: Collector, options: Options) -> dict:
    """What must be the same for a run to go on from the progress of another"""
    tokens = hashlib.sha256(np.array(token_lists, np.int32).tobytes()).hexdigest()
    return {"version": PROFILE_VERSION, "model": identity, "text": tokens, "contexts": contexts, "samples": collector.samples,
            "top_k": collector.budget.top_k, "block_sizes": collector.block_sizes, "sink_tokens": options.sink_tokens,
            "recent_tokens": options.recent_tokens, "type_kv": options.type_kv}


def named_texts(paths: list[str] | None) -> list[tuple[str, str]]:
    return [(Path(path).name, text) for path, text in zip(paths or [], read_texts(paths or []))]


# -- command ----------------------------------------------------------------------------------------------------------


def describe(profile: Profile) -> str:
    lines = [f"{profile.model}: {profile.layer_count} layers, {sum(profile.eligible)} can take part; {profile.calibration()}",
             f"forward {profile.forward_s:.0f} s, analysis {profile.analysis_s:.0f} s"]
    layers = np.flatnonzero(profile.eligible)
    for k in profile.top_k:
        recall, sensitivity = profile.matrix("recall", k), profile.layer("sensitivity", k)
        own, next_layer = np.diagonal(recall)[layers], recall[layers[:-1], layers[1:]]
        lines.append(f"top_k {k}: own mass mean {own.mean():.3f} min {own.min():.3f}; "
                     + (f"recall of the next layer mean {next_layer.mean():.3f}; " if len(next_layer) else "")
                     + f"sensitivity max {sensitivity.max():.3f} (layer {int(sensitivity.argmax())})")
    if np.isnan(profile.layer("importance")[layers]).any():
        lines.append(f"importance is missing for some layers: {profile.arch} does not add the attention output alone to its input")
    return "\n".join(lines)


def options_of(args) -> Options:
    """Those of the profiling flags that were given; `embed-policy` has fewer of them."""
    given = vars(args)
    top_k = given.get("top_k")
    return Options(
        contexts=given.get("ctx_size"), top_k=[top_k] if isinstance(top_k, int) else top_k, samples=given.get("samples") or SAMPLES,
        block_sizes=tuple(given.get("block_sizes") or BLOCK_SIZES), type_kv=type_kv_of(given),
        sink_tokens=SINK_TOKENS if given.get("sink") is None else given["sink"],
        recent_tokens=RECENT_TOKENS if given.get("recent") is None else given["recent"],
        n_threads=given.get("threads"), progress=not given.get("no_progress"))


def type_kv_of(given: dict) -> str:
    type_k = given.get("cache_type_k") or "f16"
    type_v = given.get("cache_type_v") or type_k
    return type_k if type_k == type_v else f"{type_k}/{type_v}"


def cmd_profile(args) -> None:
    texts, options = named_texts(vars(args).get("file")), options_of(args)
    if vars(args).get("policy"):
        print_drift(args, texts, options)
        return
    if args.output and not os.access(Path(args.output).resolve().parent, os.W_OK):
        raise ProfileError(f"{args.output}: cannot write here; choose a folder that exists and is writable")
    profile = profile_model(args.model, texts, options, args.output)
    print(describe(profile), file=sys.stderr)
    if args.output:
        profile.save(args.output)
        Partial(args.output, {}).remove()
    else:
        print(profile.to_json())


def print_drift(args, texts: list[tuple[str, str]], options: Options) -> None:
    from . import drift
    from .policy import Policy
    from .tables import FORMATS

    name = args.output or "md"
    if name not in FORMATS:
        raise ProfileError(f"-o {name}: with --policy rows go to stdout; expected one of {' '.join(FORMATS)}")
    for flag in ("top_k", "block_sizes", "sink", "recent"):
        if vars(args).get(flag) is not None:
            raise ProfileError(f"--{flag.replace('_', '-')} has no effect beside --policy; leave it out")
    rows = drift.measure_drift(args.model, Policy.load(args.policy), texts, options)
    print(drift.describe(rows), file=sys.stderr)
    print(FORMATS[name](rows))
