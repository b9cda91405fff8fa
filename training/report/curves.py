"""metrics.jsonl as curves: read in constant memory however long the run was, and laid out as charts."""

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BUCKETS = 256  # of a curve, at most; about what a chart has room for
METRICS = 100  # that are read, at most
LONGEST_LINE = 1 << 20  # bytes of a line that is read at once
SIDE = 1000  # of a chart's coordinates, which the page stretches to its box
FEW = 60  # evaluations up to which each has a dot

Point = tuple[float, float]  # step, value


class Bucket(NamedTuple):
    """Successive points of a curve, as one."""

    size: int  # their number
    steps: float  # their sum
    total: float  # of the values
    low: Point
    high: Point

    def join(self, other: "Bucket") -> "Bucket":
        low, high = (self.low, other.low), (self.high, other.high)
        return Bucket(
            self.size + other.size, self.steps + other.steps, self.total + other.total,
            min(low, key=_value), max(high, key=_value),
        )  # fmt: skip


def _value(point: Point) -> float:
    return point[1]


class Series:
    """The values of one metric over the steps, in at most `BUCKETS` buckets of equally many points. When they are full,
    each two become one. First and last point, and the extremes of each bucket, stay exact."""

    def __init__(self) -> None:
        self.missing = 0  # values that are not finite
        self.size = 1  # points per bucket
        self._buckets: list[Bucket] = []
        self._open: list[Point] = []  # the points of the bucket to come
        self._ends: list[Point] = []  # the first point, and the last one in a bucket

    def add(self, step: float, value: float) -> None:
        self._open.append((step, value))
        if len(self._open) >= self.size:
            self._close()

    def _close(self) -> None:
        self._ends = [self.first, self.last]
        self._buckets.append(_bucket(self._open))
        self._open = []
        if len(self._buckets) >= BUCKETS:
            pairs = zip(self._buckets[::2], self._buckets[1::2], strict=True)
            self._buckets = [one.join(other) for one, other in pairs]
            self.size *= 2

    def __bool__(self) -> bool:
        """Whether there is a point."""
        return bool(self._buckets or self._open)

    @property
    def count(self) -> int:
        return len(self._buckets) * self.size + len(self._open)

    @property
    def first(self) -> Point:
        return (self._ends or self._open)[0]

    @property
    def last(self) -> Point:
        return (self._open or self._ends)[-1]

    @property
    def buckets(self) -> list[Bucket]:
        return self._buckets + ([_bucket(self._open)] if self._open else [])

    @property
    def low(self) -> Point:
        """Step and value of the lowest point."""
        return min((bucket.low for bucket in self.buckets), key=_value)

    @property
    def high(self) -> Point:
        return max((bucket.high for bucket in self.buckets), key=_value)

    def line(self) -> list[Point]:
        """The points themselves, or, if they are too many, the means of the buckets between the first and the last."""
        means = [(bucket.steps / bucket.size, bucket.total / bucket.size) for bucket in self.buckets]
        return means if self.size == 1 else [self.first, *means, self.last]


def _bucket(points: list[Point]) -> Bucket:
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    ends = ((steps[values.index(value)], value) for value in (low, high))
    return Bucket(len(points), sum(steps), sum(values), *ends)


@dataclass
class Curves:
    """What metrics.jsonl holds. `at`: step → metric → value, exactly, for the steps that were asked for."""

    series: dict[str, Series] = field(default_factory=dict)
    at: dict[int, dict[str, float]] = field(default_factory=dict)
    damaged: int = 0  # lines that are left out
    crowded: bool = False  # whether there are more than `METRICS` metrics

    def get(self, *names: str) -> dict[str, Series]:
        """Those of `names` that have a finite value."""
        return {name: self.series[name] for name in names if self.series.get(name)}

    def hours(self, steps: Sequence[float]) -> list[float]:
        """Hours of training until each of `steps`, interpolated between log lines."""
        known, seconds = zip((0.0, 0.0), *self.series["perf/train_seconds"].line(), strict=True)
        return (np.interp(steps, known, seconds) / 3600).tolist()  # type: ignore[no-any-return]


def read_curves(path: Path, steps: Collection[int] = ()) -> Curves:
    """The curves of a metrics.jsonl, line by line. Lines that are no record are counted and left out."""
    curves, isfinite = Curves(), math.isfinite
    decode = json.JSONDecoder().raw_decode  # two thirds of the time of `json.loads`
    for line in iter_lines(path):
        try:
            record, end = decode(text := line.decode())
            step = record.pop("step")
            if text[end:].strip() or type(step) is not int or not 0 <= step < 1 << 53:
                raise ValueError(step)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            curves.damaged += 1
            continue
        for name, value in record.items():
            if (series := curves.series.get(name)) is None:
                if len(curves.series) >= METRICS:
                    curves.crowded = True
                    continue
                series = curves.series[name] = Series()
            if type(value) is float and isfinite(value):
                series.add(step, value)
            elif type(value) is int and abs(value) < 1 << 1000:
                series.add(step, float(value))
            else:  # null stands for NaN and infinity
                series.missing += 1
        if step in steps:
            curves.at.setdefault(step, {}).update(record)
    return curves


def iter_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that may not exist, without a last one that is not complete. A line longer than `LONGEST_LINE`
    comes in pieces."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE):
            if line.endswith(b"\n") or len(line) == LONGEST_LINE:
                yield line


# ---- Charts: coordinates for charts.html, which needs no script


class Curve(NamedTuple):
    """One curve of a chart: its name in the legend, its colour (a CSS class), and what makes x of its steps."""

    name: str
    colour: str
    series: Series
    x: Callable[[Sequence[float]], Sequence[float]] = list
    dots: bool = False


class Drawn(NamedTuple):
    """A curve, or what is visible of it, in the units of the axes."""

    curve: Curve
    points: list[Point]
    ranges: list[tuple[float, Bucket]]  # x, and the bucket there

    def after(self, left: float) -> "Drawn":
        points = [point for point in self.points if point[0] >= left]
        return Drawn(self.curve, points, [pair for pair in self.ranges if pair[0] >= left])


def draw(curve: Curve) -> Drawn:
    line, buckets = curve.series.line(), curve.series.buckets
    xs = curve.x([step for step, _ in line])
    middles = curve.x([bucket.steps / bucket.size for bucket in buckets])
    points = [(x, value) for x, (_, value) in zip(xs, line, strict=True)]
    return Drawn(curve, points, list(zip(middles, buckets, strict=True)))


def chart(curves: list[Curve], unit: str, *, from_zero: bool = False, skip: float = 0.0) -> dict[str, Any] | None:
    """What the template draws: lines, behind them the range of each bucket, and ticks; None if there is no point.

    `unit`: the name of the x axis, which begins at 0, or, with `skip`, after that share of it. `from_zero`: whether the y
    axis begins at 0 too.
    """
    drawn = [draw(curve) for curve in curves if curve.series]
    right = max((x for each in drawn for x, _ in each.points), default=0.0) or 1.0
    left = right * skip
    drawn = [each for each in (each.after(left) for each in drawn) if each.points and each.ranges]
    if not drawn:
        return None
    low, high, peaks = limits(drawn, from_zero)
    log = not from_zero and 0 < low < high / 100
    place, scale = _scale(left, right), _log_scale(low, high) if log else _scale(low, high)
    return {
        "lines": [_paths(each, place, scale) for each in drawn],
        "x": [(f"{place(x) / SIDE:.2%}", label) for x, label in ticks(left, right)],
        "y": [(f"{1 - scale(y) / SIDE:.2%}", label) for y, label in (log_ticks if log else ticks)(low, high)],
        "unit": unit, "log": log, "peaks": [(spell_value(value), int(step)) for step, value in peaks],
    }  # fmt: skip


def limits(drawn: list[Drawn], from_zero: bool) -> tuple[float, float, list[Point]]:
    """The ends of the y axis, and the highest point of each curve that rises above it: a spike may be so high that all
    else would be a flat line. The first point stays, because a loss begins high."""
    lows = [bucket.low[1] for each in drawn for _, bucket in each.ranges]
    highs = [bucket.high[1] for each in drawn for _, bucket in each.ranges]
    usual_low, usual_high = float(np.quantile(lows, 0.02)), float(np.quantile(highs, 0.98))
    margin = max(usual_high - usual_low, abs(usual_high) / 10)
    ceiling = max([usual_high + margin, *(each.points[0][1] for each in drawn)])
    highest = [max((bucket.high for _, bucket in each.ranges), key=_value) for each in drawn]
    lowest = [min((bucket.low for _, bucket in each.ranges), key=_value) for each in drawn]
    low, high = min(value for _, value in lowest), max(value for _, value in highest)
    low, high = min(low, 0.0) if from_zero else low, min(high, ceiling)
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    return low, high, [point for point in highest if point[1] > ceiling]


def _scale(low: float, high: float) -> Callable[[float], float]:
    """low … high → coordinates, with a margin, so that no line is cut at the edge."""
    return lambda value: SIDE * (0.02 + 0.96 * (value - low) / (high - low))


def _log_scale(low: float, high: float) -> Callable[[float], float]:
    scale = _scale(math.log(low), math.log(high))
    return lambda value: scale(math.log(value)) if value > 0 else -SIDE


def _paths(drawn: Drawn, place: Callable[[float], float], scale: Callable[[float], float]) -> dict[str, str]:
    """Paths of SVG: the line, the ranges of the buckets, and a dot for each point of a short curve."""
    curve = drawn.curve

    def path(points: list[Point]) -> list[str]:
        far = 2 * SIDE  # as good as further: what is outside is not drawn
        return [f"{place(x):.0f},{SIDE - min(max(scale(y), -far), far):.0f}" for x, y in points]

    points = path(drawn.points)
    found = {"name": curve.name, "colour": curve.colour, "line": "M" + " ".join(points), "band": "", "dots": ""}
    if curve.series.size > 1:
        above = path([(x, bucket.high[1]) for x, bucket in drawn.ranges])
        below = path([(x, bucket.low[1]) for x, bucket in reversed(drawn.ranges)])
        found["band"] = "M" + " ".join(above + below) + "Z"
    if len(points) == 1 or (curve.dots and len(points) <= FEW):
        found["dots"] = "".join(f"M{point}h0" for point in points)
    return found


def spell_value(value: float) -> str:
    """Four digits, or a whole number."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


def ticks(low: float, high: float, most: int = 6) -> list[tuple[float, str]]:
    """Some round numbers from low to high, at most about `most`, and their labels."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [
        (number * step, tick_label(number * step, step, max(abs(low), abs(high)))) for number in range(first, last + 1)
    ]


def log_ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Powers of ten from low to high, at most six of them."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    every = max(1, -(-(last - first + 1) // 6))
    return [(10.0**power, tick_label(10.0**power, 10.0**power, 10.0**power)) for power in range(first, last + 1, every)]


def tick_label(value: float, step: float, largest: float) -> str:
    """`value` with as many digits as the `step` between two ticks needs, in a unit that suits the `largest`."""
    units = ((1e12, 1e12, "T"), (1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
    unit, letter = next(((unit, letter) for least, unit, letter in units if largest >= least), (1.0, ""))
    if largest < 0.01 or largest >= 1e16:
        power = math.floor(math.log10(largest))
        digits = max(0, power - math.floor(math.log10(step) + 1e-9))
        return f"{value / 10**power:.{digits}f}e{power}" if value else "0"
    digits = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    return f"{value / unit:,.{digits}f}{letter if value else ''}"
