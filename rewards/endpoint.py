"""One request to an OpenAI-compatible endpoint, and what came of it.

Nothing that a server sends is an exception here, and no text that leaves here holds the key.
"""

import asyncio
import ipaddress
import json
import math
import os
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import urlsplit

PATH = "/chat/completions"  # that is called below BASE_URL
KEY_ENV = "OPENAI_API_KEY"
NO_KEY = "none"  # what a server on this machine is sent where there is no key
MAX_SHOWN = 200  # characters of a server's words that are shown
REJECTED = (400, 413, 422)  # this request; another one may be answered
RETRYABLE_STATUS = (408, 409, 429)  # and 500 and above: worth another try


@dataclass
class Reply:
    """What came of a try: the model's words, or the kind of its failure and the fault in words."""

    kind: Literal["answer", "fault", "rejected", "refused", "foreign"]
    text: str = ""  # what the model said
    fault: str = ""
    tokens: tuple[int | None, int | None] = (None, None)  # in and out; None: it does not say
    wait: float = 0.0  # seconds that the server asks for before the next try


def secret(key_env: str, base_url: str | None) -> str:
    """The key, without the blanks around it. Raises ValueError, which does not show it.

    A server on this machine needs none, unless `key_env` names another variable than the usual.
    """
    key = os.environ.get(key_env, "").strip()
    if not key and key_env == KEY_ENV and _is_local(base_url):
        return NO_KEY
    if not key:
        raise ValueError(f"the judge's key is not in the environment variable {key_env}")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            f"the environment variable {key_env} holds no key: there is a blank, a line break or "
            "another character inside that no key has"
        )
    return key


async def ask(client: Any, request: dict[str, Any], seconds: float) -> Reply:
    """One try, of `seconds` as a whole: a server that sends byte by byte gets no more.

    A fault ends with the address that was called, without a name and a password in it.
    """
    reply = await _asked(client, request, seconds)
    if reply.fault:
        base = str(client.base_url.copy_with(userinfo=b""))
        address = shown(base.rstrip("/") + PATH, client.api_key)
        reply.fault = f"{shown(reply.fault, client.api_key)} ({address})"
    return reply


async def _asked(client: Any, request: dict[str, Any], seconds: float) -> Reply:
    import openai

    try:
        async with asyncio.timeout(seconds):
            raw = await client.chat.completions.with_raw_response.create(**request)
        response = raw.http_response
        return _read(response.content, response.headers.get("content-type", ""))
    except TimeoutError:
        return Reply("fault", fault=f"it timed out after {seconds:g} s")
    except openai.APIStatusError as error:
        again = error.status_code in RETRYABLE_STATUS or error.status_code >= 500
        rejected = error.status_code in REJECTED
        return Reply(
            "fault" if again else "rejected" if rejected else "refused",
            fault=f"it answered {error.status_code}: {error.message}",
            wait=_retry_after(error.response.headers),
        )
    except openai.APIConnectionError as error:
        why = f": {error.__cause__}" if error.__cause__ else ""
        return Reply("fault", fault=f"{str(error).rstrip('.')}{why}")


def shown(text: str, key: str) -> str:
    """Some of a server's words: on one line, without the key, nothing that steers a terminal."""
    text = text if key == NO_KEY else text.replace(key, "[the key]")
    text = "".join(c if c.isprintable() else "�" for c in " ".join(text.split()))
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def _read(body: bytes, kind: str) -> Reply:
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError) as error:
        if "json" in kind and body.lstrip()[:1] in (b"", b"{"):  # proxies call their pages JSON
            return Reply("fault", fault=f"its answer was cut off: {error}")
        start = body[:60].decode(errors="replace")
        return Reply("foreign", fault=f"no chat completion but {start!r}")
    if not isinstance(reply, dict) or "choices" not in reply:
        return Reply("foreign", fault=f"no chat completion but {str(reply)[:60]!r}")
    text = ""
    match reply["choices"]:
        case [{"message": {"content": str(content)}}, *_]:
            text = content
        case [{"message": {"content": [*parts]}}, *_]:
            for part in parts:
                match part:
                    case {"type": "text", "text": str(content)}:
                        text += content
    usage = reply.get("usage")
    tokens = _count(usage, "prompt") or None, _count(usage, "completion")  # a prompt has some
    return Reply("answer", text, tokens=tokens)


def _count(usage: Any, what: str) -> int | None:
    """Tokens that were used, None where the server does not say. A few write 12.0."""
    count = usage.get(f"{what}_tokens") if isinstance(usage, dict) else None
    if isinstance(count, bool) or not isinstance(count, int | float) or not 0 <= count < math.inf:
        return None
    return min(math.ceil(count), 2**32)


def _retry_after(headers: Any) -> float:
    """Seconds, or those until a date; 0 where the header is absent or neither, or in the past."""
    value = headers.get("retry-after", "0")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError, OSError):
            return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _is_local(base_url: str | None) -> bool:
    host = urlsplit(base_url or "").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost" or host.endswith(".localhost")
