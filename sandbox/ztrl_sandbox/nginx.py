"""A configuration of nginx that makes many executors look like one, for clients that know a single URL."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from ztrl_sandbox.client_session import ROUTE_HEADER
from ztrl_sandbox.endpoint import KEEPALIVE_SECONDS

_SERVER = re.compile(r"[A-Za-z0-9._-]+(:[0-9]+)?|\[[0-9A-Fa-f:.]+\](:[0-9]+)?")

_TEMPLATE = """\
# Printed by `ztrl-sandbox nginx-config`. In a directory of its own:
#     nginx -p "$PWD" -c nginx.conf -g 'daemon off;'
worker_processes auto;
error_log stderr warn;
pid nginx.pid;

events {{
    worker_connections 16384;
}}

http {{
    access_log off;
    client_body_temp_path client_body_temp;
    proxy_temp_path proxy_temp;
    fastcgi_temp_path fastcgi_temp;
    uwsgi_temp_path uwsgi_temp;
    scgi_temp_path scgi_temp;

    # The executor chooses a session's id, so no hash of the id can tell where it is to be opened. The client
    # chooses this instead, and sends it with every request of the session. Clients that do not know it are
    # told apart by their address.
    map {route_variable} $session_id {{
        "" $remote_addr;
        default {route_variable};
    }}

    # Shared memory (zone): least_conn must know the calls of all worker processes.
    upstream executors {{
        zone executors 256k;
        least_conn;
{executors}
        keepalive 256;
        keepalive_timeout {keepalive_seconds:g}s;
    }}

    # No other executor has the session, so none is ever passed over: while one is down its sessions are lost,
    # and a session opened elsewhere in its stead would be lost when it comes back.
    upstream sessions {{
        zone sessions 256k;
        hash $session_id consistent;
{sessions}
        keepalive 256;
        keepalive_timeout {keepalive_seconds:g}s;
    }}

    # The whole request is read before an executor is chosen, in memory.
    client_max_body_size 64m;  # the executors refuse more
    client_body_buffer_size 64m;
    proxy_http_version 1.1;
    proxy_set_header Connection "";
    proxy_buffering off;
    proxy_connect_timeout 3s;
    proxy_read_timeout 3600s;  # queue and run time; the clients have limits of their own
    proxy_ignore_client_abort off;  # who hangs up stops the snippet
    # Elsewhere only when nothing was sent: nginx repeats no POST without `non_idempotent`.
    proxy_next_upstream error timeout;

    server {{
        listen {listen};

        location = /v1/execute {{ proxy_pass http://executors; }}
        location = /run_code {{ proxy_pass http://executors; }}
        location = /health {{ proxy_pass http://executors; }}
        location = /ready {{
            proxy_pass http://executors;
            proxy_next_upstream error timeout http_503;
        }}
        location = /v1/sessions {{
            proxy_pass http://sessions;
            proxy_next_upstream off;
        }}
        location /v1/sessions/ {{
            proxy_pass http://sessions;
            proxy_next_upstream off;
        }}
        location / {{ return 404; }}
    }}
}}
"""


def nginx_config(urls: Sequence[str], *, listen: str = "127.0.0.1:8000") -> str:
    """The configuration file.

    Args:
        urls: ``http://host:port`` of each executor.
        listen: Address and port of nginx. It asks nobody for a token: the executors do, when they have one.

    Raises:
        ValueError: a URL or ``listen`` is not of that form, or a URL comes twice.
    """
    servers = [_server(url) for url in urls]
    if not servers or len(set(servers)) < len(servers):
        raise ValueError(f"name at least one executor, and each once, got {list(urls)}")
    if not _SERVER.fullmatch(listen):
        raise ValueError(f"listen must be ADDRESS:PORT, got {listen!r}")
    return _TEMPLATE.format(
        route_variable="$http_" + ROUTE_HEADER.lower().replace("-", "_"),
        executors="\n".join(f"        server {server} max_fails=3 fail_timeout=5s;" for server in servers),
        sessions="\n".join(f"        server {server} max_fails=0;" for server in servers),
        keepalive_seconds=KEEPALIVE_SECONDS,
        listen=listen,
    )


def _server(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.path not in ("", "/") or not _SERVER.fullmatch(parts.netloc):
        raise ValueError(f"an executor behind nginx is named http://HOST:PORT, got {url!r}")
    return parts.netloc
