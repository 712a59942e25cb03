"""A run on two machines: two network namespaces that a cable joins, with torchrun in each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from driving import TINY, metrics, run_here, wait_for
from rank_runs import free_port

import scan_fast

PACKAGE = str(Path(scan_fast.__file__).parents[1])
WORDS = ("run", "digits", *TINY, "clustering.update=heads", "selflabel=null")
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two namespaces with one interface each, ``cable0`` and ``cable1``."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces need the program ip")
    names = [f"scan-fast-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "name", "cable1", "netns", names[1])
        for number, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{ADDRESSES[number]}/24", "dev", f"cable{number}")
            ip("-n", name, "link", "set", f"cable{number}", "up")
            ip("-n", name, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield names
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def start(machines: list[str], folder: Path, *words: object) -> list[subprocess.Popen[str]]:
    """Start a command under torchrun on both machines, each in a working directory of its own."""
    rendezvous = f"{ADDRESSES[0]}:{free_port()}"
    processes = []
    for number, name in enumerate(machines):
        own = folder / f"machine{number}"
        own.mkdir(parents=True)
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--nproc-per-node", "1", "--node-rank", str(number), "--rdzv-backend", "c10d"]
        # The name of this machine does not lead to these addresses, so torchrun must be told who holds the rendezvous.
        command += ["--rdzv-conf", f"is_host={str(number == 0).lower()}", "--local-addr", ADDRESSES[number]]
        command += ["--rdzv-endpoint", rendezvous, "--rdzv-id", "test", "-m", "scan_fast"]
        processes.append(
            subprocess.Popen(
                [*command, *map(str, words)],
                cwd=own,
                env={
                    **os.environ,
                    "PYTHONPATH": PACKAGE,
                    "GLOO_SOCKET_IFNAME": f"cable{number}",
                    "OMP_NUM_THREADS": "1",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
    return processes


def stop(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_run_on_two_machines_without_a_common_disk(machines: list[str], tmp_path: Path) -> None:
    processes = start(machines, tmp_path, *WORDS, "--out", "run")
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        stop(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    # The run folder is on the machine of rank 0 alone.
    folders = [tmp_path / f"machine{number}" / "run" for number in range(2)]
    (found,) = [folder for folder in folders if folder.exists()]
    assert run_here(*WORDS, "--out", tmp_path / "alone").code == 0
    with np.load(found / "neighbors.npz") as ours, np.load(tmp_path / "alone" / "neighbors.npz") as theirs:
        assert (ours["train"] == theirs["train"]).all()
    losses = [[entry["loss"] for entry in metrics(run) if "loss" in entry] for run in (found, tmp_path / "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_a_cable_that_is_cut_ends_the_run_on_both_machines(machines: list[str], tmp_path: Path) -> None:
    """Nobody closes a connection then, so only silence tells."""
    port = str(free_port())
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": ADDRESSES[0]}
    place["SCAN_FAST_SILENT_SECONDS"] = "12"  # of 40 by default
    words = [*WORDS, "pretext.epochs=1000", "--out", str(tmp_path / "run")]
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-m", "scan_fast", *words],
            env={
                **os.environ,
                **place,
                "MASTER_PORT": port,
                "RANK": str(number),
                "PYTHONPATH": PACKAGE,
                "GLOO_SOCKET_IFNAME": f"cable{number}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for number, name in enumerate(machines)
    ]
    try:
        wait_for((tmp_path / "run" / "metrics.jsonl").is_file, 120)
        begin = time.monotonic()
        ip("-n", machines[0], "link", "set", "cable0", "down")
        errors = [process.communicate(timeout=150)[1] for process in processes]
    finally:
        stop(processes)
    assert time.monotonic() - begin < 32
    said = [[line for line in text.splitlines() if line.startswith("scan-fast: ")] for text in errors]
    assert all(process.returncode != 0 for process in processes), errors
    assert len(said[0]) == len(said[1]) == 1, errors
    assert said[0][0].startswith("scan-fast: rank 1 (process ")
    assert "has given no sign of life for 12 s" in said[0][0]
    assert said[1][0].startswith("scan-fast: the store by which the ranks have met has not answered for 12 s: ")
