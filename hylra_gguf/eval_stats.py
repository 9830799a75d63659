"""Paired statistics of `eval`: differences from dense with 95 % confidence intervals, in the names of llama-perplexity.

"Less than 1 % lost" is said only where the whole interval lies on the good side of the margin.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
SCORE_MARGIN = 1.0  # points of task score
PPL_MARGIN = 0.01  # relative
MIN_CLUSTERS = 5
STRETCH_TOKENS = 32  # neighbouring tokens are alike: with few documents, stretches of this size stand for independent samples
OK, OPEN, LOST = "ok", "open", "lost"


def mean_interval(values: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of independent values by Student's t; the interval is infinite for fewer than two."""
    values = np.asarray(values, float)
    mean = float(values.mean())
    if values.size < 2:
        return mean, -np.inf, np.inf
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size))
    return mean, mean - half, mean + half


def clustered_interval(documents: list[np.ndarray]) -> tuple[float, float, float]:
    """(mean, low, high) over tokens; the documents count as independent, or with few of them stretches of tokens."""
    if len(documents) < MIN_CLUSTERS:
        documents = [part for one in documents for part in np.array_split(one, max(1, one.size // STRETCH_TOKENS))]
    return mean_interval(np.array([one.mean() for one in documents if one.size]))


def paired_interval(differences: np.ndarray) -> tuple[float, float, float]:
    """(mean, low, high) of differences in [-1, 1] between two scores of the same questions: Bonett and Price's interval for paired
    proportions (2012). It adds one question that only the arm answers and one that only dense answers, so that a hundred equal answers do
    not look like certainty: with 200 of them the interval still reaches 1.4 points to either side, with 400 it reaches 0.7."""
    differences = np.asarray(differences, float)
    n = differences.size + 2
    centre = differences.sum() / n
    variance = ((differences**2).sum() + 2) / n - centre**2
    half = float(stats.norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt(variance / n))
    return float(differences.mean()), max(-1.0, float(centre - half)), min(1.0, float(centre + half))


def judge(low: float, high: float, margin: float) -> str:
    """Of an interval of losses: within the margin as a whole, beyond it as a whole, or neither."""
    return OK if high <= margin else LOST if low > margin else OPEN


def text_row(nll: list[np.ndarray], nll_dense: list[np.ndarray], kld: list[np.ndarray], same_top: list[np.ndarray],
             change: list[np.ndarray]) -> dict:
    """Per-token arrays, one per document. ln_ppl_ratio is the mean difference of log losses, ppl_ratio its exponential."""
    tokens = [np.concatenate(part) for part in (nll, nll_dense, kld, same_top, change)]
    ratio = clustered_interval([a - b for a, b in zip(nll, nll_dense)])
    divergence = clustered_interval(kld)
    n = tokens[2].size
    return {
        "n_tokens": n,
        "ppl": round(float(np.exp(tokens[0].mean())), 4), "ppl_dense": round(float(np.exp(tokens[1].mean())), 4),
        **named("ppl_ratio", [float(np.exp(x)) for x in ratio], 5),
        **named("mean_kld", divergence, 6), "median_kld": round(float(np.median(tokens[2])), 7),
        "kld_99": round(float(np.quantile(tokens[2], 0.99)), 5), "max_kld": round(float(tokens[2].max()), 5),
        "rms_dp": round(float(100 * np.sqrt((tokens[4] ** 2).mean())), 4),
        "same_top_p": round(float(100 * tokens[3].mean()), 3),
        "same_top_p_stderr": round(float(100 * np.sqrt(tokens[3].mean() * (1 - tokens[3].mean()) / n)), 3),
        "ppl_verdict": judge(float(np.exp(ratio[1])) - 1, float(np.exp(ratio[2])) - 1, PPL_MARGIN),
    }


def task_row(scores: list[float], dense: list[float]) -> dict:
    """Scores in points of 100; score_loss is dense less the arm, paired by question."""
    loss = paired_interval(np.subtract(dense, scores))
    return {
        "n_questions": len(scores),
        "score": round(100 * float(np.mean(scores)), 2), "score_dense": round(100 * float(np.mean(dense)), 2),
        **named("score_loss", [100 * x for x in loss], 3),
        "n_worse": int(np.sum(np.less(scores, dense))), "n_better": int(np.sum(np.greater(scores, dense))),
        "score_verdict": judge(100 * loss[1], 100 * loss[2], SCORE_MARGIN),
    }


def long_row(lengths: list[int], dense_lengths: list[int], same: list[int], limit: int) -> dict:
    """Generation beyond answers: tokens until it first differs from dense greedy text, and its length over dense length where both end.
    length_ratio is the sum of the lengths over that of dense, with the interval of a ratio estimator (residuals a - ratio b)."""
    ended = [(a, b) for a, b in zip(lengths, dense_lengths) if a < limit and b < limit and b]
    return {
        "n_long": len(lengths), "same_tokens": round(float(np.mean(same)), 1),
        **(ratio_of_sums(*np.array(ended, float).T) if ended else {"length_ratio": None}),
        "n_both_ended": len(ended), "n_ended": sum(a < limit for a in lengths), "n_ended_dense": sum(b < limit for b in dense_lengths),
    }


def ratio_of_sums(lengths: np.ndarray, dense_lengths: np.ndarray) -> dict:
    """length_ratio of paired lengths, all above 0 in dense"""
    ratio = lengths.sum() / dense_lengths.sum()
    _, low, high = mean_interval((lengths - ratio * dense_lengths) / dense_lengths.mean())
    return named("length_ratio", (ratio, ratio + low, ratio + high), 4)


def named(name: str, triple, digits: int) -> dict:
    """Infinite ends, of a single sample, become None: JSON has no infinity."""
    known = np.isfinite(triple).all()
    values = [round(float(x), digits) if known or i == 0 else None for i, x in enumerate(triple)]
    return dict(zip((name, f"{name}_low", f"{name}_high"), values))


def leading_equal(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def pareto(points: list[tuple[float, float]]) -> list[bool]:
    """(cost, gain) each: True where no other costs as little and gains as much, one of both better."""
    return [not any(c <= cost and g >= gain and (c < cost or g > gain) for c, g in points) for cost, gain in points]
