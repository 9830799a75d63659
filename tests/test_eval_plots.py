"""Pictures of `eval`: what stands on their axes, and which points are the Pareto front."""

from __future__ import annotations

import accuracy_plots
import accuracy_tables
import numpy as np
import pytest

from hylra_gguf import eval_plots, plots


def row(arm: str, speedup, loss, kld: float, depth: int = 8192) -> dict:
    """Intervals one point and a tenth of the KLD wide"""
    return {"arm": arm, "policy": "SR", "top_k": 8, "n_depth": depth, "speedup": speedup, "reads": 0.5, "score_loss": loss,
            "score_loss_low": None if loss is None else loss - 1, "score_loss_high": None if loss is None else loss + 1, "mean_kld": kld, "mean_kld_low": 0.9 * kld, "mean_kld_high": 1.1 * kld}


def words_of(figure) -> list[str]:
    """Every tick label, after drawing"""
    figure.draw_without_rendering()
    return [label.get_text() for ax in figure.axes for label in (*ax.get_xticklabels(), *ax.get_yticklabels())]


ROWS = [row("hylra:a", 1.0, 0.0, 0.01), row("hylra:slow", 1.5, 30.0, 0.04), row("hylra:b", 2.0, 3.0, 0.02), row("hylra:c", 3.0, 76.0, 0.03)]


@pytest.fixture(autouse=True)
def style():
    with plots.plain_style():
        yield


@pytest.mark.parametrize("make", [lambda: eval_plots.frontier(ROWS, 8192), lambda: eval_plots.kld_by_depth(ROWS)], ids=["frontier", "kld"])
def test_labels_of_axes_are_plain_numbers(make):
    words = [word for word in words_of(make()) if word]
    assert "0.02" in words and all(float(word.replace("\N{MINUS SIGN}", "-")) is not None for word in words)


def test_the_front_is_a_line_through_its_points():
    points, kld = eval_plots.frontier(ROWS, 8192).axes
    for ax, expected in ((points, [0.0, 3.0, 76.0]), (kld, [0.01, 0.02, 0.03])):
        x, y = ax.lines[0].get_data()
        np.testing.assert_array_equal(x, [1.0, 2.0, 3.0])
        np.testing.assert_allclose(y, expected)


def test_without_questions_or_times_there_is_one_panel_over_the_cells_read():
    (ax,) = eval_plots.frontier([row("hylra", None, None, 0.01)], 8192).axes
    assert ax.get_xlabel() == "cells read, as a share of dense" and ax.get_ylabel() == "mean KLD (nats)"


def test_an_arm_that_is_the_same_as_dense_stands_in_the_legend():
    figure = eval_plots.kld_by_depth([row("stock-fa1", 1.0, 0.0, 0.0), row("hylra", 1.0, 0.0, 0.01)])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["stock-fa1 (0: the same as dense)", "hylra"]


def test_the_grid_names_lengths_in_thousands():
    asked = [{"n_depth": depth, "where": 0.1, "scores": {"dense": 1.0}} for depth in (8192, 16384, 32000)]
    assert {"8K", "16K", "32K", "10%", "90%"} <= set(words_of(eval_plots.needle_grid(asked)))


def test_speeds_of_bench_take_the_place_of_those_of_eval():
    b, a = ({"arm": arm, "policy": "RS", "top_k": 8, "n_depth": depth, "speedup": speedup} for arm, depth, speedup in
            (("hylra:b", 8192, 2.5), ("hylra:a", 32000, 9.0)))
    found = accuracy_plots.with_speeds([row("dense", 1.0, 0.0, 0.0), *ROWS], [b, a])
    assert [(one["arm"], one["speedup"]) for one in found] == [("hylra:b", 2.5)]
    assert not accuracy_plots.with_speeds(ROWS, [{**b, "policy": "SS"}]) and not accuracy_plots.with_speeds(ROWS, [{**b, "top_k": 16}])


def test_intervals_of_lengths_are_averaged_each_counted_once():
    np.testing.assert_allclose(accuracy_tables.alike([(1.0, 0.0, 2.0), (3.0, 3.0, 3.0), (5.0, 3.0, 7.0)]), (3.0, 3 - 5**0.5 / 3, 3 + 5**0.5 / 3))


def test_each_fact_counts_once_at_its_place_and_the_last_row_leaves_out_the_first_fifth():
    asked = [{"where": where, "scores": {"dense": 1.0, "hylra": hylra}} for where, hylra in ((0.0, 0.0), (0.199, 1.0), (0.2, 0.0), (0.99, 1.0), (1.0, 1.0))]
    cells = [line.split(" | ") for line in accuracy_tables.places([{"questions": asked}]).splitlines()[2:]]
    assert [line[0].strip("| ") for line in cells] == ["0 to 20 %", "20 to 40 %", "80 to 100 %", "20 to 100 %"]
    assert [line[1] for line in cells] == ["2", "1", "2", "3"]
    assert [line[3].split()[0] for line in cells] == ["50.0", "100.0", "0.0", "33.3"]
