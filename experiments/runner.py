"""Runs the steps of a study, each script in a process of its own, and writes the rows of the table."""

import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

from experiments.images import Reference, write_archives
from experiments.report import NUMBERS, read_table, write_table
from experiments.studies import ROOT
from metrics.results import read_results
from runtime.errors import UserError
from runtime.files import file_lock, write_json
from runtime.progress import progress_bar
from runtime.versions import git_commit

KINDS = {"train.py": "train", "generate_data.py": "pairs", "evaluation_fid.py": "evaluate", "image_sampling.py": "look"}


def figures_of(step, root, reference):
    """Return the figures of a finished step for its row of the table; `reference(images)` gives a `Reference`."""
    if step.script == "train.py":
        return {"loss": json.loads((root / step.name / "log.jsonl").read_text().splitlines()[-1])["loss"]}
    if step.script == "generate_data.py":
        return {"nfe": json.loads((root / step.name / str(step.seed) / "pairs.json").read_text())["nfe_mean"]}
    run = root / dict(step.needs)["flow"].name
    if step.script == "image_sampling.py":
        entries = json.loads((run / "eval_sample/checkpoint_1/samples.json").read_text())
        return {"straightness": entries[-1].get("straightness")}
    fields = dict(zip(step.words, step.words[1:], strict=False))
    sampler, steps = (fields.get(f"--config.sampling.{name}") for name in ("use_ode_sampler", "sample_N"))
    steps = steps and int(steps)
    found = [r for r in read_results(run / "eval/results.jsonl") if (r["sampler"], r["sample_N"]) == (sampler, steps)]
    result = found[-1]
    figures = {name: result[name] for name in ("nfe", "parameters", "gmacs", "latency_ms")}
    if step.images is None:
        return figures | {"pixel_distance": result["pixel_frechet_distance"], "nearest": result["nn_distance"]}
    samples = np.load(run / f"eval/checkpoint_1_{sampler}{f'-{steps}' if steps else ''}.npy")
    return figures | reference(step.images).measure(samples)


class Study:
    """The folder of a study on this machine: which steps are finished there, their processes and their rows."""

    def __init__(self, root, results, jobs, cifar_root="data/cifar10-jpeg"):
        self.root, self.results, self.jobs = pathlib.Path(root).absolute(), pathlib.Path(results), jobs
        self.cifar_root, self.running = cifar_root, set()

    @functools.cache  # noqa: B019 - one study a process
    def reference(self, images):
        """Return the `Reference` of an `Images`, its archives written."""
        folder = self.root / "images" / images.name
        found = Reference(images, folder, self.cifar_root)
        write_archives(folder, found.split)
        return found

    def marker(self, step):
        """Return the file that says which step ended well here, and in how many seconds."""
        return self.root / "finished" / f"{step.name}.json"

    def state(self, step):
        """Return {"digest", "finished", "seconds"} of a step that was started here in this form, or None."""
        path = self.marker(step)
        found = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("digest") == step.digest else None

    def forget(self, step):
        """Remove what the step left, so that it can run again."""
        self.marker(step).unlink(missing_ok=True)
        if step.script in ("train.py", "generate_data.py"):
            shutil.rmtree(self.root / step.name, ignore_errors=True)

    def missing(self, steps, rows, again=()):
        """Return the steps to run, in order: those without a row of their digest, and what they need and is absent."""
        found = {}

        def add(step):
            for _, need in step.needs:
                if need not in found and (lacks_row(need, rows) or not (self.state(need) or {}).get("finished")):
                    add(need)
            found[step] = True

        for step in steps:
            if step not in found and (lacks_row(step, rows) or step.name in again):
                add(step)
        return list(found)

    def run(self, steps, lock, again=()):
        """Run all steps; `lock` is the descriptor of the study's lock, which the scripts hold, too.

        Raises the first `UserError`, after the steps that were running then have ended.
        """
        for images in dict.fromkeys(step.images for step in steps if step.images):
            self.reference(images)
        waiting, futures, failure = list(steps), {}, None
        with (concurrent.futures.ThreadPoolExecutor(self.jobs) as pool, self.children_end_with_us(),
              progress_bar(total=len(steps), desc="study", unit="steps", enabled="auto" if self.jobs > 1 else "false"
                           ) as bar):
            while (waiting and not failure) or futures:
                unfinished = {*waiting, *futures.values()}
                ready = [step for step in waiting if not unfinished & {need for _, need in step.needs}]
                for step in ready[: 0 if failure else self.jobs - len(futures)]:
                    waiting.remove(step)
                    number = len(steps) - len(waiting)
                    futures[pool.submit(self.run_step, step, f"[{number}/{len(steps)}]", lock, again)] = step
                done, _ = concurrent.futures.wait(futures, return_when="FIRST_COMPLETED")
                for future in done:
                    step = futures.pop(future)
                    try:
                        self.write_row(step, future.result())
                    except UserError as error:
                        failure = failure or error
                    bar.update(1)
        if failure:
            raise failure

    def run_step(self, step, place, lock, again):
        """Run the step's script, unless it is finished, and return its seconds, interrupted starts included."""
        state = self.state(step)
        if state is None or step.name in again:
            self.forget(step)  # what other words made
            state = {"digest": step.digest, "finished": False, "seconds": 0.0}
            write_json(self.marker(step), state)  # before the start: a killed command continues
        elif state["finished"]:
            return state["seconds"]
        words = [sys.executable, *step.command(self.root)] + ["--force"] * (step.script == "evaluation_fid.py")
        output, environment = None, {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # spinning threads disturb others
        if self.jobs > 1:
            output = self.root / "output" / f"{step.name}.txt"
            output.parent.mkdir(parents=True, exist_ok=True)
            environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        shown = f"prints to {output}" if output else f"\n    python {' '.join(words[1:])}"
        tqdm.write(f"{place} {step.name}: {shown}", file=sys.stderr)
        status, seconds = self.launch(words, output, environment, lock)
        state |= {"finished": status == 0, "seconds": state["seconds"] + seconds}
        write_json(self.marker(step), state)
        if status:
            tail = " | ".join(output.read_text().splitlines()[-3:]) if output else "its message stands above"
            raise UserError(f"{step.name}: {words[1]} ended with status {status}: {tail}; the same command "
                            f"continues from here (to start anew remove {self.root})")
        return state["seconds"]

    def launch(self, words, output, environment, lock):
        """Run a command to its end; return its status and seconds: of the processor, or with one job of the clock."""
        started = time.perf_counter()
        with open(output, "a") if output else contextlib.nullcontext() as opened:
            process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=opened,
                                       stderr=opened and subprocess.STDOUT, pass_fds=[lock])
            self.running.add(process)
            _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self.running.discard(process)
        seconds = used.ru_utime + used.ru_stime if self.jobs > 1 else time.perf_counter() - started
        return process.returncode, seconds

    @contextlib.contextmanager
    def children_end_with_us(self):
        """Tell running scripts to end, too, when this process is told to (each ends after its update or block)."""
        def stop(number, frame):
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        except KeyboardInterrupt:
            for process in list(self.running):
                process.send_signal(signal.SIGINT)
            raise
        finally:
            signal.signal(signal.SIGTERM, before)

    def write_row(self, step, seconds):
        """Measure a finished step and put its row into the table, which other studies may be writing, too."""
        figures = figures_of(step, self.root, self.reference)
        row = {"step": step.name, "kind": KINDS[step.script], "seed": step.seed, "digest": step.digest,
               "commit": (git_commit() or "")[:10], "processor": processor(), "seconds": round(seconds, 1), **figures}
        with file_lock(self.root / "results.lock", "writing the results"):
            rows = read_table(self.results)
            earlier = rows.get(step.name)
            rows[step.name] = row
            write_table(self.results, rows)
        tqdm.write(f"{step.name}: " + described(row), file=sys.stderr)
        if earlier and earlier["digest"] == step.digest:
            tqdm.write(f"  before, at commit {earlier['commit']}: {described(earlier)}", file=sys.stderr)


def lacks_row(step, rows):
    """Whether the table has no row of this step as it is now."""
    return rows.get(step.name, {}).get("digest") != step.digest


def described(row):
    """Return the figures of a row as text."""
    return ", ".join(f"{name} {row[name]:.4g}" for name in NUMBERS if row.get(name) is not None)


@functools.cache
def processor():
    """Return the name of the GPU, or of the CPU with the instruction set that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if pathlib.Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.machine()])[0]} {torch.backends.cpu.get_cpu_capability()}"
