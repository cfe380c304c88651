"""Small wrong changes, one at a time, and whether the tests of their area notice: `python tests/mutations.py [WORDS]`.

Each row replaces a text that occurs once in a file of a copy of the working tree and runs the named tests there; what
they pass is printed as SURVIVED, and the exit status is then 1. WORDS run the rows of these numbers and
those whose files have one in their names. Not part of `make test`: it takes some seconds a row.
"""

import os
import pathlib
import shutil
import sys
import tempfile
import time

sys.dont_write_bytecode = True  # a change of equal length within a second would go unnoticed

import matplotlib.figure  # noqa: E402, F401 - the libraries that children share; none of our modules
import ml_collections  # noqa: E402, F401
import pytest  # noqa: E402
import scipy.linalg  # noqa: E402, F401
import torch  # noqa: E402, F401
import torchvision  # noqa: E402, F401

ROOT = pathlib.Path(__file__).parent.parent
REFERENCE, UPDATE = "tests/training/test_reference.py", "tests/training/test_update.py"
STATE, RUN = "tests/training/test_state.py", "tests/training/test_run.py"
OBJECTIVE, LOSSES = "tests/flows/test_objective.py", "tests/flows/test_losses.py"
SCHEDULES, EMA = "tests/flows/test_schedules.py", "tests/training/test_ema.py"
BATCHES, FILES, SEEDS = "tests/datasets/test_batches.py", "tests/runtime/test_files.py", "tests/runtime/test_seeds.py"

# Of evaluation: what runs in this process.
SCORES, REFERENCES = "tests/metrics/test_scores.py", "tests/metrics/test_reference.py"
SAMPLING = "tests/test_evaluation_fid.py -k starts_at_its_own"
MEASURED = "tests/test_evaluation_fid.py -k another_evaluation"

MUTATIONS = [  # (file, text, wrong text, tests)
    # the same draws, masks and flips at every update; the update miscounted
    ("train.py", "step_generator(config.seed, update, DRAWS", "step_generator(config.seed, 0, DRAWS", REFERENCE),
    ("train.py", "seed_dropout(config.seed, update,", "seed_dropout(config.seed, 0,", REFERENCE),
    ("train.py", "self.objective(self.velocity, batch, draws, update)",
     "self.objective(self.velocity, batch, draws, update + 1)", REFERENCE),
    ("train.py", "self.source.batch(update,", "self.source.batch(update + 1,", REFERENCE),
    ("train.py", "self.source.batch(update,", "self.source.batch(0,", REFERENCE),
    ("train.py", "warmup = 0 if self.config.flow.pre_train_model else optim.warmup", "warmup = optim.warmup",
     REFERENCE),
    ("train.py", "min(1.0, update / warmup)", "min(1.0, (update + 1) / warmup)", REFERENCE),
    ("train.py", "group[\"lr\"] = self.learning_rate(update)", "pass", REFERENCE),
    ("train.py", "self.optimizer.zero_grad(set_to_none=not self.keep_gradients)", "pass", REFERENCE),
    ("train.py", "self.network.train()", "self.network.eval()", REFERENCE),
    ("datasets/batches.py", "step_generator(self.seed, update,", "step_generator(self.seed, 0,", REFERENCE),
    ("runtime/seeds.py", "_torch_seed(seed, update, stream)", "_torch_seed(seed, update)", REFERENCE),
    ("runtime/seeds.py", "_torch_seed(seed, update, rank, DROPOUT)", "_torch_seed(seed, update, DROPOUT)", REFERENCE),
    ("runtime/seeds.py", "np.array([seed % 2**64, stream]", "np.array([seed % 2**64, 0]", f"{SEEDS} {REFERENCE}"),
    # the teacher, the start, the averages
    ("training/state.py", "load_model(path, use_ema=True", "load_model(path, use_ema=False", REFERENCE),
    ("training/state.py", "config.flow.teacher_model or config.flow.pre_train_model", "config.flow.pre_train_model",
     STATE),
    ("training/state.py", "unmatched and not config.flow.pre_train_partial", "False", STATE),
    ("training/update.py", "(1 + self.num_updates) / (10 + self.num_updates)",
     "(2 + self.num_updates) / (10 + self.num_updates)", f"{EMA} {REFERENCE}"),
    ("training/update.py", "decay = min(self.decay,", "decay = max(self.decay,", f"{EMA} {REFERENCE}"),
    ("training/update.py", "torch._foreach_mul_(change, keep * (1 - decay))",
     "torch._foreach_mul_(change, (1 - decay))", f"{EMA} {UPDATE}"),
    ("training/update.py", "self.num_updates = int(state[\"num_updates\"])", "pass", EMA),
    # one update
    ("training/update.py", "torch.clamp(grad_clip / (norm + 1e-6), max=1.0)", "grad_clip / (norm + 1e-6)", REFERENCE),
    ("training/update.py", "if grad_clip >= 0:", "if grad_clip > 10:", f"{UPDATE} {REFERENCE}"),
    ("training/update.py", "torch.isfinite(loss + norm)", "torch.isfinite(loss)", UPDATE),
    ("training/update.py", "torch.isfinite(loss + norm)", "torch.isfinite(norm)", UPDATE),
    ("training/update.py", "ema.update(keep=1.0 - nonfinite)", "ema.update()", UPDATE),
    ("train.py", "min(1.0, update / warmup)", "update / warmup", UPDATE),
    ("training/update.py", "p.grad.masked_fill_(skip, 0.0)", "pass", UPDATE),
    ("training/update.py", "rho_inf = 2 / (1 - beta2) - 1", "rho_inf = 2 / (1 - beta2)", UPDATE),
    ("training/update.py", "rectified = (rho > 5)", "rectified = (rho > 4)", UPDATE),
    ("training/update.py", "\"betas\": (optim.beta1, 0.999)", "\"betas\": (optim.beta1, 0.99)", REFERENCE),
    ("training/update.py", "consecutive.add_(1.0).mul_(nonfinite)", "consecutive.add_(nonfinite)", UPDATE),
    ("training/update.py", "scale.mul_(1.0 - 0.5 * nonfinite)", "scale.mul_(1.0 + 0.5 * nonfinite)", UPDATE),
    ("training/update.py", "self.values[:3] = 0.0", "self.values[:2] = 0.0", UPDATE),
    ("training/update.py", "if stats[\"most_consecutive\"] > limit", "if stats[\"consecutive\"] > limit", UPDATE),
    # the state on disk, and who may go on
    ("training/state.py", "[folder / STATE, *numbered]", "[*numbered, folder / STATE]", STATE),
    ("training/state.py", "moment.shape != expected", "False", STATE),
    ("training/state.py", "values())[:-keep]", "values())[:keep]", STATE),
    ("training/state.py", "tensor.detach().to(\"cpu\", copy=True)", "tensor", STATE),
    ("training/state.py", "torch.empty_like(parameter, dtype=value.dtype).copy_(value)", "value", STATE),
    ("training/state.py", "{**ours, \"params\": theirs[\"params\"]}", "theirs", STATE),
    ("training/state.py", "os.path.normpath(str(there))", "str(there)", RUN),
    ("training/state.py", "not phrase.startswith(REPORTED_FIELDS)", "False", RUN),
    ("training/run.py", "received[0] if received", "received[-1] if received", RUN),
    ("runtime/files.py", "os.replace(temporary, path)", "os.replace(temporary, temporary)", FILES),
    ("runtime/files.py", "time.time() - left.stat().st_mtime > STALE_AFTER", "True", FILES),
    # the objective
    ("flows/objective.py", "u = v_xi if first_step == \"student\"", "u = v_xi if first_step == \"teacher\"",
     f"{REFERENCE} {OBJECTIVE}"),
    ("flows/objective.py", "GUIDANCE_TIMES = (0.2, 0.8)", "GUIDANCE_TIMES = (0.0, 1.0)", f"{REFERENCE} {OBJECTIVE}"),
    ("flows/objective.py", "per_sample(1 - t, xi) * teacher(x_t", "per_sample(t, xi) * teacher(x_t", REFERENCE),
    ("flows/objective.py", "choices.weigh(choices.distance(v_xi, guided), t)",
     "choices.weigh(choices.distance(v_xi, guided), start)", OBJECTIVE),
    ("flows/losses.py", "return 0.5 * values", "return values", f"{LOSSES} {OBJECTIVE}"),
    ("flows/losses.py", "HUBER_C = 0.00054", "HUBER_C = 0.0054", LOSSES),
    ("flows/losses.py", "per_sample(1 - point.alpha, v) * v", "per_sample(point.alpha, v) * v", LOSSES),
    ("flows/schedules.py", "1 - min(1.0, update / n)", "1 - min(1.0, (update + 1) / n)", f"{SCHEDULES} {REFERENCE}"),
    ("flows/schedules.py", "torch.randint(int(k),", "torch.randint(int(k) + 1,", SCHEDULES),
    ("flows/rectified_flow.py", "TIME_SCALE = 999.0", "TIME_SCALE = 1000.0", REFERENCE),
    # evaluation: its noise, what makes a result another, the metrics
    ("evaluation_fid.py", "image_shape(config), EVALUATION)", "image_shape(config))", SAMPLING),
    ("evaluation_fid.py", '"eps": config.flow.eps', '"eps": 0', MEASURED),
    ("metrics/statistics.py", '"nearest": config.eval.nearest', '"nearest": 0', MEASURED),
    ("metrics/scores.py", "allowed = INDEFINITE * sigma.abs().max()", "allowed = 2 * sigma.abs().max()", SCORES),
    ("metrics/scores.py", "extractor.probabilities(features)[order]", "extractor.probabilities(features)", SCORES),
    ("metrics/scores.py", "min(NEIGHBOURS + 1, len(points))", "min(NEIGHBOURS, len(points))", SCORES),
    ("metrics/scores.py", "covered |= (distances <= reach[:, None]).any(0)",
     "covered |= (distances <= reference_radii).any(0)", SCORES),
    ("runtime/run_folder.py", "awaited = k + 1", "awaited = k + 2", "tests/runtime/test_run_folder.py"),
]


def notices(tree, file, text, wrong, tests):
    """Return whether the tests fail with the change made in the copy `tree`."""
    path = tree / file
    original = path.read_text()
    if original.count(text) != 1:
        raise SystemExit(f"{file} has {text!r} {original.count(text)} times: this row is out of date")
    path.write_text(original.replace(text, wrong))
    child = os.fork()  # the libraries are imported already: a row costs its tests alone
    if not child:
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os._exit(pytest.main(["-n0", "-q", "-x", "-p", "no:cacheprovider", *tests.split()]))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    path.write_text(original)
    return status == pytest.ExitCode.TESTS_FAILED


def main(*arguments):
    """Run the rows; return the number of survivors."""
    rows, survivors = [row for number, row in enumerate(MUTATIONS, 1) if not arguments or str(number) in arguments
                       or any(word in row[0] for word in arguments)], 0
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "logs", "reflow_data",
                                                                       "__pycache__"))
        for number, (file, text, wrong, tests) in enumerate(rows, 1):
            start = time.monotonic()
            noticed = notices(tree, file, text, wrong, tests)
            survivors += not noticed
            print(f"{number}/{len(rows)} {'noticed' if noticed else 'SURVIVED'} in {time.monotonic() - start:.0f} s: "
                  f"{file}: {text} → {wrong}", flush=True)
    print(f"{survivors} of {len(rows)} survived")
    return survivors


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:])))
