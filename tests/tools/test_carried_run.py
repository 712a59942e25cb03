"""A run with what was carried: what is missing is one line, and nothing of the driver is imported too early."""

import os
import subprocess
import sys
from pathlib import Path

from tools.gpu import carried


def test_without_pydantic_and_wheels_it_says_so(tmp_path: Path) -> None:
    code = "import sys; sys.modules['pydantic'] = None; from tools.gpu import run; sys.exit(run.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--carried", str(tmp_path), "--minutes", "1"]
    done = subprocess.run(command, cwd=carried.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout == f"gpu_run: no wheels were carried: {tmp_path / 'wheels'} holds none\n"


def test_importing_it_leaves_the_driver_for_later() -> None:
    code = "import sys, tools.gpu.run; print([m for m in ('torch', 'scan_fast', 'pydantic') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=carried.ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_run_gets_the_carried_archive_and_all_other_options(tmp_path: Path) -> None:
    command = ["tools/gpu_run", "--carried", str(tmp_path), "--minutes", "1", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(
        command, cwd=carried.ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 2
    line = f"gpu_run: there is no archive {tmp_path / carried.ARCHIVE}; name cifar10-jpeg.tar.xz with --archive"
    assert done.stdout.splitlines()[-1] == line
