"""The record of what ran on a GPU, and its rules."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from scan_fast import gpu_status
from tools.docs import benchmarks
from tools.docs.gpu_status import PAGE, render
from tools.gpu import conclusions
from tools.gpu import status as tool

ROOT = Path(__file__).resolve().parents[2]
PASSED = {"sha256": "a" * 64, "date": "2030-01-02", "commit": "c" * 40, "device": "a GPU"}


def test_the_record_of_this_repository_is_right() -> None:
    assert tool.problems(gpu_status.records(), tool.hashes(), PAGE.read_text()) == []


def test_every_record_has_one_line_in_info() -> None:
    for name, record in gpu_status.records().items():
        assert gpu_status.summary(name, record).startswith(name)


def test_a_changed_kernel_may_not_stay_verified() -> None:
    records = {"f/k": {"status": "verified", "passed": PASSED}}
    assert tool.problems(records, {"f/k": "a" * 64}, render(records)) == []
    (problem,) = tool.problems(records, {"f/k": "b" * 64}, render(records))
    assert "f/k" in problem and "verified" in problem
    again = tool.refreshed(records, {"f/k": "b" * 64, "f/new": "d" * 64})
    assert again["f/k"] == {"status": "unverified", "passed": PASSED, "latest": None}
    assert again["f/new"] == {"status": "never run", "passed": None, "latest": None}
    assert tool.problems(again, {"f/k": "b" * 64, "f/new": "d" * 64}, render(again)) == []


def test_a_stale_page_and_a_lost_source_are_found() -> None:
    records = tool.refreshed({}, {"f/k": "a" * 64})
    assert tool.problems(records, {"f/k": "a" * 64}, "old") == ["docs/gpu-status.md does not show the record"]
    assert tool.problems(records, {}, render(records)) == ["f/k has an entry but no source"]


def record(problem: str) -> dict[str, Any]:
    """Return the record of a stage with one case."""
    return conclusions.empty() | {"cases": {"5x7": {"problem": problem, "ran": [], "seconds": 0.1}}, "done": True}


def summary_of(**sets: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    """Return a summary of a run: by set its source, hash and the given stages; all other gating ones passed."""
    found: dict[str, Any] = {"rehearsal": False, "date": "2030-01-02", "stages": {}, "timings": [], "step": []}
    found |= {"environment": {"commit": "c" * 40, "device": "a GPU"}, "notes": [], "sets": {}, "finished": True}
    for name, (source, digest, stages) in sets.items():
        passed = {stage: record("") for stage in conclusions.GATING}
        found["sets"][f"{name}:portable"] = {"source": source, "sha256": digest * 64, "stages": passed | stages}
    return found


def test_update_takes_over_what_ran_and_nothing_else() -> None:
    wrong, nothing = record("nan | inf"), conclusions.empty()
    never = dict.fromkeys(conclusions.GATING, nothing)
    summary = summary_of(
        good=("f/good", "a", {}),
        bad=("f/bad", "b", {"accuracy": wrong}),
        edited=("f/edited", "0", {}),
        late=("f/late", "1", {"memcheck": nothing}),
        never=("f/never", "2", never),
    )
    present = {"f/good": "a" * 64, "f/bad": "b" * 64, "f/edited": "e" * 64, "f/late": "1" * 64, "f/never": "2" * 64}
    records = tool.updated({"f/bad": {"passed": PASSED | {"sha256": "9" * 64}}}, present, [summary])
    assert {name: record["status"] for name, record in records.items()} == {
        "f/good": "verified",
        "f/bad": "failed",
        "f/edited": "unverified",
        "f/late": "partly run",
        "f/never": "never run",
    }
    assert records["f/good"]["passed"] == PASSED
    assert records["f/bad"]["passed"]["sha256"] == "9" * 64, "what passed before is kept"
    assert records["f/bad"]["latest"]["reason"] == "accuracy: 5x7: nan | inf"
    page = render(records)
    assert "accuracy: 5x7: nan / inf |" in page and "not finished: memcheck |" in page
    assert tool.problems(records, present, page) == []
    assert "failed on a GPU" in gpu_status.summary("f/bad", records["f/bad"])
    with pytest.raises(SystemExit, match="rehearsal"):
        tool.updated({}, present, [summary | {"rehearsal": True}])

    # A changed source is another kernel: its failure is forgotten, and may not stay.
    changed = present | {"f/bad": "8" * 64}
    assert any("f/bad is called failed" in text for text in tool.problems(records, changed, page))
    assert tool.refreshed(records, changed)["f/bad"]["status"] == "unverified"

    # A second run of what failed clears it, together with what the first run passed.
    again = summary_of(bad=("f/bad", "b", {}))
    again["sets"]["bad:portable"]["stages"] = {"accuracy": record("")}
    assert tool.updated(records, present, [summary, again])["f/bad"]["status"] == "verified"
    assert tool.updated(records, present, [again])["f/bad"]["status"] == "partly run"


def test_only_the_very_source_and_the_very_model_count_as_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    records: dict[str, Any] = {
        "a": {"status": "verified", "passed": {"sha256": "1", "device": "GPU"}},
        "b": {"status": "never run"},
    }
    monkeypatch.setattr(gpu_status, "records", lambda: records)
    assert gpu_status.passed_on("a", "1", "GPU")
    assert not any(gpu_status.passed_on(*other) for other in (("a", "2", "GPU"), ("a", "1", "G"), ("b", "1", "GPU")))
    assert not gpu_status.passed_on("c", "1", "GPU")
    records["a"]["status"] = "unverified"
    assert not gpu_status.passed_on("a", "1", "GPU")


def test_the_hash_sees_code_and_headers_but_not_comments(tmp_path: Path) -> None:
    csrc = tmp_path / "csrc"
    (csrc / "f").mkdir(parents=True)
    kernel, header = csrc / "f" / "k.cu", csrc / "f" / "k.h"
    kernel.write_text('#include "f/k.h"\n#include <cmath>\nconst char* s = "// no comment";\nint x = 1;\n')
    header.write_text("int y;  // one\n")
    original = gpu_status.source_hash(csrc, kernel)
    header.write_text("/* two\n lines */ int   y;\n")
    assert gpu_status.source_hash(csrc, kernel) == original
    header.write_text("long y;\n")
    changed_header = gpu_status.source_hash(csrc, kernel)
    header.write_text("int y;\n")
    kernel.write_text(kernel.read_text().replace("// no comment", "// another"))
    assert len({original, changed_header, gpu_status.source_hash(csrc, kernel)}) == 3


def test_the_record_is_in_the_package(tmp_path: Path) -> None:
    # An installed package has no csrc/ beside it, and still says what was verified.
    copy = tmp_path / "gpu_status.json"
    shutil.copy(gpu_status.RECORDS, copy)
    assert set(json.loads(copy.read_text())) == {"kernels"}
    assert '"*.json"' in (ROOT / "setup.py").read_text()


def test_times_of_a_run_become_a_result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contender = {"name": "scan-fast", "seconds": 2e-6, "seconds_p10": 1e-6, "seconds_p90": 3e-6}
    summary: dict[str, Any] = {
        "rehearsal": False,
        "date": "2030-01-02",
        "environment": {
            "device": "a GPU",
            "threads": 4,
            "torch": "2",
            "commit": "c" * 40,
            "ceilings": {"copy_bytes": 1e12},
        },
        "timings": [{"stage": "timings", "family": "nt_xent", "timing": "8x4", "contenders": [contender]}],
        "step": [
            {"way": "ours", "seconds": 0.01, "views_per_second": 1024.0},
            {"way": "ours, compiled", "failed": "no | compiler"},
            {"profile": []},
        ],
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    words = ["status", "--times", str(tmp_path / "summary.json"), "--json", str(tmp_path / "times.json")]
    monkeypatch.setattr("sys.argv", words)
    tool.main()
    page = benchmarks.render(benchmarks.load(tmp_path), {})
    assert "nt_xent 8x4" in page and "| ours | 10 ms | 1,024 |" in page and "no / compiler" in page
    assert "a GPU, 4 threads" in page and "copy 1e+03 GB/s" in page
    with pytest.raises(SystemExit, match="rehearsal"):
        tool.times(summary | {"rehearsal": True})
    monkeypatch.setattr("sys.argv", words[:3])
    with pytest.raises(SystemExit, match="2"):
        tool.main()
