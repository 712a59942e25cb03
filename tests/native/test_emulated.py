"""Build and run the C++ tests in ``csrc/tests``, without a GPU and without torch.

They test the CUDA kernels on the host, and the CPU kernels with every instruction set that this processor has.
The environment variable ``SCAN_FAST_TEST_BUILD_DIR`` chooses the build folder (default ``build/native-tests``).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "tests"
TESTS = sorted(path.stem for path in SOURCES.glob("test_*.cpp"))


ISAS = ("baseline", "avx2", "avx512")
SKIPPED = 77
"""What a test of CPU kernels returns if the processor does not have the instruction set that it was asked for."""


def run(arguments: list[str], environment: dict[str, str] | None = None, accepted: tuple[int, ...] = (0,)) -> int:
    finished = subprocess.run(arguments, capture_output=True, text=True, timeout=600, env=environment, check=False)
    output = (finished.stdout + finished.stderr)[-6000:]
    assert finished.returncode in accepted, f"{' '.join(arguments)} returned {finished.returncode}:\n{output}"
    return finished.returncode


def run_alone(folder: Path, arguments: list[str]) -> None:
    """Run a command while no other process builds in the folder: two builds would disturb each other."""
    with (folder / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run(arguments)


@pytest.fixture(scope="session")
def build_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if shutil.which("cmake") is None or compiler is None:
        pytest.skip("the C++ tests need cmake and a C++ compiler")
    folder = Path(os.environ.get("SCAN_FAST_TEST_BUILD_DIR", ROOT / "build" / "native-tests"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = tmp_path_factory.mktemp("native-tests")
    run_alone(folder, ["cmake", "-S", str(SOURCES), "-B", str(folder)])
    return folder


@pytest.mark.parametrize("name", TESTS)
def test_native(name: str, build_dir: Path) -> None:
    run_alone(build_dir, ["cmake", "--build", str(build_dir), "--target", name])
    # The fibers switch stacks, which the leak checker cannot follow once a kernel has failed on purpose.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    run([str(build_dir / name)], environment)
    if not name.startswith("test_cpu_"):
        return
    ran = [run([str(build_dir / name)], environment | {"SCAN_FAST_CPU_ISA": isa}, (0, SKIPPED)) for isa in ISAS]
    assert ran[0] == 0  # every processor has the baseline
    # Products of bfloat16 pairs, with the instruction if the processor has it.
    run([str(build_dir / name)], environment | {"SCAN_FAST_CPU_BF16": "1", "SCAN_FAST_CPU_VNNI": "0"})
