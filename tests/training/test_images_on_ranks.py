"""Ranks that see different images are told so before they train."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from images import varied
from PIL import Image
from ranks import answers_by_rank

from scan_fast.data import FileSource, ImagePaths, Source, SubsetSource, TensorSource
from scan_fast.distributed import ranks
from scan_fast.distributed.ranks import Ranks
from scan_fast.errors import DataError
from scan_fast.training.images import check_ranks_agree

PIXELS = varied(100, 8, 8)
LABELS = torch.arange(100) % 3
NAMES = ["ant", "bee", "cat"]


def arrays(rank: int) -> dict[str, tuple[list[Source | None], str]]:
    """Return cases of sources of this rank, with a part of the error; an empty one if there is none."""
    cases: dict[str, tuple[list[Source | None], str]] = {}
    paths = [f"image/{row:03d}" for row in range(100)]

    def source(pixels: torch.Tensor = PIXELS, labels: torch.Tensor | None = LABELS, **changes: Any) -> TensorSource:
        return TensorSource(pixels, labels, **{"paths": paths, "class_names": NAMES, **changes})

    other = PIXELS.clone()
    other[[70, 40], 3, 3] += 1
    relabelled = LABELS.clone()
    relabelled[[54, 56]] = 2 - relabelled[[54, 56]]
    here = rank == 1
    renamed = [*paths[:30], "image/new", *paths[31:]]
    cases["same"] = [source(), None, SubsetSource(source(), torch.arange(50, 90))], ""
    cases["pixels"] = [source(), source(other) if here else source()], "image/040 has other pixels on rank 1"
    cases["subset"] = [SubsetSource(source(other) if here else source(), torch.arange(30))], ""
    cases["labels"] = [source(labels=relabelled if here else LABELS)], "image/054 has another label on rank 1"
    cases["unlabelled"] = [source(labels=None if here else LABELS)], "image/000 has another label on rank 1"
    cases["names"] = [source(paths=renamed if here else paths)], "has image/030 as number 31 of 100, rank 1 on "
    cases["fewer"] = [SubsetSource(source(), torch.arange(99 if here else 100))], "has none as number 100 of 99"
    cases["classes"] = [source(class_names=["ant", "bee", "dog"] if here else NAMES)], "has dog as number 3 of 3"
    return cases


def _compare(rank: int, store: str, world: int, folders: list[Path], results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    ranks.enter(Ranks(rank, world, rank, world))

    def refused(sources: list[Source | None]) -> str:
        try:
            check_ranks_agree(sources)
        except DataError as error:
            return str(error)
        return ""

    answers = {name: refused(sources) for name, (sources, _) in arrays(rank).items()}
    images = ImagePaths([f"{row:03d}.png" for row in range(100)], folders[rank])
    for resident in (True, False):
        source = FileSource(images, None, 8, resident=resident)
        answers[f"files {resident}"] = refused([source])
        answers[f"some files {resident}"] = refused([SubsetSource(source, torch.tensor([3, 5, 8]))])
    dist.barrier()
    if rank == 1:
        (folders[1] / "005.png").unlink()
    dist.barrier()
    answers["gone"] = refused([SubsetSource(source, torch.tensor([3, 5, 8]))])
    results.put((rank, answers))
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
def test_ranks_with_other_images_are_refused(tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        for row, pixels in enumerate(PIXELS.numpy()):
            # More than a third of the files differ, so a sample of 64 meets one.
            changed = folder is folders[1] and row % 3 == 1
            Image.fromarray(255 - pixels if changed else pixels).save(folder / f"{row:03d}.png")
    (_, first), (_, second) = answers_by_rank(_compare, tmp_path, 2, folders, seconds=120)
    assert first == second
    for name, (_, message) in arrays(0).items():
        assert message in first[name] and bool(first[name]) == bool(message), (name, first[name])
    host = socket.gethostname()
    for resident in (True, False):
        message = first[f"files {resident}"]
        assert message.startswith("the ranks see different images: 0")
        assert f".png has another file on rank 1 ({host}) than on rank 0 ({host}); give all machines" in message
        assert int(message.partition(".png")[0][-3:]) % 3 == 1
        assert first[f"some files {resident}"] == ""
    assert f"rank 1 on {host}: cannot read image {folders[1]}/005.png: FileNotFoundError" in first["gone"]


def test_one_process_compares_nothing() -> None:
    check_ranks_agree([TensorSource(PIXELS), None])
