"""Run the steps of studies that the table of results lacks: `python -m experiments.run --study digits,ablations`.

Every step is one of the four scripts in a process of its own: with `--jobs 1` one after the other, with all threads
and their progress on the terminal; otherwise several at a time, each with one thread, printing to {root}/output/.
The same command continues an interrupted study. `--again STEP` repeats a step and prints both results.
"""

import sys

from absl import flags

from experiments.images import find_fashion
from experiments.report import read_table, write_demo
from experiments.runner import Study
from experiments.studies import LARGEST_STUDENT, STUDIES, THRESHOLDS
from runtime.errors import UserError, run_program
from runtime.files import file_lock

FLAGS = flags.FLAGS
flags.DEFINE_list("study", ["digits"], f"studies to run, of {', '.join(STUDIES)}")
flags.DEFINE_integer("jobs", 0, "steps at a time (0: one for demo and cifar, otherwise two)", lower_bound=0)
flags.DEFINE_string("root", "", "folder of the runs, pairs and images (default logs/demo or "
                    "logs/study)")
flags.DEFINE_string("results", "", "table of finished steps (default {root}/results.csv for the demo, else "
                    "experiments/results.csv)")
flags.DEFINE_string("again", "", "name of a step to run again")
flags.DEFINE_list("steps", [], "run only the steps whose names contain one of these, and what they need")
flags.DEFINE_bool("dry_run", False, "print the commands and run nothing")
flags.DEFINE_enum("size", "small", ["tiny", "small", "large"], "of the study cifar: a test, two CPU cores, one GPU")
flags.DEFINE_float("minutes", 0, "scale the study cifar to about so many minutes (0: as planned, small 40, large 25)")
flags.DEFINE_string("cifar_root", "data/cifar10-jpeg", "folder with cifar10-jpeg-train.zip and cifar10-jpeg-test.zip")
flags.DEFINE_float("scale", 1.0, "of the demo: share of its updates, pairs and samples (the thresholds are for 1)")


def chosen_steps():
    """Return the steps that the flags name. Raises UserError for names that do not exist."""
    unknown = [name for name in FLAGS.study if name not in STUDIES]
    if unknown:
        raise UserError(f"--study {unknown[0]}: there is no such study; choose of {', '.join(STUDIES)}")
    if "fashion" in FLAGS.study and find_fashion() is None:
        print("study: Fashion-MNIST is not here; its steps are left out", flush=True)
        FLAGS.study.remove("fashion")
    planned = {"tiny": 1, "small": 40, "large": 25}[FLAGS.size]
    cifar = {"size": FLAGS.size, "scale": (FLAGS.minutes or planned) / planned}
    options = {"demo": {"scale": FLAGS.scale}, "cifar": cifar}
    steps = dict.fromkeys(step for name in FLAGS.study for step in STUDIES[name](**options.get(name, {})))
    steps = [step for step in steps if any(text in step.name for text in FLAGS.steps or [""])]
    if not steps or (FLAGS.again and FLAGS.again not in {step.name for step in steps}):
        missing = FLAGS.again or ", ".join(FLAGS.steps) or ", ".join(FLAGS.study)
        raise UserError(f"no step is called {missing}; results.csv and --dry_run have their names")
    if "cifar" in FLAGS.study and FLAGS.minutes:
        print(f"study: updates and pairs scaled by {FLAGS.minutes / planned:.2g} for {FLAGS.minutes:g} minutes instead "
              f"of {planned}", flush=True)
    return steps


def run_chosen():
    """Run what the flags name and is missing; return the exit status."""
    steps, is_demo = chosen_steps(), FLAGS.study == ["demo"]
    root = FLAGS.root or ("logs/demo" if is_demo else "logs/study")
    results = FLAGS.results or (f"{root}/results.csv" if is_demo else "experiments/results.csv")
    jobs = FLAGS.jobs or (1 if {"demo", "cifar"} & set(FLAGS.study) else 2)
    study, again = Study(root, results, jobs, FLAGS.cifar_root), {FLAGS.again} - {""}
    wanted = [step for step in steps if not again or step.name in again]
    with file_lock(study.root / "study.lock", "running a study") as lock:  # then all that it finished counts
        todo = study.missing(wanted, read_table(results), again)
        if FLAGS.dry_run:
            for step in todo:
                print(f"{step.name}\n    python {' '.join(step.command(root))}")
        elif todo:
            study.run(todo, lock, again)
    print(f"study: {len(todo)} steps to run" if FLAGS.dry_run else f"study: all {len(steps)} steps are in {results}")
    if is_demo and not FLAGS.dry_run:
        met = write_demo(study.root, read_table(results), THRESHOLDS, LARGEST_STUDENT)
        return 0 if met or FLAGS.scale < 1 else 1
    return 0


def main(argv):
    """Run, and end with one sentence when something is wrong."""
    try:
        sys.exit(run_chosen())
    except UserError as error:
        print(f"experiments.run: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"experiments.run: cannot write {error.filename or ''}: {error.strerror}; make room or choose another "
              "folder, then run the same command again", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("experiments.run: interrupted; the same command continues from what is finished", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run_program(main, "experiments.run")
