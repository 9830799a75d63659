"""The figures of `eval`: needle grid, accuracy against speed with the Pareto front, KL divergence against depth."""

from __future__ import annotations

from typing import Iterator, Tuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .eval_arms import DENSE
from .eval_stats import pareto
from .plots import ARMS, LINES, WIDTH_INCH, axes, values

DEPTH_BINS = 5


def figures(result: dict) -> Iterator[Tuple[str, Figure]]:
    """File name without ending, figure"""
    rows = [one for one in result["rows"] if one.get("mean_kld") is not None]
    if result["questions"]:
        yield "needle-grid", needle_grid(result["questions"])
    if rows:
        yield "kld-depth", kld_by_depth(rows)
        for depth in sorted({one["n_depth"] for one in rows}):
            yield f"frontier-{depth}", frontier([one for one in rows if one["n_depth"] == depth and one["arm"] != DENSE], depth)


def needle_grid(questions: list[dict]) -> Figure:
    """One panel per arm: score by length and by place of the facts."""
    arms, lengths = list(questions[0]["scores"]), sorted({one["n_depth"] for one in questions})
    columns = min(3, len(arms))
    n_rows = -(-len(arms) // columns)
    figure = Figure((WIDTH_INCH, 0.8 + 1.7 * n_rows))
    panels = np.ravel(figure.subplots(n_rows, columns, squeeze=False, sharex=True, sharey=True))
    for ax in panels[len(arms):]:
        ax.set_axis_off()
    for ax, arm in zip(panels, arms):
        found = grid(questions, arm, lengths)
        image = ax.imshow(found, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        for (y, x), value in np.ndenumerate(found):
            if np.isfinite(value):
                ax.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color="white" if value < 60 else "black")
        ax.set_title(arm, loc="left", fontsize=8)
        ax.set_xticks(range(len(lengths)), [f"{length // 1024}K" for length in lengths])
        ax.set_yticks(range(DEPTH_BINS), [f"{(i + 0.5) / DEPTH_BINS:.0%}" for i in range(DEPTH_BINS)])
    figure.supxlabel("length", fontsize=9)
    figure.supylabel("place of the facts", fontsize=9)
    figure.colorbar(image, ax=list(panels), label="score", pad=0.02)
    return figure


def grid(questions: list[dict], arm: str, lengths: list[int]) -> np.ndarray:
    """[DEPTH_BINS, len(lengths)] mean score of 100; NaN where nothing was asked"""
    cells: list[list[list[float]]] = [[[] for _ in lengths] for _ in range(DEPTH_BINS)]
    for one in questions:
        place = min(DEPTH_BINS - 1, int(one["where"] * DEPTH_BINS))
        cells[place][lengths.index(one["n_depth"])].append(100 * one["scores"][arm])
    return np.array([[np.mean(cell) if cell else np.nan for cell in line] for line in cells])


def kld_by_depth(rows: list[dict]) -> Figure:
    figure, ax = axes("Divergence from dense by length", 3.2)
    arms = [arm for arm in dict.fromkeys(one["arm"] for one in rows) if arm != DENSE]
    for number, arm in enumerate(arms):
        own = [one for one in rows if one["arm"] == arm]
        middle = values([one["mean_kld"] for one in own])
        low, high = (values([one[f"mean_kld_{end}"] for one in own]) for end in ("low", "high"))
        ax.errorbar([one["n_depth"] for one in own], middle, (np.minimum(middle - low, middle * 0.95), high - middle),
                    color=ARMS.get(arm, LINES[number % len(LINES)]), marker=".", capsize=2.5, label=arm)
    ax.set(xlabel="cached tokens", ylabel="mean KLD (nats)", yscale="log")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def frontier(rows: list[dict], depth: int) -> Figure:
    """KLD against speed-up, or against the cells read where nothing was timed; the Pareto front is a line."""
    timed = all(one["speedup"] for one in rows)
    x = values([one["speedup"] if timed else one["reads"] for one in rows])
    y = values([max(one["mean_kld"], 1e-7) for one in rows])
    best = np.array(pareto([(kld, at if timed else -at) for at, kld in zip(x, y)]), bool)
    figure, ax = axes(f"What speed costs at {depth} tokens", 3.8)
    order = np.argsort(x[best])
    ax.plot(x[best][order], y[best][order], color="#d55e00", linewidth=1, label="Pareto front", zorder=0)
    ax.scatter(x, y, 18, [ARMS["hylra"] if one else LINES[0] for one in best])
    for one, at, kld in zip(rows, x, y):
        ax.annotate(one["arm"].replace("hylra:", ""), (at, kld), xytext=(3, 3), textcoords="offset points", fontsize=6.5)
    ax.set(xlabel="speed-up over the fastest stock arm" if timed else "cells read, as a share of dense", ylabel="mean KLD (nats)", yscale="log")
    ax.legend(loc="best")
    return figure
