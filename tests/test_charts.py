"""The charts of the docs show the figures of the docs, and can be read."""

import charts
from figures import apart


def test_methods_are_those_of_the_page():
    figure = charts.recorded_methods()
    (axes,) = figure.axes
    rows = charts.table("results/methods.md", "method | test accuracy")
    labels = [t.get_text().rsplit("  ", 1) for t in axes.get_yticklabels()]
    assert sorted(labels) == sorted([row[0], row[2]] for row in rows) and len(rows) > 20
    means = [float(bars.lines[0].get_xdata()[0]) for bars in axes.containers]
    assert means == sorted(float(row[1].split(" ± ")[0]) for row in rows)
    assert "3 seeds" in axes.get_xlabel() and "1,000 test snippets" in figure.get_suptitle()
    mean = {row[0]: row[1].split()[0] for row in rows}
    lines = [f"{name}, {mean[name]}" for name in ("LoRA", "full fine-tuning")]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == lines
    apart(figure)


def test_weak_scaling_is_that_of_the_page():
    figure = charts.recorded_weak_scaling()
    rows = charts.table("scaling.md", "chips | arm | TFLOPs")
    for i, panel in enumerate(figure.axes):
        shown = {line.get_label(): line.get_xydata().tolist() for line in panel.get_lines()}
        for arm, name in (("LoRA", "LoRA"), ("full", "full fine-tuning")):
            own = [[int(r[0]), float(r[2 + i])] for r in rows if r[1] == arm and r[2 + i] != "–"]
            assert shown[name] == own and len(own) >= 6
    assert [t.get_text() for t in panel.get_xticklabels()] == [
        "4",
        "8",
        "16",
        "32",
        "64",
        "128",
        "256",
    ]
    apart(figure)


def test_few_rows():
    apart(charts.methods([("LoRA", 0.5, 0.1, 3)], "data", 2))
