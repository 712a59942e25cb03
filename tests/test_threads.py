"""Small computations run on one thread each, and the process's numbers of threads are left as they were."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from threadpoolctl import threadpool_info

from scan_fast.openmp import SPINS
from scan_fast.threads import on_all_cores, one_thread


def blas_threads() -> set[int]:
    """Return the numbers of threads of the BLAS libraries that have one for the process, not one for each thread."""
    found = [entry for entry in threadpool_info() if entry["user_api"] == "blas"]
    return {entry["num_threads"] for entry in found if entry.get("threading_layer") == "pthreads"}


def test_one_thread_is_for_the_block_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="ends"), one_thread():
            assert torch.get_num_threads() == 1
            raise RuntimeError("ends")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_calls_share_the_cores_and_compute_on_one_thread_each() -> None:
    import sklearn.cluster  # noqa: F401

    before, blas = torch.get_num_threads(), blas_threads()
    assert blas
    found = on_all_cores(lambda i: (i, threading.get_ident(), torch.get_num_threads(), blas_threads()), range(20))
    assert [i for i, *_ in found] == list(range(20))
    assert threading.get_ident() not in {thread for _, thread, *_ in found}
    assert {threads for *_, threads, _ in found} == {1}
    assert all(numbers == {1} for *_, numbers in found)
    openmp = [entry for infos in on_all_cores(lambda _: threadpool_info(), range(4)) for entry in infos]
    assert {entry["num_threads"] for entry in openmp if entry["user_api"] == "openmp"} == {1}
    assert torch.get_num_threads() == before and blas_threads() == blas
    assert on_all_cores(lambda i: i, []) == []


def test_an_error_of_a_call_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        on_all_cores(lambda i: 1 // i, [1, 0])


@pytest.mark.parametrize(
    ("first", "given", "expected"),
    [
        ("", {}, SPINS),
        ("", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("", {"OMP_WAIT_POLICY": "active"}, "None"),
        ("import torch; ", {}, "None"),
    ],
)
def test_waiting_threads_spin_shortly_unless_the_user_decides(first: str, given: dict[str, str], expected: str) -> None:
    code = f"{first}import os, scan_fast; print(os.environ.get('GOMP_SPINCOUNT'))"
    kept = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    result = subprocess.run([sys.executable, "-c", code], env=kept | given, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == expected
