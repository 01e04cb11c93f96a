"""The port of an engine, from the moment it is chosen until the server has bound it."""

import socket

import pytest

from megatron_ztrl.engines.server import _reserve_port


def test_a_reserved_port_is_given_to_nobody_but_a_server_that_names_it():
    with _reserve_port("127.0.0.1", None) as reservation:
        address = reservation.getsockname()
        with socket.create_server(address) as server, socket.create_connection(address) as client:
            connection, peer = server.accept()
            connection.close()
            assert peer == client.getsockname()


def test_a_port_that_somebody_listens_on_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"engine.port: 127.0.0.1:{port} is taken"):
            _reserve_port("127.0.0.1", port)


def test_a_reserved_port_is_taken_for_those_who_do_not_share():
    with _reserve_port("127.0.0.1", None) as reservation, socket.socket() as other:
        address = reservation.getsockname()
        with pytest.raises(OSError, match="in use"):
            other.bind(address)
