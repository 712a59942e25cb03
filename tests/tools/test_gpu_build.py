"""A module is checked before it is carried, and used on arrival only if it fits."""

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from scan_fast.ops import native
from scan_fast.ops.families import GPU_FAMILIES
from tools.gpu import build, carried

GCC = shutil.which("gcc")
needs_tools = pytest.mark.skipif(GCC is None or shutil.which("readelf") is None, reason="needs gcc and readelf")


def library(folder: Path, code: str = "int f(void) { return 1; }", *flags: str, name: str = "lib.so") -> Path:
    """Compile a small shared library."""
    source = folder / f"{name}.c"
    source.write_text(code)
    subprocess.run([str(GCC), "-shared", "-fPIC", str(source), "-o", str(folder / name), *flags], check=True)
    return folder / name


# -- the module ------------------------------------------------------------------------------------------------------


@needs_tools
def test_a_plain_library_passes(tmp_path: Path) -> None:
    code = "#include <string.h>\nvoid *f(void *a, void *b, unsigned long n) { return memcpy(a, b, n); }"
    path = library(tmp_path, code, "-fno-builtin")
    report = build.check_module(path, 1)
    assert report["bytes"] == path.stat().st_size
    assert report["libraries"] == ["libc.so.6"]
    assert report["symbols"] == {"GLIBC": "2.14"}  # memcpy's version on x86-64


@needs_tools
def test_a_large_module_is_refused(tmp_path: Path) -> None:
    path = library(tmp_path)
    limit = path.stat().st_size / build.MIB
    build.check_module(path, limit)
    with pytest.raises(build.BuildError, match=r"lib\.so has .* MiB, more than"):
        build.check_module(path, limit * 0.99)


@needs_tools
def test_a_newer_c_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "#include <string.h>\nvoid *f(void *a, void *b, unsigned long n) { return memcpy(a, b, n); }"
    path = library(tmp_path, code, "-fno-builtin")
    monkeypatch.setitem(build.NEWEST, "GLIBC", (2, 13))
    with pytest.raises(build.BuildError, match=r"needs GLIBC_2\.14, the other machine may have 2\.13 only"):
        build.check_module(path, 1)


@needs_tools
def test_a_foreign_library_is_refused(tmp_path: Path) -> None:
    library(tmp_path, name="libcublas.so.13")
    path = library(tmp_path, "int f(void); int g(void) { return f(); }", str(tmp_path / "libcublas.so.13"))
    with pytest.raises(
        build.BuildError, match=r"needs .*libcublas\.so\.13, which neither torch nor the system provides"
    ):
        build.check_module(path, 1)


@needs_tools
@pytest.mark.parametrize("tag", ["--enable-new-dtags", "--disable-new-dtags"])
def test_a_search_path_of_this_machine_is_refused(tmp_path: Path, tag: str) -> None:
    path = library(tmp_path, "int f(void) { return 1; }", f"-Wl,{tag},-rpath,$ORIGIN:/opt/here/lib")
    with pytest.raises(build.BuildError, match="looks for libraries in /opt/here/lib, a folder of this machine"):
        build.check_module(path, 1)
    build.check_module(library(tmp_path, "int f(void) { return 1; }", f"-Wl,{tag},-rpath,$ORIGIN/lib"), 1)


@needs_tools
def test_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.so"
    path.write_text("no library")
    with pytest.raises(build.BuildError, match="is no shared library"):
        build.check_module(path, 1)


def test_versions_compare_as_numbers() -> None:
    found = build.newest_symbols(
        ["GLIBC_2.9", "GLIBC_2.34", "GLIBC_2.2.5", "GLIBCXX_3.4.9", "GLIBCXX_3.4", "CXXABI_1.3"]
    )
    assert found == {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 9), "CXXABI": (1, 3)}


# -- the interpreter -------------------------------------------------------------------------------------------------


def test_the_interpreter_must_be_the_wanted_one(tmp_path: Path) -> None:
    import torch

    own = ".".join(map(str, sys.version_info[:2]))
    found = build.check_interpreter(sys.executable, own, torch.__version__)
    assert found == {
        "python": sys.implementation.cache_tag,
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    with pytest.raises(build.BuildError, match=r"is Python 3\.\d+\.\d+, wanted is 3\.1$"):
        build.check_interpreter(sys.executable, "3.1", torch.__version__)
    with pytest.raises(build.BuildError, match=r"has torch .*, wanted is 1\.0"):
        build.check_interpreter(sys.executable, own, "1.0")
    with pytest.raises(build.BuildError, match="cannot be run"):
        build.check_interpreter(str(tmp_path / "python"), own, torch.__version__)


def test_a_problem_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert build.main(["--python", str(tmp_path / "python"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpu_build: --python: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# -- the size of all -------------------------------------------------------------------------------------------------


def test_too_much_to_carry_names_the_largest(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "huge.whl").write_bytes(bytes(3 * build.MIB))
    tree = sum((build.ROOT / name).stat().st_size for name in build.working_tree() if (build.ROOT / name).is_file())
    assert tree > 1000 * 1000
    limit = tree / build.MIB + 3
    assert build.check_total(tmp_path, limit + 0.01).startswith("to carry: 3.0 MiB in")
    with pytest.raises(
        build.BuildError, match=r"more than .* MiB together; the largest are wheels/huge\.whl \(3\.0 MiB\)"
    ):
        build.check_total(tmp_path, limit - 0.01)


# -- taking it -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small source tree."""
    root = tmp_path / "tree"
    (root / "scan_fast").mkdir(parents=True)
    shutil.copy(carried.ROOT / "scan_fast" / "gpu_status.py", root / "scan_fast")
    (root / "csrc" / "loss").mkdir(parents=True)
    (root / "csrc" / "loss" / "loss_cuda.cu").write_text('#include "loss/loss.h"\nint kernel;\n')
    (root / "csrc" / "loss" / "loss.h").write_text("int header;\n")
    (root / "csrc" / "bindings.cpp").write_text("int bindings;\n")
    return root


MODULE = f"_C.{sys.implementation.cache_tag}-test.so"


def carry(tmp_path: Path, tree: Path, **changes: Any) -> Path:
    """A folder with a module that fits this interpreter and the tree, but for some changes of its record."""
    folder = tmp_path / "carry"
    folder.mkdir(exist_ok=True)
    (folder / MODULE).write_bytes(b"the module")
    record = {
        "module": MODULE,
        "python": sys.implementation.cache_tag,
        "machine": platform.machine(),
        "torch": carried.torch_version(),
        "sha256": hashlib.sha256(b"the module").hexdigest(),
        **carried.sources(tree),
        **changes,
    }
    (folder / carried.RECORD).write_text(json.dumps(record))
    return folder


@pytest.fixture(autouse=True)
def not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "scan_fast._C", raising=False)


def test_a_module_that_fits_is_taken(tmp_path: Path, tree: Path) -> None:
    folder = carry(tmp_path, tree)
    assert carried.use(folder, tree) == ""
    assert (tree / "scan_fast" / MODULE).read_bytes() == b"the module"
    assert sorted(path.name for path in (tree / "scan_fast").iterdir() if path.suffix == ".so") == [MODULE]
    # Once more, and over another one of the same name.
    assert carried.use(folder, tree) == ""
    (tree / "scan_fast" / MODULE).write_bytes(b"another")
    assert carried.use(folder, tree) == ""
    assert (tree / "scan_fast" / MODULE).read_bytes() == b"the module"


def test_an_identical_module_stays_as_it_is(tmp_path: Path, tree: Path) -> None:
    folder = carry(tmp_path, tree)
    carried.use(folder, tree)
    before = (tree / "scan_fast" / MODULE).stat().st_ino
    carried.use(folder, tree)
    assert (tree / "scan_fast" / MODULE).stat().st_ino == before


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"python": "cpython-39"}, f"is for Python cpython-39, this is {sys.implementation.cache_tag}"),
        ({"machine": "sparc"}, f"is for a CPU of type sparc, this is {platform.machine()}"),
        ({"torch": "1.0"}, "is for torch 1.0, this is 2."),
        ({"sha256": "0"}, "is damaged"),
        ({"module": "_C.gone.so"}, "names _C.gone.so, which is not there"),
    ],
)
def test_another_interpreter_or_a_damaged_file_is_refused(
    tmp_path: Path, tree: Path, changes: dict[str, str], line: str
) -> None:
    refusal = carried.use(carry(tmp_path, tree, **changes), tree)
    assert line in refusal and "\n" not in refusal
    assert not (tree / "scan_fast" / MODULE).exists()


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("loss/loss_cuda.cu", "loss/loss_cuda differ"),
        ("loss/loss.h", "loss/loss_cuda differ"),
        ("bindings.cpp", "the C++ sources differ"),
        ("loss/new_cuda.cu", "loss/new_cuda differ"),
    ],
)
def test_other_sources_are_refused(tmp_path: Path, tree: Path, file: str, named: str) -> None:
    folder = carry(tmp_path, tree)
    with (tree / "csrc" / file).open("a") as source:
        source.write("// A comment changes nothing.\n")
    if file != "loss/new_cuda.cu":
        assert carried.use(folder, tree) == ""
        (tree / "scan_fast" / MODULE).unlink()
    with (tree / "csrc" / file).open("a") as source:
        source.write("int more;\n")
    assert named in carried.use(folder, tree)
    assert not (tree / "scan_fast" / MODULE).exists()


def test_tests_and_the_emulator_are_no_part_of_the_module(tmp_path: Path, tree: Path) -> None:
    folder = carry(tmp_path, tree)
    (tree / "csrc" / "tests").mkdir()
    (tree / "csrc" / "tests" / "test_a.cpp").write_text("int a;\n")
    (tree / "csrc" / "emulator.cpp").write_text("int a;\n")
    assert carried.use(folder, tree) == ""


def test_no_record_or_a_broken_one(tmp_path: Path, tree: Path) -> None:
    assert "no module was carried" in carried.use(tmp_path / "nothing", tree)
    folder = carry(tmp_path, tree)
    (folder / carried.RECORD).write_text("{")
    assert "module.json cannot be read: JSONDecodeError" in carried.use(folder, tree)
    (folder / carried.RECORD).write_text('{"module": "a"}')
    assert "module.json cannot be read: KeyError" in carried.use(folder, tree)


def test_a_module_comes_too_late_once_another_is_imported(
    tmp_path: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scan_fast._C", argparse)
    assert "too late" in carried.use(carry(tmp_path, tree), tree)


def test_importing_it_imports_neither_torch_nor_the_package() -> None:
    code = (
        "import sys; from tools.gpu import carried; carried.use('/nowhere'); carried.sources(); "
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'scan_fast', 'numpy')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=carried.ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_version_of_torch_is_found_without_importing_it() -> None:
    import torch

    assert carried.torch_version() == torch.__version__


# -- wheels ----------------------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, tag: str = "py3-none-any") -> None:
    """Write a wheel of one module whose content is the project's name."""
    folder.mkdir(parents=True, exist_ok=True)
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": f"NAME = {name!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: never-there\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)


def test_wheels_are_installed_without_network(tmp_path: Path) -> None:
    wheel(tmp_path / carried.WHEELS, "carried_a")
    wheel(tmp_path / carried.WHEELS, "carried_b")
    target = carried.wheels(tmp_path)
    assert (target / "carried_a.py").read_text() == "NAME = 'carried_a'\n"
    assert (target / "carried_b.py").is_file()
    only = carried.wheels(tmp_path, ("carried-b",))
    assert (only / "carried_b.py").is_file() and not (only / "carried_a.py").exists()


def test_wheels_that_are_missing_or_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(carried.CarriedError, match="no wheels were carried"):
        carried.wheels(tmp_path)
    wheel(tmp_path / carried.WHEELS, "carried_a", "cp39-cp39-win32")
    with pytest.raises(
        carried.CarriedError, match=r"cannot be installed: .*carried_a.* is not a supported wheel"
    ) as error:
        carried.wheels(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(carried.CarriedError, match="no wheel of memeff was carried"):
        carried.wheels(tmp_path, ("memeff",))


# -- the trial -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")
def test_a_module_that_computes_what_it_should_passes_the_trial(tmp_path: Path) -> None:
    (module,) = (carried.ROOT / "scan_fast").glob(f"_C.{sys.implementation.cache_tag}*.so")
    content = module.read_bytes()
    (tmp_path / module.name).write_bytes(content)
    record = {"module": module.name, "sha256": hashlib.sha256(content).hexdigest(), **carried.sources()}
    record |= {"python": sys.implementation.cache_tag, "machine": platform.machine(), "torch": carried.torch_version()}
    (tmp_path / carried.RECORD).write_text(json.dumps(record))
    answer = build.try_module(sys.executable, tmp_path)
    assert set(answer["errors"]) == {family.name for family in GPU_FAMILIES}
    assert all(0 <= error <= 1 for error in answer["errors"].values()) and "cuda" in answer["build"]
    (tmp_path / module.name).write_bytes(content + b"?")
    with pytest.raises(build.BuildError, match="is damaged"):
        build.try_module(sys.executable, tmp_path)
