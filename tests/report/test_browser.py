"""The page as a reader uses it. Pictures of it go to $UNLORA_ARTEFACTS, or to artefacts/ here."""

import os
from pathlib import Path

import browser
import pytest
from report_runs import HOSTILE, QUESTIONS, entries

from unlora.report import write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.PATH is None, reason="no Chromium here: apt-get install chromium"),
]
ARTEFACTS = Path(os.environ.get("UNLORA_ARTEFACTS") or Path(__file__).parent / "artefacts")
ANSWERS = dict(
    zip([question for rows in QUESTIONS.values() for question, _ in rows], HOSTILE.values(),
        strict=False)
)  # fmt: skip
TEXT = "document.querySelector('{}').textContent"
ROWS = "[...document.querySelectorAll('.rows > li .question')].map(x => x.textContent)"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module", params=["tame", "hostile"])
def file(request, tmp_path_factory):
    """The page of two methods, once with answers that try to be more than text."""
    home = tmp_path_factory.mktemp(request.param)
    answers = ANSWERS if request.param == "hostile" else None
    made = entries(home, "good", "broken", answers=answers, curves=True)
    return write(home / "out", made, title=request.param)


@pytest.fixture
def page(chromium, file):
    name = file.parents[1].name.rstrip("0123456789")
    chromium.problems.clear(), chromium.requests.clear()
    chromium.size(1280, 1600)
    chromium.open(file)
    yield chromium
    chromium.size(1280, 1600)
    chromium.picture(ARTEFACTS / f"{name}-desktop.png")
    chromium.size(390, 1600)
    width = chromium.run("document.documentElement.scrollWidth")
    chromium.picture(ARTEFACTS / f"{name}-phone.png")
    assert width <= 390, "the page itself never scrolls sideways"
    assert chromium.problems == []
    assert set(chromium.requests) <= {file.resolve().as_uri(), "data:,"}
    assert chromium.run("window.hit === undefined")


def choose(page, name, value):
    page.run(
        f"(() => {{ const field = document.querySelector('[name={name}]'); field.value = {value!r};"
        "field.dispatchEvent(new Event('input', {bubbles: true}));"
        "field.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )


@pytest.mark.slow
def test_a_reader_finds_searches_sorts_and_switches(page):
    for part in ("headline", "scatter", "table", "browser"):
        box = f"document.querySelector('[data-part={part}]').getBoundingClientRect()"
        assert page.run(f"{box}.height > 20 && {box}.width > 200"), part
    assert page.run(TEXT.format("[data-part=headline]")).startswith("good forgot what it was asked")
    assert page.run("document.querySelectorAll('[data-part=table] tbody tr').length") == 4
    assert page.run("document.querySelectorAll('[data-part=scatter] svg text').length") > 5

    assert page.run(TEXT.format(".hits")) == "3 rows found"
    choose(page, "search", "osaka")
    page.until(TEXT.format(".hits") + " === '1 row found'")
    assert page.run(ROWS) == ["Where was Ada Quill born?"]
    choose(page, "search", "")
    page.until(TEXT.format(".hits") + " === '3 rows found'")

    choose(page, "split", "1")
    assert len(page.run(ROWS)) == 2
    choose(page, "sort", "data")
    assert page.run(ROWS) == [question for question, _ in QUESTIONS["retain"]]

    before = page.run("getComputedStyle(document.documentElement).backgroundColor")
    page.run("document.getElementById('theme').click()")
    after = page.run("getComputedStyle(document.documentElement).backgroundColor")
    assert before != after
    page.run("document.getElementById('theme').click()")
    assert page.run("getComputedStyle(document.documentElement).backgroundColor") == before


def test_words_are_compared_with_the_true_answer_or_the_targets(page):
    marked = "[...document.querySelectorAll('.rows > li:first-child .target mark')].length"
    assert page.run(marked) > 3
    choose(page, "against", "nothing")
    assert page.run("document.querySelectorAll('.rows mark, .rows del').length") == 0
    choose(page, "against", "target")
    assert page.run("document.querySelectorAll('.rows .gold del').length") > 0


def test_every_control_has_a_name_and_takes_the_keyboard(page):
    nameless = """[...document.querySelectorAll('button, input, select')].filter(one =>
        !(one.getAttribute('aria-label') || one.textContent.trim() || one.labels?.length)).length"""
    assert page.run(nameless) == 0
    assert page.run("document.querySelectorAll('th:not([scope])').length") == 0
    assert page.run("document.querySelector('.hits').getAttribute('aria-live')") == "polite"
    page.run("document.querySelector('[name=split]').focus()")
    # the arrow keys are the browser's own; what counts is that a choice made with them is followed
    for kind in ("rawKeyDown", "keyUp"):
        page.call("Input.dispatchKeyEvent", type=kind, key="ArrowDown", code="ArrowDown",
                  windowsVirtualKeyCode=40)  # fmt: skip
    page.until(TEXT.format(".hits") + " === '2 rows found'")


@pytest.mark.slow
def test_it_can_be_printed(page):
    pdf = page.call("Page.printToPDF", preferCSSPageSize=True)["data"]
    assert len(pdf) > 20_000
