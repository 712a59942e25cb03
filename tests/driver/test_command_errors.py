"""Errors of commands: one line for what a user can act on, a traceback for a defect."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

import pytest
import torch
from driving import TINY, run_here

from scan_fast import errors
from scan_fast.errors import (
    ConfigError,
    DataError,
    MissingPackageError,
    RankError,
    RunError,
    ScanFastError,
    UsageError,
    WeightsError,
)


@pytest.mark.parametrize("kind", [AssertionError, ValueError, RuntimeError, ImportError])
def test_a_defect_is_reported_as_one(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise kind("deep inside")

    monkeypatch.setattr("scan_fast.info.collect", broken)
    result = run_here("info")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("Traceback (most recent call last):")
    assert f"{kind.__name__}: deep inside\n" in result.err
    assert "in broken" in result.err
    assert result.err.splitlines()[-1].startswith("scan-fast: this is a defect of scan-fast and no mistake of yours")


USER_ERRORS = (ConfigError, DataError, WeightsError, RankError, RunError, UsageError, MissingPackageError)


def test_all_errors_for_users_have_one_base() -> None:
    found = {value for value in vars(errors).values() if isinstance(value, type)}
    assert found == {*USER_ERRORS, ScanFastError}
    assert all(issubclass(kind, ScanFastError) for kind in USER_ERRORS)
    # What callers of the library expect of these.
    assert all(issubclass(kind, ValueError) for kind in (ConfigError, DataError, WeightsError, UsageError))
    assert issubclass(RunError, RuntimeError)
    assert issubclass(MissingPackageError, ImportError)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        *((kind("two\n  lines"), "two lines") for kind in USER_ERRORS),
        (OSError(errno.ENOSPC, "full", "a.pt"), "a.pt: the disk is full; free some space"),
        (OSError(errno.EACCES, "no entry", "a.pt"), "a.pt: not writable or not readable (no entry)"),
        (OSError(errno.EIO, "Input/output error", "a.pt"), "a.pt: Input/output error"),
        (FileNotFoundError("there is no weight file a.pt"), "there is no weight file a.pt"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "out of GPU memory (CUDA out of memory. Tried)"),
        (MemoryError(), "out of memory; lower the batch_size"),
    ],
    ids=repr,
)
def test_what_a_user_can_act_on_is_one_line(error: Exception, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr("scan_fast.info.collect", broken)
    assert run_here("info").refusal().startswith(f"scan-fast: {line}")


def test_exhausted_memory_of_the_processor_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scan_fast.info.collect", lambda: torch.empty(1 << 60, dtype=torch.uint8))
    assert "out of memory" in run_here("info").refusal()


def test_traceback_shows_where_an_error_came_from() -> None:
    result = run_here("run", "nothing", "--traceback")
    assert result.code == 2
    assert "in find_config" in result.err
    assert result.err.splitlines()[-1].startswith("scan-fast: there is no configuration 'nothing'")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "digits", *TINY, "pretext.method.temperature=1e-9"], "pretext.method.temperature: input should be"),
        (["run", "digits", *TINY, "data.std=[1, 0, 1]"], "mean and std must be 3 numbers each, std above 0"),
        (["run", "digits", *TINY, "model.width=1", "model.backbone=torchvision:resnet"], "torchvision has no"),
        (
            ["run", "digits", *TINY, "model.width=1", "model.backbone=torchvision:alexnet"],
            r"model.backbone=torchvision:alexnet does not take images of 8 x 8 pixels (Given input size: (64x1x1)",
        ),
        (["run", "digits", *TINY, "model.width=1", "model.backbone=torchvision:squeezenet1_0"], "0 linear classifiers"),
        (
            ["run", "digits", *TINY, "model.width=1", "model.pretrained=true", "model.backbone=torchvision:resnet"],
            "torchvision has no pretrained weights for 'resnet'",
        ),
        (["run", "--data", ".", "--clusters", "2", "data.classes_file=latin.txt"], "latin.txt is no text in UTF-8"),
        (
            ["predict", "RUN", "--data", ".", "--device", "abacus"],
            "--device must be auto, cpu, cuda or cuda:N, got 'abacus'",
        ),
        (["predict", "RUN", "--data", ".", "--device", "cuda:99"], "--device=cuda:99: this machine has"),
        (["info", "--device", "cpu"], "--device goes with --check"),
        (["info", "--check", "--device", "abacus"], "--device must be cpu, cuda or cuda:N, got 'abacus'"),
    ],
)
def test_mistakes_that_are_found_deep_inside(words: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Möwe".encode("latin-1"))
    assert message in run_here(*words).refusal()


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("timm", ["run", "digits", *TINY, "model.width=1", "model.backbone=timm:resnet18"]),
        ("tensorboard", ["run", "digits", *TINY, "runtime.tensorboard=true"]),
        ("faiss", ["run", "digits", *TINY, "--quiet", "mining.backend=faiss"]),
        ("onnxscript", ["export", "RUN", "--format", "onnx", "--out", "model.onnx"]),
    ],
)
def test_missing_packages_are_named(
    package: str, words: list[str], finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if package == "tensorboard":
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    message = run_here(*(finished_run if word == "RUN" else word for word in words)).refusal()
    assert "pip install" in message
    assert package in message
