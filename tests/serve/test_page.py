"""The chat page in a real browser: Chromium, headless, driven by Playwright, against a running server."""

import json
import re
from collections.abc import Iterator

import pytest
from chromium import MISSING, find_chromium
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from scripted_server import wait_until

ANSWER = ".assistant .text"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = find_chromium()
    if found is None:
        pytest.fail(MISSING, pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server) -> Iterator:
    """Opens the page in a browser that has never been here; what it complains about fails the test."""
    contexts, complaints = [], []

    def note(message) -> None:
        too_much = re.search("status of 4(00|13)", message.text)  # some tests ask for it, on purpose
        if message.type == "error" and not too_much:
            complaints.append(message.text)

    def open_it(**options) -> Page:
        context = browser.new_context(**{"locale": "en-US", "viewport": {"width": 1100, "height": 760}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", note)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(server.url)
        expect(page.locator("#model")).to_have_text(server.name)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def page(open_page) -> Page:
    return open_page()


def say(page: Page, text: str) -> None:
    page.locator("#input").fill(text)
    page.keyboard.press("Enter")


def wait_for_words(page: Page, count: int) -> None:
    page.wait_for_function(
        "n => document.querySelector('.assistant .text')?.textContent.split(' ').length > n", arg=count
    )


def keep(page: Page, kept: dict) -> None:
    """What the browser holds when the page is opened next."""
    page.evaluate("kept => localStorage.setItem('minigpt.chat.v1', JSON.stringify(kept))", kept)


def expect_forgetful_answer(page: Page, number: int) -> None:
    """An answer, as number `number`, that was given without the oldest turns, and says so."""
    page.wait_for_function("n => document.querySelectorAll('.assistant .text')[n]?.textContent.length > 20", arg=number)
    page.keyboard.press("Escape")
    expect(page.locator(".stats").last).to_contain_text("oldest turns are no longer seen")


def is_free(server) -> bool:
    """Whether nothing is made any longer, within twenty looks."""
    return wait_until(lambda: server.metric("minigpt_sequences_in_flight") == 0, tries=20)


def test_an_answer_streams_with_its_thinking_folded_and_escape_stops_it(page, server, script):
    expect(page.locator("#welcome")).to_be_visible()
    say(page, "Count.")
    expect(page.locator(".user .bubble")).to_have_text("Count.")
    expect(page.locator("#stop")).to_be_visible()
    wait_for_words(page, 10)
    early = page.locator(ANSWER).inner_text()
    page.wait_for_function(  # it grows
        "n => document.querySelector('.assistant .text')?.innerText.length > n", arg=len(early)
    )
    expect(page.locator("details.thinking")).not_to_have_attribute("open", "")
    page.locator("details.thinking summary").click()
    expect(page.locator(".thoughts")).to_have_text("思考")
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".stats")).to_have_text(re.compile(r"\d+ tokens · [\d.]+ tokens/s · stopped"))
    text = page.locator(ANSWER).inner_text().strip()
    assert script.words(20_000).strip().startswith(text)
    page.wait_for_timeout(300)
    assert page.locator(ANSWER).inner_text().strip() == text  # it has stopped
    assert is_free(server)


def test_regenerate_edit_and_the_stop_button(page, server):
    say(page, "Count.")
    wait_for_words(page, 20)
    page.locator("#stop").click()
    page.locator(".regenerate").click()
    expect(page.locator(".assistant")).to_have_count(1)
    wait_for_words(page, 20)
    page.locator("#stop").click()
    say(page, "Go on.")
    expect(page.locator(".message")).to_have_count(4)
    page.locator("#stop").click()
    page.locator(".user").first.hover()
    page.locator(".user .edit").first.click()
    editor = page.locator(".editor textarea")
    expect(editor).to_have_value("Count.")
    editor.fill("Count again.")
    editor.press("Enter")
    expect(page.locator(".message")).to_have_count(2)  # what followed the edited message is gone
    expect(page.locator(".user .bubble")).to_have_text("Count again.")
    wait_for_words(page, 20)
    page.locator("#stop").click()
    expect(page.locator(".regenerate")).to_be_visible()
    assert is_free(server)


def test_enter_sends_shift_enter_breaks_the_line_and_an_input_method_keeps_its_enter(page):
    field = page.locator("#input")
    field.press_sequentially("one")
    field.press("Shift+Enter")
    field.press_sequentially("two")
    expect(field).to_have_value("one\ntwo")
    composing = "{key: 'Enter', isComposing: true, bubbles: true, cancelable: true}"
    field.evaluate(f"f => f.dispatchEvent(new KeyboardEvent('keydown', {composing}))")
    expect(page.locator(".message")).to_have_count(0)
    field.press("Enter")
    expect(page.locator(".user .bubble")).to_have_text("one\ntwo")
    page.keyboard.press("Escape")


def test_conversations_stay_in_the_browser_and_can_be_left_and_deleted(page):
    page.locator("#examples button").first.click()
    wait_for_words(page, 5)
    page.keyboard.press("Escape")
    expect(page.locator(".regenerate")).to_be_visible()
    page.locator("#new-chat").click()
    expect(page.locator("#welcome")).to_be_visible()
    page.reload()
    page.locator("#conversations button").first.click()
    expect(page.locator(".message")).to_have_count(2)
    expect(page.locator(".stats")).to_contain_text("tokens/s")
    page.locator("#conversations .remove").click()
    expect(page.locator("#conversations li")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()


def test_what_is_set_is_asked_for(page):
    asked = []
    page.on("request", lambda r: asked.append(json.loads(r.post_data)) if r.method == "POST" else None)
    page.locator("#settings-button").click()
    page.locator("#system").fill("Be brief.")
    page.locator("#set-temperature").fill("1.5")
    page.locator("#set-max_tokens").fill("16")
    page.keyboard.press("Escape")
    page.locator("#think").click()
    say(page, "Count.")
    expect(page.locator(".stats")).to_contain_text("cut at the token limit")
    (body,) = asked
    assert body["temperature"] == 1.5
    assert body["max_tokens"] == 16
    assert body["top_p"] == 0.9  # the server's default
    assert body["chat_template_kwargs"] == {"enable_thinking": True}
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Count."}]


def test_a_conversation_that_outgrew_the_context_goes_on_without_its_oldest_turns(page):
    old = [{"role": "user", "content": "word " * 40_000}, {"role": "assistant", "content": "yes"}]
    kept = {"conversations": [{"id": "1", "title": "long", "messages": old}]}
    keep(page, kept)
    with page.expect_response(lambda r: r.status == 400):
        page.reload()
        page.locator("#conversations button").first.click()
        say(page, "Count.")
    expect_forgetful_answer(page, 1)


def test_an_answer_gets_room_though_the_conversation_nearly_fills_the_context(page):
    question, answer = {"role": "user", "content": "word " * 16_000}, {"role": "assistant", "content": "yes"}
    kept = {"conversations": [{"id": "1", "title": "long", "messages": [question, answer] * 2}]}
    asked = []
    page.on("request", lambda r: asked.append(len(json.loads(r.post_data)["messages"])) if r.method == "POST" else None)
    keep(page, kept)
    page.reload()
    page.locator("#conversations button").first.click()
    say(page, "Count.")
    expect_forgetful_answer(page, 2)
    assert asked == [5, 3]


@pytest.mark.parametrize(
    ("old", "numbers"),
    [
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 513,
            [1027, 1025, 1023, 1025, 1023],
        ),
        ([{"role": "user", "content": "a" * (1 << 20)}, {"role": "assistant", "content": "b"}], [3, 1, 3]),
    ],
    ids=["messages", "bytes"],
)
def test_a_conversation_that_no_request_can_hold_goes_on_and_forgets_each_turn_once(page, old, numbers):
    asked = []
    page.on("request", lambda r: asked.append(len(json.loads(r.post_data)["messages"])) if r.method == "POST" else None)
    keep(page, {"conversations": [{"id": "1", "title": "long", "messages": old}], "settings": {"max_tokens": 16}})
    page.reload()
    page.locator("#conversations button").first.click()
    for number in (1, 2):
        say(page, "Count.")
        expect(page.locator(".regenerate")).to_be_visible()
        expect(page.locator(".stats")).to_have_count(2 * number)
        expect(page.locator(".stats").last).to_contain_text("oldest turns are no longer seen")
    assert asked == numbers


def test_an_old_error_offers_no_answer_that_would_delete_what_was_said_since(page):
    question, error = {"role": "user", "content": "Count."}, {"role": "assistant", "content": "", "error": "offline"}
    kept = {"conversations": [{"id": "1", "title": "t", "messages": [question, error] * 2}]}
    keep(page, kept | {"settings": {"max_tokens": 16}})
    page.reload()
    page.locator("#conversations button").first.click()
    expect(page.locator(".error")).to_have_count(2)
    expect(page.locator(".error button")).to_have_count(1)
    page.locator(".error button").click()
    expect(page.locator(".regenerate")).to_be_visible()
    expect(page.locator(".message")).to_have_count(4)
    expect(page.locator(".error")).to_have_count(1)


def test_thinking_that_was_off_and_a_server_that_was_away_leave_the_conversation_as_it_was(page, server):
    asked = []
    page.on("request", lambda r: asked.append(json.loads(r.post_data)["messages"]) if r.method == "POST" else None)
    page.route("**/v1/models", lambda route: route.fulfill(json={}))  # the page does not learn of the model
    keep(page, {"conversations": [], "settings": {"max_tokens": 16, "think": "off"}})
    page.reload()
    expect(page.locator("#model")).to_contain_text("not answer")
    for number in (1, 2, 3):
        if number == 3:
            page.unroute("**/v1/models")
        say(page, "Count.")
        expect(page.locator(".regenerate")).to_be_visible()
        expect(page.locator(".message")).to_have_count(2 * number)
    assert [len(messages) for messages in asked] == [1, 3, 5]
    assert [m.get("reasoning_content") for m in asked[2]] == [None, "", None, "", None]
    expect(page.locator("#model")).to_have_text(server.name)


def test_two_tabs_keep_each_others_conversations(page):
    other = page.context.new_page()
    other.goto(page.url)
    for tab, text in ((page, "First."), (other, "Second."), (page, "Third.")):
        tab.locator("#new-chat").click()
        say(tab, text)
        wait_for_words(tab, 5)
        tab.keyboard.press("Escape")
        expect(tab.locator(".regenerate")).to_be_visible()
    titles = ["Third.", "Second.", "First."]
    for tab in (page, other):
        expect(tab.locator("#conversations li > button:first-child")).to_have_text(titles)
    other.locator("#conversations .remove").nth(1).click()
    expect(page.locator("#conversations li")).to_have_count(2)
    page.reload()
    expect(page.locator("#conversations li > button:first-child")).to_have_text(["Third.", "First."])


def test_what_has_come_of_an_answer_survives_a_reload(page, server):
    say(page, "Count.")
    wait_for_words(page, 20)
    page.reload()
    page.locator("#conversations button").first.click()
    expect(page.locator(ANSWER)).to_contain_text("one two three one two three")
    assert is_free(server)


def test_a_limit_set_for_a_model_with_a_longer_context_is_no_error(page):
    kept = {"conversations": [], "settings": {"max_tokens": 1_000_000}}
    keep(page, kept)
    page.reload()
    expect(page.locator("#size")).to_contain_text("M")
    with page.expect_request(lambda r: r.method == "POST") as asked:
        say(page, "Count.")
    assert json.loads(asked.value.post_data)["max_tokens"] == 32768
    wait_for_words(page, 5)
    page.keyboard.press("Escape")


def test_language_theme_and_width_are_the_readers(open_page):
    chinese = open_page(locale="zh-CN", color_scheme="dark", viewport={"width": 375, "height": 700}, has_touch=True)
    expect(chinese.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(chinese.locator("#welcome h1")).to_have_text("想聊点什么？")
    background = "getComputedStyle(document.body).backgroundColor"
    assert chinese.evaluate(background) == "rgb(25, 26, 25)"
    assert chinese.evaluate("document.documentElement.scrollWidth") <= 375
    say(chinese, "x" * 300 + "\n```\n" + "y" * 300)
    wait_for_words(chinese, 50)
    assert chinese.evaluate("document.documentElement.scrollWidth") <= 375
    chinese.keyboard.press("Escape")
    expect(chinese.locator("#new-chat")).not_to_be_visible()
    chinese.locator("#menu").click()
    expect(chinese.locator("#new-chat")).to_be_visible()
    chinese.locator("#theme").click()
    assert chinese.evaluate(background) == "rgb(250, 249, 246)"
    chinese.locator("#language").click()
    expect(chinese.locator("#new-chat")).to_have_text(re.compile("New chat"))


def test_every_control_has_a_name_for_a_screen_reader(page):
    say(page, "Count.")
    wait_for_words(page, 5)
    page.keyboard.press("Escape")
    expect(page.locator(".regenerate")).to_be_visible()
    page.locator("#settings-button").click()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, dialog, nav, [role=log]")]
            .filter((n) => !(n.getAttribute("aria-label") || n.getAttribute("aria-labelledby") || n.textContent.trim()
                || n.labels?.length)).map((n) => n.outerHTML)"""
    )
    assert nameless == []


PAYLOADS = [
    f"<{tag} {event}={code}>"
    for tag, event in (("img src=x", "onerror"), ("svg", "onload"), ("body", "onload"), ("video src=x", "onerror"))
    for code in ("hit()", '"hit()"', "window.hit=1")
]
PAYLOADS += [
    "<script>hit()</script>",
    "</textarea><script>hit()</script>",
    "</div></article><script src=//evil.example/x.js></script>",
    "<scr<script>ipt>hit()</scr</script>ipt>",
    '"><script>hit()</script>',
    "'><img src=x onerror=hit()>",
    "<iframe src=javascript:parent.hit()></iframe>",
    "<iframe srcdoc='<script>parent.hit()</script>'></iframe>",
    "<object data=javascript:hit()></object>",
    "<embed src=javascript:hit()>",
    "<a href=javascript:hit()>x</a>",
    "[x](javascript:hit())",
    "![x](x' onerror='hit())",
    "[x]: javascript:hit()",
    "<javascript:hit()>",
    "**<img src=x onerror=hit()>**",
    "`<img src=x onerror=hit()>`",
    "```\n</code></pre><script>hit()</script>\n```",
    "```<img/src=x/onerror=hit()>\ncode\n```",
    "```html\n<svg/onload=hit()>\n```",
    "# <img src=x onerror=hit()>",
    "- <img src=x onerror=hit()>",
    "1. <svg onload=hit()>",
    "<details open ontoggle=hit()>",
    "<input autofocus onfocus=hit()>",
    "<marquee onstart=hit()>",
    "<math><mtext><img src=x onerror=hit()></mtext></math>",
    "<style>@import 'javascript:hit()';</style>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<meta http-equiv=refresh content=0;url=javascript:hit()>",
    "<base href=//evil.example/>",
    "<form action=javascript:hit()><button>x</button></form>",
    "<template><script>hit()</script></template>",
    "<noscript><p title='</noscript><img src=x onerror=hit()>'></noscript>",
    "&lt;script&gt;hit()&lt;/script&gt;",
    "\\u003cscript\\u003ehit()\\u003c/script\\u003e",
    "{{constructor.constructor('hit()')()}}",
    "${hit()}",
    "data: [DONE]\n\ndata: <script>hit()</script>",
]
INERT = {"ARTICLE", "DIV", "DETAILS", "SUMMARY", "P", "UL", "OL", "LI", "PRE", "CODE", "STRONG", "BR", "BUTTON", "SPAN"}


def echo(route: Route) -> None:
    """A model that a stranger steers: it says whatever it was told, thinking and answering."""
    text = json.loads(route.request.post_data)["messages"][-1]["content"]
    deltas = [{"reasoning_content": text}, *({"content": text[i : i + 3]} for i in range(0, len(text), 3))]
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    route.fulfill(status=200, content_type="text/event-stream", body=body)


def test_fifty_hostile_texts_stay_text_as_message_answer_thought_and_title(page):
    assert len(PAYLOADS) >= 50
    page.evaluate("() => { window.hit = () => { window.wasHit = true } }")
    page.route("**/v1/chat/completions", echo)
    for payload in PAYLOADS:
        page.locator("#new-chat").click()
        say(page, payload)
        expect(page.locator(".regenerate")).to_be_visible()
        assert page.locator(".user .bubble").evaluate("n => n.textContent") == payload
        assert page.locator(".thoughts").evaluate("n => n.textContent") == payload
    seen = page.evaluate(
        """() => {
            const active = (name) => name.startsWith("on") || name === "href" || name === "src";
            return [...document.querySelectorAll("#conversations li")].map((row) => {
                row.querySelector("button").click();
                const nodes = [...document.querySelectorAll("#messages *, #conversations li *")];
                return nodes.filter((node) => node.className !== "avatar")
                    .flatMap((node) => [node.tagName, ...node.getAttributeNames().filter(active)]);
            });
        }"""
    )
    assert len(seen) == len(PAYLOADS)
    assert set().union(*map(set, seen)) <= INERT
    assert page.locator("script, iframe, object, embed, link[href*=evil], base").count() == 1  # the page's own script
    assert page.evaluate("window.wasHit === undefined && typeof window.hit === 'function'")


def test_markdown_becomes_blocks_lists_and_bold(page):
    page.route("**/v1/chat/completions", echo)
    say(page, "Look: **bold** and `code`\n\n- a\n- b\n\n3. c\n\n```python\nx = '<b>'\n```\n**open")
    expect(page.locator(".regenerate")).to_be_visible()
    text = page.locator(ANSWER)
    assert text.locator("strong").all_inner_texts() == ["bold"]
    assert text.locator("p code").all_inner_texts() == ["code"]
    assert text.locator("ul li").all_inner_texts() == ["a", "b"]
    assert text.locator("ol").get_attribute("start") == "3"
    assert text.locator("pre code").inner_text() == "x = '<b>'"
    assert text.locator("p").last.inner_text() == "**open"


def test_the_security_policy_would_stop_what_slips_through(browser, server):
    page = browser.new_page()
    page.goto(server.url)
    page.evaluate("""() => {
        document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.wasHit = 1'>");
        const script = document.createElement("script");
        script.textContent = "window.wasHit = 2";
        document.body.append(script);
    }""")
    page.wait_for_timeout(200)
    assert page.evaluate("window.wasHit") is None
    page.close()
