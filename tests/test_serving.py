"""The local web page: what it answers, what it refuses, and a real browser that drops a photograph on it."""

from __future__ import annotations

import http.client
import io
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

import innerloop as il
from innerloop.cli import serving
from innerloop.cli.serving import HEADERS, application, local_socket, probabilities
from innerloop.errors import UsageError
from innerloop.reporting import html

pytest.importorskip("starlette", reason="needs innerloop[serve]")
uvicorn = pytest.importorskip("uvicorn", reason="needs innerloop[serve]")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NOTES = {"classes": ["cat", "<b>dog</b>"], "input_shape": (3, 16, 16), "invert": False}
BYTES = {"Content-Type": "application/octet-stream"}


def picture(seed: int = 0, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 20, 3), np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


class Site(NamedTuple):
    port: int
    model: torch.nn.Module

    def ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read().decode()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(il.models.Conv4(3, 2, filters=4, size=16)).eval()
    app = application(html("A page", ["for people"]), model, NOTES)
    listening = local_socket("0")
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield Site(listening.getsockname()[1], model)
    server.should_exit = True
    thread.join(10)


def test_it_shows_the_page_with_a_place_to_drop_on(site: Site) -> None:
    status, headers, text = site.ask("GET", "/")
    assert (status, text.count("for people"), text.count("</main>")) == (200, 1, 1)
    assert '<script src="/drop.js"></script>' in text
    assert all(headers[name] == value for name, value in HEADERS.items())
    status, headers, text = site.ask("GET", "/drop.js")
    assert status == 200
    assert headers["Content-Type"].startswith("text/javascript")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_photograph_gets_the_probabilities_of_the_model(site: Site, kind: str) -> None:
    status, _, text = site.ask("POST", "/classify", picture(kind=kind), BYTES)
    assert status == 200
    assert json.loads(text) == [list(pair) for pair in probabilities(picture(kind=kind), site.model, NOTES)]
    assert sum(share for _, share in json.loads(text)) == pytest.approx(1)


def test_what_it_refuses(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert site.ask("POST", "/classify", picture())[0] == 415
    assert site.ask("POST", "/classify", picture(), {"Content-Type": "text/plain"})[0] == 415
    assert site.ask("GET", "/classify")[0] == 405
    assert site.ask("POST", "/classify", b"no image", BYTES)[0] == 400
    assert site.ask("POST", "/classify", b"", BYTES)[0] == 400
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"  # Pillow calls Ghostscript for it
    status, _, text = site.ask("POST", "/classify", postscript, BYTES)
    assert status == 400
    assert "in no format that is read here" in json.loads(text)["error"]
    monkeypatch.setattr(serving, "MOST_PIXELS", 599)
    assert "20 x 30 pixels, more than 599" in site.ask("POST", "/classify", picture(), BYTES)[2]
    monkeypatch.setattr(serving, "MOST_BYTES", 2**20)
    assert site.ask("POST", "/classify", bytes(2**20 + 1), BYTES)[0] == 413


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/drop.html"])
def test_it_serves_no_files(site: Site, path: str) -> None:
    assert site.ask("GET", path)[0] == 404


def test_it_answers_to_this_machine_alone(site: Site) -> None:
    assert site.ask("GET", "/", headers={"Host": "evil.example"})[0] == 400
    assert site.ask("GET", "/", headers={"Host": f"localhost:{site.port}"})[0] == 200
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    status, headers, _ = site.ask("OPTIONS", "/classify", headers=preflight)
    assert status == 405
    assert not any(name.lower().startswith("access-control") for name in headers)
    with local_socket("0") as listening:
        assert listening.getsockname()[0] == "127.0.0.1"


def test_ports_that_will_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for port in ("x", "-1", "65536", ""):
        with pytest.raises(UsageError, match="it must be a number from 0 to 65535"):
            local_socket(port)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UsageError, match=r"^cannot listen on port \d+ \(.+\); leave --port out$"):
            local_socket(str(other.getsockname()[1]))
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"^--serve needs starlette, uvicorn: pip install 'innerloop\[serve\]'$"):
        local_socket("0")


def test_a_browser_drops_photographs_on_the_page(site: Site, tmp_path: Path) -> None:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"needs a browser: one of {', '.join(BROWSERS)}")
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    files[0].write_bytes(picture())
    files[1].write_bytes(b"no image")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(f"http://127.0.0.1:{site.port}/")
        page.set_input_files("#files", files[:1])
        caption = page.locator("#answers figcaption")  # locators, as the page's own rules forbid to wait by eval
        caption.filter(has_text="%").wait_for()
        first, share = probabilities(picture(), site.model, NOTES)[0]
        assert caption.inner_text().startswith(f"{first} {share * 100:.0f} %")  # text, not markup
        assert page.evaluate("document.querySelector('#answers img').naturalWidth") == 20
        # a real drop, of a file that is no image
        page.evaluate("""() => {
            const data = new DataTransfer();
            data.items.add(new File(["no image"], "two.png", { type: "image/png" }));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
        }""")
        caption.filter(has_text="cannot read").wait_for()
        assert ["cannot read" in each for each in caption.all_inner_texts()] == [True, False]
        assert not faults
        browser.close()
