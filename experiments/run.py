"""Run the steps of studies that the table of results lacks: `python -m experiments.run --study digits,ablations`.

Every step is one of the four scripts in a process of its own: with `--jobs 1` one after the other, with all threads
and their progress on the terminal; otherwise several at a time, each with one thread, printing to {root}/output/.
The same command continues an interrupted study. `--again STEP` repeats a step and prints both results.
"""

from configs.command_line import run_program
from configs.default import Field
from experiments.images import find_fashion
from experiments.report import read_table, write_demo
from experiments.runner import Study
from experiments.studies import LARGEST_STUDENT, STUDIES, THRESHOLDS
from runtime.errors import UserError
from runtime.files import file_lock

FLAGS = {
    "study": Field("digits", f"studies to run, separated by commas, of {', '.join(STUDIES)}"),
    "jobs": Field(0, "steps at a time (0: one for demo and cifar, otherwise two)", low=0),
    "root": Field("", "folder of the runs, pairs and images (empty: logs/demo for the demo, otherwise logs/study)"),
    "results": Field("", "table of finished steps (empty: {root}/results.csv for the demo, otherwise "
                     "experiments/results.csv)"),
    "again": Field("", "name of a step to run again"),
    "steps": Field("", "run only the steps whose names contain one of these texts, and what they need"),
    "dry_run": Field(False, "print the commands and run nothing"),
    "size": Field("small", "of the study cifar: a test, two CPU cores, one GPU", choices=("tiny", "small", "large")),
    "minutes": Field(0.0, "scale the study cifar to about so many minutes (0: as planned, small 40, large 25)", low=0),
    "cifar_root": Field("data/cifar10-jpeg", "folder with cifar10-jpeg-train.zip and cifar10-jpeg-test.zip"),
    "scale": Field(1.0, "of the demo: share of its updates, pairs and samples (the thresholds are for 1)", low=0),
}


def chosen_steps(args):
    """Return (names of studies, steps) that the flags name. Raises UserError for names that do not exist."""
    names = args.study.split(",")
    unknown = [name for name in names if name not in STUDIES]
    if unknown:
        raise UserError(f"--study {unknown[0]}: there is no such study; choose of {', '.join(STUDIES)}")
    if "fashion" in names and find_fashion() is None:
        print("study: Fashion-MNIST is not here; its steps are left out", flush=True)
        names.remove("fashion")
    planned = {"tiny": 1, "small": 40, "large": 25}[args.size]
    cifar = {"size": args.size, "scale": (args.minutes or planned) / planned}
    options = {"demo": {"scale": args.scale}, "cifar": cifar}
    steps = dict.fromkeys(step for name in names for step in STUDIES[name](**options.get(name, {})))
    steps = [step for step in steps if any(text in step.name for text in args.steps.split(","))]
    if not steps or (args.again and args.again not in {step.name for step in steps}):
        raise UserError(f"no step is called {args.again or args.steps or args.study}; results.csv and --dry_run have "
                        "their names")
    if "cifar" in names and args.minutes:
        print(f"study: updates and pairs scaled by {args.minutes / planned:.2g} for {args.minutes:g} minutes instead "
              f"of {planned}", flush=True)
    return names, steps


def main(args):
    """Run what the flags name and is missing; return the exit status."""
    names, steps = chosen_steps(args)
    is_demo, again = names == ["demo"], {args.again} - {""}
    root = args.root or ("logs/demo" if is_demo else "logs/study")
    results = args.results or (f"{root}/results.csv" if is_demo else "experiments/results.csv")
    study = Study(root, results, args.jobs or (1 if {"demo", "cifar"} & set(names) else 2), args.cifar_root)
    wanted = [step for step in steps if not again or step.name in again]
    with file_lock(study.root / "study.lock", "running a study") as lock:  # then all that it finished counts
        todo = study.missing(wanted, read_table(results), again)
        if args.dry_run:
            for step in todo:
                print(f"{step.name}\n    python {' '.join(step.command(root))}")
        elif todo:
            study.run(todo, lock, again)
    print(f"study: {len(todo)} steps to run" if args.dry_run else f"study: all {len(steps)} steps are in {results}")
    if is_demo and not args.dry_run:
        met = write_demo(study.root, read_table(results), THRESHOLDS, LARGEST_STUDENT)
        return 0 if met or args.scale < 1 else 1
    return 0


if __name__ == "__main__":
    run_program(main, __doc__, FLAGS)
