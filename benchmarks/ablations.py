"""The ablations of the SCAN paper, for the tables of docs/reproducing.md.

    python -m benchmarks.ablations threshold --config digits --seeds 0-2 --out DIR --shared DIR --json FILE

It does what ``scan-fast ablate`` does, and adds hardware, versions and commit to the result. With ``--out`` the run
folders are kept, and an interrupted ablation continues. Ablations with one ``--shared`` learn the representation once.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from scan_fast.ablation import cells, configure, find_ablation, run_ablation
from scan_fast.devices import choose_device
from scan_fast.experiments import parse_seeds
from scan_fast.runs.config import find_config

from .environment import describe
from .files import write_json
from .trials.plan import hidden


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table: one row for each variant."""
    columns, rows = cells(result)
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ablation", help="a name that `scan-fast ablate --list` shows, or a YAML file")
    parser.add_argument("--config", default="digits", help="a configuration file, or the name of a shipped one")
    parser.add_argument("--seeds", default="0-2", help="such as 0-9 or 0,3,7")
    parser.add_argument("--variants", help="some of the variants only")
    parser.add_argument("--share-pretext", action="store_true", help="one representation for all seeds")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    parser.add_argument("--shared", type=Path, help="keep the shared stages here, for other ablations too")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    seeds = parse_seeds(options.seeds)
    device = choose_device(options.device).type
    ablation = find_ablation(options.ablation).only(options.variants)
    words = [*options.overrides, f"runtime.device={options.device}"]
    config = configure(ablation, find_config(options.config), words)
    with tempfile.TemporaryDirectory() as temporary:
        results = run_ablation(
            ablation,
            config,
            seeds,
            options.out or Path(temporary),
            share_pretext=options.share_pretext,
            shared=options.shared,
        )
    print("\n" + table(results))
    if options.json:
        content = {"benchmark": "ablations", "device": device, "environment": describe(device)}
        content["set"] = hidden(options.overrides)
        write_json(options.json, content | results)


if __name__ == "__main__":
    main()
