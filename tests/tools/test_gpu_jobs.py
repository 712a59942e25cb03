"""Processes of the GPU suite end within their limits, with their children."""

import io
import sys
import time
from pathlib import Path

import pytest

from tools.gpu import jobs
from tools.gpu.jobs import Job


@pytest.mark.serial
def test_a_process_ends_with_its_children(tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begin = time.monotonic()
    outcome = jobs.run(Job((sys.executable, "-c", child)), 2, io.StringIO(), lambda line: None)
    assert outcome.status == "cut off" and time.monotonic() - begin < 30
    log = io.StringIO()
    outcome = jobs.run(Job((sys.executable, "-c", "print('last words'); exit(3)")), 60, log, lambda line: None)
    assert outcome.status == "failed (3)" and outcome.tail == ["last words"] and "last words" in log.getvalue()


@pytest.mark.serial
def test_a_process_may_take_longer_to_start_than_between_two_lines() -> None:
    text = "import time; time.sleep(1.5); print('{}', flush=True); time.sleep(60)"
    job = Job((sys.executable, "-c", text), patience=1.0, startup=20.0)
    assert jobs.run(job, 60, io.StringIO(), lambda line: None).status == "hung after 1 s"
    job = Job((sys.executable, "-c", text), patience=20.0, startup=1.0)
    assert jobs.run(job, 60, io.StringIO(), lambda line: None).status == "hung after 1 s"


@pytest.mark.serial
def test_a_child_that_holds_the_output_does_not_hold_the_suite() -> None:
    text = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    begin = time.monotonic()
    outcome = jobs.run(Job((sys.executable, "-c", text)), 50, io.StringIO(), lambda line: None)
    assert outcome.status == "passed" and time.monotonic() - begin < 30
