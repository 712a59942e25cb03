"""The command for several machines in docs/scaling.md, with two torchruns on this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from driving import TINY, wait_for
from pages import blocks, commands
from rank_runs import free_port

import scan_fast

LONG = (*TINY, "pretext.epochs=60", "runtime.checkpoint_seconds=0")


def words_of_the_page() -> list[str]:
    """Return the options of torchrun in the command for several machines."""
    found = [words for block in blocks("docs/scaling.md") if block.language == "sh" for words in commands(block)]
    (command,) = (words for words in found if words[0] == "torchrun" and "--nnodes" in words)
    return command[1 : command.index("-m")]


def children_of(process: int) -> list[int]:
    """Return the processes that a process has started and that still run."""
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_machines_go_on_after_a_process_was_killed(tmp_path: Path) -> None:
    changed = {"node0:29500": f"localhost:{free_port()}", "8": "1"}
    options = [changed.get(word, word) for word in words_of_the_page()]
    run = ["-m", "scan_fast", "run", "digits", *LONG, "--out", str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(Path(scan_fast.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    logs = [tmp_path / "machine0.log", tmp_path / "machine1.log"]
    machines = []
    for log in logs:
        with log.open("w") as output:
            command = [sys.executable, "-m", "torch.distributed.run", *options, *run]
            machines.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    wait_for((tmp_path / "run" / "checkpoints" / "pretext.pt").is_file, 120)
    (victim,) = children_of(machines[1].pid)
    os.kill(victim, signal.SIGKILL)
    try:
        codes = [machine.wait(240) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    text = "\n".join(log.read_text() for log in logs)
    assert codes == [0, 0], text
    assert "pretext: going on after epoch" in text
    assert (tmp_path / "run" / "report.html").is_file()
