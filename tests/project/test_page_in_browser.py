"""report.html in Chromium: no word on its console, nothing loaded, videos that keep together, dark, and on a phone."""

import re
from itertools import pairwise

import pytest
from browser import BINARY, Browser
from helpers import dcm_recipe, evaluate

from moedistill.components.plugins import load_plugins
from moedistill.runs.loop import run
from moedistill.runs.page.write import write_page

pytestmark = pytest.mark.skipif(BINARY is None, reason="there is no Chromium: apt-get install chromium")

SHOWN = "[...document.querySelectorAll('#side-by-side video')]"
LOADED = f"{SHOWN}.every(video => video.readyState >= 2 && !video.seeking)"
TIMES = f"{SHOWN}.map(video => video.currentTime)"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    made = dcm_recipe(2)
    made["stages"][1]["preview"] = {"every": 2, "prompts": ["3 right"], "compare_teacher": True}
    candidates = [{"name": "teacher", "model": "teacher", "steps": 8}, {"name": "student"}]
    made["stages"] += [evaluate(candidates=candidates, reference="teacher", pictures=2, save_latents=False)]
    run(made, output=folder / "run", device="cpu")
    write_page([folder / "run"], folder / "report.html", load_plugins(), planned=False, resamples=10)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    tab = Browser(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.fixture
def opened(browser, page):
    browser.open(page)
    browser.until(LOADED)
    yield browser
    assert browser.messages == []
    assert [url for url in browser.requests if not url.startswith("data:")] == [page.resolve().as_uri()]


def drag(browser, frame):
    browser.value(
        f"(() => {{ const slider = document.querySelector('#side-by-side input');"
        f" slider.value = {frame}; slider.dispatchEvent(new Event('input')); }})()"
    )
    browser.until(LOADED)


def test_all_videos_show_the_frame_of_the_scrubber(opened):
    """A frame k of 8 at 8 a second lies around (k + 0.5) / 8 s."""
    assert len(opened.value(TIMES)) == 2
    for frame in (5, 2, 7, 0):
        drag(opened, frame)
        assert opened.value(TIMES) == pytest.approx([(frame + 0.5) / 8] * 2, abs=1e-3)
        assert opened.value("document.querySelector('#side-by-side output').textContent") == f"{frame + 1} / 8"


def test_videos_play_in_sync_again_and_again(opened):
    """From where the scrubber stood, through their end, and until they are stopped."""
    drag(opened, 4)
    opened.value("document.querySelector('#side-by-side [data-do=play]').click()")
    opened.until(f"{SHOWN}.every(video => !video.paused)")
    seen = []
    for _ in range(40):
        opened.value("new Promise(done => setTimeout(done, 50))")
        seen.append(opened.value(TIMES))
    apart = sorted(abs(one - other) for one, other in seen)
    assert apart[len(apart) // 2] < 1 / 8  # a frame; a busy machine may stall one for a moment
    assert any(later[0] < earlier[0] for earlier, later in pairwise(seen))  # it began anew
    opened.value("document.querySelector('#side-by-side [data-do=play]').click()")
    opened.until(f"{SHOWN}.every(video => video.paused)")
    opened.value("document.querySelector('#side-by-side [data-do=on]').click()")
    opened.until(LOADED)
    first, second = opened.value(TIMES)
    assert first == pytest.approx(second, abs=1e-3)


def test_another_sample_is_shown_at_the_same_frame(opened):
    drag(opened, 3)
    before = opened.value(f"{SHOWN}.map(video => video.src)")
    opened.value(
        "(() => { const chosen = document.querySelector('#side-by-side [data-caption]');"
        " chosen.value = 1; chosen.dispatchEvent(new Event('change')); })()"
    )
    opened.until(f"{LOADED} && {TIMES}.every(time => time > 0.3)")
    assert not set(before) & set(opened.value(f"{SHOWN}.map(video => video.src)"))
    assert opened.value(TIMES) == pytest.approx([3.5 / 8] * 2, abs=1e-3)


def test_speed_is_that_of_all(opened):
    opened.value(
        "(() => { const speed = document.querySelector('#side-by-side [data-speed]');"
        " speed.value = '0.5'; speed.dispatchEvent(new Event('change')); })()"
    )
    assert opened.value(f"{SHOWN}.map(video => video.playbackRate)") == [0.5, 0.5]


def test_every_control_has_a_name_and_is_reached_by_keys(opened):
    """With Tab alone, in order; Space plays, arrows go by frames."""
    names = "[...document.querySelectorAll('#side-by-side button, #side-by-side input, #side-by-side select')]"
    named = f"{names}.every(each => each.ariaLabel || each.textContent.trim() || each.labels?.length)"
    assert opened.value(named)
    opened.value("document.querySelector('#side-by-side [data-caption]').focus()")
    reached = []
    for _ in range(5):
        for kind in ("keyDown", "keyUp"):
            opened.do("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        reached.append(opened.value("document.activeElement.dataset.do || document.activeElement.ariaLabel"))
    assert reached == ["play", "back", "on", "frame", "speed"]
    opened.value("document.querySelector('#side-by-side input').focus()")
    for kind in ("keyDown", "keyUp"):
        opened.do("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    opened.until(f"{TIMES}.every(time => time > 0.15)")


def lightness(browser, property, element="document.body"):
    text = browser.value(f"getComputedStyle({element}).{property}")
    red, green, blue = map(int, re.findall(r"\d+", text)[:3])
    return (red + green + blue) / 3 / 255


@pytest.mark.parametrize("dark", [False, True])
def test_light_and_dark(browser, page, dark):
    """Text, also in plots, stands out from what is behind it."""
    browser.open(page, dark=dark)
    back, ink = lightness(browser, "backgroundColor"), lightness(browser, "color")
    plotted = lightness(browser, "fill", "document.querySelector('svg text')")
    lines = lightness(browser, "stroke", "document.querySelector('svg .axes path, svg [id^=patch] path')")
    assert (back < 0.2, back > 0.8) == (dark, not dark)
    assert min(abs(each - back) for each in (ink, plotted)) > 0.6
    assert lines == pytest.approx(ink, abs=0.05) or abs(lines - back) > 0.6
    assert browser.messages == []


@pytest.mark.parametrize("width", [360, 768])
def test_nothing_is_wider_than_the_screen(browser, page, width):
    browser.open(page, width=width)
    browser.until(LOADED)
    assert browser.value("document.documentElement.scrollWidth") <= width
    widths = browser.value(f"{SHOWN}.map(video => video.getBoundingClientRect().width)")
    assert min(widths) >= 120  # two side by side, not a stripe
    assert browser.messages == []
