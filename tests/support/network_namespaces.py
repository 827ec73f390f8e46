"""Machines with a network of their own: namespaces of the test's, a switch between them, and links that can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack

import pytest


class Network:
    """`n` machines with the addresses 10.77.0.1 and up; nothing leads out of it. The block takes it away."""

    def __init__(self, n: int):
        self._name, self._n = f"unet-ray-{os.getpid()}", n
        self._stack = ExitStack()

    def __enter__(self) -> Network:
        if shutil.which("ip") is None or not self._add("switch"):
            pytest.skip("a network of its own takes root and iproute2")
        self._switch("link", "add", "bridge", "type", "bridge")
        self._switch("link", "set", "bridge", "up")
        for number in range(self._n):
            assert self._add(str(number))
            machine = self._namespace(str(number))
            self._switch("link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", machine)
            self._switch("link", "set", f"port{number}", "master", "bridge", "up")
            _ip("-n", machine, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", machine, "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _namespace(self, name: str) -> str:
        return f"{self._name}-{name}"

    def _add(self, name: str) -> bool:
        added = subprocess.run(["ip", "netns", "add", self._namespace(name)], capture_output=True).returncode == 0
        if added:
            self._stack.callback(_ip, "netns", "delete", self._namespace(name))
        return added

    def _switch(self, *what: str) -> None:
        _ip("-n", self._namespace("switch"), *what)

    def address(self, number: int) -> str:
        return f"10.77.0.{number + 1}"

    def on(self, number: int) -> list[str]:
        """Returns the beginning of a command that runs on a machine."""
        return ["ip", "netns", "exec", self._namespace(str(number))]

    def cut(self, number: int) -> None:
        """Takes a machine's link away: what is sent is lost, and nobody is told."""
        self._switch("link", "set", f"port{number}", "down")


def _ip(*what: str) -> None:
    subprocess.run(["ip", *what], check=True)
