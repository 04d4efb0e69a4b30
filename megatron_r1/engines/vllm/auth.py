"""One secret per server, demanded on every route.

vLLM's own `--api-key` guards /v1 only; the routes that pause the engine or overwrite its weights answer to
anyone who can reach the port, and any user of the machine can reach a loopback port. This middleware is the
outermost layer of the ASGI application, so it sees every request (health, metrics, docs and websockets
included) first.

The token travels in the environment variable VLLM_API_KEY, which vLLM reads as well: a process's environment
is readable by its own user only, its command line by everyone. There is no TLS here: on anything wider than
loopback the token crosses the network in clear text.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from megatron_r1.errors import EngineError

TOKEN_VARIABLE = "VLLM_API_KEY"
TOKEN_BYTES = 32

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


def new_token() -> str:
    """A fresh random token, 256 bits, URL-safe."""
    return secrets.token_urlsafe(TOKEN_BYTES)


def authorization(token: str) -> dict[str, str]:
    """The header that carries `token`."""
    return {"Authorization": f"Bearer {token}"}


class TokenMiddleware:
    """ASGI middleware: 401 for http and close code 1008 for websockets unless the bearer token matches.

    Raises EngineError when built without a token in the environment: an unguarded server must not come up.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        token = os.environ.get(TOKEN_VARIABLE, "")
        if len(token) < TOKEN_BYTES:
            raise EngineError(
                f"{TOKEN_VARIABLE}: got {len(token)} characters; the server needs at least {TOKEN_BYTES}. "
                "Start servers through megatron_r1.rollout.start_engines, which makes one."
            )
        self.app = app
        self.expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self.admits(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            body = b'{"error": "missing or wrong bearer token"}'
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    def admits(self, scope: Scope) -> bool:
        """Whether exactly one Authorization header is present and it is ours, compared in constant time."""
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self.expected)
