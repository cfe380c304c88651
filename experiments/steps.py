"""A step of a study: one call of one of the four scripts, with all that its result depends on in its words."""

import dataclasses
import functools
import hashlib
import json
import pathlib

from configs.command_line import load_config
from configs.default import field_names, find_field

TRAIN, PAIRS, EVALUATE, LOOK = "train", "pairs", "evaluate", "look"
SCRIPTS = {TRAIN: "train.py", PAIRS: "generate_data.py", EVALUATE: "evaluation_fid.py", LOOK: "image_sampling.py"}
MEASURED = 2  # groups of samples, each as large as the set of held-out images, whose figures are averaged


@dataclasses.dataclass(frozen=True)
class Images:
    """A set of images that a study trains on: its name, what its networks look like, how many images are measured."""

    name: str
    size: int
    attention: int
    teacher_width: int
    student_width: int
    measured: int
    widths: tuple = ()


DIGITS = Images("digits", 8, 4, 24, 12, 898, (8, 12, 16, 24))
FASHION = Images("fashion", 16, 8, 24, 12, 1000)


@dataclasses.dataclass(frozen=True)
class Step:
    """A call of a script.

    In `words`, {root} is the folder of the study, {here} the step's own name there, {images} the folder of the
    images, and {key} the folder of the step that `needs` names so.
    """

    name: str
    kind: str
    images: Images
    seed: int
    words: tuple
    needs: tuple = ()  # of (key, Step)

    @property
    def digest(self):
        """12 hexadecimal digits of all that the result depends on: words, the config they name, the steps needed."""
        config = self.words[self.words.index("--config") + 1]
        content = [SCRIPTS[self.kind], self.images.name, self.words, config_changes(config),
                   [(key, step.digest) for key, step in self.needs]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    @property
    def place(self):
        """The step's folder below the root: another one when anything changes that its result depends on."""
        return f"{self.name}-{self.digest}"

    def command(self, root):
        """Return the words of the command, for the study's folder `root`."""
        places = {key: f"{root}/{step.place}" for key, step in self.needs}
        places |= {"root": str(root), "here": self.place, "images": f"{root}/images/{self.images.name}"}
        return [SCRIPTS[self.kind], *(word.format(**places) for word in self.words)]


@functools.cache
def config_changes(path):
    """Return {field: value} of what the config file `path` in this repository changes of the defaults."""
    config = load_config(ROOT / path)
    values = {name: functools.reduce(getattr, name.split("."), config) for name in field_names()}
    return {name: value for name, value in values.items() if value != find_field(name).default}


ROOT = pathlib.Path(__file__).parent.parent
CHECKPOINT = "checkpoints/checkpoint_1.pth"
CONFIG = "configs/rectified_flow/digits_rf_gaussian.py"


def flags(**fields):
    """Return config flags: `optim__lr=1e-3` becomes --config.optim.lr 0.001."""
    return tuple(word for name, value in fields.items()
                 for word in (f"--config.{name.replace('__', '.')}", str(value)))


def common(images, seed, config=CONFIG):
    """Return the words that every step of a seed has."""
    return ("--config", config, *flags(
        seed=seed, data__dataset="custom", data__data_root="{images}/train.zip", data__cache_dir="{root}/cache",
        data__image_size=images.size, model__attn_resolutions=f"({images.attention},)", training__progress="false"))


def train(name, images, seed, updates, *, config=CONFIG, width, pairs=None, start=None, **fields):
    """Return a training step. pairs: the `Step` whose pairs it trains on; start: the `Step` of its pre_train_model."""
    words = (*common(images, seed, config), *flags(
        work_dir="{root}", expr="{here}", model__nf=width, training__n_iters=updates, training__snapshot_freq=updates,
        training__snapshot_sampling=updates, **fields))
    needs = ()
    if pairs:
        words, needs = (*words, *flags(data__reflow_data_root="{pairs}")), (*needs, ("pairs", pairs))
    if start:
        words, needs = (*words, *flags(flow__pre_train_model="{start}/" + CHECKPOINT)), (*needs, ("start", start))
    return Step(name, TRAIN, images, seed, words, needs)


def pairs(name, flow, count=None, *, config=CONFIG, **sampling):
    """Return a step that makes `count` noise-image pairs (None: as the config says) with the trained step `flow`."""
    counted = {"sampling__total_number_of_samples": count} if count else {}
    words = (*common(flow.images, flow.seed, config), "--ckpt_path", "{flow}/" + CHECKPOINT, "--data_root",
             "{root}/{here}", *flags(**counted, training__batch_size=250, **{
                 f"sampling__{field}": value for field, value in sampling.items()}))
    return Step(name, PAIRS, flow.images, flow.seed, words, (("flow", flow),))


def evaluate(flow, *, config=CONFIG, **sampling):
    """Return the step that samples the trained step `flow` and measures its samples."""
    sampler = "-".join(str(value) for value in sampling.values())
    words = (*common(flow.images, flow.seed, config), "--ckpt_dir", "{flow}/" + CHECKPOINT, "--target_path",
             "{images}/held_out.zip", *flags(
                 eval__num_samples=MEASURED * flow.images.measured, eval__batch_size=250, eval__nearest=0,
                 eval__save_samples="true", **{f"sampling__{field}": value for field, value in sampling.items()}))
    return Step(f"{flow.name}/{sampler}", EVALUATE, flow.images, flow.seed, words, (("flow", flow),))


def look(flow, *, config=CONFIG):
    """Return the step that draws samples of the trained step `flow` and measures the straightness of its ways."""
    words = (*common(flow.images, flow.seed, config), "--sampling_dir", "{flow}/" + CHECKPOINT,
             *flags(sampling__use_ode_sampler="euler", sampling__sample_N=1))
    return Step(f"{flow.name}/straightness", LOOK, flow.images, flow.seed, words, (("flow", flow),))
