"""Options of the command line without effect are refused, or said if nobody has asked for what makes them so."""

from __future__ import annotations

from pathlib import Path

from driving import TINY, TINY_FOLDER, fill, run_here

DESCRIPTOR = ("model.backbone=descriptor", "pretext.method=none", "mining.features=backbone")


def test_settings_and_options_beside_finish(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_here("pretext", "digits", *TINY, "--out", out, "--quiet").code == 0
    message = run_here("run", out, "--finish", "clustering.heads=3").refusal()
    assert "what differs has no effect (clustering.heads: 2 -> 3)" in message
    assert f"scan-fast run {out} --finish" in message
    for option in (("--minutes", "3"), ("--again",)):
        message = run_here("run", out, "--finish", *option).refusal()
        assert f"--finish trains nothing, so {option[0]} has no effect" in message


def test_minutes_for_what_trains_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "images", 12)
    words = ("run", "--data", tmp_path / "images", "--clusters", "3", "--minutes", "3", "--out", tmp_path / "out")
    message = run_here(*words, *DESCRIPTOR, "clustering.update=features", "selflabel=null").refusal()
    assert "--minutes 3 has no effect: pretext.method=none trains nothing that could be shortened" in message
    assert not (tmp_path / "out").exists()


def test_a_word_without_effect_leaves_nothing_behind(tmp_path: Path) -> None:
    fill(tmp_path / "images", 12)
    words = ("run", "--data", tmp_path / "images", *TINY_FOLDER, "--out", tmp_path / "out")
    assert "selflabel.fraction=0.2 has no effect" in run_here(*words, "selflabel.fraction=0.2").refusal()
    assert not (tmp_path / "out").exists()
