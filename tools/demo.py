"""SlimFlow on scikit-learn's digits in a few minutes on two cores: `make demo`, or `python -m tools.demo`.

The four scripts run as a user would run them: 1-rectified flow, its pairs, annealing reflow into a network of a
quarter of the size, flow-guided distillation, evaluation and pictures. Finished stages are not run again. The
report is logs/demo/report.md, report.json and demo.png; the exit status is 1 when a quality threshold is missed.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

from absl import flags

from runtime.files import write_json
from runtime.programs import run_program

FLAGS = flags.FLAGS
flags.DEFINE_string("work_dir", "logs", "folder of the runs; the demo's are in its sub-folder demo/")
flags.DEFINE_string("pairs_dir", "reflow_data", "folder of the pairs; the demo's are in its sub-folder demo/")
flags.DEFINE_enum("size", "full", ["full", "tiny"], "full: the demo; tiny: the same chain, too short to be good")

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "configs/rectified_flow/digits_rf_gaussian.py"
STUDENT = ["--config.model.nf", "16"]

# The largest pixel Fréchet distances that count as success, and the largest student (share of the teacher).
THRESHOLDS = {("1-flow", "rk45"): 0.25, ("2-flow", "one_step"): 0.42, ("distilled", "one_step"): 0.31}
LARGEST_STUDENT = 0.26


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the demo's time and quality."""

    flow_steps: int = 1350
    flow_lr: float = 2e-3
    pairs: int = 4000
    reflow_steps: int = 1300
    reflow_lr: float = 2e-3
    annealing: int = 400
    distill_steps: int = 800
    distill_lr: float = 1e-3
    samples: int = 2000
    pictures: int = 64


TINY = Recipe(flow_steps=20, pairs=64, reflow_steps=20, annealing=10, distill_steps=20, samples=64, pictures=10)
RECIPES = {"full": Recipe(), "tiny": TINY}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One call of a script: what it is called in the report, and its words."""

    name: str
    title: str
    words: list


def train_words(recipe_steps, lr, run, work_dir):
    """Return the words of a training stage whose checkpoint_1.pth is written after its last update."""
    return ["train.py", "--config", CONFIG, "--config.work_dir", work_dir, "--config.expr", f"demo/{run}",
            "--config.training.n_iters", str(recipe_steps), "--config.training.snapshot_freq", str(recipe_steps),
            "--config.training.snapshot_sampling", str(recipe_steps), "--config.optim.lr", str(lr),
            "--config.training.progress", "true"]


def stages(recipe, work_dir, pairs_dir):
    """Return the stages of the demo in their order."""
    runs = f"{work_dir}/demo"
    flow, reflow = (f"{runs}/{run}/checkpoints/checkpoint_1.pth" for run in ("1_flow", "2_flow"))
    pairs = ["--config.data.reflow_data_root", f"{pairs_dir}/demo"]
    evaluations = [
        Stage(f"evaluate {run} {name}", f"evaluate: {run}, {name}",
              ["evaluation_fid.py", "--config", CONFIG, "--ckpt_dir", f"{runs}/{run}",
               "--config.eval.num_samples", str(recipe.samples), *words])
        for run, samplers in SURVEY.items() for name, words in samplers.items()
    ]
    return [
        Stage("1-flow", "train the 1-rectified flow",
              train_words(recipe.flow_steps, recipe.flow_lr, "1_flow", work_dir)),
        Stage("pairs", "generate its noise-image pairs",
              ["generate_data.py", "--config", CONFIG, "--ckpt_path", flow, "--data_root", f"{pairs_dir}/demo",
               "--config.sampling.total_number_of_samples", str(recipe.pairs), "--config.seed", "0",
               "--config.sampling.direction", "from_z0", "--config.sampling.ode_tol", "1e-2",
               "--config.training.batch_size", "256", "--config.training.progress", "true"]),
        Stage("2-flow", "annealing reflow into a network of a quarter of the size",
              [*train_words(recipe.reflow_steps, recipe.reflow_lr, "2_flow", work_dir), *STUDENT, *pairs,
               "--config.training.x0_randomness", f"warmup_{recipe.annealing}"]),
        Stage("distilled", "flow-guided distillation to one step",
              [*train_words(recipe.distill_steps, recipe.distill_lr, "distilled", work_dir), *STUDENT, *pairs,
               "--config.flow.flow_t_schedule", "t0", "--config.flow.use_teacher", "true",
               "--config.flow.pre_train_model", reflow]),
        *evaluations,
        *(Stage(f"sample {run}", f"sample grids: {run}",
                ["image_sampling.py", "--config", CONFIG, "--sampling_dir", f"{runs}/{run}",
                 "--config.eval.batch_size", str(recipe.pictures), *words]) for run, words in PICTURES.items()),
    ]


ONE_STEP = ["--config.sampling.use_ode_sampler", "one_step"]
SURVEY = {
    "1_flow": {"one_step": ONE_STEP, "rk45": ["--config.sampling.use_ode_sampler", "rk45"]},
    "2_flow": {"one_step": ONE_STEP},
    "distilled": {"one_step": ONE_STEP},
}
PICTURES = {"1_flow": [], "2_flow": ONE_STEP, "distilled": ONE_STEP}  # nothing chosen: every sampler, side by side


def run_stages(todo, folder):
    """Run what is not finished, each stage as its own process; return {stage: seconds}."""
    # threads that wait asleep: on a machine that does other things, too, spinning ones are twenty times slower
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    record = folder / "stages.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    for number, stage in enumerate(todo, 1):
        before = done.get(stage.name)
        head = f"[{number}/{len(todo)}] {stage.title}"
        if before and before["words"] == stage.words:
            print(f"{head}: finished before, in {before['seconds']:.0f} s", flush=True)
            continue
        print(f"{head}\n    python {' '.join(stage.words)}", flush=True)
        start = time.perf_counter()
        status = subprocess.run([sys.executable, *stage.words], cwd=ROOT, env=environment, check=False).returncode
        if status:
            print(f"demo: {stage.words[0]} ended with status {status}; the same command goes on from here (to start "
                  f"anew remove {folder} and the demo's pairs: make clean-demo)", file=sys.stderr)
            sys.exit(status if status > 0 else 128 - status)
        done[stage.name] = {"words": stage.words, "seconds": round(time.perf_counter() - start, 2)}
        write_json(record, done)
    return {name: entry["seconds"] for name, entry in done.items()}


def main(argv):
    """Run the demo and print its report; exit 1 if a threshold is missed."""
    recipe = RECIPES[FLAGS.size]
    folder = pathlib.Path(FLAGS.work_dir) / "demo"
    folder = folder if folder.is_absolute() else ROOT / folder
    todo = stages(recipe, FLAGS.work_dir, FLAGS.pairs_dir)
    try:
        seconds = run_stages(todo, folder)
    except KeyboardInterrupt:
        print("demo: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)

    from configs.command_line import load_config  # after the stages: torch is not needed to run them
    from tools.demo_report import write_report

    text, good = write_report(folder, load_config(ROOT / CONFIG), seconds, sum(seconds.values()), THRESHOLDS,
                              LARGEST_STUDENT)
    print(f"\n{text}\nreport: {folder}/report.md, report.json, demo.png")
    if not good and FLAGS.size == "full":
        print("demo: a quality threshold was missed, see the report", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_program(main, "tools.demo")
