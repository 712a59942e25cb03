"""The example of docs/extending/image-source.md, as it stands there."""

from __future__ import annotations

import re
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from containers import Item, encoded, write_folder
from images import varied

from scan_fast.data import DataConfig, kinds, open_splits, source_from
from scan_fast.errors import DataError

PAGE = Path(__file__).parents[2] / "docs" / "extending" / "image-source.md"


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {"__name__": "scan_fast.data.kinds.zip", "__package__": "scan_fast.data.kinds"}
    exec(textwrap.dedent(found[1]), names)
    monkeypatch.setitem(kinds.SOURCES, "zip", names["ZIP"])


def test_the_documented_source_gives_the_images_of_a_folder(tmp_path: Path) -> None:
    items = [Item(f"{i:02d}", encoded(pixels), "ab"[i % 2]) for i, pixels in enumerate(varied(12, 20, 20).numpy())]
    folder = source_from(write_folder(tmp_path / "folder", items), DataConfig(image_size=16))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in folder.paths:
            archive.write(tmp_path / "folder" / path, path)
    for resident in ("host", "files"):
        config = DataConfig.model_validate({"image_size": 16, "resident": resident})
        source = source_from(f"zip:{tmp_path}/x.zip", config)
        assert torch.equal(source.read(torch.arange(12)), folder.read(torch.arange(12)))
        assert source.labels is not None and folder.labels is not None
        assert source.class_names == ["a", "b"] and np.array_equal(source.labels, folder.labels)
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
        archive.writestr("b/broken.jpg", b"no image")
    with pytest.raises(DataError, match=r"cannot read image .*x\.zip: b/broken\.jpg"):
        source_from(f"zip:{tmp_path}/x.zip")
    splits = open_splits(DataConfig(source="zip:x.zip", root=tmp_path, image_size=16, on_error="skip"))
    assert len(splits.train) == 12
    with pytest.raises(ValueError, match=r"did you mean zip:FILE\?"):
        DataConfig(source="zipp:x")
