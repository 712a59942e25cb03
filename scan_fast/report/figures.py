"""The confusion matrix as a picture."""

from __future__ import annotations

import io

import numpy as np

from ..runs.tables import Confusion


def confusion_png(table: Confusion) -> bytes:
    """Draw a confusion matrix, each row divided by its sum, and return it as PNG.

    With more columns than have room for numbers, the darkest colour is that of the largest share, and a bar tells it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = table.shares
    n_rows, n_columns = shares.shape
    side = min(max(4.0, 0.42 * n_columns + 1.6), 24.0)
    figure = Figure(figsize=(side, side * (n_rows + 1) / (n_columns + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    numbered = n_columns <= 30
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1 if numbered else max(float(shares.max()), 0.01))
    size = 9 if numbered else 6
    axes.set_xticks(range(n_columns), [plain(name) for name in table.column_names], rotation=90, fontsize=size)
    axes.set_yticks(range(n_rows), [plain(name) for name in table.row_names], fontsize=size)
    axes.set_xlabel("class of the cluster")
    axes.set_ylabel("true class")
    if not numbered:
        figure.colorbar(picture, shrink=0.3, format="{x:.0%}", label="share of the true class")
    else:
        for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
            share = shares[row, column]
            color = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{share * 100:.0f}", ha="center", va="center", fontsize=8, color=color)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def plain(name: str, longest: int = 24) -> str:
    """Return a name as matplotlib should write it: cut to ``longest`` letters, and no mathematics."""
    # matplotlib would take a pair of dollar signs for mathematics.
    short = name if len(name) <= longest else name[: longest - 1] + "…"
    return short.replace("$", r"\$")
