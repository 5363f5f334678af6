"""How the reports' plots look.

- Drawn on `Figure` objects without pyplot: no global state, no display.
- Glyphs are paths of matplotlib's own font and ids are salted, so that a plot looks and reads the same on every machine.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, fontManager
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e7eb"
ACCENT, SECOND = "#1f6f8b", "#d1603d"
PARTS = (
    *("#1f6f8b", "#78a9b8", "#d1603d", "#e8b04b", "#8a6fa8", "#93a35a"),
    *("#4d5a66", "#c98ba3", "#5fae9a", "#a9713f", "#b3bcc6"),
)
FONT = "report"
STYLE: dict[Any, Any] = {
    "font.family": FONT,
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "dense2moe",
}

WIDTH = 10.5
"""Inches; all figures are as wide as the page."""


@contextmanager
def styled() -> Iterator[None]:
    """Inside, plots are drawn and written in this style, whatever the user's own is."""
    _register_font()
    # classic rc first: a user's matplotlibrc must not change the report
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def _register_font() -> None:
    """Makes FONT the DejaVu Sans that comes with matplotlib: a machine's own may be another version, with other glyphs."""
    if any(entry.name == FONT for entry in fontManager.ttflist):
        return
    for file, weight in (("DejaVuSans.ttf", "normal"), ("DejaVuSans-Bold.ttf", "bold")):
        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / file
        fontManager.ttflist.append(FontEntry(fname=str(path), name=FONT, weight=weight, size="scalable"))


def svg(figure: Figure) -> str:
    """The same text for the same figure."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight", pad_inches=0.08)
    return buffer.getvalue()


def plain_log(axis: Axes) -> None:
    """Log axes over a decade or two have few or clumsy labels by default; name 1, 2 and 5 of each decade plainly."""
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.yaxis.set_minor_formatter(plain if high / low < 100 else NullFormatter())
