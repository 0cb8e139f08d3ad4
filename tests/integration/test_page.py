"""The page in a real browser, before a real server with Ray workers: one server for all of it; the tests follow one another."""

import json
import os
import re
import shutil
import signal
from contextlib import contextmanager

import httpx
import pytest
from playwright.sync_api import Error, expect, sync_playwright
from safetensors.torch import load_file, save_file

from tests.checkpoints import write_checkpoint, write_tokenizer
from tests.server_process import Server, wait_until

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.integration,
    # Where CI is set it is part of the set-up (Makefile), and its absence a failure.
    pytest.mark.skipif(
        CHROMIUM is None and "CI" not in os.environ, reason="there is no chromium (Debian's package has one)"
    ),
]

# No sandbox: in containers its kernel features are often not to be had, and this browser sees no page but ours.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
TIMEOUT_MS = 60_000
expect.set_options(timeout=TIMEOUT_MS)
OPERATOR, CLIENT = "operators-key", "clients-key"
CONTEXT_TOKENS = 16384  # longer than any test takes to read


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "mixtral"
    write_tokenizer(write_checkpoint("mixtral", directory, max_position_embeddings=CONTEXT_TOKENS))
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"][257] = 0  # greedy answers never end by themselves
    save_file(tensors, directory / "model.safetensors")
    flags = ["--device", "cpu", "--served-model-name", "tiny", "--micro-batches", 2, "--tpot-sla-ms", 500]
    with Server(directory, *flags, "--api-key", f"{OPERATOR},{CLIENT}") as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(server, browser):
    """Opens the page with a key, or without; at the test's end nothing may have been said on the console or asked of others."""
    contexts, said, asked = [], [], []

    def open_page(key=OPERATOR, **settings):
        context = browser.new_context(**settings)
        context.set_default_timeout(TIMEOUT_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url)
        if key:
            page.get_by_label("API key", exact=True).fill(key)
            page.get_by_role("button", name="Continue").click()
            expect(page.locator("#model")).to_have_text("tiny")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert asked and [url for url in asked if not url.startswith(server.url)] == []


def say(page, text):
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def set_sampling(page, **values):
    page.locator("#sampling summary").click()
    for label, value in values.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(str(value))
    page.locator("#sampling summary").click()


@contextmanager
def requests_running(server, count):
    """So many long requests on the server."""
    with httpx.Client(
        base_url=server.url, headers={"Authorization": f"Bearer {CLIENT}"}, timeout=120
    ) as client:
        body = {"model": "tiny", "prompt": "on and on", "stream": True, "max_tokens": 16000, "temperature": 0}
        streams = [client.stream("POST", "/v1/completions", json=body) for _ in range(count)]
        try:
            lines = [stream.__enter__().iter_lines() for stream in streams]
            assert all(map(next, lines))
            yield
        finally:
            for stream in streams:
                stream.__exit__(None, None, None)


def running(server):
    return server.metric("afd:num_requests_running")


def worker(page, name):
    return page.locator(f"[data-worker={name}]")


def test_a_key_is_asked_for_and_stays_in_the_tab(server, open_page):
    page = open_page(key=None)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("asks for an API key")
    expect(page.get_by_label("API key", exact=True)).to_be_focused()
    page.keyboard.type("a guess")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_have_text("The server does not know this key.")
    page.keyboard.type(CLIENT)
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    set_sampling(page, Max_tokens=5)
    expect(page.locator("#live-note")).to_contain_text("operator's key")
    expect(page.locator("#live")).to_be_hidden()
    say(page, "Hello")
    expect(page.locator(".message.assistant .foot")).to_contain_text("5 tokens")
    assert page.evaluate("[document.cookie, JSON.stringify(localStorage), location.href]") == [
        "",
        "{}",
        f"{server.url}/",
    ]
    page.reload()
    expect(page.locator("#model")).to_have_text("tiny")  # this tab knows it still
    other = page.context.new_page()
    other.goto(server.url)
    expect(other.get_by_role("dialog")).to_be_visible()  # another one does not


def test_an_answer_streams_and_can_be_stopped(server, open_page):
    page = open_page()
    set_sampling(page, Temperature=0)
    say(page, "Tell me a long story")
    answer = page.locator(".message.assistant")
    expect(answer).to_have_class(re.compile("streaming"))
    lengths = set()

    def grows():
        lengths.add(len(answer.locator(".text").text_content()))
        return len(lengths) >= 4

    wait_until(grows)
    wait_until(lambda: running(server) == 1)
    aborted = server.metric("afd:request_success_total", finished_reason="abort")
    page.get_by_role("button", name="Stop").click()
    expect(answer.locator(".foot")).to_contain_text("stopped")
    wait_until(lambda: running(server) == 0)
    wait_until(lambda: server.metric("afd:request_success_total", finished_reason="abort") == aborted + 1)
    expect(page.get_by_label("Your message")).to_be_focused()
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)


def test_a_new_chat_has_nothing_of_the_answer_that_it_cuts_off(open_page):
    page = open_page()
    set_sampling(page, Temperature=0)
    say(page, "Tell me a long story")
    expect(page.locator(".message.assistant .text")).not_to_be_empty()
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    with page.expect_request("**/v1/chat/completions") as sent:
        say(page, "Hello")
    assert [message["role"] for message in sent.value.post_data_json["messages"]] == ["user"]


def test_the_curl_command_asks_what_the_page_asks(server, open_page):
    page = open_page()
    set_sampling(page, Temperature=0, Max_tokens=5)
    page.locator("#curl summary").click()
    page.get_by_label("Your message").fill("it's <b>me</b>")
    command = page.locator("#curl-command").text_content()
    with page.expect_request("**/v1/chat/completions") as sent:
        page.keyboard.press("Enter")
    expect(page.locator(".message.assistant .foot")).to_contain_text("5 tokens")
    shown = re.search(r"-d '(.*)'$", command, re.S)[1].replace("'\\''", "'")
    assert sent.value.post_data_json == json.loads(shown)
    assert OPERATOR not in command and "$AFD_API_KEY" in command
    expect(page.locator(".message.user")).to_contain_text("it's <b>me</b>")  # as text


def test_nothing_that_a_model_says_becomes_an_element(open_page):
    page = open_page()
    chunk = {
        "choices": [{"delta": {"content": "<img src=x onerror=alert(1)>\n```\n<script>1</script>\n```\n`<b>`"}}]
    }
    events = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=events, content_type="text/event-stream")
    )
    say(page, "Attack")
    text = page.locator(".message.assistant .text")
    expect(text).to_contain_text("<img src=x onerror=alert(1)>")
    expect(text.locator("pre")).to_have_text("<script>1</script>")
    assert text.locator("img, script, b").count() == 0


def test_the_live_view_shows_lanes_times_and_the_promise(server, open_page):
    page = open_page()
    expect(page.locator("#health")).to_have_text("Serving")
    with requests_running(server, 3):
        expect(page.locator("#running-value")).to_have_text("3")
        expect(page.locator("#lanes-canvas")).to_have_attribute(
            "aria-label", re.compile("attention-0 computes .*ffn-0")
        )
        expect(page.locator("#lanes-legend")).to_contain_text("micro-batch 1")
        expect(page.locator("#lanes-legend")).to_contain_text("bubble")
        expect(page.locator("#times-chart .bar").first).to_be_attached()
        expect(page.locator("#times-chart .promise")).to_be_attached()
        expect(page.locator("#throughput-value")).not_to_have_text("0")
        expect(page.locator("#kv-value")).to_have_text(re.compile(r"\d %"))
        assert drawn_colours(page, "#lanes-canvas") > 5
    expect(page.locator("#running-value")).to_have_text("0")


def drawn_colours(page, canvas):
    return page.locator(canvas).evaluate(
        "canvas => new Set(new Uint32Array(canvas.getContext('2d')"
        ".getImageData(0, 0, canvas.width, canvas.height).data.buffer)).size"
    )


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (390, "dark")])
def test_a_phone_needs_no_scrolling_sideways(open_page, width, scheme):
    page = open_page(viewport={"width": width, "height": 780}, color_scheme=scheme)
    for view in ("Machine", "Chat"):
        page.get_by_role("button", name=view, exact=True).click()
        expect(page.locator(f"#{view.lower()}")).to_be_visible()
        if view == "Machine":
            expect(worker(page, "ffn-0")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for name in ("#key-button", "#theme-button"):
            box = page.locator(name).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width


def test_light_and_dark_have_enough_contrast(open_page):
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        expect(worker(page, "ffn-0")).to_be_visible()
        assert page.evaluate(CONTRASTS) == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.locator("#theme-button").click()  # from the system's to light
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != ground


# Texts with less than 4.5 between their colour and the colour behind them (WCAG 2.2, 1.4.3).
CONTRASTS = """() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (colour) => {
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = colour;
    paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => [r, g, b].map((each) => each / 255)
    .map((each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4))
    .reduce((sum, each, index) => sum + each * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = rgb(getComputedStyle(each).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll("body *")]
    .filter((each) => each.checkVisibility() && !each.disabled && [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .filter((each) => !each.closest("svg, .skip, .unseen, noscript"))
    .map((each) => {
      const [a, b] = [luminance(rgb(getComputedStyle(each).color)), luminance(behind(each))];
      return [each.textContent.trim().slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    })
    .filter(([, contrast]) => contrast < 4.5);
}"""


def test_everything_can_be_reached_by_keyboard_and_has_a_name(open_page):
    page = open_page()
    expect(worker(page, "ffn-0")).to_be_visible()
    page.locator("#sampling summary").click()
    page.locator("#curl summary").click()
    nameless = page.evaluate(
        "[...document.querySelectorAll('button, input, textarea, select')].filter((each) => each.checkVisibility()"
        " && !(each.labels?.length || each.textContent.trim() || each.ariaLabel)).map((each) => each.outerHTML)"
    )
    assert nameless == []
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    wanted = {"draft", "send", "key-button", "theme-button", "system", "sampling-temperature", "copy-curl"}
    wanted |= {"lanes-steps", "lanes-pause", "messages"}
    assert wanted - reached == set()


def test_a_killed_worker_shows_as_restarting_and_recovers(server, open_page):
    page = open_page()
    expect(worker(page, "ffn-0")).to_have_attribute("data-state", "serving")
    (pid,) = server.pids("FFN")
    os.kill(pid, signal.SIGKILL)
    expect(worker(page, "ffn-0")).to_have_attribute("data-state", "restarting")
    expect(page.locator("#problems")).to_contain_text("ffn-0")
    expect(page.locator("#health")).not_to_have_text("Serving")
    expect(worker(page, "ffn-0")).to_have_attribute("data-state", "serving")
    expect(worker(page, "ffn-0")).not_to_contain_text(f"{pid}")
    expect(page.locator("#health")).to_have_text("Serving")
    expect(page.locator("#problems")).to_be_hidden()


def test_the_servers_end_is_not_held_up_by_a_view(server, browser):
    page = browser.new_page()
    page.goto(server.url)
    page.get_by_label("API key", exact=True).fill(OPERATOR)
    page.keyboard.press("Enter")
    expect(page.locator("#health")).to_have_text("Serving")
    assert server.stop() == 0
    expect(page.locator("#health")).to_have_text("Not connected")
    assert "are cut off" not in server.log()
    with pytest.raises(Error):
        page.goto(server.url)
