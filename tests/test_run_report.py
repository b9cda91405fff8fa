"""The page of a run: figures that are those of its files, curves of bounded size, foreign text that stays text."""

import itertools
import json
import random
import re
import shlex
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, find_chromium
from conftest import metrics, train
from markupsafe import escape
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from test_html_report import EVIL, Page

from training.monitoring.tracking import _cut_metrics, _cut_samples
from training.report import report
from training.report.__main__ import main
from training.report.comparison import have_same_data, html_comparison
from training.report.curves import BUCKETS, Curve, Series, chart, read_curves
from training.report.folder import EVENTS, SAMPLES, folder_bytes, read_run, read_samples
from training.report.plot import draw_losses
from training.report.report import WHOLE
from utils.cli import UserError, parse_config
from utils.config import TrainConfig
from utils.report import CONTROLS


def write_metrics(path: Path, steps: int) -> None:
    """A log line per step, an evaluation every 100th."""
    numbers = random.Random(0)
    with path.open("w") as file:
        for step in range(1, steps + 1):
            figures = {"train/loss": 3 + 5 / step + numbers.random(), "perf/train_seconds": step * 0.5}
            file.write(json.dumps({"step": step, **figures}) + "\n")
            if step % 100 == 0:
                file.write(json.dumps({"step": step, "eval/loss": 3 + 5 / step}) + "\n")


# ---- Curves


@pytest.mark.parametrize("count", [1, BUCKETS - 1, BUCKETS, BUCKETS + 1, 5 * BUCKETS + 3, 50_001])
def test_a_thinned_curve_is_bounded_and_keeps_ends_extremes_and_means(count):
    values = np.random.default_rng(0).normal(size=count)
    values[count // 3], values[count // 2] = -50.0, 100.0  # a spike between many other points
    series = Series()
    for step, value in enumerate(values.tolist(), start=1):
        series.add(step, value)
    assert len(series.buckets) <= BUCKETS and series.count == count
    assert series.first == (1, values[0]) and series.last == (count, values[-1])
    assert series.low == (int(values.argmin()) + 1, values.min())
    assert series.high == (int(values.argmax()) + 1, values.max())
    assert sum(bucket.size for bucket in series.buckets) == count
    start = 0
    for bucket in series.buckets:
        part = values[start : start + bucket.size]
        assert bucket.total == pytest.approx(part.sum()) and bucket.high[1] == part.max()
        assert bucket.steps == sum(range(start + 1, start + len(part) + 1))
        start += bucket.size
    if count < BUCKETS:
        assert series.line() == list(enumerate(values.tolist(), start=1))
    assert series.line()[0] == series.first and series.line()[-1] == series.last


def test_memory_and_page_do_not_grow_with_the_run(tmp_path):
    peaks, sizes = [], []
    for steps in (2_000, 10_000):
        write_metrics(tmp_path / "metrics.jsonl", steps)
        report.html_report(read_run(tmp_path))  # compiles the templates
        tracemalloc.start()
        sizes.append(len(report.html_report(read_run(tmp_path))))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] and sizes[1] < 1.5 * sizes[0] < 150_000


def test_a_spike_does_not_flatten_the_curve_and_is_named():
    series = Series()
    for step in range(1, 101):
        series.add(step, 4.0 - step / 100 if step != 50 else 900.0)
    drawn = chart([Curve("loss", "s0", series)], "step")
    heights = [int(pair.split(",")[1]) for pair in drawn["lines"][0]["line"].removeprefix("M").split()]
    assert max(heights) - sorted(heights)[1] > 300 and drawn["peaks"] == [("900", 50)]
    assert heights[49] < 0  # outside of the picture


def test_damaged_lines_are_counted_and_end_nothing(tmp_path):
    good = {"step": 3, "train/loss": 2.5, "router/balance": 7, "note": "text"}
    lines = ["", "{", "[1]", "null", '{"step": "3"}', '{"train/loss": 1}', '{"step": 1e3, "a": 1}', '{"step": 1} x',
             "[" * 5000, json.dumps(good), '{"step": 4, "train/loss": null, "router/balance": NaN}', "\0"]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes(
        "\n".join(lines).encode() + b"\n\xff\xfe\n" + b'{"step": 9, "train/loss": 0.0'
    )
    curves = read_curves(tmp_path / "metrics.jsonl", {3})
    assert curves.damaged == len(lines) - 2 + 1
    assert [curves.series["train/loss"].last, curves.series["train/loss"].missing] == [(3, 2.5), 1]
    assert curves.at == {3: {name: value for name, value in good.items() if name != "step"}}
    page = Page(report.html_report(read_run(tmp_path)))
    assert "router/balance" in page.text and "11 lines" in page.text and "1 not finite" in page.text


def test_samples_are_the_first_the_last_and_some_between(tmp_path):
    path = tmp_path / "samples.md"
    for count in (1, 2, 100, 1000):
        path.write_text("".join(f"## Step {step}\n\n```\ntext {step}\n```\n\n" for step in range(1, count + 1)))
        found = read_samples(path)
        steps = [step for step, _ in found]
        assert found[0] == (1, "text 1") and found[-1] == (count, f"text {count}")
        assert len(set(steps)) == len(steps) == min(count, SAMPLES) and steps == sorted(steps)
        assert count < SAMPLES or max(np.diff(steps)) < 2 * count / (SAMPLES - 1)


def test_a_heading_in_the_text_of_a_sample_begins_no_sample(tmp_path):
    """A model that has read a tutorial writes `## Step 1` too. A resumed run drops samples as a whole."""
    path = tmp_path / "samples.md"
    samples = {step: f"text {step}\n## Step 1\nInstall it" for step in (10, 20, 30)}
    path.write_text("".join(f"## Step {step}\n\n```\n{text}\n```\n\n" for step, text in samples.items()))
    assert read_samples(path) == list(samples.items())
    with path.open("ab") as file:
        file.write("## Step 40\n\n```\n語".encode()[:-1])  # the disk was full
    _cut_samples(path, 20)
    assert read_samples(path) == list(samples.items())[:2] and path.read_bytes().endswith(b"Install it\n```\n\n")


def test_damaged_metrics_do_not_stop_a_resumed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": 1, "train/loss": 2.0}', b"\xff\xfe", b"[" * 100_000, b'{"step": 2, "train/loss": 1.0}']
    path.write_bytes(b"\n".join(lines))
    assert _cut_metrics(path, 1, 1) == (2, -1)
    assert path.read_bytes() == lines[0] + b"\n"


# ---- The page of a run


def test_the_page_of_a_run_holds_its_figures(finished_run, dataset):
    text = (finished_run / "report.html").read_text(encoding="utf-8")
    page, summary = Page(text), json.loads((finished_run / "summary.json").read_text())
    assert page.open == [] and page.tags["svg"] >= 8
    assert "finished (max_steps)" in page.text and "10 of 10" in page.text
    for figure in ("best_loss", "bits_per_byte"):
        assert f"{summary[figure]:.{4 if figure == 'best_loss' else 3}f}" in page.text
    (evaluation,) = [
        record["eval/loss"] for record in metrics(finished_run) if record["step"] == 10 and "eval/loss" in record
    ]
    (training,) = [
        record["train/loss"] for record in metrics(finished_run) if record["step"] == 10 and "train/loss" in record
    ]
    assert page.row("10")[1:4] == ["best, last", f"{training:.4f}", f"{evaluation:.4f}"]
    assert page.row("model.hidden_size") == ["model.hidden_size", "32", "null"]
    assert not [row for row in page.rows if row[:1] == ["seed"]]  # it has its default
    manifest = json.loads((dataset / "manifest.json").read_text())
    assert page.row("train")[3] == f"{manifest['splits']['train']['tokens']:,}"
    samples = (finished_run / "samples.md").read_text()
    for sample in re.findall(r"```\n(.*?)\n```\n", samples, re.S):
        assert sample.strip("\n")[:100].translate(CONTROLS) in page.text
    assert page.tags["figure"] == 2 and "loss.png" in page.text
    assert not {"script", "img", "link", "iframe"} & page.tags.keys()
    rows = [row for row in page.rows if row and row[0] == "packages.torch"]
    assert len(rows) == 1


def test_the_command_on_the_page_continues_the_run(finished_run):
    run = read_run(finished_run)
    (line, export, evaluate) = [words for _, words in report.commands(run)]
    assert str(escape(line)) in (finished_run / "report.html").read_text()
    words = shlex.split(line)
    config = parse_config(TrainConfig, None, words[words.index("--config") :])
    assert config.checkpoint.resume == "auto" and config.output == str(finished_run) and config.model.hidden_size == 32
    assert (Path(words[3])).is_file() and words[:3] == ["accelerate", "launch", "--config_file"]
    assert shlex.split(export)[3] == shlex.split(evaluate)[3] == str(finished_run)


def test_the_summary_says_how_a_run_ended(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    write_metrics(run / "metrics.jsonl", 20)
    page = Page(report.html_report(read_run(run))).text
    assert "running" in page and "20 of 800" in page and "about 6.5 min left" in page
    (run / "summary.json").write_text(json.dumps({"finished": False, "reason": "error", "error": "loss is NaN"}))
    page = Page(report.html_report(read_run(run))).text
    assert "stopped (error)" in page and "loss is NaN" in page and "s left" not in page


def test_a_checkpoint_that_vanishes_meanwhile_ends_nothing(tmp_path, monkeypatch):
    """The thread that writes checkpoints may remove an old one."""
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "b").symlink_to("removed")
    assert folder_bytes(tmp_path) == 3
    monkeypatch.setattr(Path, "is_file", lambda self: True)  # it was there a moment ago
    assert folder_bytes(tmp_path) in (0, 3)


def test_events_are_the_newest_warnings_and_resumes(tmp_path):
    lines = [f"2026-12-01 10:00:{number % 60:02},123 WARNING step {number}: skipped" for number in range(EVENTS)]
    lines[9:9] = ["2026-12-01 10:00:00,123 INFO step  20/1234 | train | loss 2.0", "no line of a log",
                  "2026-12-01 10:00:00,123 INFO resumed from x at step 20", "2026-12-01 10:00:00,123 INFO data: x"]  # fmt: skip
    (tmp_path / "training.log").write_text("\n".join(lines) + "\n")
    run = read_run(tmp_path)
    assert run.max_steps == 1234 and len(run.events) == EVENTS
    assert [message for _, _, message in run.events[7:10]] == [
        "step 8: skipped",
        "resumed from x at step 20",
        "step 9: skipped",
    ]


def test_a_page_that_cannot_be_written_is_one_warning(dataset, tmp_path, monkeypatch):
    def fail(run):
        raise ZeroDivisionError("no page")

    monkeypatch.setattr(report, "html_report", fail)
    records = train(tmp_path / "run", data__dataset=dataset, evaluation__every_steps=1, schedule__max_steps=2)
    assert sum("eval/loss" in record for record in records) == 2 and not (tmp_path / "run" / "report.html").exists()
    warned = [line for line in (tmp_path / "run" / "training.log").read_text().splitlines() if "report.html" in line]
    assert len(warned) == 1 and "no page" in warned[0]


def hostile_run(folder: Path) -> Path:
    """A run whose files hold markup wherever they can hold text."""
    data = folder / "<data>"
    data.mkdir(parents=True)
    figures = {"documents": 3, "bytes": 30, "tokens": 10}
    (data / "manifest.json").write_text(json.dumps({
        "key": EVIL, "documents_read": 3, "dropped": {EVIL: 0}, "tokenizer": {"vocab_size": 7, "from": EVIL},
        "splits": {EVIL: figures | {"sources": {EVIL: figures, "b": figures}}},
    }))  # fmt: skip
    (data / "report.html").touch()
    run = folder / "<img src=x>'\"& run"
    run.mkdir()
    options = {"output": EVIL, "data": {"dataset": str(data)}, "model": {"pretrained": EVIL, "overrides": {EVIL: EVIL}}}
    (run / "config.yaml").write_text(json.dumps(options))
    launch = {"time": EVIL, "command": [EVIL, EVIL], "git_commit": EVIL, "packages": {EVIL: EVIL}, "device": EVIL,
              "num_processes": EVIL, "mixed_precision": EVIL}  # fmt: skip
    (run / "environment.json").write_text(json.dumps([launch, launch]))
    (run / "summary.json").write_text(json.dumps({"finished": False, "reason": EVIL, "error": EVIL}))
    lines = [{"step": 1, "train/loss": 2.0, EVIL: 1.0}, {"step": 2, "train/loss": 1.0, EVIL: 5.0, "eval/loss": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "samples.md").write_text(f"## Step 2\n\n```\n\0{EVIL}\u202e\n```\n\n")
    (run / "training.log").write_text(f"2026-12-01 10:00:00,123 WARNING {EVIL}\x1b[31m\n")
    return run


def test_nothing_in_a_run_folder_becomes_markup(tmp_path):
    run = hostile_run(tmp_path)
    for text, least in (
        (report.html_report(read_run(run)), 20),
        (html_comparison([read_run(run), read_run(tmp_path)]), 5),
    ):
        page = Page(text)
        text.encode()
        assert page.open == [] and page.text.count("<script>alert(") >= least
        assert (
            not {"script", "img", "link", "iframe", "data"} & page.tags.keys()
            and "\0" not in text
            and "\x1b" not in text
        )
        assert page.attributes <= {
            "lang", "charset", "name", "content", "http-equiv", "class", "style", "open", "dir", "href", "id", "for", "type",
            "checked", "viewbox", "preserveaspectratio", "role", "aria-label", "d",
        }  # fmt: skip
        assert "url(" not in text and "@import" not in text and "javascript:" not in text
        with pytest.raises(AssertionError):  # a single unescaped place would be noticed
            Page(text.replace(str(escape(EVIL)), EVIL, 1))


# ---- Several runs


@pytest.fixture
def two_runs(finished_run, tmp_path) -> list[Path]:
    """The finished run, and a copy that says it had another learning rate and got another loss."""
    other = tmp_path / "other"
    shutil.copytree(finished_run, other, symlinks=True)
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("learning_rate: 0.003", "learning_rate: 0.5"))
    lines = [record | ({"eval/loss": 9.8765} if "eval/loss" in record else {}) for record in metrics(other)]
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [finished_run, other]


def test_a_comparison_shows_only_the_options_that_differ(two_runs):
    page = Page(html_comparison([read_run(run) for run in two_runs]))
    names = [run.name for run in two_runs]
    at = page.rows.index(["option", *names])
    assert page.rows[at:] == [["option", *names], ["optimizer.learning_rate", "0.003", "0.5"]]
    best = json.loads((two_runs[0] / "summary.json").read_text())["best_loss"]
    assert page.row(names[0])[1:4] == ["finished (max_steps)", "10", f"{best:.4f}"]
    assert page.row("other")[3] == "9.8765"


def test_runs_have_different_data_only_if_something_says_so(two_runs):
    """A run without a checkpoint does not know the key of its dataset."""
    one, other = map(read_run, two_runs)
    assert have_same_data([one, other]) and "different datasets" not in html_comparison([one, other])
    for key, folder, same in (
        (one.dataset_key, "moved", True),
        ("other", one.options["data.dataset"], False),
        (None, one.options["data.dataset"], True),
        (None, "other", False),
    ):
        changed = replace(other, dataset_key=key, options=other.options | {"data.dataset": folder})
        assert have_same_data([one, changed]) is same
        assert ("different datasets" in html_comparison([one, changed])) is not same


def test_runs_compare_by_the_loss_on_all_documents_if_one_has_scored_a_part(two_runs):
    one, other = map(read_run, two_runs)
    assert not Page(html_comparison([one, other])).text.count(WHOLE)
    part = replace(other, options=other.options | {"evaluation.max_tokens": 1000})
    page = Page(html_comparison([one, part]))
    (head,) = [row for row in page.rows if WHOLE in row]
    for run in (one, part):
        assert page.row(run.name)[head.index(WHOLE)] == f"{run.summary['eval_loss']:.4f}"
    stopped = replace(part, summary=part.summary | {"finished": False})
    assert page.row("other") != Page(html_comparison([one, stopped])).row("other")
    assert WHOLE not in report.figures_of(stopped)


def test_runs_of_one_name_are_told_apart_by_their_paths(two_runs, tmp_path):
    (tmp_path / "deeper").mkdir()
    same = shutil.copytree(two_runs[1], tmp_path / "deeper" / "other", symlinks=True)
    page = Page(html_comparison([read_run(run) for run in (two_runs[1], same)]))
    first, second = [row[0] for row in page.rows[1:3]]
    assert first != second and first.endswith("/other") and second.endswith("deeper/other")
    assert "All options are the same" in page.text


def test_the_command_overwrites_its_own_pages_only(two_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [str(run) for run in two_runs]
    for _ in range(2):
        main(runs)
    assert "Comparison" in (tmp_path / "comparison.html").read_text()
    (two_runs[1] / "report.html").unlink()
    main(runs[1:])
    assert "9.8765" in (two_runs[1] / "report.html").read_text()
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    for output in ("mine.html", "."):
        with pytest.raises(UserError, match="no page of a run"):
            main([*runs, "--output", output])
    assert (tmp_path / "mine.html").read_text() == "<p>mine</p>"
    for arguments in (["nowhere"], [str(tmp_path)], [], [*runs, "--output", "no/where.html"], [*runs, "--outptu", "x"]):
        with pytest.raises(UserError):
            main(arguments)


# ---- Pictures


def test_the_plot_shows_the_losses_and_the_learning_rate(finished_run):
    """The points are those of metrics.jsonl, and the picture has the colours of all lines."""
    records = metrics(finished_run)
    figure = draw_losses(finished_run / "metrics.jsonl")
    above, below = figure.axes
    drawn = {line.get_label().split(":")[0]: list(map(tuple, line.get_xydata())) for line in above.get_lines()}
    assert drawn == {
        name: [(record["step"], record[name]) for record in records if name in record]
        for name in ("train/loss", "eval/loss")
    }
    assert [len(points) for points in drawn.values()] == [10, 2]
    rates = [(record["step"], record["train/learning_rate"]) for record in records if "train/learning_rate" in record]
    assert [tuple(point) for point in below.get_lines()[0].get_xydata()] == rates
    assert finished_run.name in figure.get_suptitle()
    colours = [to_rgb(line.get_color()) for line in above.get_lines()]
    apart = [max(abs(one - other) for one, other in zip(*pair, strict=True)) for pair in
             itertools.combinations([*colours, to_rgb(above.get_facecolor())], 2)]  # fmt: skip
    assert min(apart) > 0.3  # from each other and from the background
    pixels = (imread(finished_run / "loss.png")[..., :3] * 255).round().astype(int)
    for line in above.get_lines():
        colour = [round(255 * part) for part in to_rgb(line.get_color())]
        thick = (abs(pixels - colour) <= 1).all(axis=-1).sum(axis=0)  # pixels of this colour in each column
        assert (thick > 0).sum() > pixels.shape[1] / 4, line.get_label()  # much more than its mark in the legend


FIRST = {"light": "#0072b2", "dark": "#56b4e9"}


def colour_of(name: str) -> np.ndarray:
    return np.array([int(name[at : at + 2], 16) for at in (1, 3, 5)])


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine")
def test_the_pages_look_right_in_a_browser(finished_run, two_runs, dataset, tmp_path):
    """On a phone and a desktop, in light and dark mode."""
    long = shutil.copytree(finished_run, tmp_path / "long", symlinks=True)
    write_metrics(long / "metrics.jsonl", 3000)
    pages = {"run": finished_run, "long": long, "hostile": hostile_run(tmp_path / "hostile")}
    for name, run in pages.items():
        (tmp_path / f"{name}.html").write_text(report.html_report(read_run(run)), encoding="utf-8")
    (tmp_path / "comparison.html").write_text(html_comparison([read_run(run) for run in two_runs]), encoding="utf-8")
    shutil.copy(dataset / "report.html", tmp_path / "data.html")
    with Browser(tmp_path / "profile") as browser:
        for name in (*pages, "comparison", "data"):
            for width, scheme in itertools.product((390, 1280), ("light", "dark")):
                picture = tmp_path / f"{name}_{width}_{scheme}.png"
                browser.open(tmp_path / f"{name}.html", width, scheme)
                what = (name, width, scheme)
                assert browser.value("document.documentElement.scrollWidth") <= width, what
                assert browser.value(SMALLEST_FONT) >= 12, what
                assert browser.value(COVERED_LABELS) == [], what
                browser.screenshot(picture)
                pixels = (imread(picture)[..., :3] * 255).round().astype(int)
                assert pixels.shape[1] == width, what
                background = pixels[2, 2]
                assert (background < 60).all() if scheme == "dark" else (background > 240).all(), what
                assert 0.02 < (abs(pixels - background).max(axis=-1) > 40).mean() < 0.6, what  # text and lines
                if name != "data":
                    # In the comparison the second curve covers the first.
                    colours = {"light": "#d55e00", "dark": "#e69f00"} if name == "comparison" else FIRST
                    line = colour_of(colours[scheme])
                    assert ((abs(pixels - line) <= 12).all(axis=-1)).sum() > width / 2, what
        browser.open(tmp_path / "run.html", 1280, "light")
        assert browser.value(VISIBLE_TABS) == ["by step"]
        browser.value("document.querySelectorAll('.tabs > label')[2].click()")
        assert browser.value(VISIBLE_TABS) == ["by hours"]


SMALLEST_FONT = """Math.min(...[...document.querySelectorAll('body *')]
  .filter(element => [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim()))
  .filter(element => element.tagName != 'STYLE').map(element => parseFloat(getComputedStyle(element).fontSize)))"""
# Labels of one axis that cover each other or leave the window.
COVERED_LABELS = """[...document.querySelectorAll('.box')].flatMap(box => ['x', 'y'].flatMap(axis => {
  const spots = [...box.querySelectorAll('span.' + axis)].map(label => label.getBoundingClientRect());
  return spots.filter((one, at) => one.width && (one.left < 0 || one.right > innerWidth || spots.slice(at + 1).some(other =>
    one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom)))
    .map(one => axis + one.left) }))"""
VISIBLE_TABS = """[...document.querySelectorAll('.tabs')].flatMap(tabs => {
  const labels = [...tabs.querySelectorAll(':scope > label')], shown = [...tabs.querySelectorAll(':scope > div')];
  return labels.filter((_, at) => shown[at].offsetHeight > 0).map(label => label.textContent) })"""
