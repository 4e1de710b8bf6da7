"""Geometry of a small line chart: from a `Chart` to the numbers and path strings that the template draws as SVG."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dare.report.curves import Chart, Series, Unit

WIDTH, HEIGHT = 340.0, 190.0
SMALL = (215.0, 125.0)  # of many charts of one kind; texts keep their size
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 8.0, 24.0
_TICK_WIDTH = 68.0  # pixels per label of the horizontal axis, about


@dataclass(frozen=True)
class Tick:
    position: float  # pixels
    label: str


@dataclass(frozen=True)
class Stroke:
    """One series: a path, the closed path of its band ("" if none), and point positions with their hover text.

    tone  "a" for what training measures, "b" for held-out evaluations and for the second of two curves, "c" for what a
          run is compared with, "n0" to "n4" for curves in an order, "quiet" for a background
    """

    label: str
    tone: str
    path: str
    band: str
    points: list[tuple[float, float, str]]


@dataclass(frozen=True)
class Drawing:
    title: str
    note: str
    latest: str  # the last value of the last series of the run; "" if it says nothing
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    strokes: list[Stroke]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = _LEFT
    top: float = _TOP

    @property
    def right(self) -> float:
        return self.width - _RIGHT

    @property
    def bottom(self) -> float:
        return self.height - _BOTTOM


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float  # pixels at `low`
    end: float  # pixels at `high`

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def draw(chart: Chart, size: tuple[float, float] = (WIDTH, HEIGHT)) -> Drawing:
    """Scale a chart with at least one point to a drawing of so many pixels across and down."""
    width, height = size
    steps = [step for series in chart.series for step in series.steps]
    values = [value for series in chart.series for value in (*series.values, *(series.low or ()), *(series.high or ()))]
    x = _Scale(*_spread(0.0, max(steps)), _LEFT, width - _RIGHT)
    low, high = _value_range(values, chart.unit)
    y = _Scale(low, high, height - _BOTTOM, _TOP)
    x_values = ticks(x.low, x.high, max(2, round(width / _TICK_WIDTH)))
    return Drawing(
        title=chart.title,
        note=chart.note,
        latest=label(_own(chart).values[-1], chart.unit) if chart.has_latest else "",
        x_ticks=[Tick(x(value), label(value, "number")) for value in x_values if value == round(value)],
        y_ticks=[Tick(y(value), label(value, chart.unit)) for value in ticks(low, high, 4)],
        strokes=[_stroke(series, x, y, chart, index) for index, series in enumerate(chart.series)],
        width=width,
        height=height,
    )


def ticks(low: float, high: float, num: int) -> list[float]:
    """Round values in [low, high], about `num` of them, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / num
    power = 10.0 ** math.floor(math.log10(rough))
    limits = ((1, 2**0.5), (2, 10**0.5), (5, 50**0.5), (10, math.inf))  # the factor that is closest in ratio
    step = next(factor * power for factor, limit in limits if rough / power < limit)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    num_decimals = -math.floor(math.log10(step))
    return [round(index * step, num_decimals) for index in range(first, last + 1)]  # 0.3, not 0.30000000000000004


def label(value: float, unit: Unit) -> str:
    """A number as an axis shows it."""
    if unit == "percent":
        return f"{100 * value:.3g}%"
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e6 else f"{value:.3g}"


def _own(chart: Chart) -> Series:
    """The last series that is not there to compare with."""
    return next((s for s in reversed(chart.series) if s.tone not in ("c", "quiet")), chart.series[-1])


def _value_range(values: list[float], unit: Unit) -> tuple[float, float]:
    """Room around the values; a share never leaves [0, 1], and its axis starts at 0 unless the range is far from it."""
    low, high = _spread(min(values), max(values))
    margin = 0.06 * (high - low)
    low, high = low - margin, high + margin
    if unit == "percent":
        return 0.0 if low < high / 2 else low, min(high, 1.0)
    return (0.0 if low < 0 <= min(values) else low), high


def _spread(low: float, high: float) -> tuple[float, float]:
    """The range, opened where it is a single point or nearly so (it is divided by)."""
    if high - low > 1e-9 * max(abs(low), abs(high), 1e-300):
        return low, high
    half = 0.5 * abs(low) or 0.5
    return low - half, high + half


def _stroke(series: Series, x: _Scale, y: _Scale, chart: Chart, index: int) -> Stroke:
    xs, ys = [x(step) for step in series.steps], [y(value) for value in series.values]
    band = ""
    if series.low is not None and series.high is not None and len(xs) > 1:
        upper = list(zip(xs, (y(value) for value in series.high), strict=True))
        lower = list(zip(xs, (y(value) for value in series.low), strict=True))
        band = _path(upper + lower[::-1]) + "Z"
    pairs = zip(series.steps, series.values, strict=True)
    hover = [f"{chart.x_name} {step:g}: {label(value, chart.unit)}" for step, value in pairs]
    is_dotted = series.is_points or len(xs) == 1
    points = list(zip(xs, ys, hover, strict=True)) if is_dotted else []
    tone = series.tone or ("b" if index > 0 or series.is_points else "a")
    return Stroke(series.label, tone, _path(list(zip(xs, ys, strict=True))), band, points)


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:g},{y:g}" for x, y in points)
