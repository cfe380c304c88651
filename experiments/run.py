"""Run the steps of studies that are missing in the table of results.

    python -m experiments.run --study demo                  make demo
    python -m experiments.run --study digits,ablations      two steps at a time, each with one thread
    python -m experiments.run --study cifar --size small    CIFAR-10 end to end on two CPU cores

Every step runs one of the four scripts in its own process; with several at a time they print to {root}/output/. The
same command continues an interrupted study. `--again STEP` repeats a step and replaces its row.
"""

import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import torch

from configs.command_line import run_program
from configs.default import Field
from experiments.images import Reference
from experiments.report import NUMBERS, read_table, write_demo, write_table
from experiments.studies import ROOT, STUDIES
from metrics.results import read_results
from models.checkpoint import load_model, read_checkpoint
from runtime.files import file_lock, read_json, read_json_lines, write_json
from runtime.run_folder import GRIDS, LOG, RESULTS, checkpoint_path, git_commit
from runtime.terminal import UserError
from tools import convert

FLAGS = {
    "study": Field("digits", f"studies to run, separated by commas, of {', '.join(STUDIES)}"),
    "jobs": Field(0, "steps at a time (0: one for demo and cifar, otherwise two)", low=0),
    "root": Field("", "folder of the runs, pairs and images (empty: logs/demo for the demo, otherwise logs/study)"),
    "results": Field("", "table of finished steps (empty: experiments/results.csv, of the demo {root}/results.csv)"),
    "again": Field("", "name of a step to run again"),
    "steps": Field("", "run only steps whose names contain one of these strings, and those they need"),
    "dry_run": Field(False, "print the commands and run nothing"),
    "size": Field("small", "cifar: for a test, two CPU cores, or one GPU", choices=("tiny", "small", "large")),
    "minutes": Field(0.0, "cifar: scale updates and pairs to about so many minutes (0: small 40, large 27)", low=0),
    "cifar_root": Field("data/cifar10-jpeg", "folder with cifar10-jpeg-train.zip and cifar10-jpeg-test.zip"),
    "scale": Field(1.0, "demo: fraction of its updates, pairs and samples (the thresholds are for 1)", low=0),
}
KINDS = {"train.py": "train", "generate_data.py": "pairs", "evaluation_fid.py": "evaluate", "image_sampling.py": "look"}


def main(args):
    """Run the missing steps that the flags select; return the exit status."""
    names = args.study.split(",")
    if unknown := [name for name in names if name not in STUDIES]:
        raise UserError(f"--study {unknown[0]}: there is no such study; choose from {', '.join(STUDIES)}")
    if "cifar" in names and not pathlib.Path(args.cifar_root, "cifar10-jpeg-train.zip").exists():
        raise UserError(f"--cifar_root {args.cifar_root} has no cifar10-jpeg-train.zip: name the folder that has it")
    planned = {"tiny": 1, "small": 40, "large": 27}[args.size]
    scale = args.minutes / planned if args.minutes else 1.0
    if "cifar" in names and args.minutes:
        print(f"study: {args.minutes:g} minutes instead of {planned}, updates and pairs times {scale:.2g}", flush=True)
    options = {"demo": {"scale": args.scale}, "cifar": {"size": args.size, "scale": scale}}
    steps = dict.fromkeys(step for name in names for step in STUDIES[name](**options.get(name, {})))
    wanted = [step for step in steps if any(text in step.name for text in args.steps.split(","))
              and args.again in ("", step.name)]
    if not wanted:
        raise UserError(f"no step is called {args.again or args.steps or args.study}; their names are in results.csv "
                        "and shown by --dry_run")

    is_demo = names == ["demo"]
    root = args.root or ("logs/demo" if is_demo else "logs/study")
    results = args.results or (f"{root}/results.csv" if is_demo else "experiments/results.csv")
    study = Study(root, results, args.jobs or (1 if {"demo", "cifar"} & set(names) else 2), args.cifar_root, args.again)
    with file_lock(study.root / "study.lock", "running a study") as lock:  # another's finished steps count
        todo = study.missing(wanted)
        if args.dry_run:
            for step in todo:
                print(f"{step.name}\n    python {' '.join(step.command(root))}")
            print(f"study: {len(todo)} steps to run")
            return 0
        study.run(todo, lock)
    print(f"study: all {len(wanted)} steps are in {results}")
    rows = read_table(results)
    if not is_demo or not {step.name for step in steps} <= rows.keys():
        return 0
    return int(not write_demo(study.root, rows) and args.scale >= 1)


class Study:
    """The folder of a study: which steps are finished there; runs steps and writes their rows."""

    def __init__(self, root, results, jobs, cifar_root="data/cifar10-jpeg", again=""):
        self.root, self.results, self.jobs = pathlib.Path(root).absolute(), pathlib.Path(results), jobs
        self.cifar_root, self.again, self.references = cifar_root, again, {}

    def marker(self, step):
        """Return the file with the state of a step (see `state`)."""
        return self.root / "finished" / f"{step.name}.json"

    def state(self, step):
        """Return {"digest", "finished", "seconds"} of a step; digest None if it was never started so."""
        found = read_json(self.marker(step)) if self.marker(step).exists() else {}
        return found if found.get("digest") == step.digest else {"digest": None, "finished": False, "seconds": 0.0}

    def missing(self, steps):
        """Return the steps to run, in order: those without a row of their digest, and missing ones they need."""
        rows, found = read_table(self.results), {}

        def lacks_row(step):
            return step.digest != rows.get(step.name, {}).get("digest")

        def add(step):
            for _, need in step.needs:
                if lacks_row(need) or not self.state(need)["finished"]:
                    add(need)
            found[step] = True

        for step in steps:
            if lacks_row(step) or step.name == self.again:
                add(step)
        return list(found)

    def run(self, steps, lock):
        """Run all steps; raise the first UserError once the running ones have ended. lock: descriptor they inherit."""
        for images in dict.fromkeys(step.images for step in steps if step.images):
            self.references[images] = Reference(images, self.root / "images" / images.folder, self.cifar_root)
            real = f"{images.folder}/real"
            if real not in read_table(self.results):
                self.write_row(real, "real", 0, **self.references[images].real())
        waiting, futures, failures = list(steps), {}, []
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            while futures or (waiting and not failures):
                unfinished = {*waiting, *futures.values()}
                ready = [step for step in waiting if unfinished.isdisjoint(need for _, need in step.needs)]
                for step in ready[: 0 if failures else self.jobs - len(futures)]:
                    waiting.remove(step)
                    place = f"[{len(steps) - len(waiting)}/{len(steps)}]"
                    futures[pool.submit(self.run_step, step, place, lock)] = step
                for future in concurrent.futures.wait(futures, return_when="FIRST_COMPLETED").done:
                    step = futures.pop(future)
                    try:
                        self.write_row(step.name, KINDS[step.script], step.seed, digest=step.digest,
                                       seconds=round(future.result(), 1), **self.figures(step))
                    except UserError as error:
                        failures.append(error)
        if failures:
            raise failures[0]

    def run_step(self, step, place, lock):
        """Run the step's script, unless it is finished; return its seconds, those of interrupted starts included."""
        state = self.state(step)
        if state["digest"] is None or step.name == self.again:
            if step.script in ("train.py", "generate_data.py"):
                shutil.rmtree(self.root / step.name, ignore_errors=True)  # made with other arguments
            state = {"digest": step.digest, "finished": False, "seconds": 0.0}
            write_json(self.marker(step), state)  # before the start, so that a killed command continues
        if state["finished"]:
            return state["seconds"]
        arguments = [sys.executable, *step.command(self.root)] + ["--force"] * (step.script == "evaluation_fid.py")
        output, environment = None, {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # spinning slows others
        if self.jobs > 1:
            output = self.root / "output" / f"{step.name}.txt"
            output.parent.mkdir(parents=True, exist_ok=True)
            environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        shown = f"prints to {output}" if output else f"\n    python {' '.join(arguments[1:])}"
        print(f"{place} {step.name}: {shown}", flush=True)
        status, seconds = self.launch(arguments, output, environment, lock)
        state |= {"finished": status == 0, "seconds": state["seconds"] + seconds}
        write_json(self.marker(step), state)
        if status:
            tail = " | ".join(output.read_text().splitlines()[-3:]) if output else "see its message above"
            raise UserError(f"{step.name}: {arguments[1]} ended with status {status}: {tail}; the same command "
                            f"continues from here (to start over, remove {self.root})")
        return state["seconds"]

    def launch(self, arguments, output, environment, lock):
        """Run a command; return its status and its seconds, of CPU time, or with one job of wall-clock time."""
        started = time.perf_counter()
        with open(output, "a") if output else contextlib.nullcontext() as opened:
            process = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=opened,
                                       stderr=opened and subprocess.STDOUT, pass_fds=[lock])
            _, status, used = os.wait4(process.pid, 0)
        seconds = used.ru_utime + used.ru_stime if self.jobs > 1 else time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, seconds

    def write_row(self, name, kind, seed, **figures):
        """Add or replace a row of the table, which studies in other folders may share, and print its numbers."""
        row = {"step": name, "kind": kind, "seed": seed, "commit": (git_commit() or "")[:10], "processor": processor()}
        with file_lock(self.results.with_name(f".{self.results.name}.lock"), "writing a row of results"):
            write_table(self.results, read_table(self.results) | {name: row | figures})
        shown = ", ".join(f"{column} {figures[column]:.4g}" for column in NUMBERS if figures.get(column) is not None)
        print(f"{name}: {shown}", flush=True)

    def figures(self, step):
        """Return the results of a finished step for its row; write CIFAR-10's networks as slim files."""
        if step.script == "train.py":
            if step.images and step.images.name == "cifar":
                path = checkpoint_path(self.root / step.name, 1)
                slim = convert.averaged(read_checkpoint(path), load_model(path), half=True)
                convert.write_parts(self.root / "slim" / f"{step.name}.pth", slim)
            return {"loss": read_json_lines(self.root / step.name / LOG)[-1]["loss"]}
        if step.script == "generate_data.py":
            return {"nfe": read_json(self.root / step.name / str(step.seed) / "pairs.json")["nfe_mean"]}
        run = self.root / dict(step.needs)["flow"].name
        if step.script == "image_sampling.py":
            entries = json.loads((run / GRIDS / "checkpoint_1/samples.json").read_text())
            return {"straightness": entries[-1].get("straightness")}
        sampling = {name.removeprefix("--config.sampling."): value for name, value in itertools.pairwise(step.arguments)
                    if name.startswith("--config.sampling.")}
        results = [result | {"use_ode_sampler": result["sampler"]} for result in read_results(run / RESULTS)]
        result = [result for result in results if all(str(result[name]) == sampling[name] for name in sampling)][-1]
        figures = {name: result[name] for name in ("nfe", "parameters", "gmacs", "latency_ms")}
        if step.images is None:
            return figures | {"pixel_distance": result["pixel_frechet_distance"], "nearest": result["nn_distance"]}
        samples = np.load((run / RESULTS).with_name(result["samples"]))
        return figures | self.references[step.images].measure(samples)


def processor():
    """Return the name of the GPU, or of the CPU and the instruction set that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    path = pathlib.Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text() if path.exists() else "")
    return f"{found[1] if found else platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    run_program(main, __doc__, FLAGS)
