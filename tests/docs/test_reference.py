"""The generated reference: it is current, and it leaves nothing out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import scan_fast
from scan_fast.runs.config import Config, find_config, load_config, shipped_configs
from tools.docs import api, configuration, docstrings, presets, reference


def test_the_committed_pages_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    code = reference.main(["--check"])
    assert code == 0, capsys.readouterr().out


def test_a_stale_page_is_found_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "api.md").write_text(api.page().replace("temperature: float = 0.5", "temperature: float"))
    assert reference.main(["--check"]) == 1
    shown = capsys.readouterr()
    assert "-    temperature: float,\n+    temperature: float = 0.5," in shown.out
    assert "out of date: docs/api.md, docs/configuration.md" in shown.err
    assert reference.main([]) == 0
    assert reference.main(["--check"]) == 0
    assert (tmp_path / "docs" / "configuration.md").read_text() == configuration.page()


def test_the_table_of_presets_names_every_difference() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in presets.table().splitlines()[2:]]
    assert set(presets.ORDER) == set(shipped_configs())
    for name in presets.ORDER:
        first = presets.FROM.get(name, "paper")
        before, after = (load_config(find_config(name), [f"preset={preset}"]) for preset in (first, "fast"))
        listed = [(key.strip("`"), old, new) for key, old, new, names in rows if name in names.split(", ")]
        assert listed
        # The listed values are those of the presets, and with them in place of its own, the one becomes the other.
        words = [f"{key}={new}" for key, _, new in listed]
        changed = load_config(find_config(name), [f"preset={first}", *words])
        assert changed.model_copy(update={"preset": "fast"}) == after
        words = [f"{key}={old}" for key, old, _ in listed]
        changed = load_config(find_config(name), ["preset=fast", *words])
        assert changed.model_copy(update={"preset": first}) == before


def test_every_public_name_is_described() -> None:
    page = api.page()
    for name in scan_fast.__all__:
        assert name == "__version__" or f"### `scan_fast.{name}`" in page, name


def test_every_key_is_listed() -> None:
    page = configuration.page()

    def visit(model: Any, place: str) -> None:
        for key, value in model:
            assert f"| `{key}` |" in page, f"{place}.{key}"
            if hasattr(value, "model_fields_set"):
                visit(value, f"{place}.{key}")

    visit(Config(), "")
    for heading in ("## `data`", "`selflabel.optimizer`", "### `pretext.method` of kind `weights`", "of kind `affine`"):
        assert heading in page


def test_every_key_is_described() -> None:
    assert configuration.undescribed() == []


def test_types_and_defaults_in_words() -> None:
    page = configuration.page()
    for row in (
        "| `width` | float > 0, ≤ 16 | `1` |",
        "| `cached_views` | int ≥ 1 or `null` | `null` |",
        "| `precision` | `auto` or `float32` or `bfloat16` | `auto` |",
        "| `file` | path | required |",
        "| `std` | [float, float, float] or `null` | `null` | Per-channel normali",
    ):
        assert row in page, row


def test_markup() -> None:
    assert docstrings.markdown("See :func:`~scan_fast.nt_xent` and ``x|y``.") == "See `scan_fast.nt_xent` and `x|y`."
    assert docstrings.one_line("a ``b``\n    c | d") == "A `b` c \\| d"
