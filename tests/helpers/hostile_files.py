"""What tests of files from strangers share: a pickle that shows whether it was read, and a network that is shut."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest


class Marker:
    """Makes a file if it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every connection, and every download of weights, an error."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("scan_fast.models.backbones.fetch", refuse)
