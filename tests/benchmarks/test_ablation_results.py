"""Results of ablations: what the command finds, with hardware, versions and commit, and without local paths."""

import json
from pathlib import Path

import pytest
from driving import TINY, fill, picture

from benchmarks import ablations
from tools.docs import benchmarks as pages


def test_a_result_names_where_it_is_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in range(3):
        fill(tmp_path / "images" / f"class{kind}", 8, make=lambda n, kind=kind: picture(3 * n + kind))  # type: ignore[misc]
    small = ("data.source=folder", f"data.root={tmp_path / 'images'}", "data.limit=null", "pretext.batch_size=8")
    smaller = ("clustering.batch_size=8", "selflabel.batch_size=8", "clustering.n_clusters=3", "data.image_size=8")
    file = tmp_path / "result.json"
    words = ("overclustering", "--seeds", "0", "--json", str(file), "--out", str(tmp_path / "runs"))
    monkeypatch.setattr("sys.argv", ["ablations", *words, *TINY, *small, *smaller])
    ablations.main()
    result = json.loads(file.read_text())
    kept = json.loads((tmp_path / "runs" / "ablation.json").read_text())
    assert {key: result[key] for key in kept} == kept
    assert result["environment"]["torch"] and result["environment"]["commit"]
    assert "data.root=FOLDER" in result["set"]
    assert str(tmp_path) not in file.read_text()
    page = pages.fill("<!-- ablation: result.json -->\n<!-- end -->", tmp_path)
    for name, entry in result["variants"].items():
        assert f"| {name} | {100 * entry['acc']['mean']:.1f} | " in page
