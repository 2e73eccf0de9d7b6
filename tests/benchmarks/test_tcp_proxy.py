"""The proxy that forwards TCP connections: what a server learns of a client that has ended."""

from __future__ import annotations

import socket

import pytest

from benchmarks.components.proxies import tcp_proxy


@pytest.mark.parametrize("reports_end", [True, False])
def test_server_learns_of_the_end_of_a_client_only_if_it_is_reported(reports_end: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, tcp_proxy(listener.getsockname()[1]) as proxy:
        client = socket.create_connection(("127.0.0.1", proxy.port))
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(10)
            client.sendall(b"begin")
            assert accepted.recv(5) == b"begin"
            proxy.reports_end = reports_end
            client.close()
            if reports_end:
                assert accepted.recv(1) == b""
                return
            accepted.settimeout(0.5)
            with pytest.raises(TimeoutError):
                accepted.recv(1)
            proxy.reports_end = True
            with pytest.raises(TimeoutError):  # it has ended while that was not reported
                accepted.recv(1)
            proxy.set_mode("cut")
            accepted.settimeout(10)
            assert accepted.recv(1) == b""
