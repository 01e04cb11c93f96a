"""Ports that are chosen now and served from seconds later."""

from __future__ import annotations

import socket


def reserve_port(host: str, port: int | None = None) -> socket.socket:
    """Bind ``port``, or a free one, and do not listen. Keep the socket until the server listens.

    Until then the kernel gives the port to no connection and to nobody who asks for a free one. A server that
    names it may bind too, with ``SO_REUSEADDR`` as servers do, since neither socket of the two listens yet.

    Raises:
        OSError: ``port`` is taken.
    """
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reservation.bind((host, port or 0))
    except OSError:
        reservation.close()
        raise
    return reservation


def port_of(reservation: socket.socket) -> int:
    """The port that a reservation holds."""
    return reservation.getsockname()[1]
