"""Values that stages hand on: declared, used instead of computed, dropped when nobody needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from driving import TINY, opened, run_here

from scan_fast.errors import RunError
from scan_fast.runs.artifacts import PRETEXT_MODEL, Artifact, checkpoint
from scan_fast.stages import embedding
from scan_fast.stages.handover import EMBEDDINGS, FEATURES, Handover
from scan_fast.stages.pipeline import FINISH_TAKES, PIPELINE, STAGES, run_stage
from scan_fast.training.inference import forward_all


def test_a_stage_may_only_use_what_it_declares() -> None:
    handover = Handover()
    handover.declare([EMBEDDINGS])
    assert handover.get(EMBEDDINGS, "train", lambda: torch.ones(1)).equal(torch.ones(1))
    assert handover.get(EMBEDDINGS, "train", lambda: torch.zeros(1)).equal(torch.ones(1))
    assert handover.get(EMBEDDINGS, "test", lambda: torch.zeros(1)).equal(torch.zeros(1))
    with pytest.raises(KeyError, match="does not declare 'features'; it declares embeddings"):
        handover.get(FEATURES, "train", lambda: torch.ones(1))
    with pytest.raises(KeyError, match="does not declare"):
        handover.put(FEATURES, "train", torch.ones(1))
    handover.drop([EMBEDDINGS])
    assert handover.names() == set()


def test_every_value_that_is_taken_is_handed_on_by_an_earlier_stage() -> None:
    known: set[str] = set()
    files: set[Artifact[Any]] = set()
    for stage in PIPELINE:
        assert set(stage.takes) <= known and set(stage.inputs) <= files, stage.name
        known |= set(stage.hands_on)
        files |= set(stage.outputs)
    assert set(FINISH_TAKES) <= known


def test_embeddings_are_computed_once_and_dropped_after_mining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(context: Any, model: Any, function: Any, source: Any, **named: Any) -> Any:
        calls.append(len(source))
        return forward_all(context, model, function, source, **named)

    monkeypatch.setattr(embedding, "forward_all", counted)
    handover = Handover()
    with opened(tmp_path / "run", "pretext.monitor_every=0") as context:
        run_stage(context, STAGES["pretext"], handover)
        assert calls == [len(source) for source in context.clustered.values()]
        assert handover.names() == {EMBEDDINGS}
        run_stage(context, STAGES["mining"], handover)
        assert len(calls) == 2
        assert handover.names() == set()
        before = (tmp_path / "run" / "neighbors.npz").read_bytes()
        run_stage(context, STAGES["mining"], Handover())
        assert len(calls) == 4
    assert (tmp_path / "run" / "neighbors.npz").read_bytes() == before


def test_a_stage_that_is_repeated_does_not_reuse_its_former_values(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as context:
        handover = Handover()
        run_stage(context, STAGES["pretext"], handover)
        stale = torch.zeros(len(context.splits.train), 4)
        handover.put(EMBEDDINGS, "train", stale)
        context.run.remove(checkpoint("pretext"))
        run_stage(context, STAGES["pretext"], handover)
        handover.declare([EMBEDDINGS])
        assert handover.get(EMBEDDINGS, "train", lambda: stale) is not stale


@pytest.mark.parametrize("command", ["mine", "cluster"])
def test_a_missing_input_names_the_command_that_writes_it(command: str, tmp_path: Path) -> None:
    message = run_here(command, "digits", *TINY, "--out", tmp_path / "run", "--quiet").refusal()
    assert f"has no {PRETEXT_MODEL.name}; run `scan-fast pretext" in message


def test_every_input_of_every_stage_is_required(finished: Path) -> None:
    """Each declared file, taken away, is refused before the stage computes anything."""
    for stage in PIPELINE:
        for artifact in stage.inputs:
            path = finished / artifact.name
            kept = path.read_bytes()
            path.unlink()
            with opened(finished) as context, pytest.raises(RunError, match=r"run `scan-fast \w+ "):
                run_stage(context, stage, Handover())
            path.write_bytes(kept)
