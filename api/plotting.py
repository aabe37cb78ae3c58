"""Charts of what was measured, as PNG; they need matplotlib (`sievert[plot]`)."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

from sievert.bundle.errors import InputError

if TYPE_CHECKING:
    from sievert.calibration.sensitivity import Sensitivity


def find_pyplot() -> Any | None:
    """Matplotlib's ``pyplot``, drawing without a screen; None where it is not installed."""
    try:
        import matplotlib as mpl
    except ImportError:
        return None
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def require_pyplot() -> Any:
    """The same.

    Raises:
        InputError: matplotlib is not installed.
    """
    if (pyplot := find_pyplot()) is None:
        raise InputError('a picture needs matplotlib, which is not installed: run `pip install "sievert[plot]"`, or leave the picture out')
    return pyplot


def to_png(pyplot: Any, figure: Any) -> bytes:
    """The figure, which is closed; the same figure gives the same bytes."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=110, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return drawn.getvalue()


def draw_sensitivity(found: Sensitivity) -> bytes:
    """Bars for every layer, whole graph and all together, what loses most on top: KL, kept tokens that change, first tokens that change.

    Raises:
        InputError: matplotlib is not installed.
    """
    pyplot = require_pyplot()
    units = (*found.units, *found.graphs, found.everything)
    colours = ["tab:blue"] * len(found.units) + ["tab:orange"] * len(found.graphs) + ["tab:red"]
    panels = (
        ("KL of the first token, nats", [unit.divergence for unit in units]),
        ("kept tokens that change, %", [100 * (1 - unit.kept_overlap) for unit in units]),
        ("first tokens that change, %", [100 * unit.changed for unit in units]),
    )
    figure, axes = pyplot.subplots(1, len(panels), sharey=True, figsize=(11, 1.6 + 0.24 * len(units)), layout="constrained")
    for place, (title, values) in zip(axes, panels, strict=True):
        bars = place.barh(range(len(units)), values, color=colours)
        place.bar_label(bars, labels=[f"{value:.2g}" for value in values], padding=3, fontsize=7)
        place.set(xlabel=title, xlim=(0, 1.2 * max(values) or 1.0))
        place.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(units)), [unit.name for unit in units], fontsize=7)
    axes[0].invert_yaxis()
    random = ", RANDOM data" if found.random else ""
    figure.suptitle(f"{found.variant} in {found.format}, one at a time: {found.samples} samples{random}", fontsize=10)
    return to_png(pyplot, figure)
