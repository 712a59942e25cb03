"""Writing of artifacts in a thread, while training continues."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from .. import distributed
from .artifacts import Artifact
from .folder import RunFolder
from .records import map_tensors

T = TypeVar("T")


class BackgroundWriter:
    """Writes artifacts of a run one after another in a thread; with several ranks, rank 0 does.

    Leaving the context waits for the last one. An error of a write (such as a full disk) is raised by the next
    :meth:`write`, by :meth:`join` or on leaving; if the context is left by another error, that one counts.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def write(self, artifact: Artifact[T], content: T) -> None:
        """Copy the tensors of ``content`` and write it; returns when the copy is made.

        On a GPU the copy is only enqueued: it comes before whatever changes the tensors next, and nothing waits for it.
        """
        if not distributed.is_first():
            return
        self.join()
        copied = map_tensors(content, _copy_to_host)
        event = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            event = torch.cuda.Event()
            event.record()

        def write() -> None:
            try:
                if event is not None:
                    event.synchronize()
                with distributed.alone():
                    self._run.write(artifact, copied)
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=write, name="checkpoint")
        self._thread.start()

    def join(self) -> None:
        """Wait for the artifact that is being written, and raise the error of its writing."""
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


def _copy_to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.detach().cpu().clone()
    # Only a copy into pinned memory is asynchronous.
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor.detach(), non_blocking=True)
