"""The figures of `eval`: needle grid, accuracy against speed with the Pareto front, KL divergence against depth."""

from __future__ import annotations

from typing import Iterator, Tuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from .eval_arms import DENSE
from .eval_stats import pareto
from .plots import ARMS, LINES, WIDTH_INCH, axes, values

DEPTH_BINS = 5
POINTS = (-50, -20, -10, -5, 0, 5, 10, 20, 50, 100)
PLAIN = FuncFormatter(lambda value, _: f"{value:g}")  # powers of ten need math text, which labels of arms must not be taken for


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
        ax.set_xticks(range(len(lengths)), [f"{length / 1000:.0f}K" for length in lengths])
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


def scale_of(ax: Axes, name: str) -> None:
    """name: mean_kld, which has no zero, or score_loss, which has and may be negative"""
    if name == "mean_kld":
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    else:
        ax.set_yscale("symlog", linthresh=5)
        ax.yaxis.set_major_locator(FixedLocator(POINTS))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(PLAIN)


def bars(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """[n] values and [2, n] distances to the ends of their intervals, which are NaN where an interval is unknown"""
    middle, low, high = (values([one.get(key) for one in rows]) for key in (name, f"{name}_low", f"{name}_high"))
    return middle, np.array([middle - low, high - middle])


def kld_by_depth(rows: list[dict]) -> Figure:
    """A logarithm has no place for 0: arms that predict the same as dense stand in the legend only."""
    figure, ax = axes("Divergence from dense by length", 3.2)
    scale_of(ax, "mean_kld")
    arms = [arm for arm in dict.fromkeys(one["arm"] for one in rows) if arm != DENSE]
    for number, arm in enumerate(arms):
        own = [one for one in rows if one["arm"] == arm]
        middle, ends = bars(own, "mean_kld")
        same = not np.nanmax(middle)
        ends[0] = np.minimum(ends[0], 0.95 * middle)
        ax.errorbar([one["n_depth"] for one in own], np.full_like(middle, np.nan) if same else middle, ends, capsize=2.5, marker=".",
                    color=ARMS.get(arm, LINES[number % len(LINES)]), label=f"{arm} (0: the same as dense)" if same else arm)
    ax.set(xlabel="cached tokens", ylabel="mean KLD (nats)")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def frontier(rows: list[dict], depth: int) -> Figure:
    """Points lost, where questions were asked, and KLD, against speed-up, or against the cells read where nothing was timed; each with
    its Pareto front as a line."""
    timed = all(one["speedup"] for one in rows)
    x = values([one["speedup"] if timed else one["reads"] for one in rows])
    wanted = [name for name in ("score_loss", "mean_kld") if any(one.get(name) is not None for one in rows)]
    figure = Figure((WIDTH_INCH, 0.8 + 2.9 * len(wanted)))
    panels = np.ravel(figure.subplots(len(wanted), 1, squeeze=False, sharex=True))
    for ax, name in zip(panels, wanted):
        panel(ax, rows, x, name, sign=1 if timed else -1)
    panels[0].set_title(f"What speed costs at {depth} tokens", loc="left")
    panels[0].legend(loc="best", fontsize=8)
    panels[-1].set_xlabel("speed-up over the fastest stock arm" if timed else "cells read, as a share of dense")
    return figure


def panel(ax: Axes, rows: list[dict], x: np.ndarray, name: str, sign: int) -> None:
    """x: a gain where sign is 1, a cost where it is -1"""
    y, ends = bars(rows, name)
    scale_of(ax, name)
    if name == "mean_kld":
        y = np.maximum(y, 1e-7)
        ends[0] = np.minimum(ends[0], 0.95 * y)
    best = np.array(pareto([(lost, sign * at) for at, lost in zip(x, y)]), bool)
    order = np.argsort(x[best])
    ax.plot(x[best][order], y[best][order], color=ARMS["hylra"], linewidth=1, label="Pareto front", zorder=0)
    ax.errorbar(x, y, ends, fmt="none", ecolor="#cccccc", elinewidth=1, zorder=0)
    ax.scatter(x, y, 18, [ARMS["hylra"] if one else LINES[0] for one in best])
    order = np.argsort(x, kind="stable")
    for place, at in enumerate(order):
        is_crowded = 0 < place < len(x) - 1 and x[order[place + 1]] - x[at] < 0.06 * np.ptp(x)  # then the label stands on the left
        ax.annotate(rows[at]["arm"].replace("hylra:", ""), (x[at], y[at]), xytext=(-3 if is_crowded else 3, (4, -9)[place % 2]),
                    textcoords="offset points", ha="right" if is_crowded else "left", fontsize=6.5)
    ax.set_ylabel("points lost" if name == "score_loss" else "mean KLD (nats)")
