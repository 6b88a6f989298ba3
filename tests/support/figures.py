"""What a reader needs of any figure: its texts are inside, and none lies on another."""

import numpy as np


def apart(figure):
    """No text is cut off, and no two of one panel overlap."""
    figure.draw_without_rendering()
    for axes in figure.axes:
        texts = [t for x in (axes, *axes.child_axes) for t in _texts(x) if t.get_text().strip()]
        boxes = [t.get_window_extent() for t in texts]
        for t, box in zip(texts, boxes):
            assert min(box.x0, box.y0) >= -1, f"{t} is cut off"
            assert max(box.x1 - figure.bbox.x1, box.y1 - figure.bbox.y1) <= 1, f"{t} is cut off"
        low, high = (np.array([getattr(b, side) for b in boxes]) for side in ("min", "max"))
        # Half a pixel of each may touch.
        both = (low[:, None] < high - 1).all(-1)
        pairs = np.argwhere(np.triu(both & both.T, 1))
        assert not len(pairs), f"{texts[pairs[0, 0]]} lies on {texts[pairs[0, 1]]}"


def _texts(axes):
    """What is drawn: an axis has labels of ticks beyond its limits too."""
    yield from (axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts)
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        # The second label is that of the other side, for which there is none.
        yield from (
            t.label1 for t in axis.get_major_ticks()
            if low <= t.get_loc() <= high and t.label1.get_visible()
        )  # fmt: skip
    if axes.get_legend():
        yield from axes.get_legend().get_texts()
