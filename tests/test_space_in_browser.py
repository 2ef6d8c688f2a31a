"""The Space in a real browser: Debian's chromium, driven by selenium, both started here.

Screenshots go to tests/artifacts/ (SCREENSHOT_MODEL=runs/tiny/rl lets that model answer on the README's one).
"""

import os
import shutil
import time
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install -e .[dev])")
pytest.importorskip("gradio", reason="the extra `space` is not installed")
from scripted import echo  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402
from test_space import free_port  # noqa: E402

import nanochat_hf.space.app as app  # noqa: E402
from nanochat_hf.chat import load_chat_model  # noqa: E402
from nanochat_hf.chat_service import JOINER  # noqa: E402

ARTIFACTS = Path(__file__).parent / "artifacts"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1"
)
DESKTOP, PHONE = (1100, 900), (390, 844)
PATIENCE_SECONDS = 120
ANSWER = "#chat [data-testid=bot]"
QUESTION = "#chat [data-testid=user]"


@pytest.fixture(scope="module")
def model(tiny_tokenizer):
    """Slow enough to be watched and stopped."""
    model = echo(tiny_tokenizer)
    next_token = model.next_token
    model.next_token = lambda history: time.sleep(0.005) or next_token(history)
    return model


@pytest.fixture(scope="module")
def url(model, tiny_tokenizer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "load_chat_model", lambda name: (model, tiny_tokenizer))
        patch.setenv("MESSAGES_PER_MINUTE", "1000")
        interface = app.build_app(["me/tiny-chat", "me/tiny-sft"])
    yield serve(interface)
    interface.close()


def serve(interface):
    interface.queue(max_size=app.MAX_QUEUED_ANSWERS)
    settings = {"server_port": free_port(), "theme": app.THEME, "css": app.CSS}
    return interface.launch(prevent_thread_lock=True, quiet=True, **settings)[1]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver on PATH (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class Page:
    """A tab with the chat in it."""

    def __init__(self, browser, url, size=DESKTOP):
        self.browser = browser
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(url)
        self.wait(lambda: self.all("#chat"))
        self.wait_until_ready()

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def script(self, text, *arguments):
        return self.browser.execute_script(f"return {text}", *arguments)

    def wait(self, condition):
        def holds(_):
            return condition()

        ignored = webdriver.remote.webdriver.WebDriverException
        return WebDriverWait(self.browser, PATIENCE_SECONDS, 0.1, [ignored]).until(holds)

    def wait_until_ready(self):
        self.wait(lambda: self.all(".submit-button") and self.all("textarea")[0].is_enabled())

    def texts(self, selector):
        script = "[...document.querySelectorAll(arguments[0])].map(e => e.innerText.trim())"
        return self.script(script, selector)

    def type(self, text):
        self.wait_until_ready()
        self.all("textarea")[0].send_keys(text, Keys.ENTER)

    def ask(self, text):
        """Send a message and wait for the end of its answer."""
        before = len(self.texts(QUESTION))
        self.type(text)
        self.wait(lambda: len(self.texts(QUESTION)) > before and len(self.texts(ANSWER)) > before)
        self.wait_until_ready()
        return self.texts(ANSWER)[-1]

    def click(self, label):
        button = f"#chat button[aria-label={label}]"
        self.wait(lambda: self.all(button))
        self.script("arguments[0].click()", self.all(button)[-1])

    def shoot(self, name):
        ARTIFACTS.mkdir(exist_ok=True)
        self.script("document.activeElement.blur()")
        self.browser.save_screenshot(str(ARTIFACTS / f"{name}.png"))


def test_an_answer_streams(browser, url):
    page = Page(browser, url)
    seen = set()
    page.type("long words ")
    page.wait(lambda: any(page.texts(ANSWER)))
    page.wait(lambda: seen.add(page.texts(ANSWER)[-1]) or page.all(".submit-button"))
    final = page.texts(ANSWER)[-1]
    assert final.count("long") == 60
    partial = {text for text in seen if text and text != final}
    assert len(partial) > 2 and all(final.startswith(text[:-20]) for text in partial)


def test_stop_keeps_what_was_said_and_the_talk_goes_on(browser, url):
    page = Page(browser, url)
    page.type("long words ")
    page.wait(lambda: any(page.texts(ANSWER)))
    page.wait(lambda: page.script("document.querySelector('.stop-button')?.click() ?? true"))
    page.wait_until_ready()
    stopped = page.texts(ANSWER)[-1]
    assert stopped and ("long words " * 60).startswith(stopped) and stopped.count("long") < 60
    assert page.ask("and then?") == "and then?"
    assert len(page.texts(QUESTION)) == 2 and page.texts(ANSWER)[0] == stopped


def test_retry_answers_again(browser, url, model):
    page = Page(browser, url)
    page.ask("once more")
    num_calls = len(model.num_tokens_read)
    page.click("Retry")
    page.wait(lambda: len(model.num_tokens_read) > num_calls)
    page.wait_until_ready()
    assert page.texts(QUESTION) == ["once more"] == page.texts(ANSWER)


def test_editing_a_message_drops_what_followed(browser, url):
    page = Page(browser, url)
    page.ask("first")
    page.ask("second")
    page.script("document.querySelector('#chat button[aria-label=Edit]').click()")
    page.wait(lambda: page.all("#chat textarea"))
    box = page.all("#chat textarea")[0]
    box.clear()
    box.send_keys("changed")
    page.click("Submit")
    page.wait(lambda: page.texts(QUESTION) == ["changed"] == page.texts(ANSWER))


def test_settings_and_slash_commands(browser, url):
    page = Page(browser, url)
    page.script("[...document.querySelectorAll('button')].find(b => b.innerText.includes('Settings')).click()")
    page.wait(lambda: page.all("input[type=number]"))
    assert page.ask("a b c d e f") == "a b c d e f"
    script = """(() => {
        const slider = [...document.querySelectorAll('input[type=number]')][2];
        Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(slider, 3);
        slider.dispatchEvent(new Event('input', {bubbles: true}));
        slider.dispatchEvent(new Event('change', {bubbles: true}));
        slider.blur();
    })()"""
    page.script(script)
    assert "a b c d e f".startswith(cut := page.ask("a b c d e f")) and len(cut) < 8  # three tokens long
    assert page.ask("/temperature 1.3") == "temperature is 1.3 now."
    sliders = "[...document.querySelectorAll('input[type=number]')].map(e => +e.value)"
    page.wait(lambda: page.script(sliders)[:2] == [1.3, 50])
    assert "/topk K" in page.ask("/help")


def test_what_was_cleared_stays_away(browser, url):
    page = Page(browser, url)
    for _ in range(2):
        page.ask("hello")
        page.type("/clear")
        page.wait(lambda: not page.texts(QUESTION) and not page.texts(ANSWER))
        time.sleep(1)  # the answer's last update may come late
        assert page.ask("again") == "again"
        assert page.texts(QUESTION) == ["again"] == page.texts(ANSWER)
        page.click("Clear")
        page.wait(lambda: not page.texts(QUESTION) and not page.texts(ANSWER))


def test_the_words_of_clear_clear_nothing(browser, url):
    page = Page(browser, url)
    page.ask("hello")
    assert page.ask("Forgotten.") == "Forgotten."
    time.sleep(1)
    assert page.texts(QUESTION) == ["hello", "Forgotten."]


def test_a_tool_call_is_a_step_that_folds(browser, url):
    page = Page(browser, url)
    page.ask("17*23")
    [step] = page.texts("#chat .thought-group")
    assert step.split() == ["Calculator", "17*23", "391"]
    page.shoot("tool_call")
    page.script("document.querySelector('#chat .thought-group .title').click()")
    page.wait(lambda: page.texts("#chat .thought-group")[0].split() == ["Calculator", "17*23"])


def test_markdown_is_rendered_and_html_is_not_run(browser, url):
    page = Page(browser, url)
    harmful = "**bold** `code` <script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
    page.ask(harmful)
    time.sleep(0.5)  # an onerror comes later than the text
    assert page.browser.title == "nanochat"
    assert page.script(f"document.querySelectorAll('{ANSWER} script, {ANSWER} [onerror]').length") == 0
    assert page.texts(f"{ANSWER} strong") == ["bold"] and page.texts(f"{ANSWER} code") == ["code"]
    assert page.ask("18.").replace(JOINER, "") == "18." and not page.all(f"{ANSWER} ol")
    form = "use <form action=x><button>b</button></form>, `<iframe>`, <iframe src=x></iframe> <style>*{color:red}"
    read = form.replace("`", "")
    assert page.ask(form).replace(JOINER, "") == read == page.texts(QUESTION)[-1].replace(JOINER, "")
    assert page.script("document.querySelectorAll('#chat form, #chat iframe, #chat .message style').length") == 0
    page.script("[...document.querySelectorAll('#chat button[aria-label=Edit]')].at(-1).click()")
    page.wait(lambda: page.all("#chat textarea"))
    page.all("#chat textarea")[0].send_keys(" too")
    page.click("Submit")
    page.wait(lambda: page.texts(ANSWER)[-1].replace(JOINER, "") == read + " too")


def test_odd_texts_come_through(browser, url):
    page = Page(browser, url)
    for text in ("שלום עולם", "e\u0301a\u0308 न\u093fम", "<|assistant_end|> typed", "/usr/bin is a folder"):
        assert page.ask(text) == text
    direction = "getComputedStyle(document.querySelector(arguments[0])).unicodeBidi"
    assert page.script(direction, f"{ANSWER} p") == page.script(direction, "textarea") == "plaintext"


def test_two_tabs_are_two_conversations(browser, url):
    pages = [Page(browser, url)]
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    second = browser.current_window_handle
    pages.append(Page(browser, url))
    try:
        for text in ("one", "two"):
            for handle, page in zip((first, second), pages, strict=True):
                browser.switch_to.window(handle)
                page.type(f"{text} from {handle[:5]}")
        for handle, page in zip((first, second), pages, strict=True):
            browser.switch_to.window(handle)
            page.wait(lambda page=page: len(page.texts(ANSWER)) == 2)
            page.wait_until_ready()
            assert page.texts(ANSWER) == [f"{text} from {handle[:5]}" for text in ("one", "two")]
    finally:
        browser.switch_to.window(second)
        browser.close()
        browser.switch_to.window(first)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_shows_it_all(theme, browser, url):
    page = Page(browser, f"{url}?__theme={theme}", PHONE)
    page.ask("12*12")
    assert page.script("document.documentElement.scrollWidth") <= PHONE[0]
    box = page.script("document.querySelector('textarea').getBoundingClientRect().bottom")
    assert box < PHONE[1], "the text box is off the screen"
    red = page.script("getComputedStyle(document.querySelector(arguments[0])).color.match(/\\d+/)[0]", ANSWER)
    assert (int(red) > 128) == (theme == "dark"), "light text on dark"
    page.shoot(f"phone_{theme}")


@pytest.mark.skipif("SCREENSHOT_MODEL" not in os.environ, reason="SCREENSHOT_MODEL names no trained model to talk to")
def test_the_screenshot_of_the_readme(browser):
    """Whatever the model says; temperature 0."""
    folder = os.environ["SCREENSHOT_MODEL"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "load_chat_model", load_chat_model)
        interface = app.build_app([folder])
    page = Page(browser, serve(interface), (900, 860))
    page.ask("/temperature 0")
    page.type("/clear")
    page.wait(lambda: not page.texts(ANSWER))
    time.sleep(1)  # the answer's last update may come late
    for question in ("What can you do?", "Maria has 14 apples. She buys 3 bags with 6 each. How many apples now?"):
        page.ask(question)
    time.sleep(1)  # a step unfolds slowly
    page.shoot("chat")
    interface.close()
