"""The figures of `report` and `bench`: one function per figure, plain numbers in, a matplotlib figure out; needs the extra `report`.

Narrow, with large type, so that a phone shows them whole; None or NaN is what was not measured and stays blank.
"""

from __future__ import annotations

import contextlib
import io
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH_INCH, DPI = 5.2, 150
# colours that people with any colour vision tell apart (Okabe and Ito)
COLOURS = {"F": "#7f7f7f", "S": "#d55e00", "R": "#0072b2"}
LINES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
ARMS = {"stock-fa1": "#7f7f7f", "stock-fa0": "#000000", "full": "#e69f00", "hylra": "#d55e00"}
NAMES = {"F": "full", "S": "select", "R": "reuse"}
STYLE = {"font.size": 9.5, "axes.titlesize": 10.5, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
         "figure.constrained_layout.use": True, "text.parse_math": False}

Numbers = Sequence[Optional[float]]


@contextlib.contextmanager
def plain_style() -> Iterator[None]:
    """The same pictures whatever the user's matplotlibrc says"""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def axes(title: str, height_inch: float) -> tuple[Figure, Axes]:
    figure = Figure((WIDTH_INCH, height_inch))
    ax = figure.add_subplot()
    ax.set_title(title, loc="left")
    return figure, ax


def values(numbers: Sequence) -> np.ndarray:
    return np.array(numbers, float)  # None becomes NaN


# -- the plan ---------------------------------------------------------------------------------------------------------


def layer_map(modes: str, sources: List[int]) -> Figure:
    """modes: a letter F, S or R per layer. Below the strip of all layers one row per select layer with those it feeds."""
    selects = [layer for layer, mode in enumerate(modes) if mode == "S"]
    figure, ax = axes("What each layer does, and whose cells it takes", 1.15 + 0.19 * (len(selects) + 1))
    size = min(60.0, (WIDTH_INCH * 52 / len(modes)) ** 2)  # points squared, so that neighbours just do not touch
    for mode, name in NAMES.items():
        found = [layer for layer, letter in enumerate(modes) if letter == mode]
        ax.scatter(found, [0] * len(found), size, COLOURS[mode], marker="s", label=f"{name} ({len(found)})")
    for row, select in enumerate(selects, 1):
        fed = [layer for layer, source in enumerate(sources) if source == select and layer != select]
        ax.plot([select, max(fed, default=select)], [row, row], color="#cccccc", linewidth=1, zorder=0)
        ax.scatter(fed, [row] * len(fed), size * 0.5, COLOURS["R"])
        ax.scatter([select], [row], size, COLOURS["S"], marker="s")
    ax.set_yticks(range(len(selects) + 1), ["all", *map(str, selects)])
    ax.set(xlabel="layer", ylabel="source", xlim=(-0.8, len(modes) - 0.2), ylim=(len(selects) + 0.6, -0.6))
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


# -- pairs of layers --------------------------------------------------------------------------------------------------


def heat_map(matrix: List[List[Optional[float]]], title: str, label: str, modes: str, sources: List[int]) -> Figure:
    """matrix: [source, layer], blank below the diagonal, where the legend goes."""
    figure, ax = axes(title, 4.6)
    found = values(matrix)
    low, high = scale_of_pairs(found)
    image = ax.imshow(found, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    figure.colorbar(image, ax=ax, label=label, shrink=0.85, pad=0.02, extend=beyond(found, low, high))
    mark_plan(ax, modes, sources)
    ax.set(xlabel="layer", ylabel="source layer")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(9, integer=True))
    ax.legend(loc="lower left", handletextpad=0.3, borderaxespad=0.6)
    return figure


def scale_of_pairs(found: np.ndarray) -> Tuple[float, float]:
    """In steps of 0.05, without a few outliers and the diagonal: the differences near the top are what a plan turns on."""
    pairs = found[np.triu_indices(len(found), 1)]
    pairs = pairs[np.isfinite(pairs)]
    if not len(pairs):
        return 0.0, 1.0
    high = max(0.05, np.ceil(pairs.max() * 20) / 20)
    return min(high - 0.05, np.floor(np.quantile(pairs, 0.02) * 20) / 20), high


def beyond(found: np.ndarray, low: float, high: float) -> str:
    """Which end of the colour bar gets an arrow for values past it"""
    lower, upper = np.nanmin(found, initial=high) < low, np.nanmax(found, initial=low) > high
    return "both" if lower and upper else "min" if lower else "max" if upper else "neither"


def mark_plan(ax: Axes, modes: str, sources: List[int]) -> None:
    size = min(22.0, (WIDTH_INCH * 36 / len(modes)) ** 2)
    selects = [layer for layer, mode in enumerate(modes) if mode == "S"]
    full = [layer for layer, mode in enumerate(modes) if mode == "F"]
    edges = [(layer, source) for layer, source in enumerate(sources) if modes[layer] == "R"]
    ax.scatter(selects, selects, size * 1.6, COLOURS["S"], marker="s", edgecolors="white", linewidths=0.5, label="select layer")
    ax.scatter(full, full, size * 1.6, COLOURS["F"], marker="s", edgecolors="white", linewidths=0.5, label="full layer")
    ax.scatter(*np.reshape(edges, (-1, 2)).T, size * 0.8, "white", edgecolors="black", linewidths=0.7,
               label="reuse: layer takes from source")


# -- layers -----------------------------------------------------------------------------------------------------------


def layer_lines(curves: Dict[str, Numbers], band: Optional[Tuple[Numbers, Numbers]], title: str, label: str,
                modes: str) -> Figure:
    """band: (0.1 quantile, 0.9 quantile) of the last curve, if they are known"""
    figure, ax = axes(title, 2.9)
    layers = np.arange(len(modes))
    for before_last, (name, numbers) in zip(range(len(curves))[::-1], curves.items()):
        ax.plot(layers, values(numbers), color=LINES[before_last % len(LINES)], marker=".", linewidth=1.3, label=name)
    if band:
        ax.fill_between(layers, values(band[0]), values(band[1]), color=LINES[0], alpha=0.18, linewidth=0, label="0.1 to 0.9 of samples")
    decorate_layers(ax, modes, label)
    figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2)
    return figure


def decorate_layers(ax: Axes, modes: str, label: str) -> None:
    """Layers along x, the selecting ones as lines in the back"""
    for layer, mode in enumerate(modes):
        if mode == "S":
            ax.axvline(layer, color=COLOURS["S"], linewidth=0.8, alpha=0.55, zorder=0)
    if "S" in modes:
        ax.plot([], [], color=COLOURS["S"], linewidth=0.8, alpha=0.55, label="select layer")
    ax.set(xlabel="layer", ylabel=label, xlim=(-0.7, len(modes) - 0.3))
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))


def head_map(by_head: List[List[Optional[float]]], title: str, label: str) -> Figure:
    """by_head: [layer, KV head]; layers run along x. The scale is a square root, or layer 0 would leave the others all dark."""
    found = values(by_head).T
    figure, ax = axes(title, 1.5 + min(2.4, 0.16 * len(found)))
    image = ax.imshow(found, cmap="viridis", aspect="auto", norm=PowerNorm(0.5, vmin=0), interpolation="nearest")
    figure.colorbar(image, ax=ax, label=label, pad=0.02)
    ax.set(xlabel="layer", ylabel="KV head")
    ax.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


# -- fit against held-out ---------------------------------------------------------------------------------------------


def halves_of_pairs(fit: Numbers, heldout: Numbers, chosen: List[bool], title: str, label: str) -> Figure:
    """One point per pair of layers; chosen: the pairs that the plan uses"""
    figure, ax = axes(title, 4.4)
    x, y, used = values(fit), values(heldout), np.array(chosen, bool)
    ends = [min(x.min(), y.min()), max(x.max(), y.max())]
    ax.plot(ends, ends, color="#bbbbbb", linewidth=1, zorder=0)
    ax.scatter(x[~used], y[~used], 8, LINES[4], alpha=0.6, linewidths=0, label="pair of layers")
    ax.scatter(x[used], y[used], 22, COLOURS["S"], edgecolors="white", linewidths=0.4, label="pair in the plan")
    ax.set(xlabel=f"{label}, fit half", ylabel=f"{label}, held-out half")
    ax.set_aspect("equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(6))
    ax.legend(loc="upper left")
    return figure


def halves_of_layers(fit: Numbers, heldout: Numbers, title: str, label: str, modes: str) -> Figure:
    figure, ax = axes(title, 2.9)
    for name, numbers, colour in (("fit half", fit, LINES[0]), ("held-out half", heldout, LINES[1])):
        ax.plot(np.arange(len(modes)), values(numbers), color=colour, marker=".", linewidth=1.3, label=name)
    decorate_layers(ax, modes, label)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


# -- frontier ---------------------------------------------------------------------------------------------------------


def frontier(theta: List[float], full: List[int], select: List[int], smallest: Numbers, mean: Numbers,
             chosen: Optional[float]) -> Figure:
    """Above the layers that stay dense, below the recall of the others; chosen: the plan's own theta. Every theta is as wide as
    the next, since most happens close to 1."""
    figure = Figure((WIDTH_INCH, 4.6))
    above, below = figure.subplots(2, 1, sharex=True)
    above.set_title("What theta costs and what it keeps", loc="left")
    at = np.arange(len(theta))
    above.bar(at, select, color=COLOURS["S"], label="select")
    above.bar(at, full, bottom=select, color=COLOURS["F"], label="full")
    above.set_ylabel("layers")
    above.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    for name, numbers, colour in (("mean recall", mean, LINES[0]), ("smallest recall", smallest, LINES[3])):
        below.plot(at, values(numbers), color=colour, marker=".", label=name)
    below.set(xlabel="theta", ylabel="recall of reuse layers")
    below.set_xticks(at, [f"{value:g}" for value in theta], rotation=90)
    if chosen is not None and theta[0] <= chosen <= theta[-1]:
        for ax, label in ((above, "this plan"), (below, None)):
            ax.axvline(np.interp(chosen, theta, at), color="black", linewidth=1, linestyle=":", label=label)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


# -- speed ------------------------------------------------------------------------------------------------------------


def speeds(depths: List[int], lines: Dict[str, List[Numbers]], title: str, label: str) -> Figure:
    """lines: arm -> [middle, low, high], each with one speed per depth"""
    figure, ax = axes(title, 3.4)
    for number, (name, (middle, low, high)) in enumerate(lines.items()):
        colour = ARMS.get(name, LINES[number % len(LINES)])
        spread = values(middle) - values(low), values(high) - values(middle)
        ax.errorbar(depths, values(middle), spread, color=colour, marker=".", capsize=2.5, label=name)
    ax.set(xlabel="cached tokens", ylabel=label)
    ax.set_ylim(bottom=0)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    figure.legend(loc="outside lower center", ncols=min(4, len(lines)))
    return figure
