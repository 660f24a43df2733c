"""Servers that tests start come up, whoever else takes ports at the same time."""

from __future__ import annotations

import socket
import sys

import pytest
import servers

SERVER = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1])))"


def command(ports):
    return [sys.executable, "-S", "-c", f"{SERVER}; time.sleep(60)", str(ports[0])]


def answers(ports):
    try:
        socket.create_connection(("127.0.0.1", ports[0]), 5).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.fixture
def drawn(monkeypatch):
    """Ports in the order in which they are drawn: two that others listen on, then free ones."""
    free, drawn = servers._free_ports, []
    with socket.socket() as one, socket.socket() as other:
        taken = []
        for listener in (one, other):
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            taken.append(listener.getsockname()[1])

        def draw(count):
            drawn.append(taken[len(drawn)] if len(drawn) < len(taken) else free(count)[0])
            return drawn[-1:]

        monkeypatch.setattr(servers, "_free_ports", draw)
        yield drawn


def test_a_server_whose_port_is_taken_gets_another(drawn, tmp_path):
    with servers.listening(command, answers, 1, tmp_path / "log") as ports:
        assert answers(ports)
    assert len(drawn) == 3 and ports == drawn[-1:]
    assert not answers(ports)


def test_one_that_fails_for_another_reason_is_not_started_again(drawn, tmp_path):
    with (
        pytest.raises(AssertionError, match="no such luck"),
        servers.listening(
            lambda ports: [sys.executable, "-S", "-c", "raise SystemExit('no such luck')"],
            lambda ports: False,
            1,
            tmp_path / "log",
        ),
    ):
        pass
    assert len(drawn) == 1
