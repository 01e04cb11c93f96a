"""A port, from the moment it is chosen until the server has bound it."""

import socket

import pytest

from megatron_ztrl.engines.ports import reserve_port


def test_a_reserved_port_is_given_to_nobody_but_a_server_that_names_it():
    with reserve_port("127.0.0.1") as reservation:
        address = reservation.getsockname()
        with socket.create_server(address) as server, socket.create_connection(address) as client:
            connection, peer = server.accept()
            connection.close()
            assert peer == client.getsockname()


def test_a_port_that_somebody_listens_on_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            reserve_port("127.0.0.1", port)


def test_a_reserved_port_is_taken_for_those_who_do_not_share():
    with reserve_port("127.0.0.1") as reservation, socket.socket() as other:
        address = reservation.getsockname()
        with pytest.raises(OSError, match="in use"):
            other.bind(address)
