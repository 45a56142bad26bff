"""Labelling on a web page, by one or several people: a small server in the run.

Whoever has the token may label; nobody else gets an answer. What another site's page sends is
refused by the cookie (SameSite), the Origin and the Host; a link there may be followed. The page
itself is page.html.
"""

import os
import re
import secrets
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from pydantic import BaseModel
from tqdm import tqdm

from rewards.label_queue import NAMES, TOO_LATE, UNDO_EXPIRED, LabelQueue

PAGE = Path(__file__).with_name("page.html")
EVERYWHERE = {"0.0.0.0", "::"}  # the machine's names are then not known
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Answer(BaseModel, extra="forbid"):
    key: str
    value: str


class Page:
    """The page at http://host:port; port 0 is any that is free, and raises ValueError if none is.

    The token comes from the environment variable `token_env`, or is made up; the address with it is
    printed once, on stderr. Every browser is a labeller of its own.
    """

    def __init__(
        self,
        queue: LabelQueue,
        question: str,
        agreement: Callable[[], dict[str, float]],
        host: str,
        port: int,
        token_env: str | None,
    ):
        self.queue, self.question, self.agreement = queue, question, agreement
        self.token = _token(token_env) if token_env else secrets.token_urlsafe(24)
        self.hosts = None if host in EVERYWHERE else LOOPBACK | {host}
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        if os.name != "nt":  # where it would let another program take the port
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.socket.bind((host, port))
            self.socket.listen()
        except OSError as error:
            self.socket.close()
            raise ValueError(f"nobody can listen on {host}:{port}: {error.strerror}") from error
        port = self.socket.getsockname()[1]
        name = socket.gethostname() if self.hosts is None else f"[{host}]" if ":" in host else host
        self.address = f"http://{name}:{port}"
        self.cookie = f"labels-{port}"  # cookies do not know ports
        # Without log_config=None it would close the log files of the whole process
        options: dict[str, Any] = {"log_config": None, "log_level": "warning", "access_log": False}
        self.server = uvicorn.Server(uvicorn.Config(self.app(), lifespan="off", **options))
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        if self.thread is None:
            self.thread = threading.Thread(
                target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True
            )
            self.thread.start()
            # above a progress bar, if there is one
            tqdm.write(f"label at {self.address}/?token={self.token}", file=sys.stderr)

    def close(self) -> None:
        if self.thread:
            self.server.should_exit = True
            self.thread.join()
        self.socket.close()

    def app(self) -> FastAPI:
        """GET / with the token, then /next, /label and /undo for who has the cookie."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

        @app.middleware("http")
        async def guarded(
            request: Request, then: Callable[[Request], Awaitable[Response]]
        ) -> Response:
            refusal = self._refusal(request)
            response = JSONResponse({"error": refusal}, 403) if refusal else await then(request)
            response.headers.update(HEADERS)
            return response

        @app.exception_handler(RequestValidationError)
        def refused(request: Request, error: RequestValidationError) -> Response:
            # FastAPI's own answer repeats what came, and cannot where that was Infinity
            return JSONResponse({"error": "this is not what the page sends"}, 422)

        @app.get("/")
        def page(request: Request) -> Response:
            if "token" in request.query_params:  # into a cookie, and out of the address bar
                response: Response = RedirectResponse("/", 303)
                who = self._who(request) or secrets.token_hex(4)
                response.set_cookie(  # "strict" would not be sent after a link on another site
                    self.cookie, f"{self.token}.{who}", httponly=True, samesite="lax"
                )
                return response
            nonce = secrets.token_urlsafe(16)
            policy = (
                f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
                "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            )
            text = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
            return HTMLResponse(text, headers={"Content-Security-Policy": policy})

        @app.get("/next")
        def following(request: Request, acted: bool = False) -> dict[str, Any]:
            return self._view(self._labeller(request), acted=acted)

        @app.post("/label")
        def label(request: Request, answer: Answer) -> dict[str, Any]:
            who = self._labeller(request)
            kept = self.queue.answer(who, answer.key, answer.value)
            return self._view(who, None if kept else TOO_LATE)

        @app.post("/undo")
        def undo(request: Request) -> dict[str, Any]:
            who = self._labeller(request)
            return self._view(who, None if self.queue.undo(who) else UNDO_EXPIRED)

        return app

    def _view(self, who: str, message: str | None = None, acted: bool = True) -> dict[str, Any]:
        """All that the page shows."""
        question = self.queue.next(who, acted)
        shown = question and {
            "key": question.key,
            "prompt": question.prompt + ("\n\n" if question.is_answer else ""),
            "completion": question.completion,
        }
        return {
            "asked": self.question,
            "values": list(self.queue.values),
            "names": NAMES,
            "item": shown,
            "left": len(self.queue.open),
            "done": len(self.queue.given.get(who, [])),
            "people": len(self.queue.here() | {who}),
            "agreement": self.agreement(),
            "message": message,
        }

    def _refusal(self, request: Request) -> str | None:
        """Why a request is refused; None: it is answered."""
        host = request.headers.get("host", "")
        if self.hosts and _part("hostname", f"//{host}") not in self.hosts:
            return "this host name is not the page's"
        if request.method != "GET":
            origin = request.headers.get("origin")
            if origin is None or _part("netloc", origin) != host:
                return "this request comes from another site"
        given = request.query_params.get("token", "")
        if request.url.path == "/" and given:
            allowed = secrets.compare_digest(given.encode(), self.token.encode())
        else:
            allowed = self._who(request) is not None
        return None if allowed else "no token, or a wrong one: open the address the run printed"

    def _who(self, request: Request) -> str | None:
        """The labeller that the cookie names; None if the token in it is wrong."""
        token, _, who = request.cookies.get(self.cookie, "").rpartition(".")
        right = secrets.compare_digest(token.encode(), self.token.encode())
        return who if who and right else None

    def _labeller(self, request: Request) -> str:
        who = self._who(request)
        assert who, "the middleware lets nobody else in"
        return who


def _token(variable: str) -> str:
    """What the environment holds, without the blanks around it; it is part of an address."""
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ValueError(f"the page's token is not in the environment variable {variable}")
    if not re.fullmatch(r"[\w.~-]+", token, re.ASCII):
        raise ValueError(
            f"the page's token in the environment variable {variable} may hold letters, digits and "
            "- . _ ~ only: it is part of an address"
        )
    return token


def _part(name: str, url: str) -> str | None:
    try:
        return getattr(urlsplit(url), name)
    except ValueError:  # no address at all
        return None
