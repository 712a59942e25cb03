"""The HTML report, read back with a parser that knows nothing of the template."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_runs import Page, colour, file_source, photograph, plain_sources, report_of, simple_rows, write_run

from scan_fast.cli import build_parser
from scan_fast.errors import RunError
from scan_fast.report import write_report
from scan_fast.report.build import EMBEDDED
from scan_fast.report.charts import Series, line_chart
from scan_fast.report.figures import confusion_png
from scan_fast.report.text import duration, number
from scan_fast.runs import artifacts
from scan_fast.runs.digests import digest_of
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.tables import Confusion
from scan_fast.text import shown


def shown_colours(page: Page) -> list[Any]:
    """The colours of the pictures in the page's markup, in order."""
    urls = page.values("img", "src")
    assert all(url.startswith("data:image/png;base64,") for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).getpixel((3, 3)) for url in urls]


def test_report_of_an_unlabelled_run(tmp_path: Path) -> None:
    rows = simple_rows()
    write_run(tmp_path, rows)
    path = write_report(RunFolder(tmp_path), plain_sources(rows), title="My run")
    assert path == tmp_path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert [value for value in page.values("li", "id") if value] == ["group-0", "group-1", "group-2"]
    assert page.tags["h1"] == 1
    words = page.words
    assert "My run" in words and "resnet_digits" in words
    assert "40 images, 44.4\u202f% (27 train, 13 test), mean confidence 69.5\u202f%" in words
    assert "mostly" not in words and "Confusion" not in words and "Look at this first" not in words
    # Every picture belongs to the row that was asked for, in the order of confidence.
    by_group: dict[int, list[tuple[str, int]]] = {0: [], 1: [], 2: []}
    seen: Counter[str] = Counter()
    for _, split, group, _, _ in rows:
        by_group[group].append((split, seen[split]))
        seen[split] += 1
    # By size, then number; confidence rises with the row.
    expected = [place for group in (0, 1, 2) for place in by_group[group][::-1][:10]]
    assert shown_colours(page) == [colour(split, row) for split, row in expected]


def test_the_data_holds_every_image(tmp_path: Path) -> None:
    rows = simple_rows(labelled=True)
    write_run(tmp_path, rows, extra=("label",))
    page = Page(report_of(tmp_path, plain_sources(rows)))
    data = page.data
    folders = [data["folders"][i][0] for i in data["folder"]]
    assert [folder + name for folder, name in zip(folders, data["name"], strict=True)] == [row[0] for row in rows]
    assert data["group"] == [row[2] for row in rows]
    assert data["confidence"] == [round(1000 * float(row[3])) for row in rows]
    assert [data["labels"][i] for i in data["label"]] == [row[5] for row in rows]
    assert {known["id"]: known["size"] for known in data["groups"]} == {0: 40, 1: 40, 2: 10}
    # A picture that is in the markup is not in the data a second time.
    in_markup = {int(value) for value in page.values("img", "data-row")}
    assert {i for i, value in enumerate(data["thumb"]) if value == 1} == in_markup
    for i, value in enumerate(data["thumb"]):
        if value != 1:
            split, row = rows[i][1], sum(other[1] == rows[i][1] for other in rows[:i])
            picture = Image.open(io.BytesIO(base64.b64decode(value.split(",")[1])))
            assert picture.getpixel((3, 3)) == colour(split, row)


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
    page = Page(report_of(tmp_path, plain_sources(simple_rows())))
    words = page.words
    # Cluster 2 has five of each: the first in the alphabet is named. One image of cluster 0 has no label.
    assert words.count("mostly cat (100.0\u202f%)") == words.count("mostly dog (100.0\u202f%)") == 1
    assert "mostly cat (50.0\u202f%)" in words
    assert "accuracy (clustering, test) 87.5\u202f%" in words
    assert "top-5 accuracy 99.0\u202f%" in words
    assert "1 h 02 min" in words and "1 min 05 s" in words and "knn_acc 81.2" in words
    assert "kmeans pixels baseline accuracy 37.5\u202f% ± 6.2\u202f% NMI 50.0\u202f% ± 0.0\u202f%" in words
    assert page.tags["svg"] == 2
    assert any("loss over 4 epochs: first 5, last 2" in text for text in page.values("svg", "aria-label"))
    # 30, 10 and 5 of 45: rows sum to one, and the empty row stays empty.
    assert page.values("td", "style") == ["--s:0.667", "--s:0.222", "--s:0.111"] + ["--s:0.000"] * 3
    assert "(unmatched)" in words and "<i>dog</i>" in words


def test_empty_and_dominant_groups_are_warned_about(tmp_path: Path) -> None:
    rows = [(f"{i}.png", "all", 0 if i < 60 else 3, "0.9", "0.8") for i in range(80)]
    write_run(tmp_path, rows, n_clusters=5)
    page = Page(report_of(tmp_path, plain_sources(rows)))
    assert "3 of 5 groups are empty: #1, #2, #4." in page.words
    assert "Group #0 holds 75.0\u202f% of the images." in page.words
    assert page.values("li", "data-group") == ["0", "3", "1", "2", "4"]
    assert page.words.count("No image is in this group.") == 3


def test_tiny_groups_are_warned_about(tmp_path: Path) -> None:
    rows = [(f"{i}.png", "all", min(i % 5, 3) if i else 4, "0.9", "0.8") for i in range(200)]
    write_run(tmp_path, rows, n_clusters=5)
    words = Page(report_of(tmp_path, plain_sources(rows))).words
    assert "1 of 5 groups has less than a tenth of an even share: #4." in words
    assert "holds" not in words and "empty" not in words


@pytest.mark.parametrize(
    ("confidence", "margin", "message"),
    [
        ("0.27", "0.01", "hardly more than an even guess (25.0\u202f%)"),
        ("0.6", "0.3", "Only 10.0\u202f% of the images are clearly in one group (margin above 0.5)"),
        ("0.9", "0.8", None),
    ],
)
def test_undecided_predictions_are_warned_about(
    confidence: str, margin: str, message: str | None, tmp_path: Path
) -> None:
    rows = [(f"{i}", "all", i % 4, confidence, margin if i % 10 else "0.9") for i in range(40)]
    write_run(tmp_path, rows, n_clusters=4)
    words = Page(report_of(tmp_path, plain_sources(rows))).words
    assert ("Look at this first" in words) == (message is not None)
    assert message is None or message in words


def test_skipped_and_lost_images_are_warned_about(tmp_path: Path) -> None:
    rows = [(f"dir/{i}.png", "all", 0, "0.9", "0.8") for i in range(6)]
    write_run(tmp_path, rows, n_clusters=None)
    (tmp_path / "skipped.csv").write_text("path,reason\nx.jpg,cut off\ny.jpg,empty\n")
    page = Page(report_of(tmp_path, plain_sources([row for row in rows if row[0] != "dir/3.png"])))
    assert "2 files could not be read and are in no group. The first is x.jpg: cut off." in page.words
    assert "1 image of the groups cannot be read any more." in page.words
    assert page.tags["img"] == 5
    assert "3.png" in page.words and "2.png" not in page.words


def test_the_choice_of_groups_is_shown(tmp_path: Path) -> None:
    rows = simple_rows()
    write_run(tmp_path, rows)
    candidates = [{"name": "k-means", "score": 0.5, "k": 3, "seconds": 1.5}, {"name": "SCAN", "score": 0.25, "k": 3}]
    choice = {"method": "k-means", "score": 0.5, "reason": "the best silhouette", "candidates": candidates}
    curve = [{"k": k, "score": 1 / k, "stability": 0.5} for k in (4, 2, 3)]
    number = {"seconds": 1.0, "k": 4, "curve": curve}
    summary = {"number": number, "clustering": {"seconds": 1.0, "choice": choice}}
    (tmp_path / "summary.json").write_text(json.dumps({"stages": summary}))
    page = Page(report_of(tmp_path, plain_sources(rows)))
    words = page.words
    assert "k-means, score 0.5: the best silhouette" in words
    assert "k-means 3 0.5 1.5 SCAN 3 0.25 –" in words
    assert "The suggested number of groups, 4, is the most that was tried (2 to 4)." in words
    charts = page.values("svg", "aria-label")
    assert "score over 3 numbers of groups: first 0.5, last 0.25, lowest 0.25, highest 0.5" in charts
    assert "choice score" not in words  # not among the numbers of the stage
    summary["number"] = {**number, "k": 3}
    (tmp_path / "summary.json").write_text(json.dumps({"stages": summary}))
    assert "is the most that was tried" not in report_of(tmp_path, plain_sources(rows))


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
    rows = [(name, "all", 0, "0.5", "0.1", name) for name in HOSTILE]
    write_run(tmp_path, rows, extra=("label",), n_clusters=None)
    lines = [{"stage": HOSTILE[0], "epoch": e, "step": e, "time": e, HOSTILE[1]: 1.5} for e in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    summary = {"stages": {HOSTILE[1]: {"seconds": 1, HOSTILE[0]: 1}}, "baselines": {HOSTILE[0]: {"acc_mean": 1}}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with (tmp_path / "config.yaml").open("a") as file:
        file.write(f"name: {json.dumps(HOSTILE[8])}\n")
    text = report_of(tmp_path, plain_sources(rows), title=HOSTILE[1])
    page = Page(text)
    # The data, which is no script, and the page's own.
    assert page.values("script", "type") == ["application/json"] and page.tags["script"] == 2
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert page.tags["img"] == len(HOSTILE)
    assert all(value.startswith("data:image/") for value in page.values("img", "src"))
    assert page.values("img", "alt") == [shown(name) for name in HOSTILE]
    data = page.data
    names = [data["folders"][folder][0] + name for folder, name in zip(data["folder"], data["name"], strict=True)]
    assert names == [shown(name) for name in HOSTILE]
    assert "49" not in page.words.split()


def test_the_page_asks_for_nothing_from_outside(tmp_path: Path) -> None:
    write_run(tmp_path, simple_rows(labelled=True), extra=("label",))
    text = report_of(tmp_path, plain_sources(simple_rows()))
    page = Page(text)
    assert not re.search(r"https?:|@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\(", text)
    assert all(href.startswith("#") for href in page.values("a", "href"))
    assert not {"link", "iframe", "object"} & set(page.tags)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    scripted = {"#images", "#map"}
    assert {href[1:] for href in page.values("a", "href") if href not in scripted} <= set(ids)
    assert all(page.values("img", "alt")) and len(page.values("img", "alt")) == page.tags["img"]
    policy = next(value for value in page.values("meta", "content") if "default-src" in value)
    assert "default-src 'none'" in policy and "'unsafe-inline'" not in policy.partition("script-src")[2]
    digest = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy


def test_many_images_leave_their_thumbnails_beside_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    names = [f"{i:03d}.jpg" for i in range(EMBEDDED + 50)]
    for i, name in enumerate(names):
        Image.new("RGB", (64, 48), (i % 256, i // 256, 99)).save(folder / name)
    photograph(1, (900, 600)).save(folder / names[0])
    rows = [(name, "all", i // 30, "0.9", "0.5") for i, name in enumerate(names)]
    write_run(tmp_path / "run", rows, n_clusters=22)
    page = Page(report_of(tmp_path / "run", {"all": file_source(folder, names)}))
    assert page.values("script", "src") == ["report/data.js"]
    script = (tmp_path / "run/report/data.js").read_text(encoding="ascii")
    data = json.loads(json.loads(script.removeprefix("window.scanFast=JSON.parse(").removesuffix(");\n")))
    assert len(set(data["thumb"])) == len(names)
    with Image.open(tmp_path / "run" / data["thumb"][0]) as first:
        assert first.size == (192, 128)
    with Image.open(tmp_path / "run" / data["thumb"][300]) as other:
        assert other.size == (64, 48) and np.abs(np.subtract(other.getpixel((9, 9)), (44, 1, 99))).max() < 4
    assert len(page.values("img", "src")) == 22 * 10
    assert all((tmp_path / "run" / url).is_file() for url in page.values("img", "src"))
    # One file of the same run holds some of each group.
    text = report_of(tmp_path / "run", {"all": file_source(folder, names)}, single_file=True)
    single = Page(text)
    assert (tmp_path / "run/report-single.html").read_text() == text
    assert "src" not in [name for tag, name, _ in single.attributes if tag == "script"]
    assert all(url.startswith("data:") for url in single.values("img", "src"))
    inside = [i for i, value in enumerate(single.data["thumb"]) if value == 1 or str(value).startswith("data:")]
    assert len(inside) == EMBEDDED
    assert min(Counter(i // 30 for i in inside).values()) >= 20
    # The others are shown from their own files, for they are small.
    assert {value for i, value in enumerate(single.data["thumb"]) if i not in set(inside)} == {2}
    assert f"Of {len(names)} images, {EMBEDDED} have a thumbnail" in single.words


def test_nearest_groups_follow_the_mean_embeddings(tmp_path: Path) -> None:
    rows = [(str(i), ["train", "test"][i % 2], c, "0.9", "0.5") for i, c in enumerate([0, 0, 1, 1, 2, 2])]
    write_run(tmp_path, rows, n_clusters=4)  # cluster 3 is empty
    means = np.repeat([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]], 2, axis=0)
    noise = np.tile([[0.0, 0.1], [0.0, -0.1]], (3, 1))
    embeddings = means + noise
    np.savez(tmp_path / "embeddings.npz", train=embeddings[::2], test=embeddings[1::2])
    page = Page(report_of(tmp_path, plain_sources(rows)))
    near = [m.strip() for m in re.findall(r"near (group \d, group \d)", page.words)]
    assert near == ["group 1, group 2", "group 0, group 2", "group 1, group 0"]
    titles = [title.split()[-1] for title in page.values("a", "title")]
    assert titles == ["0.60", "-1.00", "0.60", "-0.60", "-0.60", "-1.00"]
    # Embeddings of other images say nothing.
    np.savez(tmp_path / "embeddings.npz", train=embeddings, test=embeddings)
    assert "mean embeddings" not in report_of(tmp_path, plain_sources(rows))


def test_the_commands_are_those_of_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "a run; it's"
    folder.mkdir()
    write_run(folder, simple_rows())
    text = report_of(folder, plain_sources(simple_rows()))
    commands = [html.unescape(command) for command in re.findall(r"<td><code>(.*?)</code></td>", text)]
    assert len(commands) == 9
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "scan-fast"
        assert str(folder) == str(build_parser().parse_args(words).target)


def test_a_run_without_images_or_scores(tmp_path: Path) -> None:
    write_run(tmp_path, [], n_clusters=None)
    assert "assigned no images" in Page(report_of(tmp_path, {})).words
    rows = [("a", "all", 0, "nan", "nan"), ("b", "all", 0, "nan", "nan")]
    write_run(tmp_path, rows, n_clusters=None)
    page = Page(report_of(tmp_path, plain_sources(rows)))
    assert "mean confidence –" in page.words
    assert page.data["confidence"] == [-1, -1]


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
        ("embeddings.npz", "PK", "it has no digest: it was cut off"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    write_run(tmp_path, simple_rows())
    (tmp_path / file).write_text(content)
    RunFolder(tmp_path).journal.add(file, digest_of(content.encode()))
    with pytest.raises(RunError, match=message):
        write_report(RunFolder(tmp_path), plain_sources(simple_rows()), title="t")


def test_assignments_are_needed(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no assignments\.csv; run `scan-fast run"):
        write_report(RunFolder(tmp_path), plain_sources(simple_rows()), title="t")


def test_a_large_confusion_matrix_is_a_picture(tmp_path: Path) -> None:
    write_run(tmp_path, simple_rows(labelled=True), extra=("label",))
    run, table = RunFolder(tmp_path), Confusion.of(np.eye(41, dtype=np.int64), [f"class $ {i}" for i in range(41)])
    run.write(artifacts.CONFUSION, table)
    run.write(artifacts.CONFUSION_FIGURE, confusion_png(table))
    page = Page(report_of(tmp_path, plain_sources(simple_rows())))
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
    page = Page(report_of(tmp_path, plain_sources(simple_rows())))
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


def test_a_large_confusion_matrix_takes_its_darkest_color_for_its_largest_share() -> None:
    counts = np.full((40, 40), 22)
    np.fill_diagonal(counts, 142)  # 142 of 1,000
    table = Confusion.of(counts, [f"class {number}" for number in range(40)])
    picture = np.asarray(Image.open(io.BytesIO(confusion_png(table))).convert("RGB")).reshape(-1, 3)
    # The end of matplotlib's Blues; 40 squares of it are thousands of pixels.
    darkest = np.abs(picture.astype(int) - (8, 48, 107)).max(axis=1) <= 2
    assert darkest.sum() > 10_000
