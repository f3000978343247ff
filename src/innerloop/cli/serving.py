"""The demonstration as a local web page to drop photographs on.

It listens on this machine alone, answers to no other name and no other page, reads photographs of bounded size in a few
formats, and neither writes nor serves a file.
"""

from __future__ import annotations

import socket
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from innerloop.errors import UsageError
from innerloop.tasks._pictures import open_image
from innerloop.training.adaptation import as_input, predict

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

HOST = "127.0.0.1"
MOST_BYTES, MOST_PIXELS = 25 * 2**20, 50_000_000
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
HERE = Path(__file__).parent


def local_socket(port: str) -> socket.socket:
    """A socket of this machine, before any work is done.

    Raises:
        UsageError: the packages that serve are missing, or the port is no number or taken.
    """
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise UsageError(f"--serve needs {', '.join(missing)}: pip install 'innerloop[serve]'")
    if not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"--port is {port!r}; it must be a number from 0 to 65535")
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, int(port)))
        listening.listen()
    except OSError as error:
        listening.close()
        raise UsageError(f"cannot listen on port {port} ({error.strerror}); leave --port out") from error
    return listening


def serve(listening: socket.socket, page: str, model: nn.Module, notes: dict[str, Any]) -> None:
    """Answer until Ctrl-C; arguments as in `application`."""
    import uvicorn

    print(f"drop photographs on http://{HOST}:{listening.getsockname()[1]} (Ctrl-C ends)", flush=True)
    config = uvicorn.Config(application(page, model, notes), log_level="warning", access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listening])


def application(page: str, model: nn.Module, notes: dict[str, Any]) -> Starlette:
    """The page with a place to drop photographs on, and what predicts them.

    Args:
        page: HTML, with one ``</main>``.
        model: an adapted model.
        notes: its ``classes``, ``input_shape`` and ``invert``.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.responses import Response as Plain
    from starlette.routing import Route

    content = page.replace("</main>", (HERE / "drop.html").read_text("utf-8") + "</main>")
    script = (HERE / "drop.js").read_text("utf-8")

    def refused(status: int, error: str) -> Response:
        return JSONResponse({"error": error}, status, headers=HEADERS)

    async def show(request: Request) -> Response:
        return HTMLResponse(content, headers=HEADERS)

    async def code(request: Request) -> Response:
        return Plain(script, media_type="text/javascript", headers=HEADERS)

    async def classify(request: Request) -> Response:
        # A page of another origin can send this type only after asking, and gets no answer.
        if request.headers.get("content-type") != "application/octet-stream":
            return refused(415, "send the bytes of an image as application/octet-stream")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MOST_BYTES:
                return refused(413, f"the file is larger than {MOST_BYTES // 2**20} MiB")
        try:
            shares = await run_in_threadpool(probabilities, bytes(body), model, notes)
        except Exception as error:  # a damaged image makes Pillow's decoders raise nearly anything
            return refused(400, f"cannot read this as an image ({error})")
        return JSONResponse(shares, headers=HEADERS)

    routes = [Route("/", show), Route("/drop.js", code), Route("/classify", classify, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])])


def probabilities(content: bytes, model: nn.Module, notes: dict[str, Any]) -> list[tuple[str, float]]:
    """The classes of one photograph with their probabilities, the likeliest first.

    Raises:
        Exception: it is too large, or Pillow cannot read it.
    """
    with open_image(content) as image:
        width, height = image.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, more than {MOST_PIXELS:,}")
    shares = predict(model, as_input(content, notes["input_shape"], notes["invert"])[None])[0].tolist()
    return sorted(zip(notes["classes"], shares, strict=True), key=lambda pair: -pair[1])
