"""The scripts of examples/ for several processes: any number of them gives the same losses and the same gradient."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

SCRIPTS = ("distributed_ddp.py", "distributed_fabric.py", "distributed_fsdp.py")
STEPS = 5
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(params=SCRIPTS)
def script(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "distributed_fabric.py" and importlib.util.find_spec("lightning_fabric") is None:
        pytest.skip("Lightning Fabric is not installed: pip install lightning-fabric")
    return str(ROOT / "examples" / name)


def figures(script: str, folder: Path, processes: int, *words: str) -> tuple[list[float], float]:
    """Return the losses and the difference of the gradient that a script prints. It leaves nothing in the folder."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    with subprocess.Popen(
        [*torchrun, script, *words],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as started:
        try:
            printed, errors = started.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            started.terminate()  # torchrun then ends the processes that it has started; kill() would leave them
            raise
    assert started.returncode == 0, f"{script}: {errors}"
    assert not list(folder.iterdir()), f"{script} leaves files in the working directory"
    losses = [float(text) for text in re.findall(r"^step \d+: loss (\S+)$", printed, flags=re.MULTILINE)]
    (difference,) = re.findall(r"^largest relative difference of the gradient .*: (\S+)$", printed, flags=re.MULTILINE)
    assert len(losses) == STEPS, printed
    return losses, float(difference)


@pytest.mark.slow
def test_processes_compute_what_one_does(script: str, tmp_path: Path) -> None:
    single, _ = figures(script, tmp_path, 1)
    several, difference = figures(script, tmp_path, 2)
    assert several == pytest.approx(single, abs=1e-5)
    assert difference < 1e-5
    assert single[-1] < single[0] - 0.5  # it learns

    apart, difference = figures(script, tmp_path, 2, "--no-gather")
    assert all(abs(other - loss) > 0.1 for other, loss in zip(apart, single, strict=True))
    assert difference > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, variables, message",
    [
        (
            ["--batch", "63"],
            {"WORLD_SIZE": "2"},
            "--batch must be a positive multiple of the number of processes, 2, got 63",
        ),
        (
            ["--batch", "0"],
            {"WORLD_SIZE": "1"},
            "--batch must be a positive multiple of the number of processes, 1, got 0",
        ),
        ([], {}, "start it with: torchrun --nproc-per-node 2 examples/"),
    ],
)
def test_a_wrong_start_is_refused(script: str, words: list[str], variables: dict[str, str], message: str) -> None:
    if variables:
        variables = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": variables["WORLD_SIZE"], **variables}
    result = subprocess.run(
        [sys.executable, script, *words],
        env={**ENVIRONMENT, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 1 and message in result.stderr, result.stderr


def test_every_distributed_example_is_tested() -> None:
    assert sorted(path.name for path in (ROOT / "examples").glob("distributed_*.py")) == list(SCRIPTS)
