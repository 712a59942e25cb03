"""Predicted time, traffic and memory of a run on several GPUs: ``python -m benchmarks.scaling --config imagenet``.

Nothing is measured here, and no image is opened. Bytes follow from the shapes of a step, and the tests compare them
with those of two processes. Times are these bytes and the multiply-adds, over rates of a machine. A rate is measured or
assumed; the last table says which, and gives the file. Options change some of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from scan_fast.runs.config import find_config, load_config

from .files import write_json
from .ranks.machine import Machine, h200
from .ranks.plan import Plan, amount, duration, plan
from .ranks.stages import IMAGES, Run, Training, describe
from .ranks.traffic import wire_bytes


def step_table(run: Run, ranks: int) -> list[str]:
    """Return a Markdown table of the collectives of one step of each learned stage."""
    lines = [
        f"| stage, a step on {ranks} GPUs | collective | calls | payload of a rank | sent by a rank |",
        "|---|---|---:|---:|---:|",
    ]
    for stage in run.stages:
        if isinstance(stage, Training):
            for message in stage.messages(ranks):
                sent = wire_bytes(message.collective, message.bytes, ranks)
                lines.append(
                    f"| {stage.name}: {message.kind} | {message.collective} | {message.calls:,.0f} | "
                    f"{amount(message.bytes)} | {amount(sent)} |"
                )
    return lines


def plan_table(plans: Sequence[Plan]) -> list[str]:
    """Return a Markdown table of the stages for each number of GPUs."""
    lines = [
        "| GPUs | stage | computing | reading images | communication | of it hidden | rank 0 writes | in all | "
        "sent by a rank | GPU memory | host memory of a rank | more on rank 0 | longest |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for found in plans:
        for stage in found.stages:
            times = (stage.compute, stage.decode, stage.communication, stage.hidden, stage.write, stage.seconds)
            sizes = (stage.sent, stage.device, stage.host, stage.first)
            cells = [
                str(found.ranks),
                stage.name,
                *(duration(time) if time else "" for time in times),
                *(amount(size) if size else "" for size in sizes),
                stage.bound,
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append(f"| {found.ranks} | all |  |  |  |  |  | {duration(found.seconds)} |  |  |  |  |  |")
    return lines


def source_table(machine: Machine) -> list[str]:
    """Return a Markdown table of the rates and their sources."""
    lines = ["| rate | value | source |", "|---|---:|---|"]
    for name, source in machine.sources.items():
        value = getattr(machine, name)
        shown = ", ".join(f"{way} {rate:.0f}/s" for way, rate in value.items()) if isinstance(value, dict) else ""
        lines.append(f"| {name} | {shown or f'{value:.3g}'} | {source} |")
    return lines


def render(run: Run, machine: Machine, plans: Sequence[Plan]) -> str:
    """Return all tables, with what would not work."""
    parts = [
        f"{run.name}: {run.images:,} images. Computed, not measured.",
        "\n".join(step_table(run, plans[-1].ranks)),
        "\n".join(plan_table(plans)),
        *(["\n".join(_misfits(plans)[1:])] if _misfits(plans) else []),
        "\n".join(source_table(machine)),
    ]
    return "\n\n".join(parts)


_SECTION = re.compile(r"(<!-- scaling (steps|plan): (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """Return a page with its tables computed again.

    A section begins with ``<!-- scaling steps: OPTIONS -->`` or ``<!-- scaling plan: OPTIONS -->``, with the options of
    this command, and ends with ``<!-- end -->``.
    """

    def table(section: re.Match[str]) -> str:
        run, _, plans = planned(shlex.split(section[3]))
        lines = step_table(run, plans[-1].ranks)
        if section[2] == "plan":
            lines = [*plan_table(plans), *_misfits(plans)]
        return f"{section[1]}\n" + "\n".join(lines) + f"\n\n{section[4]}"

    return _SECTION.sub(table, text)


def _misfits(plans: Sequence[Plan]) -> list[str]:
    found = [f"- On {each.ranks} GPUs {problem}." for each in plans for problem in each.problems]
    return ["", "Does not fit:", "", *found] if found else []


def numbers(text: str) -> list[int]:
    """Return the whole numbers above 0 of a text such as ``8,64``.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"must be whole numbers above 0, such as 8,64; got {text!r}")
    return [int(part) for part in parts]


def described(name: str, overrides: Sequence[str], images: int | None) -> Run:
    """Return the run of a shipped configuration.

    Args:
        name: of the configuration.
        overrides: changes, ``section.key=value``.
        images: number of training images; that of the data set by default.

    Raises:
        ValueError: for a configuration whose number of images is not known.
    """
    config = load_config(find_config(name), list(overrides))
    if config.name not in IMAGES:
        raise ValueError(f"--config must be one of {', '.join(IMAGES)}, got {name!r}")
    train, test, side = IMAGES[config.name]
    return describe(config, images or train, test, config.data.image_size or side)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="imagenet", help="the name of a shipped configuration")
    parser.add_argument("--images", type=int, help="number of training images (default: the data set's)")
    parser.add_argument("--gpus", type=numbers, default=[8, 64], help="numbers of GPUs (default: 8,64)")
    parser.add_argument("--utilisation", type=float, help="share of the GPU's products that training reaches")
    parser.add_argument("--network", type=float, metavar="GB/S", help="GB/s that a machine sends to another one")
    parser.add_argument("--cores", type=int, help="processor cores of a machine")
    parser.add_argument("--json", type=Path, help="also write the plan to this file")
    parser.add_argument("--page", type=Path, help="compute the tables of this page again, and nothing else")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


def planned(words: Sequence[str]) -> tuple[Run, Machine, list[Plan]]:
    """Return the run, the machine and the plans that a command asks for; wrong words end the process."""
    parser = _parser()
    options = parser.parse_intermixed_args(words)
    given = {
        "utilisation": options.utilisation,
        "small_utilisation": options.utilisation,
        "network": options.network and options.network * 1e9,
        "cores": options.cores,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    machine = h200()
    sources = machine.sources | dict.fromkeys(changes, "given")
    machine = dataclasses.replace(machine, **changes, sources=sources)
    try:
        run = described(options.config, options.overrides, options.images)
        plans = [plan(run, machine, ranks) for ranks in options.gpus]
    except ValueError as error:
        parser.error(str(error))
    return run, machine, plans


def main(words: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    options = _parser().parse_intermixed_args(words)
    if options.page:
        options.page.write_text(fill(options.page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    run, machine, plans = planned(words)
    print(render(run, machine, plans))
    if options.json:
        result = {
            "benchmark": "scaling",
            "config": run.name,
            "images": run.images,
            "machine": dataclasses.asdict(machine),
            "plans": [found.as_values() for found in plans],
        }
        write_json(options.json, result)


if __name__ == "__main__":
    main()
