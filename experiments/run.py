"""Run the steps of the studies that results.csv lacks: `python -m experiments.run [--study digits,ablations]`.

Every step is one of the four scripts in a process of its own with one thread, `--jobs` of them at a time. What was
interrupted goes on with the same command. `--quick` runs the main line on digits with one seed into a table of its
own, and writes its report; `--again STEP` runs a step of the committed table once more and shows both figures.
"""

import concurrent.futures
import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import torch
from absl import flags
from tqdm import tqdm

from experiments import report
from experiments.images import find_fashion, write_archives
from experiments.measure import Yardstick, figures_of
from experiments.steps import EVALUATE
from experiments.studies import MAIN_SEEDS, STUDIES, all_steps, digits_main
from experiments.table import NUMBERS, read_table, write_table
from runtime.errors import UserError
from runtime.files import write_json
from runtime.locks import file_lock
from runtime.programs import run_program
from runtime.progress import progress_bar

FLAGS = flags.FLAGS
flags.DEFINE_list("study", list(STUDIES), f"studies to run, of {', '.join(STUDIES)}")
flags.DEFINE_integer("jobs", 2, "steps at a time, each with one thread", lower_bound=1)
flags.DEFINE_string("root", "logs/miniature", "folder of the runs, pairs and images")
flags.DEFINE_string("results", "experiments/results.csv", "table of finished steps")
flags.DEFINE_bool("quick", False, "the main line on digits with one seed, in {root}/quick")
flags.DEFINE_string("again", "", "name of a step to run again")
flags.DEFINE_list("steps", [], "run only the steps whose names contain one of these, and what they need")
flags.DEFINE_bool("dry_run", False, "print the commands and run nothing")

ROOT = pathlib.Path(__file__).parent.parent


class Root:
    """The folder of a study on this machine: which steps are finished there, and where they print."""

    def __init__(self, path):
        self.path = pathlib.Path(path)

    def marker(self, step):
        """Return the file that says that the step's command has ended well, and in how many seconds."""
        return self.path / "finished" / f"{step.place}.json"

    def interrupted(self, step):
        """Return the file that says how many seconds the step had used when its command last ended before its end."""
        return self.path / "finished" / f"{step.place}.interrupted.json"

    def seconds_before(self, step):
        """Return the processor seconds of the step's earlier, interrupted commands, which the next one continues."""
        path = self.interrupted(step)
        return json.loads(path.read_text())["seconds"] if path.exists() else 0.0

    def is_finished(self, step):
        """Whether what the step leaves for later ones is there."""
        return self.marker(step).exists()

    def forget(self, step):
        """Remove what the step left, so that it can run again."""
        self.marker(step).unlink(missing_ok=True)
        self.interrupted(step).unlink(missing_ok=True)
        shutil.rmtree(self.path / step.place, ignore_errors=True)

    def output(self, step):
        """Return the file of what the step printed."""
        path = self.path / "output" / f"{step.place}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def missing_steps(steps, rows, root, again=()):
    """Return the steps to run, in order: those without a row of their digest, and what they need and is not there."""
    found = {}

    def add(step):
        if step in found:
            return
        for _, need in step.needs:
            if lacks_row(need, rows) or not root.is_finished(need):
                add(need)
        found[step] = True

    for step in steps:
        if lacks_row(step, rows) or step.name in again:
            add(step)
    return list(found)


def lacks_row(step, rows):
    """Whether the table has no row of this step as it is now."""
    return rows.get(step.name, {}).get("digest") != step.digest


def run_command(step, root, running, lock):
    """Run the step's script to its end, note its processor seconds and return them.

    running: a set that holds the process while it runs. lock: the descriptor of the study's lock, which the script
    holds, too: should this process be killed, another waits for the script. Raises UserError when the script ends with
    another status than 0, with the last lines that it printed.
    """
    if root.is_finished(step):
        return json.loads(root.marker(step).read_text())["seconds"]
    output = root.output(step)
    tqdm.write(f"{step.name}: runs, and prints to {output}", file=sys.stderr)
    words = [sys.executable, *step.command(root.path)] + (["--force"] if step.kind == EVALUATE else [])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with open(output, "a") as opened:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=opened, stderr=subprocess.STDOUT,
                                   pass_fds=[lock])
    running.add(process)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    running.discard(process)
    seconds = used.ru_utime + used.ru_stime + root.seconds_before(step)
    if process.returncode:
        write_json(root.interrupted(step), {"seconds": seconds})
        tail = " | ".join(output.read_text().splitlines()[-3:])
        raise UserError(f"{step.name}: {words[1]} ended with status {process.returncode} ({output}): {tail}")
    write_json(root.marker(step), {"seconds": seconds})
    return seconds


class Runner:
    """Runs steps, a few at a time, each after those that it needs, and writes their rows."""

    def __init__(self, root, results, jobs):
        self.root, self.results, self.jobs = root, pathlib.Path(results), jobs
        self.commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=ROOT, capture_output=True,
                                     text=True, check=False).stdout.strip()
        self.running = set()

    @functools.cache  # noqa: B019 - one runner a process
    def yardstick(self, images):
        """Return the `Yardstick` of an `Images`."""
        return Yardstick(images)

    def prepare(self, steps):
        """Write the images that the steps read."""
        for images in dict.fromkeys(step.images for step in steps):
            write_archives(self.root.path / "images" / images.name, self.yardstick(images).halves)

    def run(self, steps, lock, again=()):
        """Run all steps; `lock` is the descriptor of the study's lock.

        Raises the first `UserError`, after the steps that were running then have ended.
        """
        waiting, futures, failure = list(steps), {}, None
        with (concurrent.futures.ThreadPoolExecutor(self.jobs) as pool,
              progress_bar(total=len(steps), desc="study", unit="steps") as bar, self.children_end_with_us()):
            while (waiting and not failure) or futures:
                open_steps = {*waiting, *futures.values()}
                ready = [step for step in waiting if not open_steps & {need for _, need in step.needs}]
                for step in ready[: 0 if failure else self.jobs - len(futures)]:
                    waiting.remove(step)
                    if step.name in again:
                        self.root.forget(step)
                    futures[pool.submit(run_command, step, self.root, self.running, lock)] = step
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
        """Measure a finished step and put its row into the table, which other runners may be writing, too."""
        figures = figures_of(step, self.root.path, self.yardstick)
        row = {"step": step.name, "kind": step.kind, "seed": step.seed, "digest": step.digest, "commit": self.commit,
               "seconds": round(seconds, 1), **figures}
        with file_lock(self.root.path / "results.lock", "writing the results"):
            rows = read_table(self.results)
            earlier = rows.get(step.name)
            rows[step.name] = row
            write_table(self.results, rows)
        tqdm.write(f"{step.name}: " + describe_figures(row), file=sys.stderr)
        if earlier and earlier["digest"] == step.digest:
            tqdm.write(f"  before, at commit {earlier['commit']}: {describe_figures(earlier)}", file=sys.stderr)


def describe_figures(row):
    """Return the figures of a row as text."""
    return ", ".join(f"{name} {row[name]:.4g}" for name in NUMBERS if row.get(name) is not None)


def chosen_steps():
    """Return the steps that the flags name. Raises UserError for names that do not exist."""
    if FLAGS.quick:
        return digits_main(seeds=MAIN_SEEDS[:1])
    unknown = [name for name in FLAGS.study if name not in STUDIES]
    if unknown:
        raise UserError(f"--study {unknown[0]}: there is no such study; choose of {', '.join(STUDIES)}")
    names = [name for name in STUDIES if name in FLAGS.study]
    if "fashion" in names and find_fashion() is None:
        print("study: Fashion-MNIST is not here (Debian: dataset-fashion-mnist); its steps are left out", flush=True)
        names.remove("fashion")
    steps = [step for step in all_steps(names) if any(text in step.name for text in FLAGS.steps or [""])]
    if not steps or (FLAGS.again and FLAGS.again not in {step.name for step in steps}):
        missing = FLAGS.again or ", ".join(FLAGS.steps)
        raise UserError(f"no step is called {missing}; results.csv and --dry_run have their names")
    return steps


def run_chosen():
    """Run what the flags name and is missing."""
    steps = chosen_steps()
    root, results = Root(FLAGS.root), pathlib.Path(FLAGS.results)
    if FLAGS.quick:
        root = Root(root.path / "quick")
        results = root.path / "results.csv"
    again = {FLAGS.again} - {""}
    wanted = [step for step in steps if not again or step.name in again]
    with file_lock(root.path / "study.lock", "running a study") as lock:  # then all that it finished counts
        todo = missing_steps(wanted, read_table(results), root, again)
        if FLAGS.dry_run:
            for step in todo:
                print(f"{step.name}\n    python {' '.join(step.command(root.path))}")
        elif todo:
            runner = Runner(root, results, FLAGS.jobs)
            runner.prepare(todo)
            runner.run(todo, lock, again)
    print(f"study: {len(todo)} steps to run" if FLAGS.dry_run else f"study: all {len(steps)} steps are in {results}")
    if FLAGS.quick and not FLAGS.dry_run:
        report.write_report(results, root.path / "report.md", seeds=MAIN_SEEDS[:1])


def main(argv):
    """Run, and end with one sentence when something is wrong."""
    torch.set_num_threads(1)
    try:
        run_chosen()
    except UserError as error:
        print(f"experiments.run: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"experiments.run: cannot write {error.filename or ''}: {error.strerror}; make room or choose another "
              "folder, then run the same command again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("experiments.run: interrupted; the same command goes on from what is finished", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_program(main, "experiments.run")
