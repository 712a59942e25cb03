"""YAML and JSON from anyone: nested, repeated or huge values, lost keys and Python's tags cost one line each."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from driving import TINY, run_here

from scan_fast.ablation import read_ablation
from scan_fast.data.decode_cache import DecodeCache
from scan_fast.errors import ConfigError
from scan_fast.runs import artifacts
from scan_fast.runs.config import load_config
from scan_fast.runs.names import GroupNames
from scan_fast.runs.plain_yaml import parse_yaml
from scan_fast.runs.reading import load_json
from scan_fast.runs.records import BackboneRecord, MetricsEntry, SuggestedNumber, Summary, load_metrics

LAUGHS = "\n".join(
    ["a: &a0 [x, x, x, x, x, x, x, x, x, x]", *(f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9))]
)
REFUSED = {
    "nested": ("[" * 3000, "nested deeper than 40 levels"),
    "blocks": ("\n".join(" " * n + "a:" for n in range(200)), "nested deeper than 40 levels"),
    "laughs": (LAUGHS, "there are more than 100000 values, with those that aliases repeat"),
    "itself": ("a: &a [1, *a]", "the alias 'a' is inside of what it stands for"),
    "twice": ("seed: 1\nname: x\nseed: 2", "the key 'seed' is given twice"),
    "twice inside": ("{a: {b: 1, 'b': 2}}", "the key 'b' is given twice"),
    "digits": (f"seed: {'9' * 5000}", "a number or a date in it is not valid"),
    "huge": (f"seed: {1 << 64}", "a whole number in it has more than 64 bits"),
    "hex": ("seed: 0x" + "f" * 5000, "a whole number in it has more than 64 bits"),
    "date": ("a: 2001-13-45", "a number or a date in it is not valid"),
    "object": ("a: !!python/object/apply:os.system [touch executed]", "could not determine a constructor"),
    "name": ("a: !!python/name:os.system", "could not determine a constructor"),
    "keys": ("{[1, 2]: 3}", "unhashable key"),
    "long": ("a: " + "x" * (5 << 20), "characters, more than"),
    "zero": ("a: \x00", "special characters are not allowed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_yaml_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    text, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as info:
        parse_yaml(text)
    assert "\n" not in str(info.value) and len(str(info.value)) < 400
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(file)
    with pytest.raises(ValueError, match=message):
        artifacts.CONFIG.load(io.BytesIO(text.encode()))


def test_sound_yaml_is_read() -> None:
    text = "base: &b {x: 1, y: [1, 2]}\nother: {<<: *b, x: 2}\nlist: [*b, *b]\nnone:\nnumber: 1e3\nfloat: 1.5"
    values = {"x": 1, "y": [1, 2]}
    expected = {"base": values, "other": {"x": 2, "y": [1, 2]}, "list": [values, values], "none": None}
    assert parse_yaml(text) == expected | {"number": "1e3", "float": 1.5}
    assert parse_yaml("") is None


@pytest.mark.parametrize(
    "words",
    [
        ["seed=" + "[" * 3000],
        ["seed=" + "9" * 5000],
        ["a." * 3000 + "b=1"],
        ["data." * 30 + "b=1"],
        ["pretext.epochs=.inf"],
        ["pretext.optimizer.lr=.nan"],
        ["clustering.n_clusters=1000000001"],
        ["seed=!!python/name:os.system"],
        ["seed={1: 2}"],
        ["clustering.n_clusters=" + "[" + "1, " * 20_000 + "1]"],
    ],
)
def test_hostile_words_are_refused_in_one_line(words: list[str]) -> None:
    line = run_here("config", "digits", *words).refusal()
    assert len(line) < 1500


def test_hostile_plans_and_bases_are_refused_in_one_line(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    for text, message in REFUSED.values():
        plan.write_text(text)
        with pytest.raises(ConfigError, match="is not valid YAML") as info:
            read_ablation(plan)
        assert re.search(message, str(info.value))
    assert "is not valid YAML" in run_here("ablate", plan, "digits", *TINY).refusal()
    for number in range(30):
        (tmp_path / f"{number}.yaml").write_text(f"base: {number + 1}.yaml\n")
    (tmp_path / "30.yaml").write_text("seed: 1\n")
    assert "is its own base" in run_here("config", tmp_path / "0.yaml").refusal()
    assert "no key matches" in run_here("config", "--keys", "[" * 3000).refusal()


def test_a_key_that_is_given_twice_is_named_where_it_is(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("seed: 1\npretext:\n  epochs: 3\n  epochs: 4\n")
    assert "the key 'epochs' is given twice in" in (line := run_here("config", file).refusal()) and "line 4" in line


DEEP = '{"a": ' * 100_000


@pytest.mark.parametrize("text", [DEEP, '{"a": ' * 500 + "1" + "}" * 500, '{"a": ' + "9" * 5000 + "}", "[" * 10**6])
def test_hostile_json_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError) as info:
        load_json(io.BytesIO(text.encode()))
    assert len(str(info.value)) < 300
    for load in (Summary.load, GroupNames.load, BackboneRecord.load, SuggestedNumber.load):
        with pytest.raises(ValueError):
            load(io.BytesIO(text.encode()))
    assert load_metrics(io.BytesIO(text.encode())) == []
    assert not DecodeCache(text.encode())._former


WRONG: list[tuple[Any, dict[str, Any]]] = [
    (Summary, {"stages": {"a": {"seconds": float("inf")}}}),
    (Summary, {"stages": {"a": {"seconds": float("nan")}}}),
    (Summary, {"stages": {"a": {"seconds": True}}}),
    (Summary, {"stages": {}, "seed": "x"}),
    (Summary, {"stages": {"a": {"seconds": 1, "loss": 10**400}}}),
    (Summary, {"stages": {"a": {"seconds": 1, "test": 3}}}),
    (Summary, {"stages": {"a": {"seconds": 1, "test": {"acc": "=cmd"}}}}),
    (Summary, {"stages": {"mining": {"seconds": 1, "purity_at": [1]}}}),
    (Summary, {"stages": {"mining": {"seconds": 1, "purity_at": {"test": {"5": "x"}}}}}),
    (Summary, {"stages": {}, "baselines": {"a": {"acc_mean": "=cmd"}}}),
    (Summary, {"stages": {}, "baselines": {"a": 1}}),
    (SuggestedNumber, {"k": 10**9, "curve": []}),
    (SuggestedNumber, {"k": 3, "curve": [{"k": 3}]}),
    (SuggestedNumber, {"k": 3, "curve": [{"k": 3, "score": "x", "stability": 1.0, "way": "a"}]}),
    (SuggestedNumber, {"k": 3, "curve": [[]]}),
    (GroupNames, {"assignments": "a", "names": {"0": "a\x1b[2J"}}),
    (GroupNames, {"assignments": "a", "names": {"0": "a\u202eb"}}),
    (GroupNames, {"assignments": "a", "names": {"9" * 5000: "a"}}),
    (BackboneRecord, {}),
]


@pytest.mark.parametrize(("kind", "content"), WRONG)
def test_records_with_values_of_other_kinds_are_refused(kind: Any, content: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        kind.load(io.BytesIO(json.dumps(content).encode()))


def test_facts_about_a_network_of_other_kinds_are_refused() -> None:
    sound = BackboneRecord("a", "a", 8, [0.5] * 3, [0.5] * 3, "bilinear", None, None, None, 5)
    file = io.BytesIO()
    sound.dump(file)
    assert BackboneRecord.load(io.BytesIO(file.getvalue())) == sound
    for field, value in (("multiply_adds", "x"), ("image_size", 1.5), ("weights", 3), ("backbone", None)):
        content = json.loads(file.getvalue()) | {field: value}
        with pytest.raises(ValueError, match="facts about the network"):
            BackboneRecord.load(io.BytesIO(json.dumps(content).encode()))


def test_metrics_with_huge_numbers_are_left_out() -> None:
    line = MetricsEntry("a", 1, 1, 0.5, {"loss": 0.5}).to_line()
    huge = line.replace('"epoch": 1', f'"epoch": {10**30}')
    assert [entry.values for entry in load_metrics(io.BytesIO((huge + line).encode()))] == [{"loss": 0.5}]


@pytest.mark.parametrize(
    "entry",
    [
        [1, 1, 1, 1, 65000, 65000, 1, 1, 5, 0],
        [1, 1, 1, 1, 8, 8, 9, 1, 5, 0],
        [1, 1, 1, 1, 8, 8, 1, 1, 1 << 64, 0],
        [1, 1, 1, 1, -8, 8, 1, 0, 5, 0],
        [1, 1, 1, 1, 8, 8, 1, 0, 5, 2],
        [1, 1, 1, 1 << 63, 8, 8, 1, 0, 5, 0],
    ],
)
def test_images_that_cannot_have_been_decoded_are_not_recalled(entry: list[int]) -> None:
    good = [1, 1, 1, 1, 8, 8, 1, 1, 5, 0]
    for each, kept in ((good, True), (entry, False)):
        cache = DecodeCache(json.dumps({"version": 3, "files": {"/a.jpg": each}}).encode())
        assert bool(cache._former) == kept


@pytest.mark.parametrize("text", ["[" * 3000, LAUGHS, "seed: 1\nseed: 2"])
def test_a_hostile_configuration_of_a_run_folder_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    for command in ("compare", "run", "evaluate"):
        assert "config.yaml cannot be read" in run_here(command, tmp_path).refusal()
