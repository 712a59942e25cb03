"""The page in a browser: gallery, filters, map, viewer, names; from disk, with and without its folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, result_of
from PIL import Image
from report_runs import file_source, photograph, report_of, write_run

pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"), pytest.mark.slow]

HOSTILE = ["100% #1.jpg", "a?b&c.jpg", "<script>alert(1)<b>.jpg", "quote\" ' .jpg", "line\nbreak.jpg", "ünï.jpg"]
NOT_UTF8 = os.fsdecode(b"not-utf8-\xff.jpg")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 700 images in three groups, whose thumbnails lie beside it."""
    root = tmp_path_factory.mktemp("browser")
    folder = root / "images"
    folder.mkdir()
    names = [*HOSTILE, NOT_UTF8, *(f"sub/{i:03d}.jpg" for i in range(700 - len(HOSTILE) - 1))]
    (folder / "sub").mkdir()
    draw_from = np.random.default_rng(1)
    for name in names:
        blocks = draw_from.integers(0, 256, (6, 6, 3)).astype(np.uint8)
        Image.fromarray(blocks).resize((60, 60), Image.Resampling.NEAREST).save(folder / name)
    photograph(0).save(folder / names[30])
    shutil.copy(folder / names[30], folder / names[31])
    rows = [
        (name.encode("utf-8", "replace").decode(), "all", i % 3, f"{i / 700:.4f}", "0.8")
        for i, name in enumerate(names)
    ]
    write_run(root / "run", rows)
    embeddings = np.random.default_rng(0).normal(size=(700, 8)).astype(np.float32)
    np.savez(root / "run/embeddings.npz", all=embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))
    report_of(root / "run", {"all": file_source(folder, names)}, title="<b>photos</b>")
    return root / "run" / "report.html"


def test_the_gallery_shows_what_the_filters_leave(page: Path, tmp_path: Path) -> None:
    code = """
      const text = () => document.getElementById('counted').textContent;
      const tiles = () => [...document.querySelectorAll('#gallery .tile')];
      const set = async (id, value, type) => {
        const field = document.getElementById(id);
        field.value = value; field.dispatchEvent(new Event(type)); await pause(400);
      };
      location.hash = 'images'; await pause(400);
      const found = {all: text(), first: tiles().length, height: document.getElementById('gallery').clientHeight};
      found.loaded = tiles()[0].querySelector('img')?.src ?? '';
      scroll(3000); await pause(400);
      found.later = tiles().length;
      found.inView = tiles().some((tile) => Math.abs(tile.getBoundingClientRect().top - 250) < 250);
      scroll(0);
      await set('search', 'SCRIPT>ALERT', 'input'); found.search = text();
      found.title = tiles()[0].title; found.href = tiles()[0].href;
      await set('search', 'line', 'input'); found.line = tiles()[0].href;
      await set('search', 'not-utf8', 'input'); found.notUtf8 = tiles()[0].href;
      await set('search', '', 'input');
      await set('group', '1', 'change'); found.group = text();
      await set('low', '50', 'input'); found.sure = text();
      await set('order', 'unsure', 'change');
      found.unsure = tiles()[0].querySelector('.caption span:last-child').textContent;
      await set('low', '0', 'input'); await set('group', '-1', 'change');
      await set('kind', 'copies', 'change'); found.copies = text();
      done(found);
    """
    found, said = result_of(page, code, tmp_path)
    assert said == ""
    assert "error" not in found, found
    assert found["all"] == "700 images" and found["copies"] == "2 of 700 images"
    assert 10 < found["first"] < 150 and found["height"] > 5000
    assert found["later"] < 200 and found["inView"]
    assert "/report/thumbnails/" in found["loaded"] and found["loaded"].startswith("file://")
    assert found["search"] == "1 of 700 images" and found["title"] == HOSTILE[2]
    assert found["href"].endswith("/images/%3Cscript%3Ealert%281%29%3Cb%3E.jpg")
    assert found["line"].endswith("/images/line%0Abreak.jpg")
    assert found["notUtf8"].endswith("/images/not-utf8-%FF.jpg")
    assert found["group"] == "233 of 700 images"
    rows = [i for i in range(700) if i % 3 == 1]
    assert found["sure"] == f"{sum(float(f'{i / 700:.3f}') >= 0.5 for i in rows)} of 700 images"
    assert found["unsure"] == "50\N{NO-BREAK SPACE}%".replace("\N{NO-BREAK SPACE}", " ")


def test_originals_open_in_the_viewer_whatever_their_names(page: Path, tmp_path: Path) -> None:
    code = """
      location.hash = 'images'; await pause(300);
      const search = document.getElementById('search');
      const found = {};
      for (const name of ['100%', 'a?b', '<script', 'quote', 'line', 'ün', 'not-utf8']) {
        search.value = name; search.dispatchEvent(new Event('input')); await pause(400);
        document.querySelector('#gallery .tile').click();
        const image = document.querySelector('#viewer-frame img');
        await new Promise((go) => { if (image.complete) go(); else image.onload = image.onerror = go; });
        found[name] = [image.naturalWidth, image.className, document.getElementById('viewer').open];
        document.getElementById('viewer').close();
      }
      search.value = ''; search.dispatchEvent(new Event('input')); await pause(400);
      document.querySelector('#gallery .tile').click();
      const path = () => document.querySelector('#viewer-text a').textContent;
      found.first = path();
      document.getElementById('viewer-on').click();
      found.second = path();
      done(found);
    """
    found, said = result_of(page, code, tmp_path)
    assert said == ""
    first, second = found.pop("first"), found.pop("second")
    assert first != second
    # 60 pixels is the original; the class would be of a thumbnail in its place.
    assert found and all(value == [60, "", True] for value in found.values()), found


def test_the_map_is_drawn_and_points_are_found(page: Path, tmp_path: Path) -> None:
    code = """
      location.hash = 'map'; await pause(500);
      const canvas = document.getElementById('canvas'), pen = canvas.getContext('2d');
      const pixels = pen.getImageData(0, 0, canvas.width, canvas.height).data;
      const colours = new Set(); let at = null;
      for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] > 200) {
        colours.add(`${pixels[i] >> 4},${pixels[i + 1] >> 4},${pixels[i + 2] >> 4}`);
        at = at ?? [(i / 4) % canvas.width, Math.floor(i / 4 / canvas.width)];
      }
      const box = canvas.getBoundingClientRect();
      const place = {clientX: box.left + at[0], clientY: box.top + at[1], pointerId: 1, bubbles: true};
      const fire = (type) => canvas.dispatchEvent(new PointerEvent(type, place));
      fire('pointermove'); await pause(200);
      const hover = document.getElementById('hover');
      const found = {colours: colours.size, hover: hover.hidden ? '' : hover.textContent};
      found.legend = document.querySelectorAll('#legend button').length;
      canvas.setPointerCapture = () => {};
      fire('pointerdown'); fire('pointerup'); await pause(200);
      found.viewer = document.getElementById('viewer').open;
      done(found);
    """
    found, said = result_of(page, code, tmp_path)
    assert said == ""
    assert found["colours"] >= 3 and found["legend"] == 3
    assert ".jpg" in found["hover"] and "group" in found["hover"] and found["viewer"]


def test_names_give_a_command_to_keep_them(page: Path, tmp_path: Path) -> None:
    code = """
      document.querySelector('[data-rename="1"]').click();
      const input = document.querySelector('.rename-input');
      input.value = "it's <b>red</b>";
      input.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter'}));
      done({title: document.querySelector('#group-1 .title').textContent,
            command: document.getElementById('keep-command').textContent,
            bold: document.querySelectorAll('#group-1 b').length,
            heading: document.querySelector('h1').textContent});
    """
    found, said = result_of(page, code, tmp_path)
    assert said == ""
    assert found["title"] == "it's <b>red</b>" and found["bold"] == 0 and found["heading"] == "<b>photos</b>"
    assert found["command"].endswith(""" 1 'it'\\''s <b>red</b>'""") and found["command"].startswith("scan-fast name ")


def test_nothing_is_wider_than_a_phone(page: Path, tmp_path: Path) -> None:
    code = """
      const found = {};
      for (const view of ['overview', 'images', 'map', 'duplicates', 'odd', 'details']) {
        location.hash = view; await pause(300);
        found[view] = document.documentElement.scrollWidth - document.documentElement.clientWidth;
      }
      done(found);
    """
    found, said = result_of(page, code, tmp_path, (500, 900))  # no window is narrower
    assert said == ""
    assert found == dict.fromkeys(found, 0) and len(found) == 6


def test_without_its_folder_the_page_says_so(page: Path, tmp_path: Path) -> None:
    shutil.copy(page, tmp_path / "alone.html")
    code = """done({notice: document.getElementById('lost-data').offsetHeight,
                   groups: document.querySelectorAll('.group').length,
                   details: document.getElementById('details').offsetHeight});"""
    found, _ = result_of(tmp_path / "alone.html", code, tmp_path / "profile")
    assert found["notice"] > 0 and found["groups"] == 3 and found["details"] > 0
