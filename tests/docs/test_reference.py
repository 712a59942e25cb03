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


@pytest.mark.parametrize("new", ["fast", "cpu"])
def test_the_tables_of_presets_name_every_difference(new: str) -> None:
    assert set(presets.ORDER) == set(shipped_configs())
    page = {"fast": presets.table, "cpu": presets.cpu_table}[new]()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()[2:]]
    names_of_rows = {name for row in rows for name in row[3].split(", ")}
    assert names_of_rows == set(presets.with_preset(new))
    for name in presets.with_preset(new):
        first = presets.FROM.get(name, "paper") if new == "fast" else "fast"
        before, after = (load_config(find_config(name), [f"preset={preset}"]) for preset in (first, new))
        listed = [(key.strip("`"), old, changed) for key, old, changed, names in rows if name in names.split(", ")]
        assert listed
        # The listed values are those of the presets, and with them in place of its own, the one becomes the other.
        words = [f"{key}={value}" for key, _, value in listed]
        changed = load_config(find_config(name), [f"preset={first}", *words])
        assert changed.model_copy(update={"preset": new}) == after
        words = [f"{key}={old}" for key, old, _ in listed]
        changed = load_config(find_config(name), [f"preset={new}", *words])
        assert changed.model_copy(update={"preset": first}) == before


def test_the_table_of_steps_counts_each_preset() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in presets.steps().splitlines()]
    assert {len(line) for line in lines} == {8}
    rows = {line[0]: line[1:] for line in lines[2:]}
    # 50,000 images in batches of 128 and of 1,000: 390 and 50 steps an epoch.
    config = load_config(find_config("cifar10"), ["preset=paper"])
    assert config.selflabel is not None and (config.clustering.batch_size, config.selflabel.batch_size) == (128, 1000)
    assert rows["cifar10"][1] == f"{390 * config.clustering.epochs:,}"
    assert rows["cifar10"][4] == f"{50 * config.selflabel.epochs:,}"
    for name, cells in rows.items():
        assert bool(cells[3]) == bool(cells[6]) == (name in presets.with_preset("cpu"))


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
