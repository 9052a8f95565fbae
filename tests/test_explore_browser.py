"""The page of explore.py in a real browser, opened as a file: what it shows is what the model computed."""

import re

import matplotlib
import numpy as np
import pytest
from playwright.sync_api import expect

from interpretability.common.trained import TrainedRun
from interpretability.explore import make_page
from tests.explored import traced, traced_scores, train_runs

IMAGES = (4, 9, 20, 31)
SIDE = 4  # patches along an image
# one colour of each element with text of its own, and of what is behind it
COLORS = """() => [...document.querySelectorAll("body *")].filter((element) => element.checkVisibility()
    && [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()))
    .map((element) => {
        let behind = element;
        const ground = () => getComputedStyle(behind).backgroundColor;
        while (behind.parentElement && ground() === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        return [element.textContent.trim(), getComputedStyle(element).color, ground()];
    })"""


@pytest.fixture(scope="module")
def opened_runs(tmp_path_factory, experiment_in, data_dir):
    """Of each run, beside its folder the page on these images, NAME.html."""
    folders = train_runs(experiment_in, tmp_path_factory.mktemp("work") / "runs", ("v2", "vit"))
    runs = {name: TrainedRun(folder, data_dir, "cpu") for name, folder in folders.items()}
    for run in runs.values():
        run.folder.with_suffix(".html").write_text(make_page(run, IMAGES), encoding="utf-8")
    return runs


@pytest.fixture
def visit(browser, opened_runs):
    """Opens the page of a run; keywords are those of a browser's context.

    Fails at the end where the page asked for anything but its own file, or its console said anything.
    """
    contexts, asked, said = [], [], []
    urls = {name: run.folder.with_suffix(".html").as_uri() for name, run in opened_runs.items()}

    def open_page(name="v2", script="", **settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        context.add_init_script(script)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(urls[name])
        if not script:
            expect(page.locator("#strongest li")).to_have_count(3)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert asked and {url for url in asked if not url.startswith("data:")} <= set(urls.values())
    assert not said


def pixels(page, canvas="#map canvas"):
    """(rows, columns, 3) of what is drawn on a canvas."""
    data = page.locator(canvas).evaluate(
        """canvas => {
            const { width, height } = canvas;
            const copy = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
            copy.drawImage(canvas, 0, 0);
            return [...copy.getImageData(0, 0, width, height).data];
        }"""
    )
    return np.array(data).reshape(SIDE, SIDE, 4)[..., :3]


def small_map(level, column):
    """Of the table; column 0 is the mean."""
    return f"#rows tr:nth-child({level + 1}) td:nth-of-type({column + 1})"


def at(page, board, row, column):
    """The middle of a patch, from a board's corner."""
    box = page.locator(board).bounding_box()
    return {"x": box["width"] * (column + 0.5) / SIDE, "y": box["height"] * (row + 0.5) / SIDE}


def hover(page, row, column, board="#picture"):
    page.locator(board).hover(position=at(page, board, row, column))


def strongest(page):
    """[(row, column, value)] as they stand there."""
    lines = page.locator("#strongest li").all_inner_texts()
    found = [re.fullmatch(r"row (\d+), column (\d+): (\S+)", line).groups() for line in lines]
    return [(int(row), int(column), number(value)) for row, column, value in found]


def number(text):
    return float(text.replace("\N{MINUS SIGN}", "-").replace(",", ""))


def maps_of(run, index, query):
    """(L, 1 + H, rows, columns), the mean of heads first; query: of the tokens."""
    scores = traced_scores(traced(run, index)[0])[:, :, query]
    maps = np.concatenate((scores.mean(1, keepdims=True), scores), axis=1)
    return maps[..., run.adapter.class_tokens :].reshape(*maps.shape[:2], SIDE, SIDE)


def check_strongest(page, values, step):
    """That what is shown as the strongest has the values of the model's, and that no other patch beats it."""
    shown = strongest(page)
    half = 0.51 * step
    for row, column, value in shown:
        assert value == pytest.approx(values[row, column], rel=6e-3, abs=half)  # three digits
    sizes = sorted(np.abs(values).ravel(), reverse=True)
    assert [abs(values[row, column]) for row, column, _ in shown] == pytest.approx(sizes[:3], abs=2 * half)


# ---------------------------------------------------------------------------- what changes the picture


def test_hover_shows_a_patch_and_a_click_keeps_it(visit):
    """At every level and head; without a click, the patch that was chosen comes back when the pointer leaves."""
    page = visit()
    canvases = ["#map canvas", *(f"{small_map(level, column)} canvas" for level in range(3) for column in range(3))]
    before = [pixels(page, canvas) for canvas in canvases]
    hover(page, 0, 3)
    expect(page.locator("#from")).to_have_text("row 0, column 3")
    after = [pixels(page, canvas) for canvas in canvases]
    assert all((one != other).any() for one, other in zip(before, after, strict=True))
    page.mouse.move(1, 1)
    expect(page.locator("#from")).to_have_text("row 2, column 2")
    assert (pixels(page) == before[0]).all()
    page.locator("#picture").click(position=at(page, "#picture", 1, 0))
    drawn = pixels(page)
    page.mouse.move(1, 1)
    expect(page.locator("#from")).to_have_text("row 1, column 0")
    assert (pixels(page) == drawn).all() and (drawn != before[0]).any()


def test_arrow_keys(visit):
    """Over patches to the borders and no farther, over images, levels and heads; told to screen readers."""
    page = visit()
    page.locator("#picture").focus()
    before = pixels(page)
    for key, place in (("Up", "row 1, column 2"), ("Left", "row 1, column 1"), ("Down", "row 2, column 1")):
        page.keyboard.press(f"Arrow{key}")
        expect(page.locator("#from")).to_have_text(place)
        expect(page.locator("#live")).to_contain_text(f"From {place}, level 3, mean of heads: strongest row")
    assert (pixels(page) != before).any()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    expect(page.locator("#from")).to_have_text("row 2, column 3")

    page.locator("#thumbs input").first.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#stage-title")).to_have_text("Test image 9")
    expect(page.locator("#live")).to_contain_text("Test image 9, True class")

    page.locator("#table input:checked").focus()
    for key, name in (("Up", "Level 2, mean of heads"), ("Right", "Level 2, head 1"), ("Down", "Level 3, head 1")):
        page.keyboard.press(f"Arrow{key}")
        expect(page.locator("#map-name")).to_have_text(name)
    assert (pixels(page) == pixels(page, f"{small_map(2, 1)} canvas")).all()


def test_everything_is_reached_by_tab(visit):
    """With a mark on what has the focus."""
    page = visit("vit")
    reached = []
    for _ in range(6):
        page.keyboard.press("Tab")
        focus = """() => {
            const element = document.activeElement, marked = element.closest(".pick, .switch label") ?? element;
            return [element.id || element.name, getComputedStyle(marked).outlineStyle];
        }"""
        reached.append(page.evaluate(focus))
    assert reached == [[name, "solid"] for name in ("theme", "image", "picture", "map", "class-token", "view")]


def test_tap(visit):
    page = visit(viewport={"width": 360, "height": 800}, has_touch=True, is_mobile=True)
    before = pixels(page)
    page.locator("#picture").tap(position=at(page, "#picture", 3, 1))
    expect(page.locator("#from")).to_have_text("row 3, column 1")
    assert (pixels(page) != before).any()
    page.locator(f"{small_map(0, 2)} label").tap()
    expect(page.locator("#map-name")).to_have_text("Level 1, head 2")
    page.locator("#map").tap(position=at(page, "#map", 0, 2))
    expect(page.locator("#reading")).to_contain_text("row 0, column 2: ")


# ---------------------------------------------------------------------------- that it is the model's


@pytest.mark.parametrize("name", ["v2", "vit"])
def test_numbers_and_colours_are_the_model_s(visit, opened_runs, name):
    """The strongest patches, and each pixel by the figures' colour map on the scale of the legend."""
    page, run = visit(name), opened_runs[name]
    table = matplotlib.colormaps["RdBu_r" if name == "v2" else "viridis"](np.arange(256), bytes=True)[:, :3].astype(int)
    for place, (row, column) in ((1, (0, 1)), (3, (3, 3))):
        page.locator("#thumbs label").nth(place).click()
        expect(page.locator("#stage-title")).to_have_text(f"Test image {IMAGES[place]}")
        hover(page, row, column)
        maps = maps_of(run, IMAGES[place], run.adapter.class_tokens + SIDE * row + column)
        for level, head in ((0, 0), (2, 0), (1, 2)):
            page.locator(f"{small_map(level, head)} label").click()
            hover(page, row, column)
            values = maps[level, head]
            expect(page.locator("#from")).to_have_text(f"row {row}, column {column}")
            largest = abs(values if head == 0 or name == "v2" else maps[level, 1:]).max()
            step = abs(maps[level, 1:]).max() / 127
            check_strongest(page, values, step)
            assert number(page.locator("#high").inner_text()) == pytest.approx(largest, rel=6e-3, abs=step)
            drawn = pixels(page)
            parts = (values / largest + 1) / 2 if name == "v2" else values / largest
            nearest = np.abs(table - drawn[:, :, None]).sum(-1).argmin(-1)  # of the 256 colours
            assert (table[nearest] == drawn).all()
            assert nearest / 255 == pytest.approx(parts, abs=1.1 * step / largest + 1 / 255)


def test_shares(visit, opened_runs):
    """|score| / sum of |scores| in each head, on a scale from 0 up."""
    page = visit()
    page.locator("#show label").nth(1).click()
    expect(page.locator("#low")).to_have_text("0")
    hover(page, 1, 2)
    scores = np.abs(maps_of(opened_runs["v2"], IMAGES[0], 6)[2, 1:])
    shares = scores / scores.sum((1, 2), keepdims=True)
    check_strongest(page, shares.mean(0), 2 * shares.max() / 127)
    expect(page.locator("#about-scores")).to_contain_text("sum to 1")


def test_what_is_chosen_is_shown_after_going_back(visit):
    page = visit()
    page.locator("#show label").nth(1).click()
    expect(page.locator("#unit")).to_contain_text("share")
    page.goto("data:text/html,elsewhere")
    page.go_back()
    expect(page.locator("#strongest li")).to_have_count(3)
    chosen = page.locator("#show input:checked").get_attribute("value")
    expect(page.locator("#unit")).to_contain_text({"shares": "share", "scores": "raw score"}[chosen])


def test_class_token(visit, opened_runs):
    page, run = visit("vit"), opened_runs["vit"]
    scores = traced_scores(traced(run, IMAGES[0])[0])[2].mean(0)
    step = scores.max() / 127
    hover(page, 0, 2)
    assert number(page.locator("#to-token").inner_text()) == pytest.approx(scores[3, 0], abs=step)
    page.locator("#class-token").click()
    expect(page.locator("#from")).to_have_text("class token")
    check_strongest(page, scores[0, 1:].reshape(SIDE, SIDE), 2 * step)
    expect(page.locator("#class-token")).to_have_attribute("aria-pressed", "true")
    expect(page.locator("#about-neurons")).to_contain_text("This list is for BDH models only")
    page.locator("#class-token").click()
    expect(page.locator("#from")).to_have_text("row 2, column 2")


def test_reading_a_value(visit, opened_runs):
    page = visit()
    values = maps_of(opened_runs["v2"], IMAGES[0], 10)[2, 0]  # of the patch in the centre
    hover(page, 3, 1, board="#map")
    expect(page.locator("#reading")).to_contain_text("row 3, column 1: ")
    value = number(page.locator("#reading").inner_text().partition(": ")[2])
    assert value == pytest.approx(values[3, 1], abs=abs(values).max() / 60)
    page.locator("#map").focus()
    page.keyboard.press("ArrowUp")
    page.mouse.move(1, 1)
    expect(page.locator("#reading")).to_contain_text("row 1, column 2: ")
    page.keyboard.press("Escape")
    expect(page.locator("#reading")).to_have_text("hover or tap the map")


def test_classes_of_levels(visit, opened_runs):
    page, run = visit(), opened_runs["v2"]
    trace, output = traced(run, IMAGES[0])
    said, truth = int(output.argmax()), int(run.samples([IMAGES[0]]).labels[0])
    expect(page.locator("#verdict")).to_contain_text(f"True class class {truth}, predicted class {said} (")
    expect(page.locator("#verdict")).to_contain_text("right" if said == truth else "wrong")
    for level in range(3):
        probabilities = trace.logits(level)[0].softmax(-1)
        best = int(probabilities.argmax())
        told = page.locator("#rows tr").nth(level).locator(".said").inner_text()
        assert told.replace("\N{NO-BREAK SPACE}", " ") == f"class {best} {100 * float(probabilities[best]):.0f} %"
        page.locator(f"{small_map(level, 0)} label").click()
        expect(page.locator("#says-title")).to_have_text(f"Prediction after level {level + 1}")
        assert page.locator("#says li").first.inner_text().startswith(f"class {best}")
        assert "(true class)" in page.locator("#says").inner_text()


def test_neurons(visit, opened_runs):
    page = visit()
    activity = traced(opened_runs["v2"], IMAGES[0])[0].activity(1)
    page.locator(f"{small_map(1, 0)} label").click()
    hover(page, 2, 1)
    expect(page.locator("#neurons-title")).to_have_text("Most active neurons: row 2, column 1, level 2")
    for section, exact in zip(page.locator("#neurons section").all(), activity, strict=True):
        of_patch = exact[0, :, 9]  # (H, N)
        head, neuron = divmod(int(of_patch.argmax()), of_patch.shape[1])
        first = section.locator("li").first.inner_text().split()
        assert first[:3] == ["head", f"{head + 1},", f"{neuron}"]
        assert number(first[3]) == pytest.approx(float(of_patch.max()), rel=6e-3)
        assert f"{int((of_patch > 0).sum())} of 32 active" in section.inner_text()


# ---------------------------------------------------------------------------- how it looks


def luminance(color):
    """Relative luminance of "rgb(r, g, b)", as WCAG 2 defines it."""
    parts = np.array([float(part) for part in re.findall(r"[\d.]+", color)[:3]]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)


def contrast(one, other):
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("system", ["light", "dark"])
def test_text_is_readable(visit, system):
    """A contrast of 4.5 at least, as WCAG 2 asks, of all text, in the system's scheme and after the switch."""
    page = visit(color_scheme=system)
    for scheme in (system, {"light": "dark", "dark": "light"}[system]):
        if scheme != system:
            page.locator("#theme").click()
        texts = page.evaluate(COLORS)
        assert len(texts) > 40 and (luminance(texts[0][2]) < 0.1) == (scheme == "dark")
        for text, color, ground in texts:
            assert contrast(color, ground) >= 4.5, text
        style = "element => [getComputedStyle(element).color, getComputedStyle(element).backgroundImage]"
        color, bar = page.locator("#says li").first.evaluate(style)  # which goes under the text
        grounds = re.findall(r"rgb\([^)]+\)", bar)
        assert grounds and all(contrast(color, ground) >= 4.5 for ground in grounds)


@pytest.mark.parametrize("name", ["v2", "vit"])
def test_nothing_is_wider_than_the_window(visit, name):
    """And on a phone the picture stays in view."""
    page = visit(name)
    for width in (1280, 800, 320, 360):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boards = [page.locator(board).bounding_box() for board in ("#picture", "#map")]
        assert all(box["width"] > 120 and box["x"] >= 0 and box["x"] + box["width"] <= width for box in boards)
    page.locator("#about-neurons").scroll_into_view_if_needed()
    assert 0 <= page.locator("#picture").bounding_box()["y"] < 100


def test_an_old_browser_is_told(visit):
    page = visit(script="delete window.DecompressionStream")
    expect(page.locator("#problem")).to_contain_text("too old")
