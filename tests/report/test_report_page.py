"""Tests of the pages of `disttrain report` of one run and of several in a real browser, Debian's Chromium."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from disttrain.report import compare
from disttrain.report.page import write_report
from disttrain.runs.evaluation import FILE, Evaluation, Mistake
from disttrain.shards.pack import Options
from disttrain.shards.pack import pack as pack_samples
from kit import toy
from kit.run_files import CONFIG, eval_record, gpu_record, stamp, write_lines, write_run
from kit.run_results import metrics

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")

SECTIONS = ("summary", "learning", "speed", "devices", "classes", "examples", "network", "data", "setup")
EVIL = ("<script>alert(1)</script>", "$$\\frac{x}{y}$$", "emu & 'co'")
DRAWN = "[...document.querySelectorAll('.chart svg')].every((svg) => svg.childElementCount > 0)"

AXIS = "getComputedStyle(document.querySelector('.chart svg text')).fill"
"""The colour of the text at an axis, in the browser."""
TEXT = {"light": "rgb(86, 93, 104)", "dark": "rgb(169, 176, 186)"}

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Opens a page and fails the test if the page complains or asks for anything but itself."""
    contexts = []
    complaints: list[str] = []

    def open_page(path: Path, **options: Any) -> Any:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda m: m.type in ("error", "warning") and complaints.append(m.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}") or dialog.dismiss())
        page.on("request", lambda r: r.url.startswith(("data:", path.as_uri())) or complaints.append(r.url))
        page.goto(path.as_uri())
        page.wait_for_function(DRAWN)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run on two GPUs with restarts, checkpoints and a stall, on classes with evil names."""
    root = tmp_path_factory.mktemp("page")
    run = run_on(root, EVIL, gpus=4, status={"restarts": 1})
    (run / "logs").mkdir()
    events = (
        (0, "rank 0, process 17 on a"),
        (9, "saved x/step_00000010, the best"),
        (12, "rank 0, process 18 on a"),
    )
    text = "".join(f"{stamp(second)} INFO {what}\n" for second, what in events)
    (run / "logs/rank_00000.log").write_text(text)
    lines = metrics(run)
    lines[14]["step_time_s"] = 12.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_checkpoint(run, len(EVIL))
    return write_report(run)


MANY = tuple(f"class {n:03}, which has more than one name, such as kind {n} of things" for n in range(1000))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run on a thousand classes: 50 images each, 20 of which are taken for other classes."""
    run = run_on(tmp_path_factory.mktemp("many"), MANY)
    cells = [(n, n, 30) for n in range(1000)]
    cells += [(n, (n + 17 * step) % 1000, 1) for n in range(1000) for step in range(1, 21) if n != 700]
    cells += [(700, 300, 20)]
    record = eval_record(30, 0.6)
    found = msgspec.json.encode(Evaluation(record, 40_000, MANY, cells, [Mistake(0.9, 3, 0, 1)]))
    save_checkpoint(run, len(MANY), {FILE: found})
    return write_report(run)


def run_on(root: Path, classes: tuple[str, ...], **options: Any) -> Path:
    """Writes a run folder, and a small data set with these classes."""
    splits = {
        name: toy.Listed(toy.samples(toy.images(count, seed, (8, 8, 3))))
        for seed, (name, count) in enumerate({"train": 30, "val": 12}.items())
    }
    pack_samples("some", str(root / "data"), splits, classes, 3, Options())
    config = CONFIG.replace("{name: none}", f"{{name: some, root: {root / 'data'}}}")
    run = write_run(root / "run", config=config, **options)
    env = json.loads((run / "env.json").read_text())
    env["data"] = {"name": "some", "classes": classes, "shape": [3, 8, 8]}
    env["data"] |= {"mean": [0.5] * 3, "std": [0.2] * 3}
    (run / "env.json").write_text(json.dumps(env))
    return run


def save_checkpoint(run: Path, classes: int, files: dict[str, bytes] | None = None) -> None:
    """Saves a network that takes every image for the same class."""
    from disttrain.models import build_model
    from disttrain.runs import checkpoint

    model = build_model("cnn_mnist", num_classes=classes, in_channels=3, image_size=(8, 8), args={})
    for parameter in model.parameters():  # equal scores: every image is taken for the longest name
        parameter.data.zero_()
    arithmetic = {"precision": "fp32", "channels_last": False, "device": "cpu"}
    state = {"step": 30, "arithmetic": arithmetic}
    taken = checkpoint.snapshot(30, {"model": model.state_dict()}, state, files=files or {})
    checkpoint.write(run / "checkpoints", taken, keep=1, best=True)


def ticks(page: Any, name: str, axis: str = "x") -> list[str]:
    """Returns the texts at an axis of a chart, those of y from below."""
    texts: list[str] = page.locator(f"#chart-{name} svg text.{axis}").all_text_contents()
    return texts


def plot_area(page: Any, name: str) -> dict[str, float]:
    """Returns the place of a chart's curves on the screen."""
    chart = page.locator(f"#chart-{name} svg")
    chart.scroll_into_view_if_needed()
    box: dict[str, float] = chart.bounding_box()
    return box


@pytest.mark.integration
def test_every_section_and_chart_is_there_and_evil_names_are_text(report: Path, open_page: Open) -> None:
    page = open_page(report)
    for name in SECTIONS:
        assert page.locator(f"section#{name} h2").is_visible()
    charts = page.locator(".chart").evaluate_all("(all) => all.map((one) => one.id)")
    assert charts == [
        f"chart-{name}"
        for name in ("accuracy", "loss", "lr", "images_per_s", "data_wait_pct",
                     "time_utilization_pct", "time_memory_gib", "time_power_w", "time_temperature_c")
    ]  # fmt: skip
    for chart in charts:
        assert page.locator(f"#{chart} svg path[stroke='#2f7fd1']").count() > 0
    page.locator("#data summary", has_text="Class balance").click()
    for name in EVIL:
        assert page.locator("#data th", has_text=name).is_visible()
        assert page.locator(f"#examples img[alt^={json.dumps(name)}]").count() > 0
    assert page.locator("h1").inner_text() == "demo"
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    broken = "(all) => all.filter((one) => one.naturalWidth === 0).length"
    assert page.locator("img").evaluate_all(broken) == 0
    assert page.locator("#devices summary", has_text="Events in order").is_visible()
    assert "step 14 took 12 s, 12 times" in page.locator("#devices").evaluate("(all) => all.textContent")


@pytest.mark.integration
def test_hover_and_arrow_keys_name_values_and_dragging_zooms_a_group(report: Path, open_page: Open) -> None:
    page = open_page(report)
    before, times = ticks(page, "loss"), ticks(page, "time_power_w")
    assert before[-1] == "3"
    box, tip = plot_area(page, "loss"), page.locator("#chart-loss .tip")
    middle = box["y"] + 0.4 * box["height"]
    page.mouse.move(box["x"] + 0.66 * box["width"], middle)
    for text in ("epoch 2\nstep 20\ntime since the start 20 s\n", "training 0.1\n", "validation 0.2"):
        assert text in tip.inner_text()
    page.mouse.down()
    page.mouse.move(box["x"] + 0.45 * box["width"], middle, steps=5)
    page.mouse.up()
    assert 1 < float(ticks(page, "loss")[0]) < float(ticks(page, "loss")[-1]) < 2.5
    assert ticks(page, "images_per_s") == ticks(page, "loss")
    assert ticks(page, "time_power_w") == times, "another group"
    page.mouse.dblclick(box["x"] + 0.5 * box["width"], middle)
    assert ticks(page, "loss") == before
    page.mouse.move(0, 0)
    assert not tip.is_visible()
    page.locator("#chart-loss svg").focus()
    page.keyboard.press("ArrowRight")
    first = tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert first != tip.inner_text()
    page.locator("#chart-time_power_w svg").focus()
    page.keyboard.press("ArrowRight")
    assert "2026-11-20 23:59:31 UTC" in page.locator("#chart-time_power_w .tip").inner_text()


@pytest.mark.integration
def test_axes_scale_and_curves_are_chosen(report: Path, open_page: Open) -> None:
    page = open_page(report)
    chart = page.locator("#chart-loss")
    chart.hover()
    clipped = float(ticks(page, "loss", "y")[-1])
    chart.get_by_label("clip outliers").uncheck()
    assert clipped < float(ticks(page, "loss", "y")[-1]) == 2, "the first step"
    chart.get_by_label("log").check()
    assert {"0.1", "1"} <= set(ticks(page, "loss", "y"))
    assert page.locator("#chart-accuracy .name").text_content() == "epoch"
    chart.get_by_label("x").select_option("step")
    assert ticks(page, "accuracy")[-1] == "30"
    chart.get_by_label("x").select_option("time")
    assert page.locator("#chart-accuracy .name").text_content() == "time since the start"
    drawn = "(all) => all.map((one) => one.getAttribute('d'))"
    curve = chart.locator("svg path[stroke='#2f7fd1']")
    whole = curve.evaluate_all(drawn)
    chart.get_by_label("smoothing").fill("10")
    assert curve.evaluate_all(drawn) != whole
    assert curve.count() == 2, "as recorded, and the mean"
    chart.get_by_role("button", name="training").click()
    assert curve.count() == 0
    dots = chart.locator("svg circle")
    assert dots.count() == 3, "an evaluation after each epoch"


@pytest.mark.integration
def test_a_click_or_the_keyboard_enlarges_an_image(report: Path, open_page: Open) -> None:
    page = open_page(report)
    small = page.locator("#examples .enlarge").first
    small.focus()
    page.keyboard.press("Enter")
    large = page.locator("dialog img")
    assert large.bounding_box()["width"] > 4 * small.bounding_box()["width"]
    assert large.get_attribute("alt") == small.locator("img").get_attribute("alt")
    page.keyboard.press("Escape")
    assert not large.is_visible()
    page.locator("#network .enlarge").last.click()
    assert "Activation maps of layer" in page.locator("dialog p").inner_text()
    page.get_by_role("button", name="close").click()
    assert not large.is_visible()


def luminance(color: str) -> float:
    """Returns how bright a CSS colour is, 0..1; colours as rgb(r, g, b)."""
    return sum(map(float, color.removeprefix("rgb(").rstrip(")").split(","))) / 3 / 255


@pytest.mark.integration
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280, 2200])
def test_it_fits_the_screen_and_follows_the_colours(
    scheme: str, width: int, report: Path, open_page: Open
) -> None:
    page = open_page(report, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    back = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    text = luminance(page.evaluate("getComputedStyle(document.body).color"))
    assert (back > 0.9, text < 0.2) == ((True, True) if scheme == "light" else (False, False))
    assert page.evaluate(AXIS) == TEXT[scheme]
    for chart in page.locator(".chart").all():
        box = chart.bounding_box()
        assert box["width"] >= min(300, width - 60)
        assert box["x"] + box["width"] <= width
        assert box["height"] >= 250


@pytest.mark.integration
def test_the_charts_turn_with_the_colours_and_for_the_printer(report: Path, open_page: Open) -> None:
    page = open_page(report, color_scheme="light")
    page.wait_for_function(f"{AXIS} === '{TEXT['light']}'")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{AXIS} === '{TEXT['dark']}'")
    page.emulate_media(color_scheme="dark", media="print")
    page.wait_for_function(f"{AXIS} === '{TEXT['light']}'")
    assert not page.locator("nav").is_visible()
    assert luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) == 1
    assert page.pdf(format="A4").startswith(b"%PDF")


@pytest.mark.integration
def test_a_finger_scrolls_the_page_over_a_chart(report: Path, open_page: Open) -> None:
    page = open_page(report, viewport={"width": 360, "height": 800}, has_touch=True, is_mobile=True)
    box = plot_area(page, "loss")
    page.wait_for_function(f"{AXIS} === '{TEXT['light']}'")
    touched = "([x, y]) => getComputedStyle(document.elementFromPoint(x, y)).touchAction"
    middle = [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2]
    assert page.evaluate(touched, middle) == "auto"


COLORED = """() => {
    const { width, height } = document.querySelector("#matrix canvas");
    const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    copy.drawImage(document.querySelector("#matrix canvas"), 0, 0);
    const { data } = copy.getImageData(0, 0, width, height), colors = new Set();
    for (let n = 0; n < data.length; n += 4) {
        const [red, green, blue] = data.slice(n, n + 3);
        colors.add(green > 1.3 * Math.max(red, blue) ? "green" : blue > 1.4 * red ? "blue" : "other");
    }
    return [...colors].sort();
}"""
"""Which colours the matrix shows."""


@pytest.mark.integration
@pytest.mark.parametrize(("width", "scheme"), [(400, "dark"), (1300, "light")])
def test_the_matrix_of_a_thousand_classes_can_be_zoomed(
    width: int, scheme: str, many: Path, open_page: Open
) -> None:
    assert many.stat().st_size < 3_000_000
    page = open_page(many, viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    says, canvas = page.locator("#matrix output"), page.locator("#matrix canvas")
    assert page.evaluate(COLORED) == ["blue", "green", "other"]
    pair = page.locator("button.cell").first
    assert "40.0 %" in pair.locator("xpath=ancestor::tr").inner_text()
    pair.click()
    told = f"true: {MANY[700]}, predicted: {MANY[300]}: 20 images (40.0 % of the 50 of this class)"
    assert says.inner_text() == told
    assert page.locator("canvas.zoomed").count() == 1
    assert page.evaluate(COLORED) == ["blue", "other"], "the diagonal is elsewhere"
    page.get_by_role("button", name="whole").click()
    assert page.locator("canvas.zoomed").count() == 0
    page.get_by_label("Show a class").fill("class 123")
    page.keyboard.press("Enter")
    assert says.inner_text() == f"true and predicted: {MANY[123]}: 30 images (60.0 % of the 50 of this class)"
    page.get_by_role("button", name="whole").click()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for action, share in ((page.mouse.move, 0.5), (page.mouse.move, 0.7)):
        action(box["x"] + share * box["width"], box["y"] + share * box["height"])
        page.mouse.down()
    page.mouse.up()
    assert page.locator("canvas.zoomed").count() == 1
    assert page.evaluate(COLORED) == ["blue", "green", "other"]
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.9 * box["height"])
    assert says.inner_text().startswith("true")
    assert says.inner_text() != told


@pytest.mark.integration
def test_the_table_of_a_thousand_classes_is_sorted_and_searched(many: Path, open_page: Open) -> None:
    page = open_page(many)
    page.locator("#classes summary", has_text="1,000 classes").click()
    names = page.locator("#classes tbody th[scope=row]")
    assert names.count() == 1000
    assert names.first.inner_text() == MANY[0]
    page.locator("#classes thead button", has_text="precision").click()
    assert names.first.inner_text() == MANY[300], "20 more images are taken for it"
    page.locator("#classes thead button", has_text="class").click()
    page.locator("#classes thead button", has_text="class").click()
    assert names.first.inner_text() == MANY[999]
    page.get_by_label("find a class").first.fill("CLASS 70")
    assert page.locator("#classes tbody tr:not([hidden]) th[scope=row]").count() == 10
    link = page.locator("#classes a", has_text="report_classes.csv").get_attribute("href")
    assert (many.parent / link).read_text().count("\n") == 1001


@pytest.mark.integration
def test_the_comparison_in_the_browser(tmp_path: Path, open_page: Open) -> None:
    names = ("a", EVIL[1].replace("/", "|"), "c <script>alert(3)<|script>")
    paths = [
        write_run(tmp_path / name, accuracies=(0.5, 0.6, 0.7 + n / 100), config=f"{CONFIG}seed: {n}\n")
        for n, name in enumerate(names)
    ]
    page = open_page(compare.write_comparison(compare.compare(paths), tmp_path / "page.html"))
    for name in ("results", "curves", "seeds", "differences"):
        assert page.locator(f"section#{name} h2").is_visible()
    assert page.locator("#curves svg circle").count() == 2 * 3 * 3
    assert page.locator("#seeds td", has_text="71.00 % ± 1.00").is_visible()
    assert page.locator("#differences tr", has_text="seed").is_visible()
    assert page.locator("#results th", has_text=names[2]).is_visible()


@pytest.mark.integration
def test_of_many_gpus_the_curves_are_smooth_and_their_range_is_behind(
    tmp_path: Path, open_page: Open
) -> None:
    run = write_run(tmp_path / "run")
    readings = [
        gpu_record(
            second, number, power_w=1200.0 if (second, number) == (300, 3) else 500 + 10 * (second % 2)
        )
        for second in range(600)
        for number in range(12)
    ]
    write_lines(run / "gpu.jsonl", readings)
    page = open_page(write_report(run))
    power = page.locator("#chart-time_power_w")
    assert "12 curves; the pointer names the nearest; gray: the range of all" in power.inner_text()
    drawn = "#chart-time_power_w svg g[clip-path] path"
    spread = page.locator(drawn).first
    assert spread.get_attribute("shape-rendering") == "crispEdges"
    tops = [float(part.partition("V")[2]) for part in (spread.get_attribute("d") or "").split("M")[1:]]
    usual = statistics.median(tops)
    assert sum(top < usual - 50 for top in tops) in (1, 2, 3), "one reading of one GPU is far above"
    heights = [
        [float(place) for place in re.findall(r"[ML][\d.]+ ([\d.]+)", line.get_attribute("d") or "")]
        for line in page.locator(drawn).all()[1:]
    ]
    assert len([line for line in heights if line]) == 12
    assert min(min(line) for line in heights if line) > min(tops) + 30, "means of many readings"
    power.hover()
    power.locator("input[type=range]").fill("0")
    assert page.locator(drawn).first.get_attribute("shape-rendering") is None
