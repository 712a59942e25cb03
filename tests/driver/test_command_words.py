"""The words of the command line: no abbreviations, suggestions for mistyped ones, completion in shells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from driving import TINY, run_here

import scan_fast
from scan_fast.cli import build_parser
from scan_fast.runs.keys import all_keys


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("rum digits", "there is no command 'rum': did you mean run?"),
        ("evalute RUN", "there is no command 'evalute': did you mean evaluate?"),
        ("xyz", "there is no command 'xyz' (see scan-fast --help)"),
        ("", "give a command, such as run"),
        ("run --data x --cluster 10", "there is no option --cluster: did you mean --clusters?"),
        ("run digits --clusters=3 --quite", "there is no option --quite: did you mean --quiet?"),
        ("run digits --agian", "there is no option --agian: did you mean --again?"),
        ("predict RUN --dat x", "there is no option --dat: did you mean --data?"),  # before "--data is missing"
        ("run digits --seed 3", "values of the configuration have no dashes, such as seed=VALUE"),
        ("export RUN --frmat=onnx", "there is no option --frmat: did you mean --format?"),
        ("run digits pretext.epochs", "pretext.epochs has no value; give pretext.epochs=VALUE"),
        ("run digits cifar10", "one word too many: 'cifar10'"),
        ("report RUN pretext.epochs=3", "report takes no configuration values, got pretext.epochs=3"),
        ("run cifar1", "there is no configuration 'cifar1' (did you mean cifar10?); give a YAML file"),
        ("config imagnet", "there is no configuration 'imagnet' (did you mean imagenet?)"),
        ("completion tcsh", "invalid choice: 'tcsh'"),
        ("--versoin", "there is no option --versoin: did you mean --version?"),
    ],
)
def test_a_mistyped_word_is_refused_with_a_suggestion(words: str, message: str) -> None:
    assert message in run_here(*words.split()).refusal()
    assert not list(Path().iterdir())  # no run has begun


def test_no_option_has_a_shorter_form() -> None:
    parser = build_parser()
    for name, sub in parser.subparsers.items():
        for option in (option for option in sub.options if len(option) > 5):
            if option[:-1] not in sub.options and name != "bench":
                assert f"there is no option {option[:-1]}: did you mean --" in run_here(name, option[:-1]).refusal()


def test_words_of_a_benchmark_are_its_own() -> None:
    result = run_here("bench", "nothing", "--anything", "a.b=1")
    assert "bench must be one of" in result.refusal()


def test_the_package_is_a_program(tmp_path: Path) -> None:
    root = Path(scan_fast.__file__).parents[1]
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    words = [sys.executable, "-m", "scan_fast", "--version"]
    shown = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, f"scan-fast {scan_fast.__version__}\n", "")


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *build_parser().subparsers])
def test_help_explains_every_word(command: str) -> None:
    parser = build_parser()
    sub = parser.subparsers[command] if command else parser
    shown = " ".join(run_here(*command.split(), "--help").out.split())
    for action in (*sub.positionals, *sub.options.values()):
        assert action.help and (action.metavar or action.dest) and action.help.split()[0] in shown, action
    assert (sub.description or "").split()[-1] in shown
    assert not sub.takes_overrides or "scan-fast config --keys" in shown


# -- completion --------------------------------------------------------------------------------------------------------


def complete(*words: str) -> list[str]:
    """Return what bash offers for the last of the words."""
    script = run_here("completion", "bash").out
    ask = (
        f'{script}\nCOMP_WORDS=("$@"); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); _scan_fast; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    result = subprocess.run(
        ["bash", "-c", ask, "bash", "scan-fast", *words], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stderr == ""
    return result.stdout.split()


@pytest.mark.skipif(os.name == "nt", reason="needs bash")
def test_bash_completes_commands_options_choices_configurations_and_keys(tmp_path: Path) -> None:
    (tmp_path / "digital").mkdir()
    assert complete("ru") == ["run"]
    assert set(complete("")) == set(build_parser().subparsers)
    assert complete("run", "--cl") == ["--clusters"]
    assert complete("export", "x", "--format", "") == ["pt2", "onnx", "reference"]
    assert complete("run", "digi") == ["digits", "digital"]
    assert complete("run", "--out", "digi") == ["digital"]
    assert complete("completion", "f") == ["fish"]
    assert complete("run", "digits", "pretext.optimizer.l") == ["pretext.optimizer.lr="]
    assert complete("report", "pretext.optimizer.l") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_have_every_command_option_and_key(shell: str) -> None:
    script = run_here("completion", shell).out
    for name, sub in build_parser().subparsers.items():
        assert name in script
        for option in sub.options:
            word = {"fish": f"-l {option[2:]} " if option.startswith("--") else f"-s {option[1:]} "}.get(shell, option)
            assert word in script, (name, option)
    assert all(f"{key.name}=" in script for key in all_keys())


# -- config ------------------------------------------------------------------------------------------------------------


def test_config_prints_what_a_run_would_use(finished_run: Path, images: Path) -> None:
    result = run_here("config", "digits", "pretext.epochs=7", "preset=reference")
    assert (result.code, result.err) == (0, "")
    Path("mine.yaml").write_text(result.out)
    assert "epochs: 7\n" in result.out
    assert "anchors: first\n" in result.out
    assert run_here("config", "mine.yaml").out == result.out
    assert run_here("config", finished_run).out == (finished_run / "config.yaml").read_text()
    changed = run_here("config", finished_run, "seed=9").out
    assert changed == (finished_run / "config.yaml").read_text().replace("seed: 0\n", "seed: 9\n", 1)
    shown = run_here("config", "--data", images, "--clusters", 3).out
    assert f"root: {images}\n" in shown
    assert "n_clusters: 3\n" in shown
    assert not Path("runs").exists()


def test_config_lists_the_shipped_ones() -> None:
    lines = run_here("config", "--list").out.splitlines()
    assert {line.split()[0] for line in lines[::2]} >= {"cifar10", "digits", "folder", "imagenet50", "stl10"}
    assert all(line.split(maxsplit=1)[1].startswith("presets: ") for line in lines[::2])
    assert any("handwritten digits" in line for line in lines[1::2])


def test_keys_with_types_defaults_and_meaning() -> None:
    text = run_here("config", "--keys").out
    assert "mining.k = 20  (int ≥ 1)\n    Neighbours of each training image.\n" in text
    assert "selflabel.ema = null  (float > 0, < 1 or null)\n" in text
    kinds = "simclr or moco or byol or sigreg or visreg or rotation or weights or none"
    assert f"pretext.method.kind = simclr  ({kinds})\n" in text
    assert "pretext.method.file = required  (path, of kind weights)\n    The weight file." in text
    assert "clustering.view.kind = strong  " in text
    assert "selflabel = its defaults  (section or null)\n" in text
    assert "`" not in text
    found = run_here("config", "--keys", "optimizer.lr").out.splitlines()[::2]
    assert [line.split()[0] for line in found] == [
        f"{stage}.optimizer.lr" for stage in ("pretext", "clustering", "selflabel")
    ]
    assert len(run_here("config", "--keys", "mining.*").out.splitlines()) == 2 * 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keys", "temprature"], "--keys: no key matches 'temprature'; did you mean pretext.method.temperature?"),
        (["--keys", "lr*"], "--keys: no key matches 'lr*'; did you mean"),
        (["digits", "--list"], "--list shows no configuration; leave out --list"),
        (["--keys", "lr", "seed=1"], "--keys shows no configuration"),
        (["--keys", "--list"], "give --list or --keys, not both"),
        (["digits", "pretext.epoch=3"], "did you mean pretext.epochs?"),
    ],
)
def test_refused_words_of_config(words: list[str], message: str) -> None:
    assert message in run_here("config", *words).refusal()


# -- sweep ----------------------------------------------------------------------------------------------------------


def test_every_line_of_a_sweep_names_its_seed() -> None:
    result = run_here("sweep", "digits", *TINY, "selflabel=null", "--seeds", "4", "--out", "sweep")
    lines = result.out.splitlines()
    table = lines.index("digits, seeds 4")
    assert table > 5
    assert all(line.startswith("seed 4: ") for line in lines[:table])
