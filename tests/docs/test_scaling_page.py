"""The page about several GPUs: its tables are computed, and its scripts are what their programs take."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import ROOT, check_command, check_torchrun, commands
from pages import blocks as blocks_of

from benchmarks.scaling import fill
from scan_fast.distributed import joining

PAGE = "docs/scaling.md"
SLURM = ROOT / "examples" / "slurm.sbatch"
KUBERNETES = ("kubernetes-job.yaml", "kubernetes-pytorchjob.yaml")
KNOWN = {
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "requeue", "open-mode"),
    *("output", "signal", "partition", "account", "mem"),
}
"""Options of sbatch, from its manual."""
ALONE = {"requeue"}


def page() -> str:
    return (ROOT / PAGE).read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_command() -> None:
    text = page()
    assert text.count("<!-- scaling ") == text.count("<!-- end -->") == 5
    assert fill(text) == text
    assert fill(text.replace("| pretext |", "| other |", 1)) == text


def test_what_is_not_measured_is_said() -> None:
    text = " ".join(page().split())
    assert "**Several GPUs are unverified**" in text and "computed, not measured" in text


def test_figures_of_the_page_are_those_of_the_program() -> None:
    text = " ".join(page().split())
    assert f"within {joining.SECONDS[joining.JOIN_SECONDS]:.0f} seconds. `{joining.JOIN_SECONDS}`" in text
    assert f"after {joining.SECONDS[joining.SILENT_SECONDS]:.0f} seconds without a sign of life" in text


def test_commands_of_torchrun_are_on_the_page() -> None:
    found = [words for block in blocks_of(PAGE) if block.language == "sh" for words in commands(block)]
    assert sum(words[0] == "torchrun" for words in found) == 4
    for words in (["torchrun", "--nprocs", "2"], ["torchrun", "-m", "scan_fast", "run", "imagenet", "a.b=1"]):
        with pytest.raises((AssertionError, ValueError)):
            check_command(words)


def test_the_script_for_slurm() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    text = SLURM.read_text()
    assert text.startswith("#!/bin/bash\n")
    lines = text.splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    names = [option.removeprefix("--").partition("=") for option in options]
    assert {name for name, _, _ in names} <= KNOWN
    assert all(bool(value) == (name not in ALONE) for name, _, value in names)
    # sbatch reads options up to the first command only.
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in lines[first:])
    values = {name: value for name, _, value in names}
    assert re.fullmatch(r"(\d+-)?\d\d:\d\d:\d\d", values["time"])
    assert re.fullmatch(r"B:USR1@\d+", values["signal"]) and "trap" in text


def test_torchrun_takes_the_words_of_the_script_for_slurm(tmp_path: Path) -> None:
    """The script runs to its end with stand-ins for SLURM's programs, which note what they are asked for."""
    words = run_slurm_script(tmp_path, "exit 0")
    assert words[:2] == ["--kill-on-bad-exit=1", "torchrun"]
    check_torchrun(words[2:])
    assert "--nnodes 2 --nproc-per-node 8" in shlex.join(words) and "node0:29500" in words
    assert values_of(SLURM)["gpus-per-node"] == "8" and values_of(SLURM)["nodes"] == "2"


def test_the_script_for_slurm_ends_with_the_code_of_the_run(tmp_path: Path) -> None:
    run_slurm_script(tmp_path, "sleep 0.2; exit 7", code=7)


def test_the_script_for_slurm_queues_again_and_waits(tmp_path: Path) -> None:
    run_slurm_script(tmp_path, "kill -USR1 $PPID; sleep 1; exit 5", code=5)
    assert (tmp_path / "scontrol.txt").read_text().splitlines()[-1] == "requeue 12"


def values_of(script: Path) -> dict[str, str]:
    """Return the options of sbatch in a script."""
    lines = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH --")]
    return {name: value for name, _, value in (line.removeprefix("#SBATCH --").partition("=") for line in lines)}


def run_slurm_script(folder: Path, does: str, code: int = 0) -> list[str]:
    """Run the script with programs that note their words, and check its exit code; return the words of srun."""
    srun = f'#!/bin/bash\nprintf "%s\\n" "$@" > {folder}/srun.txt\n{does}\n'
    scontrol = f'#!/bin/bash\necho "$*" >> {folder}/scontrol.txt\necho node0\necho node1\n'
    for name, text in (("srun", srun), ("scontrol", scontrol)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "12", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[0-1]"}
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "DATA": "/data", "OUT": str(folder / "out"), **slurm}
    done = subprocess.run(["bash", SLURM], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    return (folder / "srun.txt").read_text().splitlines()


def documents(name: str) -> dict[str, dict[str, Any]]:
    """Return the objects of a file by their kind."""
    found = list(yaml.safe_load_all((ROOT / "examples" / name).read_text()))
    assert all({"apiVersion", "kind", "metadata", "spec"} <= set(each) and each["metadata"]["name"] for each in found)
    return {each["kind"]: each for each in found}


def pods_of(name: str) -> dict[str, Any]:
    """Return the specification of the pods of a file."""
    found = documents(name)
    if "Job" in found:
        spec: dict[str, Any] = found["Job"]["spec"]["template"]["spec"]
    else:
        spec = found["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    return spec


def test_the_job_of_kubernetes() -> None:
    found = documents("kubernetes-job.yaml")
    service, job = found["Service"], found["Job"]
    assert service["apiVersion"] == "v1" and job["apiVersion"] == "batch/v1"
    spec, name = job["spec"], job["metadata"]["name"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"]
    pods = spec["template"]["spec"]
    assert pods["restartPolicy"] in ("Never", "OnFailure")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"job-name": name}
    assert pods["subdomain"] == service["metadata"]["name"]
    words = pods["containers"][0]["command"]
    port = service["spec"]["ports"][0]["port"]
    assert f"--rdzv-endpoint={name}-0.{pods['subdomain']}:{port}" in words
    assert f"--nnodes={spec['completions']}" in words


def test_the_job_of_kubeflow() -> None:
    job = documents("kubernetes-pytorchjob.yaml")["PyTorchJob"]
    assert job["apiVersion"] == "kubeflow.org/v1"
    policy, worker = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    assert policy["rdzvBackend"] == "c10d"
    assert policy["minReplicas"] <= worker["replicas"] <= policy["maxReplicas"]
    assert worker["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
    # The operator looks for a container of this name.
    assert [each["name"] for each in worker["template"]["spec"]["containers"]] == ["pytorch"]


@pytest.mark.parametrize("name", KUBERNETES)
def test_the_containers_of_kubernetes(name: str) -> None:
    pods = pods_of(name)
    (container,) = pods["containers"]
    program, *words = container["command"]
    assert program == "torchrun" and all(isinstance(word, str) for word in words)
    check_torchrun(words)
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8 and "--nproc-per-node=8" in words
    assert all(isinstance(each["value"], str) for each in container["env"])
    volumes = {each["name"] for each in pods["volumes"]}
    assert {each["name"] for each in container["volumeMounts"]} == volumes
    mounts = {each["mountPath"] for each in container["volumeMounts"]}
    assert {"/data", "/runs", "/dev/shm"} == mounts
    assert words[words.index("--out") + 1].startswith("/runs/") and "data.root=/data" in words
    lines = [line for line in (ROOT / "examples" / name).read_text().splitlines() if line.startswith("#")]
    assert any(f"kubectl apply -f examples/{name}" in line for line in lines)


def test_measured_figures_are_those_of_the_results() -> None:
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    results = [
        json.loads((ROOT / "benchmarks" / "results" / f"cpu-{name}-avx512.json").read_text())
        for name in ("digits", "digits-2ranks", "sharded-search")
    ]
    for key in ("pretext knn_acc", "mining purity", "clustering test acc", "selflabel test acc"):
        cells = [each["results"][key] for each in results[:2]]
        row = " | ".join(f"{100 * cell['mean']:.1f} ± {100 * cell['std']:.1f}" for cell in cells)
        assert f"| {row} |" in text, key
    assert results[1]["ranks"] == 2
    first, second = (each["results"]["selflabel test acc"] for each in results[:2])
    assert abs(first["mean"] - second["mean"]) < min(first["std"], second["std"])
    for entry in results[2]["results"]:
        keys = ("peak_bytes", "bound_bytes", "bytes_sent")
        most = [max(rank[key] for rank in entry["by_rank"]) / 2**20 for key in keys]
        figures = " | ".join(f"{value:.1f}" for value in (entry["by_rank"][0]["rows_bytes"] / 2**20, *most))
        assert f"| {entry['ranks']} | {figures} |" in text
