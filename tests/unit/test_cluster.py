"""Which Ray cluster a run joins."""

import socket

import pytest

from megatron_ztrl.runtime.cluster import ray_cluster


def test_an_address_where_nobody_answers_is_refused_before_ray_tries_for_minutes(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen: the port is nobody else's meanwhile
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with (
            pytest.raises(ValueError, match=f"RAY_ADDRESS={address}: no Ray cluster answers there"),
            ray_cluster(),
        ):
            pass
