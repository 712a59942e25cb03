"""Build the native module ``scan_fast._C``.

CMakeLists.txt says how the native sources are compiled, and scan_fast/ops/families.json lists them. This file decides
whether CUDA can be built, and runs CMake with ninja. Environment variables:

``CXX``                   C++ compiler, GCC or Clang (default: CMake's choice)
``SCAN_FAST_CUDA``        ``auto`` (default), ``on`` or ``off``
``SCAN_FAST_CUDA_ARCHS``  semicolon-separated list, default ``80;90a;100``
``SCAN_FAST_WAIT_LIMIT``  ``1``: kernels that wait for more than about two seconds end with an error instead of hanging
                          (default ``0``; for debugging and for the GPU suite)
``SCAN_FAST_BUILD_TESTS`` ``1`` also builds the C++ tests (default ``0``)
``SCAN_FAST_NATIVE``      ``0`` skips the native module: the package then runs on plain PyTorch
``MAX_JOBS``              parallel compile jobs (default: all cores)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> Path | None:
    """Return the CUDA compiler: CUDACXX, CUDA_HOME, the PATH, /usr/local/cuda, or the pip package, in this order."""
    candidates: list[Path] = []
    if os.environ.get("CUDACXX"):
        candidates.append(Path(os.environ["CUDACXX"]))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            candidates.append(Path(os.environ[variable]) / "bin" / "nvcc")
    on_path = shutil.which("nvcc")
    if on_path:
        candidates.append(Path(on_path))
    candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    candidates.append(Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin" / "nvcc")
    return next((path for path in candidates if path.is_file()), None)


class CMakeBuild(build_ext):
    """Runs CMake for the single extension of this package."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build ``scan_fast._C`` next to the Python sources (or into the wheel)."""
        import torch

        mode = os.environ.get("SCAN_FAST_CUDA", "auto").lower()
        if mode not in ("auto", "on", "off"):
            raise SystemExit(f"SCAN_FAST_CUDA must be auto, on or off, got {mode!r}")
        nvcc = find_nvcc()
        torch_cuda = torch.version.cuda
        reason = ""
        if mode == "off":
            reason = "SCAN_FAST_CUDA=off"
        elif torch_cuda is None:
            reason = "this torch has no CUDA"
        elif nvcc is None:
            reason = "no nvcc was found (set CUDACXX or CUDA_HOME)"
        if mode == "on" and reason:
            raise SystemExit(f"SCAN_FAST_CUDA=on, but {reason}")
        with_cuda = not reason
        print(
            f"scan-fast: building for {'CPU and CUDA, nvcc ' + str(nvcc) if with_cuda else 'the CPU only: ' + reason}"
        )

        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One folder per interpreter and torch, kept between builds (editable installs would use a temporary one).
        build_dir = (
            ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch.__version__}"
        )
        build_dir.mkdir(parents=True, exist_ok=True)
        architectures = os.environ.get("SCAN_FAST_CUDA_ARCHS", "80;90a;100")
        arguments = [
            f"-DCMAKE_BUILD_TYPE={os.environ.get('CMAKE_BUILD_TYPE', 'Release')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSCAN_FAST_OUTPUT_DIR={output.parent}",
            f"-DSCAN_FAST_OUTPUT_NAME={output.name}",
            f"-DSCAN_FAST_WITH_CUDA={'ON' if with_cuda else 'OFF'}",
            f"-DSCAN_FAST_CUDA_ARCHS={architectures}",
            f"-DSCAN_FAST_WAIT_LIMIT={'ON' if os.environ.get('SCAN_FAST_WAIT_LIMIT', '0') == '1' else 'OFF'}",
            f"-DSCAN_FAST_BUILD_TESTS={'ON' if os.environ.get('SCAN_FAST_BUILD_TESTS', '0') == '1' else 'OFF'}",
        ]
        if with_cuda:
            arguments.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        environment = dict(os.environ)
        environment["PATH"] = str(Path(sys.executable).parent) + os.pathsep + environment.get("PATH", "")
        try:
            subprocess.run(
                ["cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", *arguments],
                check=True,
                env=environment,
            )
            subprocess.run(["cmake", "--build", str(build_dir), "-j", jobs], check=True, env=environment)
        except FileNotFoundError as error:
            raise SystemExit("scan-fast: cmake was not found; install it, e.g. `pip install cmake`") from error
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"scan-fast: the native build failed ({error})") from error


native = os.environ.get("SCAN_FAST_NATIVE", "1") != "0"
setup(
    packages=[*find_packages(include=["scan_fast", "scan_fast.*"]), "scan_fast.configs", "scan_fast.data.subsets"],
    package_dir={"scan_fast.configs": "configs"},
    package_data={
        "scan_fast": ["py.typed", "*.json", "*.pyi", "report/page/*"],
        "scan_fast.data.subsets": ["*.txt"],
        "scan_fast.ops": ["*.json"],
        "scan_fast.configs": ["*.yaml", "ablations/*.yaml"],
    },
    ext_modules=[Extension("scan_fast._C", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
