"""Who may ask: an optional bearer token, and no address but loopback without one."""

from __future__ import annotations

import hmac
import ipaddress
import json
import os
import socket
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ztrl_sandbox.process import TOKEN_VARIABLE

_MIN_TOKEN_CHARACTERS = 16

_OPEN_PATHS = frozenset({"/health", "/ready"})
"""Answered to anybody: load balancers and orchestrators ask them, and they tell no secret."""

_REFUSAL = json.dumps({"detail": "a valid bearer token is needed: Authorization: Bearer <token>"}).encode()


def load_token(token_file: Path | None) -> str | None:
    """The token from ``token_file``, else from the environment, else None.

    It is taken out of the environment, so that no child process inherits it. There is no command-line option
    for the token itself: everybody on the machine can read a command line.

    Raises:
        ValueError: it is shorter than 16 characters, or cannot be sent in an HTTP header.
        OSError: ``token_file`` cannot be read.
    """
    from_environment = os.environ.pop(TOKEN_VARIABLE, None)
    token = from_environment if token_file is None else token_file.read_text()
    if token is None:
        return None
    token = token.strip()
    source = TOKEN_VARIABLE if token_file is None else str(token_file)
    if len(token) < _MIN_TOKEN_CHARACTERS or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"{source}: a token is at least {_MIN_TOKEN_CHARACTERS} printable ASCII characters without a space"
        )
    return token


def check_bind(host: str, token: str | None) -> None:
    """Refuse an address that others can reach unless a token is set.

    Raises:
        ValueError: ``host`` is not (only) loopback and there is no token.
        OSError: ``host`` cannot be resolved.
    """
    if token is None and not _is_loopback(host):
        raise ValueError(
            f"refusing to listen on {host or 'every address'} without a token, since whoever reaches it could "
            f"run code here; set {TOKEN_VARIABLE} or --token-file, or listen on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    if not host:
        return False  # every address
    addresses = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in addresses)


class BearerAuth:
    """ASGI middleware that answers 401 to a request without the token, before its body is read."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS or self._authorized(scope):
            await self._app(scope, receive, send)
            return
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(_REFUSAL)).encode()),
            (b"www-authenticate", b"Bearer"),
        ]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": _REFUSAL})

    def _authorized(self, scope: Scope) -> bool:
        given = Headers(scope=scope).get("authorization", "")
        scheme, _, credentials = given.partition(" ")
        # The scheme's name is case-insensitive; only the credentials are secret.
        return hmac.compare_digest(f"{scheme.capitalize()} {credentials}".encode("latin-1"), self._expected)
