"""Conclusions from what ran: what is verified, what failed, and what several runs say together."""

import json
from pathlib import Path
from typing import Any

import pytest

from tools.gpu import conclusions, suite

SETS = tuple(conclusions.kernel_sets())


def stage_record(*problems: str, done: bool = True) -> dict[str, Any]:
    """Return the record of a stage whose cases 0, 1, ... had these problems, "" for none."""
    cases = {str(i): {"problem": text, "ran": [], "seconds": 0.1} for i, text in enumerate(problems)}
    return conclusions.empty() | {"cases": cases, "done": done}


def summary_of(hashes: str = "a", device: str = "a GPU", **of_scan_loss: Any) -> dict[str, Any]:
    """Return a summary in which every set passed everything, except for the given stages of the SCAN loss."""
    sets: dict[str, Any] = {
        name: {
            "source": source,
            "sha256": hashes * 64,
            "stages": {stage: stage_record("", "") for stage in conclusions.GATING},
        }
        for name, source in conclusions.kernel_sets().items()
    }
    sets["scan_loss:portable"]["stages"] |= of_scan_loss
    found: dict[str, Any] = {"rehearsal": False, "date": "2030-01-02", "environment": {"device": device, "commit": "c"}}
    found |= {"stages": {}, "sets": sets, "timings": [], "step": [], "notes": [], "finished": True}
    conclusions.conclude(found)
    return found


def scan_loss_of(summary: dict[str, Any]) -> dict[str, Any]:
    kernel: dict[str, Any] = summary["kernels"]["scan_loss/scan_loss_cuda"]
    return kernel


def test_verified_is_what_passed_everything() -> None:
    assert {kernel["status"] for kernel in summary_of()["kernels"].values()} == {conclusions.VERIFIED}
    assert len(summary_of()["kernels"]) == len(SETS)
    for stage in conclusions.GATING:
        for gap in (stage_record("", "", done=False), stage_record()):
            changed: dict[str, Any] = {stage: gap}
            kernel = scan_loss_of(summary_of(**changed))
            assert (kernel["status"], kernel["reason"]) == (conclusions.PARTLY, f"not finished: {stage}")
    kernel = scan_loss_of(summary_of(timings=stage_record("", "nan", "inf")))
    assert (kernel["status"], kernel["reason"]) == (conclusions.FAILED, "timings: 1: nan (and 1 more)")


def test_a_stage_that_makes_no_sense_for_a_family_is_no_gap() -> None:
    sets: dict[str, Any] = {"scan_loss:portable": {"stages": {}}}
    about = {"stage": "graph", "family": "scan_loss", "kernels": "portable"}
    conclusions.note(sets, {"exempt": "the host reads something", **about})
    graph = sets["scan_loss:portable"]["stages"]["graph"]
    assert not conclusions.is_through(graph)  # its process may have ended before it was done
    conclusions.note(sets, {"done": True, **about})
    assert conclusions.is_through(graph)
    first, second = summary_of(graph=graph), summary_of(graph=conclusions.empty())
    assert scan_loss_of(first)["status"] == conclusions.VERIFIED
    assert scan_loss_of(second)["reason"] == "not finished: graph"
    assert scan_loss_of(conclusions.merge([first, second]))["status"] == conclusions.VERIFIED


def test_a_stage_that_a_machine_cannot_run_is_waived_and_named() -> None:
    summary = summary_of(memcheck=conclusions.empty())
    assert scan_loss_of(summary)["status"] == conclusions.PARTLY
    summary["stages"]["memcheck"] = {"status": "not here", "seconds": 0.0}
    conclusions.conclude(summary)
    assert scan_loss_of(summary)["status"] == conclusions.VERIFIED and scan_loss_of(summary)["waived"] == ["memcheck"]


def test_merging_lets_the_later_run_speak() -> None:
    first, second = summary_of(accuracy=stage_record("", "nan")), summary_of()
    second["sets"]["scan_loss:portable"]["stages"] = {"accuracy": stage_record("", "")}  # only this ran again
    assert scan_loss_of(first)["status"] == conclusions.FAILED
    merged = conclusions.merge([first, second])
    assert scan_loss_of(merged)["status"] == conclusions.VERIFIED
    assert scan_loss_of(first)["status"] == conclusions.FAILED, "merging changed what it was given"
    assert scan_loss_of(conclusions.merge([second, first]))["status"] == conclusions.FAILED
    # A run that was cut off before it reached the failure says nothing about it.
    second["sets"]["scan_loss:portable"]["stages"] = {"accuracy": stage_record("", done=False)}
    assert scan_loss_of(conclusions.merge([first, second]))["reason"] == "accuracy: 1: nan"
    # Another source is another kernel: neither passes nor failures of the former count.
    second["sets"]["scan_loss:portable"]["sha256"] = "b" * 64
    merged = conclusions.merge([first, second])
    assert scan_loss_of(merged)["status"] == conclusions.PARTLY and scan_loss_of(merged)["sha256"] == "b" * 64
    with pytest.raises(ValueError, match="a GPU, another"):
        conclusions.merge([first, summary_of(device="another")])


def test_a_hang_counts_until_the_stage_has_come_to_its_end() -> None:
    hung = stage_record("", done=False) | {"lost": "hung after 20 s in 1"}
    first, cut_off, right = (summary_of(smoke=s) for s in (hung, stage_record("", done=False), stage_record("", "")))
    assert scan_loss_of(first)["reason"] == "smoke: hung after 20 s in 1"
    assert scan_loss_of(conclusions.merge([first, cut_off]))["status"] == conclusions.FAILED
    assert scan_loss_of(conclusions.merge([first, cut_off, right]))["status"] == conclusions.VERIFIED


def test_merged_summaries_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / name for name in ("one.json", "two.json")]
    for file in files:
        file.write_text(json.dumps(summary_of()))
    assert suite.main([str(tmp_path / "out"), "--merge", *map(str, files)]) == 0
    assert "verified    scan_loss/scan_loss_cuda" in capsys.readouterr().out
    merged = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert scan_loss_of(merged)["status"] == conclusions.VERIFIED
