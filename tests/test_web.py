"""The labelling page: who gets in, and a real browser that labels what a real run samples.

The browser tests need Debian's chromium, or another, and Playwright; without them they skip.
"""

import asyncio
import http.client
import json
import logging
import math
import os
import re
import shutil
import socket
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from conftest import read_jsonl
from tqdm import tqdm

from adaptiverl.config.loading import load_config
from adaptiverl.config.schema import ConfigError
from adaptiverl.training.keys import RunConfig
from rewards import HumanReward

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine")


@pytest.fixture
def reward(tmp_path, monkeypatch) -> Iterator[HumanReward]:
    """People on a page, who are asked about two completions."""
    monkeypatch.setenv("PAGE_TOKEN", "sesame")
    made = HumanReward(
        where="web", port=0, token_env="PAGE_TOKEN", labels=str(tmp_path / "labels.sqlite")
    )
    made.front_end.start()
    yield made
    made.close()


class Waiting(threading.Thread):
    """A step that waits for labels of `completions`."""

    def __init__(self, reward: HumanReward, *completions: str):
        super().__init__()
        self.reward, self.completions, self.result = reward, list(completions), None
        self.start()
        assert reward.queue.wait_next("nobody")
        reward.queue.shown.clear()

    def run(self) -> None:
        prompts = ["Say "] * len(self.completions)
        self.result = asyncio.run(self.reward(prompts, self.completions))


class Client:
    """A browser's requests, or somebody's who pretends to be one."""

    def __init__(self, reward: HumanReward):
        self.host = urlsplit(reward.front_end.address).netloc
        self.cookie = ""

    def request(self, method: str, path: str, body: dict | None = None, **headers: str):
        headers = {"Host": self.host, "Cookie": self.cookie} | headers
        if body is not None:
            headers["Content-Type"] = "application/json"
        connection = http.client.HTTPConnection(self.host, timeout=60)
        connection.request(method, path, body and json.dumps(body), headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response, text

    def enter(self) -> str:
        response, _ = self.request("GET", "/?token=sesame")
        assert response.status == 303 and response.headers["location"] == "/"
        self.cookie = response.headers["set-cookie"].split(";")[0]
        return response.headers["set-cookie"]

    def post(self, path: str, body: dict, **headers: str) -> int:
        headers = {"Origin": f"http://{self.host}"} | headers
        return self.request("POST", path, body, **headers)[0].status


def test_without_the_token_nothing_is_told_or_taken(reward):
    run, client = Waiting(reward, "a", "b"), Client(reward)
    answer = {"key": reward.queue.next("x").key, "value": "+"}
    for path in ("/", "/next", "/?token=", "/?token=wrong", "/docs", "/openapi.json"):
        response, text = client.request("GET", path)
        assert response.status == 403 and "Say" not in text
    port = urlsplit(reward.front_end.address).port
    cookies = ("wrong.x", ".x", "sesame.", "sesame")
    for client.cookie in ("", "labels-1=sesame.x", *(f"labels-{port}={c}" for c in cookies)):
        assert client.post("/label", answer) == 403 and client.post("/undo", {}) == 403
    assert len(reward.queue.open) == 2
    client.enter()
    assert client.post("/label", answer) == 200
    assert client.post("/label", {"key": next(iter(reward.queue.open)), "value": "-"}) == 200
    run.join()
    assert sorted(run.result) == [-1.0, 1.0]


def test_an_answer_stands_below_its_conversation_and_a_continuation_behind_its_text(reward):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "So?"}]
    turns = "system: Be brief.\nuser: So?"
    answer = [{"role": "assistant", "content": "Well."}]
    for prompt, completion, shown in ((talk, answer, turns + "\n\n"), ("Say ", "Well.", "Say ")):
        run = threading.Thread(target=asyncio.run, args=(reward([prompt], [completion]),))
        run.start()
        assert reward.queue.wait_next("nobody")
        reward.queue.shown.clear()
        client = Client(reward)
        client.enter()
        item = json.loads(client.request("GET", "/next")[1])["item"]
        assert (item["prompt"], item["completion"]) == (shown, "Well.")
        assert client.post("/label", {"key": item["key"], "value": "+"}) == 200
        run.join()


def test_half_a_character_is_shown_and_kept_as_its_escape(reward):
    """UTF-8 has none: neither the page nor the file of labels could hold it."""
    run, client = Waiting(reward, "so \ud800"), Client(reward)
    client.enter()
    item = json.loads(client.request("GET", "/next")[1])["item"]
    assert item["completion"] == "so \\ud800"
    assert client.post("/label", {"key": item["key"], "value": "+"}) == 200
    run.join()
    assert run.result == [1.0]


def test_a_second_answer_and_an_undo_too_many_change_nothing(reward):
    """A double click, and the key pressed again; what a browser of an earlier run sends."""
    run, client = Waiting(reward, "a", "b"), Client(reward)
    client.enter()
    key = json.loads(client.request("GET", "/next")[1])["item"]["key"]

    def sent(path: str, body: dict) -> tuple[str | None, int]:
        view = json.loads(client.request("POST", path, body, Origin=f"http://{client.host}")[1])
        return view["message"], view["left"]

    assert sent("/label", {"key": key, "value": "+"}) == (None, 1)
    late = "that one was labelled already, or timed out"
    assert sent("/label", {"key": key, "value": "-"}) == (late, 1)
    assert sent("/undo", {}) == (None, 2)
    expired = "nothing to undo: you have labelled nothing in this batch"
    assert sent("/undo", {}) == (expired, 2)
    assert sent("/label", {"key": key, "value": "-"}) == (None, 1)
    (other,) = reward.queue.open
    mine, client.cookie = client.cookie, client.cookie.replace("sesame", "an-older-token")
    assert client.post("/label", {"key": other, "value": "-"}) == 403
    assert client.enter().split(";")[0] != mine, "the address lets it in again"
    assert sent("/label", {"key": other, "value": "+"}) == (None, 0)
    run.join()
    assert run.result == [-1.0, 1.0]


def test_who_labels_what_another_run_has_had_labelled_is_told(reward):
    run, client = Waiting(reward, "a", "b"), Client(reward)
    client.enter()
    item = json.loads(client.request("GET", "/next")[1])["item"]
    assert item["completion"] == "a"
    reward.queue.labels.add("Say ", "a", -1.0, "of another run")
    answer = {"key": item["key"], "value": "+"}
    text = client.request("POST", "/label", answer, Origin=f"http://{client.host}")[1]
    view = json.loads(text)
    assert view["message"] == "that one was labelled already, or timed out"
    assert (view["done"], view["item"]["completion"]) == (0, "b")
    assert client.post("/label", {"key": view["item"]["key"], "value": "+"}) == 200
    run.join()
    assert run.result == [-1.0, 1.0]


def test_other_sites_and_names_get_nowhere(reward):
    run, client = Waiting(reward, "a"), Client(reward)
    cookie = client.enter()
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie
    answer = {"key": reward.queue.next("x").key, "value": "+"}
    for origin in ("http://evil.example", "null", f"http://{client.host}.evil.example", "http://["):
        assert client.post("/label", answer, Origin=origin) == 403
    response, _ = client.request("POST", "/label", answer)
    assert response.status == 403, "no origin at all"
    for host in (
        "[",
        "evil.example",
        f"evil.example:{urlsplit(reward.front_end.address).port}",
        "",
    ):
        assert client.request("GET", "/next", Host=host)[0].status == 403, "a rebound name"
    form = client.request("POST", "/label", None, Origin=f"http://{client.host}")
    assert form[0].status == 422, "not what the page sends"
    assert client.post("/label", answer | {"value": math.inf}) == 422
    assert len(reward.queue.open) == 1
    assert client.post("/label", answer) == 200
    run.join()


def test_the_page_may_only_run_what_came_with_it(reward):
    client = Client(reward)
    client.enter()
    response, text = client.request("GET", "/")
    policy = response.headers["content-security-policy"]
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert re.findall(r"<(?:script|style)([^>]*)>", text) == [f' nonce="{nonce}"'] * 2
    assert not re.search(r"https?://", text), "nothing from elsewhere"
    again = client.request("GET", "/")[0].headers["content-security-policy"]
    assert again != policy, "a nonce is used once"
    assert response.headers["x-frame-options"] == "DENY"


def test_on_all_addresses_any_name_will_do_with_the_token(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PAGE_TOKEN", "sesame")
    labels = str(tmp_path / "labels.sqlite")
    made = HumanReward(where="web", host="0.0.0.0", port=0, token_env="PAGE_TOKEN", labels=labels)
    made.front_end.start()
    try:
        assert f"label at http://{socket.gethostname()}:" in capsys.readouterr().err
        client = Client(made)
        client.host = f"127.0.0.1:{urlsplit(made.front_end.address).port}"
        assert client.request("GET", "/next", Host="studio.local")[0].status == 403
        client.enter()
        assert client.request("GET", "/next", Host="studio.local")[0].status == 200
    finally:
        made.close()


def test_the_address_stands_on_a_line_of_its_own(tmp_path, capsys):
    """Also while a progress bar is shown, as it is when people are first asked."""
    made = HumanReward(where="web", port=0, labels=str(tmp_path / "labels.sqlite"))
    with tqdm(total=3, file=sys.stderr):
        made.front_end.start()
        err = capsys.readouterr().err
    made.close()
    (line,) = [line for line in re.split(r"[\r\n]", err) if "label at" in line]
    assert line == f"label at {made.front_end.address}/?token={made.front_end.token}"


def test_the_logs_of_the_process_stay_open(tmp_path):
    handler = logging.FileHandler(tmp_path / "own.log", mode="w", encoding="utf-8")
    own = logging.getLogger("of the user")
    own.addHandler(handler)
    try:
        made = HumanReward(where="web", port=0, labels=str(tmp_path / "labels.sqlite"))
        made.front_end.start()
        made.close()
        own.error("still here")
        assert (tmp_path / "own.log").read_text("utf-8") == "still here\n"
    finally:
        own.removeHandler(handler)
        handler.close()


def test_an_idle_page_keeps_nothing_and_is_nobody(reward):
    """It asks for news every few seconds, as long as it is open."""
    run, one, other = Waiting(reward, "a"), Client(reward), Client(reward)
    reward.queue.seen.clear()

    def view(client: Client, path: str = "/next") -> dict:
        return json.loads(client.request("GET", path)[1])

    for client in (one, other):
        client.enter()
    item = view(one)["item"]
    assert view(other)["item"] is None and view(other)["people"] == 2
    reward.queue.idle_timeout = 0.0
    assert view(other, "/next?acted=true")["item"] == item and view(other)["people"] == 1
    assert view(one)["item"] == item, "it does not change under who comes back"
    assert other.post("/label", {"key": item["key"], "value": "+"}) == 200
    run.join()


def test_two_cookies_are_two_people(reward):
    run, one, other = Waiting(reward, "a", "b"), Client(reward), Client(reward)
    seen = []
    for client in (one, other):
        client.enter()
        seen.append(json.loads(client.request("GET", "/next")[1])["item"])
    assert {item["completion"] for item in seen} == {"a", "b"}
    for client, item in zip((one, other), seen, strict=True):
        assert client.post("/label", {"key": item["key"], "value": "+"}) == 200
    run.join()


def test_the_token_is_taken_without_what_a_file_adds(tmp_path, monkeypatch):
    monkeypatch.setenv("PAGE_TOKEN", "sesame\r\n")
    labels = str(tmp_path / "labels.sqlite")
    made = HumanReward(where="web", port=0, token_env="PAGE_TOKEN", labels=labels)
    made.front_end.start()
    assert Client(made).enter()
    made.close()


def test_mistakes_are_told_before_a_run_begins(reward, tmp_path, monkeypatch):
    labels = str(tmp_path / "other.sqlite")
    port = urlsplit(reward.front_end.address).port
    with pytest.raises(ValueError, match=f"nobody can listen on 127.0.0.1:{port}"):
        HumanReward(where="web", port=port, labels=labels).start()
    with pytest.raises(ValueError, match="not in the environment variable NO_TOKEN"):
        HumanReward(where="web", port=0, token_env="NO_TOKEN", labels=labels).start()
    for odd in (" \n", "open sesame", "sésame", "a;b", "a\nb", "a&b"):
        monkeypatch.setattr("os.environ", os.environ | {"ODD_TOKEN": odd})
        with pytest.raises(ValueError, match="environment variable ODD_TOKEN") as caught:
            HumanReward(where="web", port=0, token_env="ODD_TOKEN", labels=labels).start()
        assert odd not in str(caught.value)
    keys = {"REWARDS": [{"TYPE": "human", "PORT": 80}]}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(ConfigError, match=r"REWARDS\.0: PORT needs WHERE web"):
        load_config(tmp_path / "config.json", schema=RunConfig)


# In a browser


@pytest.fixture(scope="module")  # Playwright keeps an event loop in this thread
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Person:
    """Somebody with a browser of their own, at the page, with a keyboard."""

    def __init__(self, chromium, address: str):
        from playwright.sync_api import expect

        expect.set_options(timeout=120_000)
        self.expect = expect
        self.page = chromium.new_context().new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text))
        self.page.goto(address)
        assert "token" not in self.page.url, "not left in the address bar"
        self.labelled = 0

    def sees(self) -> str:
        """The completion before them, once there is one."""
        completion = self.page.locator("#completion")
        self.expect(completion).not_to_be_empty()
        return completion.text_content()

    def press(self, key: str, completion: str | None = None) -> str:
        """Labels what they see by `key`, or takes back the last label; what it was."""
        seen = completion or self.sees()
        self.page.keyboard.press(key)
        self.labelled += -1 if key == "u" else 1
        self.expect(self.page.locator("#done")).to_have_text(f"{self.labelled} labelled by you")
        return seen

    def leave(self) -> None:
        assert self.errors == []
        self.page.context.close()


@needs_browser
def test_what_a_model_writes_is_text(reward, chromium):
    evil = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"
    run = Waiting(reward, evil)
    person = Person(chromium, f"{reward.front_end.address}/?token=sesame")
    assert person.sees() == evil
    assert person.page.title() == "Label" and person.page.locator("img").count() == 0
    person.page.get_by_role("button", name="good").click()
    run.join()
    assert run.result == [1.0]
    person.leave()


@needs_browser
def test_the_address_works_from_a_link_on_another_site(reward, chromium):
    """A chat, say: also for who has been there already, who stays the same labeller."""
    run, address = Waiting(reward, "a", "b"), f"{reward.front_end.address}/?token=sesame"
    page = chromium.new_context().new_page()
    page.route(
        "http://chat.example/**",
        lambda route: route.fulfill(
            body=f"<a href='{address}'>label</a>", content_type="text/html"
        ),
    )
    seen = []
    for key in ("+", "-"):
        page.goto("http://chat.example/")
        page.get_by_role("link").click()
        page.locator("#completion").filter(has_text=re.compile(".")).wait_for()
        seen.append(page.locator("#completion").text_content())
        page.keyboard.press(key)
        page.locator("#done").filter(has_text=f"{len(seen)} labelled by you").wait_for()
    run.join()
    assert sorted(seen) == ["a", "b"]
    page.context.close()


@needs_browser
def test_the_page_is_read_in_the_dark(reward, chromium):
    """Text and ground differ by WCAG's 4.5 at least: of what is labelled too."""
    run = Waiting(reward, "a", "aa")
    for scheme in ("light", "dark"):
        page = chromium.new_context(color_scheme=scheme).new_page()
        page.goto(f"{reward.front_end.address}/?token=sesame")
        page.locator("#completion").filter(has_text="a").wait_for()
        text, mark, ground = page.evaluate(
            """() => {
                const style = element => getComputedStyle(element);
                const mark = style(document.getElementById("completion"));
                const canvas = document.createElement("canvas").getContext("2d");
                const drawn = colors => {
                    for (const color of colors) {
                        canvas.fillStyle = color;
                        canvas.fillRect(0, 0, 1, 1);
                    }
                    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
                };
                const dark = matchMedia("(prefers-color-scheme: dark)").matches;
                const canvasColor = dark ? "#121212" : "#fff";
                return [
                    drawn([canvasColor, mark.color]),
                    drawn([canvasColor, mark.backgroundColor]),
                    drawn([canvasColor]),
                ];
            }"""
        )
        assert contrast(text, mark) > 4.5 and contrast(text, ground) > 4.5
        page.keyboard.press("+")
        page.locator("#done").filter(has_text="1 labelled by you").wait_for()
        page.context.close()
        reward.queue.absence_timeout = 0.0  # who has left keeps nothing
    run.join()


def contrast(one: list[int], other: list[int]) -> float:
    """WCAG's, from 1 to 21."""

    def luminance(color: list[int]) -> float:
        parts = [x / 255 for x in color]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


@needs_browser
def test_a_scale_of_numbers_says_which_end_is_good(tmp_path, monkeypatch, chromium):
    monkeypatch.setenv("PAGE_TOKEN", "sesame")
    made = HumanReward(
        where="web", scale="1-5", port=0, token_env="PAGE_TOKEN", labels=str(tmp_path / "l.sqlite")
    )
    made.front_end.start()
    person = Person(chromium, f"{made.front_end.address}/?token=sesame")
    person.page.locator("#keys button").first.wait_for()
    assert person.page.locator("#keys button").all_text_contents() == [
        "1worst", "2", "3", "4", "5best", "sskip", "uundo"
    ]  # fmt: skip
    person.leave()
    made.close()


@needs_browser
def test_the_page_says_whether_anybody_is_at_it(reward, chromium):
    person = Person(chromium, f"{reward.front_end.address}/?token=sesame")
    page, asked = person.page, []
    page.on("request", lambda request: asked.append(urlsplit(request.url).query))
    for moves in (False, True, False):
        if moves:
            page.mouse.move(len(asked), 30)
            page.mouse.move(len(asked), 60)
        with page.expect_request("**/next*"):
            pass
    assert asked[0] == "" and "acted=true" in asked and asked[-1] == ""
    person.leave()


@needs_browser
def test_another_site_cannot_label_through_a_labellers_browser(reward, chromium):
    """Its page posts a form and a fetch to ours, from a browser that holds the cookie."""
    run = Waiting(reward, "a")
    person = Person(chromium, f"{reward.front_end.address}/?token=sesame")
    person.sees()
    key = next(iter(reward.queue.open))
    other = person.page.context.new_page()
    other.route("http://evil.example/**", lambda route: route.fulfill(body="<title>evil</title>"))
    other.goto("http://evil.example/")
    answered = other.evaluate(
        """async ([address, key]) => {
            const body = JSON.stringify({ key, value: "+" });
            const options = { method: "POST", mode: "no-cors", credentials: "include", body };
            return (await fetch(address + "/label", options).catch(error => error)).type;
        }""",
        [reward.front_end.address, key],
    )
    assert answered in ("opaque", None)
    assert list(reward.queue.open) == [key], "not labelled"
    other.close()
    person.press("-")
    run.join()
    person.leave()


@pytest.fixture
def labelled_run(settings, start, tmp_path):
    """Starts a run that asks on a page; the process, and the address that it prints."""
    processes = []

    def begin(*arguments: str):
        spec = {"TYPE": "human", "WHERE": "web", "PORT": 0, "LABELS": str(tmp_path / "l.sqlite")}
        keys = settings | {"REWARDS": [spec, {"TYPE": "length", "TARGET": 6}], "SAVE_EVERY": 1}
        process = start(keys, *arguments)
        processes.append(process)
        for line in process.stderr:
            if found := re.match(r"label at (\S+)", line):
                return process, found[1]
        pytest.fail("the run ended without an address")

    yield begin
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@needs_browser
def test_a_run_is_labelled_killed_and_resumed(labelled_run, chromium, settings, tmp_path):
    """24 completions, two people, an undo, SIGKILL with a batch half done: every label once."""
    given: dict[str, float] = {}
    shown: list[str] = []

    def label(person: Person, key: str) -> None:
        seen = person.press(key)
        shown.append(seen)
        given[seen] = 1.0 if key == "+" else -1.0

    process, address = labelled_run()
    ann = Person(chromium, address)
    for key in "+-+":
        label(ann, key)
    taken_back = shown.pop()
    ann.press("u", completion=taken_back)
    ann.expect(ann.page.locator("#completion")).to_have_text(taken_back)
    for key in "-++-+-":
        label(ann, key)  # the first batch is done
    assert given[taken_back] == -1.0

    bob = Person(chromium, address)
    assert ann.sees() != bob.sees(), "at once, each their own"
    for person, key in ((ann, "+"), (bob, "-"), (bob, "+"), (ann, "-")):
        label(person, key)
    process.kill()
    assert process.wait() == -9
    ann.page.context.close()
    bob.page.context.close()

    process, address = labelled_run("RESUME=auto")
    ann, bob = Person(chromium, address), Person(chromium, address)
    ann.expect(ann.page.locator("#left")).to_have_text("4 left in this batch")
    for i in range(12):
        label((ann, bob)[i % 2], "+-"[i // 2 % 2])
    ann.leave()
    bob.leave()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "finished: 3 steps" in out

    assert len(shown) == len(set(shown)) == 24, "nothing was asked twice"
    with closing(sqlite3.connect(tmp_path / "l.sqlite")) as base:
        rows = base.execute("SELECT completion, score FROM labels").fetchall()
    assert len(rows) == 24 and dict(rows) == given
    samples = read_jsonl(Path(settings["OUTPUT_DIR"]) / "samples.jsonl")
    assert {row["completion"]: row["rewards/human"] for row in samples} == given
    assert (
        "human/agreement/length" in read_jsonl(Path(settings["OUTPUT_DIR"]) / "metrics.jsonl")[-1]
    )
