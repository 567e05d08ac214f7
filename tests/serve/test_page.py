"""The page in a real Chromium: type, slide, draw, compare, restore; keys, a phone's width, and no foreign address."""

import base64
import re
import shutil

import pytest

from dmm_jax.serve.app import STATIC
from tests.serve.fake import FakeEngine
from tests.serve.running import running, until

webdriver = pytest.importorskip("selenium.webdriver", reason="launch/requirements-test.txt installs it")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no Chromium: apt-get install chromium chromium-driver"
)
DROP = """
const [name, text] = arguments, bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
const data = new DataTransfer();
data.items.add(new File([bytes], name, { type: "image/png" }));
document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
"""


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_window_size(1280, 900)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def server():
    with running(FakeEngine(period_s=0.004)) as web:
        yield web


@pytest.fixture
def page(chromium, server):
    """The page, freshly loaded; the console must stay empty."""
    chromium.get(server.address)
    chromium.get_log("browser")
    until(lambda: chromium.find_elements("css selector", ".slider"))
    yield chromium
    assert [entry for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"] == []


def element(page, selector):
    return page.find_element("css selector", selector)


def set_value(page, selector, value):
    """Sets a field as a user does, with the event that tells the page."""
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
    page.execute_script(script, element(page, selector), value)


def value(page, selector):
    return element(page, selector).get_property("value")


def finished(page, count):
    until(lambda: len(page.find_elements("css selector", "figure[data-done]")) == count)
    return [text.text.split("\n") for text in page.find_elements("css selector", "figcaption")]


@needs_browser
def test_typing_and_sliding_draw_a_mix(page, server):
    element(page, "#prompt").send_keys("a quiet harbour")
    set_value(page, "#style-0", 60)
    set_value(page, "#style-1", 20)
    assert value(page, "#style-text") == "anime=0.75,photo=0.25"
    assert [label.text for label in page.find_elements("css selector", ".slider output")] == ["75 %", "25 %", "0 %"]
    set_value(page, "#seed", 11)
    element(page, "#draw").click()
    (caption,) = finished(page, 1)
    assert caption[:2] == ["anime=0.75,photo=0.25", "seed 11"]
    request = server.engine.jobs[-1].request
    assert request.prompt == "a quiet harbour" and request.style == {"anime": 0.75, "photo": 0.25}
    element(page, "figure .frame").click()
    assert "Seed: 11" in element(page, "#viewer-text").text


@needs_browser
def test_all_styles_share_one_seed(page, server):
    set_value(page, "#seed", 5)
    element(page, "#compare").click()
    captions = finished(page, 3)
    assert [caption[0] for caption in captions] == ["anime", "photo", "ink"]
    assert {caption[1] for caption in captions} == {"seed 5"}


@needs_browser
def test_a_strip_goes_from_one_style_to_another(page):
    element(page, "#strip").click()
    captions = finished(page, 7)
    assert captions[0][0] == "anime" and captions[-1][0] == "photo" and captions[3][0] == "anime=0.5,photo=0.5"


@needs_browser
@pytest.mark.parametrize("style", ["anime=0.25,ink=0.75", "photo:500:ink", "ink"])
def test_a_dropped_png_restores_its_settings(page, server, style):
    body = {"prompt": "zwei Füchse, (blau:1.2)", "negative_prompt": "grau", "styles": [style], "seeds": [77],
            "steps": 9, "guidance_scale": 3.5, "guidance_rescale": 0.3, "solver": "euler_karras", "width": 128,
            "height": 64}  # fmt: skip
    (image,) = server.post("/api/draw", body).json()["images"]
    page.execute_script(DROP, "a.png", image["png"])
    until(lambda: value(page, "#prompt") == body["prompt"])
    shown = {field: value(page, f"#{field}") for field in ("negative", "seed", "steps", "guidance", "rescale", "size")}
    expected = {"negative": "grau", "seed": "77", "steps": "9", "guidance": "3.5", "rescale": "0.3", "size": "128x64"}
    assert shown == expected and value(page, "#style-text") == style
    assert value(page, "#solver") == "euler" and value(page, "#spacing") == "karras"
    element(page, "#draw").click()
    finished(page, 1)
    link = element(page, "figcaption a").get_property("href")
    assert base64.b64decode(link.partition(",")[2]) == base64.b64decode(image["png"])


@needs_browser
def test_text_of_a1111_restores_too(page):
    script = "const done = arguments[1]; import('/static/png.js').then((png) => done(png.fromA1111(arguments[0])))"
    text = 'a cat, "wet"\nof the sea\nNegative prompt: dry\nand dull\nSteps: 30, Sampler: DPM++ 2M, '
    text += "Schedule type: Karras, "
    text += 'CFG scale: 6.5, Seed: 9, Size: 64x128, Model: "a, b", Style: "anime=0.7,photo=0.3", Version: v1.9'
    assert page.execute_async_script(script, text) == {
        "prompt": 'a cat, "wet"\nof the sea', "negative_prompt": "dry\nand dull", "steps": 30, "seed": 9,
        "guidance_scale": 6.5, "width": 64, "height": 128, "solver": "DPM++ 2M Karras", "styles": "anime=0.7,photo=0.3",
    }  # fmt: skip


@needs_browser
def test_other_files_are_named_and_change_nothing(page):
    page.execute_script(DROP, "a.png", base64.b64encode(b"GIF89a").decode())
    until(lambda: element(page, "#message").text == "This file is not a PNG.")


@needs_browser
def test_keys_alone_draw_and_stop(page, server):
    server.engine.period_s = 0.05
    try:
        set_value(page, "#steps", 100)
        element(page, "#prompt").send_keys("a", webdriver.Keys.CONTROL, webdriver.Keys.ENTER)
        until(lambda: element(page, "figure img").get_property("src").startswith("data:image/png"))  # A preview.
        job = server.engine.running[-1]
        webdriver.ActionChains(page).send_keys(webdriver.Keys.ESCAPE).perform()
        until(job.future.cancelled)
    finally:
        server.engine.period_s = 0.004


@needs_browser
def test_an_error_is_shown_in_the_servers_words(page):
    set_value(page, "#style-text", "anim")
    element(page, "#draw").click()
    until(lambda: "did you mean 'anime'" in element(page, "#message").text)
    assert not page.find_elements("css selector", "figure")
    page.get_log("browser")  # The browser itself reports the answer 400.


@needs_browser
def test_a_phone_shows_everything_without_sideways_scrolling(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        element(page, "#compare").click()
        finished(page, 3)
        wide = "filter((element) => element.getBoundingClientRect().right > innerWidth + 1)"
        assert page.execute_script(f"return [...document.querySelectorAll('main *')].{wide}") == []
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
def test_dark_mode_keeps_text_legible(page):
    contrast = """
    const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const light = (color) => {
      const [r, g, b] = color.match(/[\\d.]+/g).map((c) => linear(c / 255));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const paper = light(getComputedStyle(document.body).backgroundColor);
    return ["body", ".soft", "label", "a:not(.skip)"].map((name) => {
      const ink = light(getComputedStyle(document.querySelector(name)).color);
      return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    });
    """
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        assert min(page.execute_script(contrast)) >= 4.5  # WCAG 2.2, AA.
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@needs_browser
def test_every_control_has_a_name(page):
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {"button", "textbox", "slider", "spinbutton", "combobox", "link"}
    controls = [node for node in nodes if not node.get("ignored") and node["role"]["value"] in roles]
    assert len(controls) > 15
    assert [node for node in controls if not node.get("name", {}).get("value")] == []


@needs_browser
def test_the_form_begins_with_the_models_sampling(chromium):
    engine = FakeEngine()
    sampling = {"num_inference_steps": 9, "guidance_scale": 2.5, "guidance_rescale": 0.5, "solver": "euler_karras"}
    engine.pipeline.sampling = sampling
    with running(engine, example_prompt="a large red circle") as web:
        chromium.get(web.address)
        until(lambda: chromium.find_elements("css selector", ".slider"))
        shown = {name: value(chromium, f"#{name}") for name in ("prompt", "guidance", "steps", "rescale", "solver")}
        assert shown.pop("prompt") == "a large red circle" and value(chromium, "#spacing") == "karras"
        assert shown == {"guidance": "2.5", "steps": "9", "rescale": "0.5", "solver": "euler"}


@needs_browser
def test_a_key_is_asked_for_and_kept_for_the_tab(chromium):
    key = "a-key-of-the-tests-0123"
    with running(keys=(key,)) as web:
        chromium.get(web.address)
        until(lambda: chromium.find_element("css selector", "#key").is_displayed())
        chromium.find_element("css selector", "#key").send_keys(key, webdriver.Keys.TAB)
        until(lambda: chromium.find_elements("css selector", ".slider"))
        chromium.refresh()
        until(lambda: chromium.find_elements("css selector", ".slider"))


def test_the_page_names_no_foreign_address():
    for path in STATIC.iterdir():
        addresses = re.findall(r"https?://[^\s\"'`<)]+", path.read_text())
        assert set(addresses) <= {"http://www.w3.org/2000/svg"}, path.name
