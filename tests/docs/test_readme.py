"""The README: its Python and its commands do what it says, and its figures are those of the results."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driving import TINY_FOLDER, fill, picture, run_here
from pages import ROOT, blocks, check_command, commands, run_python

from benchmarks.targets import ViewTarget
from scan_fast.runs.config import parse_override

README = "README.md"
SETTINGS = {**dict(parse_override(word) for word in TINY_FOLDER), "data.image_size": 8, "clustering.view.cutout": 2}
LEARNED = {"pretext.epochs": 5}  # after one epoch the score is luck


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The two folders that the README speaks of, in the working directory."""
    fill(tmp_path / "my_photos", 60)
    fill(tmp_path / "new_photos", 5, first=100)
    return tmp_path


@pytest.mark.slow
def test_python(photos: Path) -> None:
    names: dict[str, Any] = {"tiny": SETTINGS | LEARNED}
    replaced = 0
    for block in blocks(README):
        if block.language != "python":
            continue
        text, count = re.subn(r"(ImageClusterer\(n_clusters=\d+)", r"\1, settings=tiny", block.text)
        text = text.replace("[:1000]", "[:300]").replace("[1000:]", "[1000:1200]")
        replaced += count
        run_python(block, names, text)
    assert replaced == 2
    clusterer = names["clusterer"]
    assert clusterer.labels_.shape == (60,)
    assert (photos / "model.pt").is_file()
    assert names["images"].dtype == np.uint8 and names["images"].shape == (1797, 8, 8)
    assert names["model"].score(names["images"][1000:1200], names["digits"].target[1000:1200]) > 0.5
    assert names["total"].shape == (5,)
    assert names["index"].shape == (5000, 20)


def test_every_command_is_one() -> None:
    found = [words for block in blocks(README) if block.language == "sh" for words in commands(block)]
    assert {words[0] for words in found} == {"git", "cd", "make", "pip", "scan-fast", "torchrun"}
    for words in found:
        check_command(words)


def test_the_first_commands(photos: Path) -> None:
    run, *predictions = (
        words
        for block in blocks(README)
        if block.language == "sh"
        for words in commands(block)
        if (words[:2] == ["scan-fast", "run"] and "--data" in words) or words[1] == "predict"
    )
    result = run_here(*run[1:], *TINY_FOLDER)
    assert result.code == 0, (shlex.join(run), result.err)
    folder = photos / predictions[0][2]
    for name in ("assignments.csv", "report.html", "model.pt"):
        assert (folder / name).is_file(), name
    picture(7).save(photos / "photo.jpg")
    for predict, images in zip(predictions, (5, 1), strict=True):
        result = run_here(*predict[1:])
        assert result.code == 0, (shlex.join(predict), result.err)
        assert len(result.out.splitlines()) == 1 + images


@pytest.mark.parametrize(
    "wrong",
    [
        "scan-fast rum digits",
        "scan-fast run digits pretext.epoch=3",
        "scan-fast run --data my_photos --cluster 12 --speed",
        "make dmeo",
        "python -m benchmarks.nothing",
        "python -m benchmarks.nt_xent --nothing",
        "pip install .[nothing]",
        "benchmarks/nothing",
        "scanfast run digits",
    ],
)
def test_a_wrong_command_is_found(wrong: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check_command(shlex.split(wrong))


def rows() -> dict[str, list[str]]:
    """The README's tables, by first cell."""
    found = {}
    for line in (ROOT / README).read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|"):
            found[cells[0]] = cells[1:]
    return found


def test_figures_are_those_of_the_results() -> None:
    table = rows()

    def shown(value: float) -> str:
        return f"{value:.1f}" if value < 20 else f"{value:.0f}"

    def read(name: str) -> Any:
        return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())

    for column, ending in ((1, ""), (2, "-avx512")):
        targets = read(f"cpu-targets{ending}")["targets"]
        for label, start in {
            "NT-Xent forward and backward, 4096 x 128": "nt_xent 4096x128, scan-fast:",
            "SCAN loss, 10 heads x 1024 x 1000": "scan_loss 10x1024x1000",
            "20 nearest of 20,000 x 512": "neighbors 20000x512x20, scan-fast:",
        }.items():
            value = next(target["measured"] for target in targets if target["target"].startswith(start))
            assert table[label][column] == shown(value), label
        views = ViewTarget("simclr", 32, times=1.0).value(read(f"cpu-views{ending}"))
        assert views is not None and table["SimCLR views, 32 x 32"][column] == shown(views)
        epochs = {entry["stage"]: shown(entry["ratio"]) for entry in read(f"cpu-end_to_end{ending}")["stages"]}
        epoch_row = next(cells for label, cells in table.items() if label.startswith("an epoch of ResNet-18"))
        assert epoch_row[column] == " / ".join(epochs[stage] for stage in ("pretext", "clustering", "selflabel"))

    digits = json.loads((ROOT / "benchmarks/results/digits-cpu.json").read_text())["results"]
    for label, name in {
        "k-means on pixels": "kmeans_pixels",
        "k-means on the learned features": "kmeans_features",
        "after clustering": "clustering",
        "after self-labelling": "selflabel",
    }.items():
        value = digits[f"{name} test acc"]
        spread = f" ± {value['std']:.3f}" if value["std"] else ""
        assert table[label][0].strip("*") == f"{value['mean']:.3f}{spread}", label
