"""Two machines and a link between them, on one machine.

They are network namespaces, joined by a pair of virtual interfaces whose rate `tc` limits, and by a
wire that holds packets back where there is to be a delay.

Nothing here has a name outside of its processes. A namespace lives as long as a process in it, and
every process dies with the one that made it, so runs cannot collide, and one that is killed leaves
nothing behind. Needs Linux, iproute2 and util-linux, and root or the right to make user namespaces.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import shutil
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from kvzip.errors import KVZipError

Side = Literal["server", "client"]
ADDRESSES: dict[Side, str] = {"server": "10.83.0.1", "client": "10.83.0.2"}
_DEVICE = "link0"
_TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv")
_BURST, _BURST_SECONDS = 80 << 10, 1e-3
_QUEUE_SECONDS = 0.05
_CONTROLS = ("cubic", "reno")
_CONTROL = "/proc/sys/net/ipv4/tcp_congestion_control"
_DIE_TOO = ("setpriv", "--pdeathsig", "KILL", "--")


class NoLinkError(KVZipError):
    """Namespaces or their tools are not to be had here; says why."""


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        told = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        raise NoLinkError(f"{' '.join(command)}: {told}")


def _permitted() -> list[str]:
    """How to make namespaces: as root, or as the root of a user namespace."""
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if sys.platform != "linux" or missing:
        raise NoLinkError(f"a shaped link needs Linux with {', '.join(missing or _TOOLS)}")
    for options in (["--net"], ["--map-root-user", "--net"]):
        try:
            _run(["unshare", *options, "true"])
            return options
        except NoLinkError as error:
            why = error
    raise NoLinkError(f"network namespaces are not permitted here: {why}")


class Link:
    """Two namespaces, "server" and "client", and the link between them; a context manager.

    `delay`: seconds that a packet takes, either way. With none the link is a veth pair. With one
    it is two TUN interfaces between which a process carries packets: the `netem` of `tc` would do
    it, but not every kernel has that. Packets of up to 64 KiB are carried whole, and it keeps up
    with 1 Gb/s or so; without a delay the kernel does it all. TCP is as most servers have it,
    cubic, or else reno where the kernel has that: `congestion_control`. Raises NoLinkError.
    """

    def __init__(self, delay: float = 0.0):
        self.delay = delay
        self.wire: int | None = None
        """The process that carries packets, where one does."""
        self.congestion_control = ""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._enter: dict[Side, list[str]] = {}

    def __enter__(self) -> Link:
        try:
            self._make()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def _make(self) -> None:
        options = _permitted()
        self._hold("server", ["unshare", *options], options)
        # The second one within the user namespace of the first, or no cable could join them.
        client = self._hold("client", [*self._enter["server"], "unshare", "--net"], options)
        if self.delay:
            wire = [sys.executable, __file__, f"/proc/{client}/ns/net", str(self.delay)]
            told = self._start(self.command("server", wire), stdout=subprocess.PIPE)
            self.wire = told.pid
            assert told.stdout is not None
            if told.stdout.readline() != b"up\n":
                raise NoLinkError("the wire that delays packets did not come up (/dev/net/tun?)")
        else:
            peer = ["peer", "name", _DEVICE, "netns", str(client)]
            self._on("server", "ip", "link", "add", _DEVICE, "type", "veth", *peer)
        for side, address in ADDRESSES.items():
            other = next(a for s, a in ADDRESSES.items() if s != side)
            self._on(side, "ip", "link", "set", "lo", "up")
            self._on(side, "ip", "addr", "add", address, "peer", other, "dev", _DEVICE)
            self._on(side, "ip", "link", "set", _DEVICE, "txqueuelen", "10000", "up")
            self.congestion_control = self._control(side)

    def _control(self, side: Side) -> str:
        """Set the congestion control of a namespace; what it is then."""
        every = f"for name in {' '.join(_CONTROLS)}; do echo $name >{_CONTROL} && break; done"
        script = f"{{ {every}; }} 2>/dev/null; cat {_CONTROL}"
        command = self.command(side, ["sh", "-c", script])
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    def _hold(self, side: Side, make: Sequence[str], options: Sequence[str]) -> int:
        """A process that keeps a new namespace alive; its id."""
        told = self._start(
            [*make, *_DIE_TOO, "sh", "-c", "echo up; exec sleep infinity"], stdout=subprocess.PIPE
        )
        assert told.stdout is not None
        if told.stdout.readline() != b"up\n":
            raise NoLinkError("a network namespace could not be made")
        user = ["--user", "--preserve-credentials"] if "--map-root-user" in options else []
        self._enter[side] = ["nsenter", "--target", str(told.pid), *user, "--net", "--"]
        return told.pid

    def _start(self, command: Sequence[str], stdout: int | None = None) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command, stdout=stdout, stdin=subprocess.DEVNULL)
        self._processes.append(process)
        return process

    def _end(self) -> None:
        for process in reversed(self._processes):
            process.kill()
        for process in self._processes:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def _on(self, side: Side, *command: str) -> None:
        _run([*self._enter[side], *command])

    def command(self, side: Side, command: Sequence[str]) -> list[str]:
        """A command as it runs on one side, and dies with the process that starts it."""
        return [*self._enter[side], *_DIE_TOO, *command]

    def shape(self, rate: float) -> None:
        """Limit both directions to so many bits per second, headers of Ethernet and IP included.

        A token bucket (tc-tbf(8)): what may pass at once is a millisecond's worth, since timers
        are no finer than that, and 80 KiB at least, so that a packet of 64 KiB passes whole.
        """
        burst = max(_BURST, int(rate / 8 * _BURST_SECONDS))
        limit = burst + max(256 << 10, int(rate / 8 * _QUEUE_SECONDS))
        sizes = ["burst", str(burst), "limit", str(limit)]
        for side in ADDRESSES:
            self._on(
                side,
                "tc",
                "qdisc",
                "replace",
                "dev",
                _DEVICE,
                "root",
                "handle",
                "1:",
                "tbf",
                "rate",
                f"{rate:.0f}bit",
                *sizes,
            )


def require_links() -> None:
    """Raise NoLinkError where there can be no shaped link, before anything long begins."""
    with Link():
        pass


# --- a wire that takes its time ------------------------------------------------------------------

# linux/if_tun.h
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_TUN_F_CSUM, _TUN_F_TSO4 = 0x01, 0x02
_CLONE_NEWNET = 0x40000000


def _tun() -> int:
    """A TUN interface in this namespace. Packets come with a virtio header, so the kernel need
    neither cut them to size nor sum them up on their way."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", _DEVICE.encode(), flags))
    fcntl.ioctl(device, _TUNSETOFFLOAD, _TUN_F_CSUM | _TUN_F_TSO4)
    return device


def _carry(ends: tuple[int, int], delay: float) -> None:
    """Packets from either end to the other, each `delay` seconds after it came; for ever."""
    waiting: dict[int, deque[tuple[float, bytes]]] = {end: deque() for end in ends}
    other = dict(zip(ends, reversed(ends), strict=True))
    while True:
        now = time.monotonic()
        due = [queue[0][0] - now for queue in waiting.values() if queue]
        ready, _, _ = select.select(ends, (), (), max(0.0, min(due)) if due else None)
        now = time.monotonic()
        for end in ready:
            try:
                while True:
                    waiting[end].append((now + delay, os.read(end, 1 << 17)))
            except BlockingIOError:
                pass
        now = time.monotonic()
        for end, queue in waiting.items():
            while queue and queue[0][0] <= now:
                with suppress(OSError):  # an interface that is not up: the packet is lost
                    os.write(other[end], queue.popleft()[1])


def _wire(namespace: str, delay: float) -> None:
    near = _tun()
    with Path(namespace).open() as handle:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(handle.fileno(), _CLONE_NEWNET):  # os.setns is there from Python 3.12 on
            raise OSError(ctypes.get_errno(), "setns")
    far = _tun()
    print("up", flush=True)
    _carry((near, far), delay)


if __name__ == "__main__":
    _wire(sys.argv[1], float(sys.argv[2]))
