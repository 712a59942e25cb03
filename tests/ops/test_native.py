"""Loading of the compiled module, and the choice of GPU kernels; test_trust.py tests whether they are trusted."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import scan_fast
from scan_fast.ops import native


def test_an_unknown_choice_of_gpu_kernels_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCAN_FAST_GPU_KERNELS", "fast")
    with pytest.raises(ValueError, match=r'SCAN_FAST_GPU_KERNELS must be "auto", "portable" or "sm90", got \'fast\''):
        native.kernel_choice()


@pytest.mark.skipif(not native.build_info().get("sm90_kernels"), reason="the module has no kernels for sm_90a")
@pytest.mark.parametrize("choice", ["auto", "portable", "sm90"])
def test_sm90_kernels_are_enabled_at_import_on_request(choice: str) -> None:
    script = "from scan_fast.ops import native; print(*sorted(native.SM90_FAMILIES))"
    environment = {**os.environ, "SCAN_FAST_GPU_KERNELS": choice}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == (sorted(native.GPU_KERNELS) if choice == "sm90" else [])


@pytest.mark.skipif(not native.is_available(), reason="no compiled module")
def test_the_stub_describes_the_compiled_module() -> None:
    stub = ast.parse((Path(scan_fast.__file__).parent / "_C.pyi").read_text())
    described = {node.name: [a.arg for a in node.args.args] for node in stub.body if isinstance(node, ast.FunctionDef)}
    public = {name for name in dir(native._C) if not name.startswith("_")}
    assert set(described) == public
    for name, arguments in described.items():
        signature = str(getattr(native._C, name).__doc__).splitlines()[0]  # pybind11 writes it there
        assert re.findall(r"(\w+): ", signature.partition(" -> ")[0]) == arguments, signature
