"""Writes checkpoints while training goes on: a snapshot at once, the serialising and the disk in a thread."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .folder import RunFolder


class BackgroundWriter:
    """Writes files of a run one after another in a thread, each as atomically as :meth:`RunFolder.save`.

    Use as a context manager: leaving it waits for the last file. What a write raises (a full disk, say) is raised by
    the next :meth:`save`, by :meth:`join` or on leaving; where another error is already on its way, that one goes on.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, name: str, state: Mapping[str, Any]) -> None:
        """Copy the state's tensors and write them under ``name``; returns when the copy is made.

        On a GPU the copy is only enqueued: it comes before whatever changes the tensors next, and nothing waits for it.
        """
        self.join()
        copied = snapshot(dict(state))
        event = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            event = torch.cuda.Event()
            event.record()

        def write() -> None:
            try:
                if event is not None:
                    event.synchronize()
                self._run.save(name, copied)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def join(self) -> None:
        """Wait for the file that is being written, and raise what went wrong with it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.join()
        elif self._thread is not None:
            self._thread.join()


def snapshot(value: Any) -> Any:
    """Return nested dictionaries, lists and tuples with every tensor copied to memory of its own on the host."""
    if isinstance(value, Tensor):
        if not value.is_cuda:
            return value.detach().cpu().clone()
        # Only a copy into pinned memory is asynchronous.
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: snapshot(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(snapshot(inner) for inner in value)
    return value
