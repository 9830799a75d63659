"""`hylra-gguf report`: what a profile, policy or model file says about its layers, as text, one HTML file and PNGs.

Everything is first collected into one plain dict (`--format json` prints it); text and pictures are drawn from that alone. Refuses a
file that is none of the three, and an output name that could hit a model.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from . import report_page, sweep
from .errors import HylraError, PolicyError, plain_os_errors
from .files import replacing
from .plan import View, edges_of, plan_policy
from .policy import Policy
from .profile_data import HALVES, Profile

DIGITS = 4  # a profile stores no more
MATRICES = ("recall", "overlap", "overlap_free")
THETAS = tuple(hundredths / 100 for hundredths in range(50, 95, 5)) + (0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995)
ONLY_IN_PROFILE = ("overlap and recall side by side", "sensitivity of other top_k values and of KV heads", "sparsity", "importance",
                   "held-out against fit", "the theta frontier")
Data = Dict[str, Any]


# -- which file -------------------------------------------------------------------------------------------------------


def collect(path: str, policy_path: Optional[str] = None) -> Data:
    """The whole report as what JSON can hold. Raises HylraError where a file is missing, damaged or does not fit the other."""
    kind = kind_of(path)
    if kind == "profile":
        profile = Profile.load(path)
        given = None if policy_path is None else Policy.load(Path(policy_path))
        return from_profile(profile, path, given, policy_path)
    if policy_path is not None:
        raise PolicyError(f"--policy has no effect on a {kind}, which {path} is; leave it out or report on a profile")
    return from_policy(Policy.load(Path(path)), path, kind)


def kind_of(path: str) -> str:
    """"model", "profile" or "policy" """
    if os.path.exists(path) and not os.path.isfile(path):
        raise HylraError(f"{path}: not a regular file; save a model, profile or policy as a file and report on that")
    with open(path, "rb") as file:
        start = file.read(4)
        if start == b"GGUF":
            return "model"
        content = start + file.read()
    expected = "expected a GGUF model, a profile or a policy"
    try:
        keys = json.loads(content)
    except (ValueError, RecursionError):
        raise HylraError(f"{path}: neither GGUF nor JSON; {expected}") from None
    for kind, key in (("policy", "layer_mode"), ("profile", "samples")):
        if isinstance(keys, dict) and key in keys:
            return kind
    raise HylraError(f"{path}: JSON without the key 'layer_mode' of a policy or 'samples' of a profile; {expected}")


# -- a policy alone ---------------------------------------------------------------------------------------------------


def from_policy(policy: Policy, path: str, kind: str) -> Data:
    similarity = known_similarity(policy)
    matrix = None if policy.overlap is None else blank(np.reshape(policy.overlap, (policy.layer_count,) * 2))
    absent = [name for name, value in ((f"{similarity} of layer pairs", matrix), ("sensitivity", policy.sensitivity)) if value is None]
    edges = [edge_data(policy, edge, {similarity: matrix} if matrix else {}) for edge in edges_of(policy.layer_source)]
    return {
        "file": path, "kind": kind, "about": about_policy(policy), "top_k": policy.top_k, "pairs_at": "the top_k that the plan compared at", "similarity": similarity,
        "plan": plan_data(policy, edges, similarity),
        "matrices": {} if matrix is None else {similarity: matrix},
        "layers": {} if policy.sensitivity is None else {"sensitivity": {str(policy.top_k): {"mean": numbers(policy.sensitivity)}}},
        "left_out": absent + list(ONLY_IN_PROFILE),
    }


def known_similarity(policy: Policy) -> str:
    """A foreign policy may hold any text there, but this one becomes the name of a picture."""
    return policy.similarity if policy.similarity in ("recall", "overlap") else "similarity"


def about_policy(policy: Policy) -> Dict[str, str]:
    measured = ", ".join(f"{key} {str(value)[:12]}" for key, value in policy.measured.items())
    found = {"policy": policy.one_line(), "summary": policy.summary, "calibration": policy.calibration, "planned by": policy.tool,
             "theta": "" if policy.theta is None else f"{policy.theta:g} on {policy.similarity or 'similarity'}", "measured": measured}
    return {name: text for name, text in found.items() if text}


def plan_data(policy: Policy, edges: List[dict], similarity: str) -> Data:
    values = [edge[similarity] for edge in edges if edge.get(similarity) is not None]
    return {"layer_map": policy.layer_map(), "layer_source": list(policy.layer_source), "theta": policy.theta, "edges": edges,
            "smallest": min(values, default=None), "mean": round(sum(values) / len(values), DIGITS) if values else None}


def edge_data(policy: Policy, edge: Tuple[int, int], matrices: Dict[str, Any]) -> dict:
    source, layer = edge
    return {"layer": layer, "source": source, "top_k": top_k_of(policy, source),
            **{name: numbers(matrix[source][layer]) for name, matrix in matrices.items()}}


def top_k_of(policy: Policy, source: int) -> int:
    return policy.top_k if policy.layer_top_k is None else policy.layer_top_k[source]


# -- a profile --------------------------------------------------------------------------------------------------------


def from_profile(profile: Profile, path: str, given: Optional[Policy] = None, given_path: Optional[str] = None) -> Data:
    """given: the policy to mark; without one the default plan is marked."""
    policy = plan_policy(profile) if given is None else given
    policy.validate(profile.layer_count, profile.head_kv_count)
    lists, similarity = "layer" if policy.lists == 1 else "head", "overlap" if policy.similarity == "overlap" else "recall"
    view = View(profile, lists, similarity, "mean", policy.block_size)
    matrices = {name: profile.matrix(name, view.edge_k(policy.top_k), policy.block_size, lists=lists) for name in MATRICES}
    importance = {} if unknown(profile, "importance") else {"importance": layer_numbers(profile, "importance")}
    marked = "the default plan" if given is None else f"policy {given_path}"
    return {
        "file": path, "kind": "profile", "about": {**about_profile(profile), "marked": marked, **about_policy(policy)},
        "top_k": policy.top_k, "pairs_at": pairs_at(profile, policy.top_k), "similarity": similarity,
        "plan": plan_data(policy, profile_edges(view, policy), similarity),
        "matrices": {name: blank(matrix, profile.eligible) for name, matrix in matrices.items()},
        "layers": {"sensitivity": {str(k): layer_numbers(profile, "sensitivity", k, lists) for k in sorted(profile.top_k)},
                   "sparsity": layer_numbers(profile, "sparsity", lists=lists), **importance},
        "heads": {"sensitivity": head_numbers(profile, "sensitivity", policy.top_k), "sparsity": head_numbers(profile, "sparsity")},
        "halves": halves(view, policy) if profile.heldout_samples else {},
        "frontier": frontier(view, policy),
        "left_out": ["importance"] * (not importance) + ["held-out against fit"] * (not profile.heldout_samples),
    }


def pairs_at(profile: Profile, top_k: int) -> str:
    k = profile.edge_k(top_k)
    return f"top_k {k}" + (f", as a plan of top_k {top_k} for {profile.n_ctx_train} tokens compares them" if k != top_k else "")


def about_profile(profile: Profile) -> Dict[str, str]:
    return {
        "model": f"{profile.model}: {profile.arch}, {profile.layer_count} layers, {profile.head_kv_count} KV heads",
        "profiled on": profile.calibration(),
        "samples": f"{profile.samples}, of which {profile.heldout_samples} held out",
        "top_k measured": f"{' '.join(map(str, profile.top_k))}, each with {profile.sink_tokens} sink and "
                          f"{profile.recent_tokens} recent tokens",
        "time": f"forward {profile.forward_s:.0f} s, analysis {profile.analysis_s:.0f} s",
    }


def unknown(profile: Profile, name: str) -> bool:
    return bool(np.isnan(profile.layer(name)).all())


def layer_numbers(profile: Profile, name: str, top_k: Optional[int] = None, lists: str = "layer") -> Data:
    """"mean", the quantiles "low" and "high", and the means "fit" and "heldout" where samples were held out; None where a layer
    takes no part"""
    found = {statistic: profile.layer(name, top_k, statistic, lists) for statistic in ("mean", "low", "high")}
    if profile.heldout_samples:
        found.update({half: profile.layer(name, top_k, lists=lists, split=half) for half in HALVES})
    return {statistic: numbers(np.where(profile.eligible, array, np.nan)) for statistic, array in found.items()}


def head_numbers(profile: Profile, name: str, top_k: Optional[int] = None) -> List[List[Optional[float]]]:
    """[layer, KV head], as `layer_numbers`"""
    return numbers(np.where(np.array(profile.eligible)[:, None], profile.layer_heads(name, top_k), np.nan))


def profile_edges(view: View, policy: Policy) -> List[dict]:
    """What each reuse layer gets at its source's own top_k, see Profile.edge_k"""
    by_k = {k: {name: view.profile.matrix(name, view.edge_k(k), view.block_size, lists=view.lists) for name in MATRICES}
            for k in sorted({top_k_of(policy, source) for source, _ in edges_of(policy.layer_source)})}
    return [edge_data(policy, edge, by_k[top_k_of(policy, edge[0])]) for edge in edges_of(policy.layer_source)]


def halves(view: View, policy: Policy) -> Data:
    """Fit and held-out means: of every ordered pair of different layers that can take part, and of every such layer"""
    profile, k, able = view.profile, policy.top_k, np.array(view.profile.eligible)
    rows, columns = np.nonzero(np.triu(np.outer(able, able), 1))
    found: Data = {"pairs": [[int(i), int(j)] for i, j in zip(rows, columns)]}
    for name in ("recall", "overlap"):
        of_half = [profile.matrix(name, view.edge_k(k), view.block_size, lists=view.lists, split=half) for half in HALVES]
        found[name] = compared(*(matrix[rows, columns] for matrix in of_half))
    for name, wanted_k in (("sensitivity", k), ("sparsity", None)):
        found[name] = compared(*(profile.layer(name, wanted_k, lists=view.lists, split=half)[able] for half in HALVES))
    return found


def compared(fit: np.ndarray, heldout: np.ndarray) -> Data:
    """correlation: Pearson's, None where one half does not vary"""
    varies = len(fit) > 1 and fit.std() > 1e-9 and heldout.std() > 1e-9
    gap = np.abs(fit - heldout)
    return {"fit": numbers(fit), "heldout": numbers(heldout),
            "correlation": numbers(np.corrcoef(fit, heldout)[0, 1]) if varies else None,
            "mean_difference": numbers(gap.mean()) if len(gap) else None,
            "largest_difference": numbers(gap.max()) if len(gap) else None}


def frontier(view: View, policy: Policy) -> List[dict]:
    """The rows of `plan --sweep` for the marked plan's own budget and lists, without speeds"""
    options = {"top_k": policy.top_k, "lists": view.lists, "similarity": view.similarity, "block_size": view.block_size,
               "sink": policy.sink_tokens, "recent": policy.recent_tokens}
    return [candidate.row for candidate in sweep.frontier(view.profile, list(THETAS), options, None, [])]


# -- plain numbers ----------------------------------------------------------------------------------------------------


def numbers(array: Any) -> Any:
    """Nested lists or one number, rounded to what a profile stores; None for NaN"""
    if array is None or isinstance(array, (float, np.floating)):
        return None if array is None or np.isnan(array) else round(float(array), DIGITS)
    return [numbers(item) for item in np.asarray(array, float)]


def blank(matrix: np.ndarray, eligible: Optional[List[bool]] = None) -> List[List[Optional[float]]]:
    """None where source > layer or a layer takes no part; a policy does not say which do, but then their diagonal is zero."""
    able = np.diag(matrix) > 0 if eligible is None else np.array(eligible)
    return numbers(np.where(np.triu(np.outer(able, able)), matrix, np.nan))


# -- pictures ---------------------------------------------------------------------------------------------------------


def load_plots() -> Any:
    try:
        from . import plots
    except ImportError as error:
        raise HylraError(f"the pictures need matplotlib ({error}); pip install 'hylra-gguf[report]', "
                         "or take the numbers as text alone") from None
    return plots


def pictures(data: Data) -> Dict[str, bytes]:
    """File name without ending -> PNG, in the order of the report"""
    plots = load_plots()
    with plots.plain_style():
        return {name: plots.png(figure) for name, figure in figures(plots, data)}


def figures(plots: Any, data: Data) -> List[Tuple[str, Any]]:
    modes, sources = data["plan"]["layer_map"], data["plan"]["layer_source"]
    found = [("layer-map", plots.layer_map(modes, sources))]
    for name, matrix in data["matrices"].items():
        title, label = report_page.MATRIX_TITLES.get(name, name), f"{report_page.column(name)} at {data['pairs_at'].partition(',')[0]}"
        found.append((name.replace("_", "-"), plots.heat_map(matrix, title, label, modes, sources)))
    return found + layer_figures(plots, data, modes) + half_figures(plots, data, modes) + frontier_figure(plots, data)


def layer_figures(plots: Any, data: Data, modes: str) -> List[Tuple[str, Any]]:
    found = []
    for name, of_name in data["layers"].items():
        title, label = report_page.LAYER_TITLES[name]
        by_k = of_name if name == "sensitivity" else {"": of_name}
        last = str(data["top_k"]) if name == "sensitivity" else ""
        curves = {f"top_k {k}" if k else "mean": by_k[k]["mean"] for k in sorted(by_k, key=lambda k: (k == last, k.zfill(10)))}
        band = (by_k[last]["low"], by_k[last]["high"]) if "low" in by_k[last] else None
        found.append((name, plots.layer_lines(curves, band, title, label, modes)))
    for name, by_head in data.get("heads", {}).items():
        title, label = f"{name.capitalize()} of each KV head", report_page.LAYER_TITLES[name][1]
        found.append((f"{name}-heads", plots.head_map(by_head, title, label)))
    return found


def half_figures(plots: Any, data: Data, modes: str) -> List[Tuple[str, Any]]:
    halves = data.get("halves")
    if not halves:
        return []
    used = {(edge["source"], edge["layer"]) for edge in data["plan"]["edges"]}
    found = []
    if halves["pairs"]:
        for name in ("recall", "overlap"):
            found.append((f"halves-{name}", plots.halves_of_pairs(
                halves[name]["fit"], halves[name]["heldout"], [tuple(pair) in used for pair in halves["pairs"]],
                f"Held-out against fit: {name}, {report_page.correlation(halves[name])}", name)))
    for name, of_name in (("sensitivity", data["layers"]["sensitivity"][str(data["top_k"])]), ("sparsity", data["layers"]["sparsity"])):
        found.append((f"halves-{name}", plots.halves_of_layers(
            of_name["fit"], of_name["heldout"], f"Held-out against fit: {name}, {report_page.correlation(halves[name])}",
            report_page.LAYER_TITLES[name][1], modes)))
    return found


def frontier_figure(plots: Any, data: Data) -> List[Tuple[str, Any]]:
    rows = data.get("frontier")
    if not rows:
        return []
    names = ("theta", "dense", "select", "min_recall", "mean_recall")
    theta, dense, select, smallest, mean = ([row[name] for row in rows] for name in names)
    full = [both - selecting for both, selecting in zip(dense, select)]
    return [("frontier", plots.frontier(theta, full, select, smallest, mean, data["plan"]["theta"]))]


# -- command ----------------------------------------------------------------------------------------------------------


def cmd_report(args: Any) -> None:
    if args.output and not args.output.lower().endswith((".html", ".htm")):
        raise HylraError(f"-o {args.output}: the report is an HTML file; give a name that ends in .html")
    if args.output or args.png:
        load_plots()  # before the frontier is solved
    data = collect(args.file, args.policy)
    drawn = pictures(data) if args.output or args.png else {}
    if args.png:
        save_pictures(args.png, drawn)
    if args.output:
        save(args.output, report_page.html(data, drawn).encode())
    print(json.dumps(data, allow_nan=False) if args.format == "json" else report_page.markdown(data))


def save_pictures(folder: str, drawn: Dict[str, bytes]) -> None:
    with plain_os_errors(folder):
        os.makedirs(folder, exist_ok=True)
    for name, content in drawn.items():
        save(os.path.join(folder, f"{name}.png"), content)


def save(path: str, content: bytes) -> None:
    with plain_os_errors(path), replacing(path) as fd, open(fd, "wb", closefd=False) as file:
        file.write(content)
    print(f"{path}: {len(content) // 1024} KiB", file=sys.stderr)
