"""Figures as inline SVG: drawn by matplotlib, coloured by the page.

matplotlib writes fixed colours; here it writes marker colours that are then replaced by CSS variables, so
that one SVG follows the reader's light or dark mode. Text stays text (searchable, in the page's font, escaped
by the SVG writer). Figures are about 460 px wide, so that they stay readable at full width on a phone.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Marker colours -> CSS variables. No figure uses these exact values for anything else.
INK, MUTED, RULE, PAPER = "#010203", "#010204", "#010205", "#010206"
SERIES = [f"#0102{0x10 + i:02x}" for i in range(6)]  # distinct series
RAMP = [f"#0102{0x20 + i:02x}" for i in range(8)]  # ordered groups, blended for other counts
VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--card"}
VARIABLES |= {c: f"--s{i}" for i, c in enumerate(SERIES)} | {c: f"--g{i}" for i, c in enumerate(RAMP)}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gdrt_ds",
    "text.parse_math": False,
    "font.size": 10,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "font.family": "DejaVu Sans",
}


def draw(figure: Mapping[str, Any], number: int) -> str:
    """One checked figure (not tokens) as an <svg> element. number: unique on the page, keeps ids apart."""
    with matplotlib.rc_context(STYLE):
        height = _height(figure)
        drawing = Figure(figsize=(4.8, height), layout="constrained")
        FigureCanvasSVG(drawing)
        drawing.patch.set_alpha(0)
        axes = drawing.add_subplot()
        axes.patch.set_alpha(0)
        {"bar": _bar, "line": _line, "stacked_area": _stacked_area, "scatter": _scatter, "heatmap": _heatmap}[
            figure["kind"]
        ](axes, figure)
        if figure["kind"] != "heatmap":
            _finish(axes, figure)
        _legend(drawing, axes, figure)
        buffer = io.StringIO()
        drawing.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return _inline(buffer.getvalue(), f"{figure['title']}. {figure['caption']}", number)


def _height(figure: Mapping[str, Any]) -> float:
    if figure["kind"] == "heatmap":
        return 0.9 + 0.32 * len(figure["rows"])
    if figure["kind"] == "bar" and figure.get("horizontal"):
        bars = 1 if figure.get("stacked") else len(figure["series"])
        return max(
            2.4,
            0.8
            + len(figure["categories"])
            * (0.16 + 0.1 * bars + 0.12 * max(c.count("\n") for c in figure["categories"])),
        )
    return 3.0


def colours(count: int, ordered: bool) -> list[str]:
    if not ordered:
        return [SERIES[i % len(SERIES)] for i in range(count)]
    return [RAMP[round(i * (len(RAMP) - 1) / max(1, count - 1))] for i in range(count)]


def _numbers(values: Any) -> np.ndarray:
    return np.array([math.nan if v is None else float(v) for v in values])


def _bar(axes: Any, figure: Mapping[str, Any]) -> None:
    series, horizontal, stacked = (
        figure["series"],
        bool(figure.get("horizontal")),
        bool(figure.get("stacked")),
    )
    places = np.arange(len(figure["categories"]))
    width = 0.62 if stacked or len(series) == 1 else 0.8 / len(series)
    base = np.zeros(places.size)
    for index, (one, colour) in enumerate(
        zip(series, colours(len(series), bool(figure.get("ordered"))), strict=True)
    ):
        values = _numbers(one["values"])
        at = places if stacked or len(series) == 1 else places + (index - (len(series) - 1) / 2) * width
        options = {"color": colour, "label": one["name"], "linewidth": 0}
        draw_bar = axes.barh if horizontal else axes.bar
        draw_bar(
            at,
            values,
            width * (1 if stacked or len(series) == 1 else 0.92),
            **({"left" if horizontal else "bottom": base} if stacked else {}),
            **options,
        )
        if one.get("low") is not None and not stacked:
            low, high = _numbers(one["low"]), _numbers(one["high"])
            spread = np.abs(np.stack([values - low, high - values]))
            axes.errorbar(
                *((values, at) if horizontal else (at, values)),
                **{"xerr" if horizontal else "yerr": spread},
                fmt="none",
                ecolor=INK,
                elinewidth=1.1,
                capsize=0,
            )
        base = base + np.nan_to_num(values)
    names = [str(c) for c in figure["categories"]]
    if horizontal:
        axes.set_yticks(places, [_short(c, 30) for c in names])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    else:
        lengthy = max(len(line) for c in names for line in c.split("\n")) * len(names) > 62
        axes.set_xticks(
            places,
            [_short(c, 22) for c in names],
            rotation=35 if lengthy else 0,
            ha="right" if lengthy else "center",
        )
        axes.grid(axis="x", visible=False)
    if not horizontal and places.size < 5:  # few bars stay slim
        axes.set_xlim(-0.5 - (5 - places.size) * 0.3, places.size - 0.5 + (5 - places.size) * 0.3)
    negative = any(v is not None and v < 0 for one in series for v in one["values"])
    if negative:
        (axes.axvline if horizontal else axes.axhline)(0, color=MUTED, linewidth=0.9)


def _line(axes: Any, figure: Mapping[str, Any]) -> None:
    for one, colour in zip(
        figure["series"], colours(len(figure["series"]), bool(figure.get("ordered"))), strict=True
    ):
        x, y = _numbers(one["x"]), _numbers(one["y"])
        if figure.get("smooth") and x.size > 40:
            if len(figure["series"]) == 1:
                axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.4)
            y = _moving_average(y, max(3, x.size // 25))
        axes.plot(x, y, color=colour, label=one["name"], marker="o" if x.size <= 12 else None, markersize=4)
        if one.get("low") is not None:
            axes.fill_between(
                x, _numbers(one["low"]), _numbers(one["high"]), color=colour, alpha=0.18, linewidth=0
            )


def _moving_average(y: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` points, shorter at the ends; absent points are left out of it."""
    kernel, valid = np.ones(width), np.isfinite(y)
    counts = np.convolve(valid, kernel, "same")
    return np.divide(
        np.convolve(np.where(valid, y, 0), kernel, "same"),
        counts,
        out=np.full(y.size, np.nan),
        where=counts > 0,
    )


def _stacked_area(axes: Any, figure: Mapping[str, Any]) -> None:
    series = figure["series"]
    axes.stackplot(
        _numbers(figure["x"]),
        [np.nan_to_num(_numbers(s["y"])) for s in series],
        labels=[s["name"] for s in series],
        colors=colours(len(series), bool(figure.get("ordered"))),
        linewidth=0,
    )
    axes.margins(x=0, y=0)


def _scatter(axes: Any, figure: Mapping[str, Any]) -> None:
    names = list(dict.fromkeys(str(p.get("series", "")) for p in figure["points"]))
    palette = dict(zip(names, colours(len(names), bool(figure.get("ordered"))), strict=True))
    many = len(figure["points"]) > 60
    for name in names:
        points = [p for p in figure["points"] if str(p.get("series", "")) == name]
        x, y = _numbers([p["x"] for p in points]), _numbers([p["y"] for p in points])
        for axis in "xy":
            if any(f"{axis}_low" in p for p in points):
                middle = x if axis == "x" else y
                low, high = (
                    _numbers([p.get(f"{axis}_low") for p in points]),
                    _numbers([p.get(f"{axis}_high") for p in points]),
                )
                axes.errorbar(
                    x,
                    y,
                    fmt="none",
                    ecolor=palette[name],
                    elinewidth=1.1,
                    alpha=0.7,
                    **{f"{axis}err": np.abs(np.stack([middle - low, high - middle]))},
                )
        axes.scatter(
            x,
            y,
            s=9 if many else 44,
            color=palette[name],
            alpha=0.55 if many else 1,
            linewidth=0,
            label=name or None,
            zorder=3,
        )
    for point in figure["points"]:
        if point.get("label"):
            axes.annotate(
                _short(str(point["label"]), 26),
                (point["x"], point["y"]),
                xytext=(7, 5),
                textcoords="offset points",
                fontsize=9.5,
                color=INK,
                zorder=4,
            )
    axes.margins(0.14)


def _heatmap(axes: Any, figure: Mapping[str, Any]) -> None:
    values = np.array([_numbers(row) for row in figure["values"]])
    largest = np.nanmax(np.abs(values)) if np.isfinite(values).any() else 1.0
    for (row, column), value in np.ndenumerate(values):
        if not math.isfinite(value):
            continue
        colour = SERIES[0] if value >= 0 else SERIES[1]
        axes.add_patch(
            matplotlib.patches.Rectangle(
                (column - 0.48, row - 0.46),
                0.96,
                0.92,
                color=colour,
                alpha=0.06 + 0.5 * abs(value) / (largest or 1),
                linewidth=0,
            )
        )
        axes.text(
            column,
            row,
            f"{value:.2g}" if abs(value) < 1000 else f"{value:,.0f}",
            ha="center",
            va="center",
            fontsize=9,
            color=INK,
        )
    axes.set_xlim(-0.5, values.shape[1] - 0.5)
    axes.set_ylim(values.shape[0] - 0.5, -0.5)
    lengthy = max(len(str(c)) for c in figure["columns"]) * len(figure["columns"]) > 50
    axes.set_xticks(
        range(values.shape[1]),
        [_short(str(c), 20) for c in figure["columns"]],
        rotation=35 if lengthy else 0,
        ha="right" if lengthy else "center",
    )
    axes.set_yticks(range(values.shape[0]), [_short(str(r), 26) for r in figure["rows"]])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)


def _finish(axes: Any, figure: Mapping[str, Any]) -> None:
    horizontal = bool(figure.get("horizontal"))
    for axis, key in (("x", "log_x"), ("y", "log_y")):
        if figure.get(key):
            getattr(axes, f"set_{axis}scale")("log")
    if figure["kind"] == "line" and figure.get("log_x"):
        ticks = sorted({x for s in figure["series"] for x in s["x"]})
        if len(ticks) <= 8:
            axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axes.xaxis.minorticks_off()
    value_axis = axes.xaxis if horizontal else axes.yaxis
    if not (figure.get("log_x") if horizontal else figure.get("log_y")):
        value_axis.set_major_locator(MaxNLocator(5))
        if figure.get("percent"):
            value_axis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:g} %"))
    axes.set_xlabel(str((figure.get("y_label") if horizontal else figure.get("x_label")) or ""))
    axes.set_ylabel(str((figure.get("x_label") if horizontal else figure.get("y_label")) or ""))
    reference = figure.get("reference")
    if reference:
        (axes.axvline if horizontal else axes.axhline)(
            reference["value"],
            color=MUTED,
            linestyle=(0, (4, 3)),
            linewidth=1.1,
            label=reference.get("label"),
        )


def _legend(drawing: Figure, axes: Any, figure: Mapping[str, Any]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if figure.get("legend") is False or (len(labels) < 2 and not figure.get("reference")):
        return
    columns = (
        len(labels) if figure.get("ordered") and len(labels) <= 8 else 3 if max(map(len, labels)) < 22 else 2
    )
    drawing.legend(
        handles,
        [_short(name, 34) for name in labels],
        loc="outside upper left",
        ncols=min(columns, len(labels)),
        handlelength=1.0 if figure["kind"] != "line" else 1.4,
        columnspacing=1.2,
        handletextpad=0.5,
        borderaxespad=0.1,
        title="group" if figure.get("ordered") else None,
        alignment="left",
        title_fontsize=9,
    )


def _short(text: str, length: int) -> str:
    return "\n".join(line if len(line) <= length else line[: length - 1] + "…" for line in text.split("\n"))


def _inline(svg: str, description: str, number: int) -> str:
    """The bare <svg> element: CSS colours, the page's font, ids apart from other figures', no metadata, no
    fixed size.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(
        r"font(-family)?: ([^;\"]*?)'DejaVu Sans'[^;\"]*",
        lambda m: f"font{m[1] or ''}: {m[2]}inherit" if m[1] else f"font: {m[2]}var(--sans)",
        svg,
    )
    svg = re.sub(r'\bid="([^"]+)"', rf'id="f{number}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#f{number}-\1)", svg)
    svg = re.sub(r'(xlink:href|href)="#([^"]+)"', rf'\1="#f{number}-\2"', svg)
    opening = svg[: svg.index(">") + 1]
    bare = re.sub(r'\s(width|height)="[^"]*"', "", opening)
    return bare[:-1] + f' role="img" aria-label="{escape(description, quote=True)}">' + svg[len(opening) :]
