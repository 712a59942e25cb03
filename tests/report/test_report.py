"""The HTML report, read back with a parser that knows nothing of the template."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scan_fast.cli import build_parser
from scan_fast.errors import DataError, RunError
from scan_fast.report import write_report
from scan_fast.report.build import CLUSTERS_WITH_IMAGES, duration
from scan_fast.report.charts import Series, line_chart, number
from scan_fast.report.figures import confusion_png
from scan_fast.runs import artifacts
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.tables import Confusion

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)

    def values(self, tag: str, name: str) -> list[str]:
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]

    @property
    def words(self) -> str:
        return re.sub(r"[ \n]+", " ", " ".join(self.text))


def write_run(
    folder: Path, rows: Iterable[tuple[Any, ...]], *, extra: tuple[str, ...] = (), n_clusters: int | None = 3
) -> None:
    with (folder / "assignments.csv").open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "split", "cluster", "confidence", "margin", *extra])
        writer.writerows(rows)
    (folder / "config.yaml").write_text(
        f"seed: 5\nmodel:\n  backbone: resnet_digits\nclustering:\n  n_clusters: {n_clusters or 'null'}\n"
    )


def colour(split: str, row: int) -> tuple[int, int, int]:
    return (row * 7 % 256, 200 if split == "test" else 20, row * 31 % 256)


def pictures(split: str, rows: list[int]) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), colour(split, row)) for row in rows]


def shown_colours(page: Page) -> list[Any]:
    urls = page.values("img", "src")
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).getpixel((3, 3)) for url in urls]


def simple_rows(labelled: bool = False) -> list[tuple[Any, ...]]:
    rows = []
    for i in range(90):
        split = "test" if i % 3 == 2 else "train"
        row = (f"{split}/{i}.png", split, i % 2 if i < 80 else 2, f"{0.5 + i / 200:.4f}", "0.25")
        rows.append((*row, ["cat", "dog"][i % 2] if i != 4 else "") if labelled else row)
    return rows


def test_report_of_an_unlabelled_run(tmp_path: Path) -> None:
    write_run(tmp_path, simple_rows())
    path = write_report(RunFolder(tmp_path), pictures, title="My run")
    assert path == tmp_path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert {"cluster-0", "cluster-1", "cluster-2"} <= set(page.values("article", "id"))
    assert page.tags["h1"] == 1
    words = page.words
    assert "My run" in words and "resnet_digits" in words
    assert "40 images, 44.4\u202f% of all (27 train, 13 test), mean confidence 69.5\u202f%" in words
    assert "Most frequent label" not in words and "Confusion" not in words and "Look at this first" not in words
    # Every picture belongs to the row that was asked for, in the order of confidence.
    by_cluster: dict[int, list[tuple[str, int]]] = {0: [], 1: [], 2: []}
    seen: Counter[str] = Counter()
    for _, split, cluster, _, _ in simple_rows():
        by_cluster[cluster].append((split, seen[split]))
        seen[split] += 1
    expected = []
    for cluster in (0, 1, 2):  # by size, then number; confidence rises with the row
        members = by_cluster[cluster][::-1]
        expected += members[:16] + members[16:][::-1][:8]
    assert shown_colours(page) == [colour(split, row) for split, row in expected]


def test_report_of_a_labelled_run(tmp_path: Path) -> None:
    write_run(tmp_path, simple_rows(labelled=True), extra=("label",))
    table = Confusion.of([[30, 10, 5], [0, 0, 0]], ["cat", "<i>dog</i>"])
    RunFolder(tmp_path).write(artifacts.CONFUSION, table)
    summary = {
        "seed": 7,
        "stages": {
            "pretext": {"seconds": 65.0, "knn_acc": 0.8125},
            "clustering": {
                "seconds": 3660.0,
                "train": {"acc": 0.25},
                "test": {"confidence": 0.5, "acc": 0.875, "nmi": 0.5, "acc_top5": 0.99},
            },
        },
        "baselines": {"kmeans_pixels": {"acc_mean": 0.375, "acc_std": 0.0625, "nmi_mean": 0.5, "nmi_std": 0.0}},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    lines = [json.dumps({"stage": "pretext", "epoch": e, "step": 9 * e, "time": e, "loss": 5.0 - e}) for e in range(4)]
    lines += [json.dumps({"stage": "clustering", "epoch": e, "step": e, "time": e, "acc": 0.5}) for e in (1, 2)]
    lines += ['{"stage": "clustering", "epo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    page = Page(write_report(RunFolder(tmp_path), pictures, title="t").read_text(encoding="utf-8"))
    words = page.words
    # Cluster 2 has five of each: the first in the alphabet is named. One image of cluster 0 has no label.
    assert "#0 mostly cat (100.0\u202f%)" in words and "#1 mostly dog (100.0\u202f%)" in words
    assert "#2 mostly cat (50.0\u202f%)" in words
    assert "accuracy (clustering, test) 87.5\u202f%" in words
    assert "top-5 accuracy 99.0\u202f%" in words
    assert "1 h 02 min" in words and "1 min 05 s" in words and "knn_acc 81.2" in words
    assert "kmeans pixels baseline accuracy 37.5\u202f% ± 6.2\u202f% NMI 50.0\u202f% ± 0.0\u202f%" in words
    assert page.tags["svg"] == 2
    assert any("loss over 4 epochs: first 5, last 2" in text for text in page.values("svg", "aria-label"))
    # 30, 10 and 5 of 45: rows sum to one, and the empty row stays empty.
    assert page.values("td", "style") == ["--s:0.667", "--s:0.222", "--s:0.111"] + ["--s:0.000"] * 3
    assert "(unmatched)" in words and "<i>dog</i>" in words


def test_empty_and_dominant_clusters_are_warned_about(tmp_path: Path) -> None:
    rows = [(f"{i}.png", "all", 0 if i < 60 else 3, "0.9", "0.1") for i in range(80)]
    write_run(tmp_path, rows, n_clusters=5)
    page = Page(write_report(RunFolder(tmp_path), pictures, title="t").read_text(encoding="utf-8"))
    assert "3 of 5 clusters are empty: #1, #2, #4." in page.words
    assert "Cluster #0 holds 75.0\u202f% of the images." in page.words
    assert page.values("article", "id") == ["cluster-0", "cluster-3"]
    rows_named = [text for text in page.text if re.fullmatch(r"#\d", text.strip())]
    assert {"#0", "#1", "#2", "#3", "#4"} <= {text.strip() for text in rows_named}


def test_tiny_clusters_are_warned_about(tmp_path: Path) -> None:
    rows = [(f"{i}.png", "all", min(i % 5, 3) if i else 4, "0.9", "0.1") for i in range(200)]
    write_run(tmp_path, rows, n_clusters=5)
    words = Page(write_report(RunFolder(tmp_path), pictures, title="t").read_text(encoding="utf-8")).words
    assert "1 of 5 clusters has less than a tenth of an even share: #4." in words
    assert "holds" not in words and "empty" not in words


def test_undecided_predictions_are_warned_about(tmp_path: Path) -> None:
    write_run(tmp_path, [(f"{i}", "all", i % 4, "0.27", "0.01") for i in range(40)], n_clusters=4)
    words = Page(write_report(RunFolder(tmp_path), pictures, title="t").read_text(encoding="utf-8")).words
    assert "hardly more than an even guess (25.0\u202f%)" in words
    assert "empty" not in words


HOSTILE = [
    '<script>alert("x")</script>.png',
    '"><img src=x onerror=alert(1)>.png',
    "' onmouseover='alert(1)",
    "{{ 7 * 7 }}{% raw %}.png",
    "javascript:alert(1)",
    "https://evil.example/a.png",
    "line\nbreak,comma.png",
    "\udcff-not-utf8.png",
    "</style></title>.png",
]


def test_hostile_names_do_nothing(tmp_path: Path) -> None:
    rows = [(name, name, 0, "0.5", "0.1", name) for name in HOSTILE]
    write_run(tmp_path, rows, extra=("label",), n_clusters=None)
    lines = [{"stage": HOSTILE[0], "epoch": e, "step": e, "time": e, HOSTILE[1]: 1.5} for e in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    summary = {"stages": {HOSTILE[1]: {"seconds": 1, HOSTILE[0]: 1}}, "baselines": {HOSTILE[0]: {"acc_mean": 1}}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with (tmp_path / "config.yaml").open("a") as file:
        file.write(f"name: {json.dumps(HOSTILE[8])}\n")
    text = write_report(RunFolder(tmp_path), pictures, title=HOSTILE[1]).read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags["script"] == 0
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert page.tags["img"] == len(HOSTILE)
    assert all(value.startswith("data:image/") for value in page.values("img", "src"))
    titles = page.values("li", "title")
    for name in HOSTILE[:7]:
        assert any(title.startswith(name) for title in titles), name
    assert "49" not in page.words.split()


def test_the_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    write_run(tmp_path, simple_rows(labelled=True), extra=("label",))
    text = write_report(RunFolder(tmp_path), pictures, title="t").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r'src="data:[^"]*"', "", text))
    page = Page(text)
    assert all(href.startswith("#") for href in page.values("a", "href"))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    targets = {value for _, name, value in page.attributes if name == "id"}
    assert {href[1:] for href in page.values("a", "href")} <= targets
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert all(page.values("img", "alt")) and len(page.values("img", "alt")) == page.tags["img"]
    assert any("default-src 'none'" in value for value in page.values("meta", "content"))


def test_many_clusters_and_large_pictures_stay_bounded(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (600, 800, 3), dtype=np.uint8)) for _ in range(3)]
    rows = [(f"{i}.jpg", "all", i // 30, "0.9", "0.5") for i in range(1800)]
    write_run(tmp_path, rows, n_clusters=60)
    # Clusters lie around a circle: each is nearest to those before and after it.
    angle = 2 * np.pi * (np.arange(1800) // 30) / 60
    np.savez(tmp_path / "embeddings.npz", all=np.stack([np.cos(angle), np.sin(angle)], axis=1))
    path = write_report(RunFolder(tmp_path), lambda split, rows: [noise[row % 3].copy() for row in rows], title="t")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.tags["article"] == CLUSTERS_WITH_IMAGES == 48
    assert page.tags["img"] == 48 * 24
    assert path.stat().st_size < 16e6  # noise is the worst case for JPEG
    assert "The 48 largest of 60 clusters are shown" in page.words
    assert "#59" in page.words
    first = Image.open(io.BytesIO(base64.b64decode(page.values("img", "src")[0].split(",")[1])))
    assert max(first.size) == 96
    # Cluster 47 is near to 46, 48 and 45 or 49, but 48 has no card to jump to.
    hrefs = page.values("a", "href")
    assert "#cluster-46" in hrefs and "#cluster-48" not in hrefs
    assert "#46 0.99 #48 0.99 #4" in page.words


def test_nearest_clusters_follow_the_mean_embeddings(tmp_path: Path) -> None:
    rows = [(str(i), ["train", "test"][i % 2], c, "0.9", "0.5") for i, c in enumerate([0, 0, 1, 1, 2, 2])]
    write_run(tmp_path, rows, n_clusters=4)  # cluster 3 is empty
    means = np.repeat([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]], 2, axis=0)
    noise = np.tile([[0.0, 0.1], [0.0, -0.1]], (3, 1))
    embeddings = means + noise
    np.savez(tmp_path / "embeddings.npz", train=embeddings[::2], test=embeddings[1::2])
    words = Page(write_report(RunFolder(tmp_path), pictures, title="t").read_text(encoding="utf-8")).words
    near = [m.strip() for m in re.findall(r"mean embeddings\)((?: #\d -?\d\.\d\d)+)", words)]
    assert near == ["#1 0.60 #2 -1.00", "#0 0.60 #2 -0.60", "#1 -0.60 #0 -1.00"]
    # Embeddings of other images say nothing.
    np.savez(tmp_path / "embeddings.npz", train=embeddings, test=embeddings)
    assert "mean embeddings" not in write_report(RunFolder(tmp_path), pictures, title="t").read_text(encoding="utf-8")


def test_the_commands_are_those_of_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "a run; it's"
    folder.mkdir()
    write_run(folder, simple_rows())
    text = write_report(RunFolder(folder), pictures, title="t").read_text(encoding="utf-8")
    commands = [html.unescape(command) for command in re.findall(r"<code>(.*?)</code>", text)]
    assert len(commands) == 6
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "scan-fast"
        assert str(folder) == str(build_parser().parse_args(words).target)


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), DataError("cannot read image 3.png")])
def test_lost_pictures_are_named(error: Exception, tmp_path: Path) -> None:
    def images(split: str, rows: list[int]) -> list[Image.Image]:
        if 3 in rows:
            raise error
        return pictures(split, rows)

    write_run(tmp_path, [(f"dir/{i}.png", "all", 0, "0.5", "0.1") for i in range(6)], n_clusters=None)
    page = Page(write_report(RunFolder(tmp_path), images, title="t").read_text(encoding="utf-8"))
    assert page.tags["img"] == 5
    assert "3.png" in page.words and "2.png" not in page.words
    with pytest.raises(ValueError, match="must return 6 pictures, got 1"):
        write_report(RunFolder(tmp_path), lambda split, rows: pictures(split, rows[:1]), title="t")


def test_a_run_without_images_or_scores(tmp_path: Path) -> None:
    write_run(tmp_path, [], n_clusters=None)
    assert "assigned no images" in Page(write_report(RunFolder(tmp_path), pictures, title="t").read_text()).words
    write_run(tmp_path, [("a", "all", 0, "nan", "nan"), ("b", "all", 0, "nan", "nan")], n_clusters=None)
    words = Page(write_report(RunFolder(tmp_path), pictures, title="t").read_text(encoding="utf-8")).words
    assert "mean confidence –" in words


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("assignments.csv", "path,split,cluster\na,b,0\n", "lacks the columns confidence, margin"),
        ("assignments.csv", "path,split,cluster,confidence,margin\na,b,x,1,1\n", "line 2 is no row"),
        ("assignments.csv", "path,split,cluster,confidence,margin\na,b\n", "line 2 is no row"),
        ("assignments.csv", "path,split,cluster,confidence,margin\na,b,-1,1,1\n", "must not be negative"),
        ("summary.json", "{", r"summary\.json cannot be read"),
        ("summary.json", "[]", "it must hold a mapping, it holds list"),
        ("summary.json", '{"stages": {"pretext": {}}}', "must hold the seconds"),
        ("config.yaml", "a: [", r"config\.yaml cannot be read"),
        ("config.yaml", "a: 1", "unknown key a"),
        ("confusion.csv", "t,a,b\na,1,2\nb,3\n", "no confusion matrix"),
        ("embeddings.npz", "PK", "no .npz of arrays"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    write_run(tmp_path, simple_rows())
    (tmp_path / file).write_text(content)
    with pytest.raises(RunError, match=message):
        write_report(RunFolder(tmp_path), pictures, title="t")


def test_assignments_are_needed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no assignments\.csv; run `scan-fast run"):
        write_report(RunFolder(tmp_path), pictures, title="t")


def test_a_large_confusion_matrix_is_a_picture(tmp_path: Path) -> None:
    write_run(tmp_path, simple_rows(labelled=True), extra=("label",))
    run, table = RunFolder(tmp_path), Confusion.of(np.eye(41, dtype=np.int64), [f"class $ {i}" for i in range(41)])
    run.write(artifacts.CONFUSION, table)
    run.write(artifacts.CONFUSION_FIGURE, confusion_png(table))
    page = Page(write_report(run, pictures, title="t").read_text(encoding="utf-8"))
    urls = dict(zip(page.values("img", "alt"), page.values("img", "src"), strict=True))
    url = urls["Confusion matrix; the numbers are in confusion.csv"]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("L"), dtype=float)
    assert url.startswith("data:image/png")
    assert picture.std() > 5  # something is on it
    assert not page.values("td", "style")


def drawn_points(svg: str) -> list[list[tuple[float, float]]]:
    """The strokes of the curve, as lists of points."""
    strokes: list[list[tuple[float, float]]] = []
    path = re.search(r'd="([^"]*)"', svg)
    assert path is not None
    for letter, x, y in re.findall(r"([ML])([\d.]+) ([\d.]+)", path.group(1)):
        if letter == "M":
            strokes.append([])
        strokes[-1].append((float(x), float(y)))
    return strokes


def test_line_chart_places_values() -> None:
    svg = str(line_chart(Series("loss", [0, 1, 2, 3, 4], [4.0, 2.0, float("nan"), 0.0, 1.0])))
    first, second = drawn_points(svg)
    assert [x for x, _ in first + second] == sorted(x for x, _ in first + second)
    heights = {4.0: first[0][1], 2.0: first[1][1], 0.0: second[0][1], 1.0: second[1][1]}
    slope = (heights[0.0] - heights[4.0]) / 4
    for value, y in heights.items():
        assert y == pytest.approx(heights[0.0] - value * slope, abs=0.11)
    assert slope > 20
    assert line_chart(Series("x", [0.0, 1.0], [float("inf"), float("nan")])) is None
    assert line_chart(Series("x", [0.0], [1.0])) is None
    for values in ([0.0, 0.0], [1e300, -1e300], [1e-30, 2e-30]):
        svg = str(line_chart(Series("x", list(map(float, range(len(values)))), values)))
        assert all(0 <= x <= 320 and 0 <= y <= 150 for stroke in drawn_points(svg) for x, y in stroke)


def test_long_series_are_thinned_but_keep_spikes() -> None:
    values = [0.0] * 20_000
    values[7_777] = 9.0
    (stroke,) = drawn_points(str(line_chart(Series("x", list(map(float, range(20_000))), values))))
    assert 100 < len(stroke) < 400
    assert sorted({y for _, y in stroke}) == [10.0, 128.0]
    assert stroke[-1][0] == max(x for x, _ in stroke) == 310.0


def test_curves_are_over_epochs_and_later_lines_replace_earlier_ones(tmp_path: Path) -> None:
    write_run(tmp_path, simple_rows())
    values = [(2, 3.0), (1, 2.0), (3, 9.0), (3, 4.0)]
    lines = [json.dumps({"stage": "s", "epoch": e, "step": 7 * e, "time": 0, "a": a}) for e, a in values]
    lines += ['{"stage": "s", "epoch": 4, "a": 5}', '{"stage": "s", "epoch": 4, "step": 1, "time": 0, "a": "x"}', "[]"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    page = Page(write_report(RunFolder(tmp_path), pictures, title="t").read_text(encoding="utf-8"))
    assert "epoch 1" in page.words
    assert page.values("svg", "aria-label") == ["a over 3 epochs: first 2, last 4, lowest 2, highest 4"]


def test_numbers_and_durations() -> None:
    assert [number(v) for v in (0.12345, 12, 1e-5, -0.00027449, 123456.0, 1.5e9, float("nan"))] == [
        "0.1235",
        "12",
        "1e-5",
        "-2.745e-4",
        "123456",
        "1.5e9",
        "nan",
    ]
    spans = [duration(s) for s in (0.42, 59.7, 61, 3725, 7200)]
    assert spans == ["0.4 s", "1 min 00 s", "1 min 01 s", "1 h 02 min", "2 h 00 min"]
