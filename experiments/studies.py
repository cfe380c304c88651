"""The studies, each a list of steps. A step is a call of one of the four scripts; shared steps run once."""

import dataclasses
import functools
import hashlib
import json
import pathlib

from configs.command_line import load_config
from configs.default import FIELDS, get_field
from runtime.run_folder import checkpoint_path

ROOT = pathlib.Path(__file__).parent.parent
FLOW, START = (str(checkpoint_path(folder, 1)) for folder in ("{flow}", "{start}"))


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a study, and how its samples are measured."""

    name: str
    size: int
    channels: int
    measured: int  # held-out images, and samples per group
    groups: int  # groups of samples whose metrics are averaged
    classifier: int = 0  # channels of the convolutional classifier's first stage (0: a perceptron)
    epochs: int = 0  # of its training

    @property
    def folder(self):
        """The name of the folder of these images: other sizes are in others."""
        return f"{self.name}_{self.size}"


DIGITS = Images("digits", 8, 1, 898, 2)
FASHION = Images("fashion", 16, 1, 1000, 2)


@dataclasses.dataclass(frozen=True)
class Step:
    """A call of a script; `images` is None if the script's own metrics are the result.

    In `arguments`, {root} is the folder of the study, {here} the step's name, which is its folder there, {images} the
    folder of the images, and {key} the folder of the step under that key in `needs`.
    """

    name: str
    script: str
    arguments: tuple
    seed: int
    images: Images | None
    needs: tuple = ()  # of (key, Step)

    @property
    def digest(self):
        """12 hexadecimal digits of all that the result depends on except the code: arguments, config, needed steps."""
        config = self.arguments[self.arguments.index("--config") + 1]
        content = [self.script, self.images and dataclasses.astuple(self.images), self.arguments,
                   config_changes(config), [(key, step.digest) for key, step in self.needs]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    def command(self, root):
        """Return the command, script and arguments, for the study's folder `root`."""
        places = {key: f"{root}/{step.name}" for key, step in self.needs}
        places |= {"root": str(root), "here": self.name}
        places |= {"images": f"{root}/images/{self.images.folder}"} if self.images else {}
        return [self.script, *(argument.format(**places) for argument in self.arguments)]


@functools.cache
def config_changes(path):
    """Return {field: value} of the fields that the config file `path` in this repository changes."""
    config = load_config(ROOT / path)
    return {name: value for name in FIELDS if (value := get_field(config, name)) != FIELDS[name].default}


def euler(steps, rule="euler"):
    """Return the sampling fields of Euler's rule, or another, with that many steps."""
    return {"sampling__use_ode_sampler": rule, "sampling__sample_N": steps}


def rk45(tol):
    """Return the sampling fields of rk45 with this tolerance."""
    return ADAPTIVE | {"sampling__ode_tol": tol}


def annealed(updates, shape="warmup"):
    """Return the field of annealing reflow over that many updates."""
    return {"training__x0_randomness": f"{shape}_{updates}"}


ONE_STEP, TWO_STEPS, ADAPTIVE = euler(1), euler(2), {"sampling__use_ode_sampler": "rk45"}
T0, U_SHAPED = ({"flow__flow_t_schedule": schedule} for schedule in ("t0", "u_shaped"))
HUBER = {"training__loss_type": "huber"}
GUIDED = {"flow__use_teacher": "true", "flow__guidance_first_step": "student"}
DISTILLATIONS = {"naive": {"flow__use_teacher": "false"}, "guided_student": GUIDED,
                 "guided_teacher": GUIDED | {"flow__guidance_first_step": "teacher"}}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all steps of one seed of a study share. Keyword optim__lr is the config field optim.lr."""

    prefix: str  # of step names
    images: Images | None
    seed: int
    fields: dict = dataclasses.field(default_factory=dict)
    config: str = "configs/rectified_flow/digits_rf_gaussian.py"

    def step(self, name, script, *arguments, needs, **fields):
        """Return the step `name`: config and fields that all steps have, then `arguments`, then `fields`."""
        def flags(fields):
            return [argument for field, value in fields.items()
                    for argument in (f"--config.{field.replace('__', '.')}", str(value))]

        own = {"seed": self.seed}
        if self.images:
            own |= {"data__dataset": "custom", "data__data_root": "{images}/train.zip", "data__cache_dir":
                    "{root}/cache", "data__image_size": self.images.size, "data__num_channels": self.images.channels}
        arguments = ("--config", self.config, *flags(own | self.fields), *arguments, *flags(fields))
        return Step(name, script, arguments, self.seed, self.images, tuple(needs.items()))

    def train(self, name, updates, pairs=None, start=None, **fields):
        """Return a training step. pairs: step that makes its pairs; start: step that trains its pre_train_model."""
        own = {"work_dir": "{root}", "expr": "{here}", "training__n_iters": updates, "training__snapshot_freq": updates,
               "training__snapshot_sampling": updates}
        own |= {"data__reflow_data_root": "{pairs}"} if pairs else {}
        own |= {"flow__pre_train_model": START} if start else {}
        needs = {key: step for key, step in (("pairs", pairs), ("start", start)) if step}
        return self.step(self.prefix + name, "train.py", needs=needs, **own | fields)

    def pairs(self, name, flow, count=None, **sampling):
        """Return a step that makes `count` pairs (None: the config's number) with the training step `flow`."""
        fields = {"sampling__total_number_of_samples": count} if count else {}
        return self.step(self.prefix + name, "generate_data.py", "--ckpt_path", FLOW, "--data_root", "{root}/{here}",
                         needs={"flow": flow}, **fields, training__batch_size=250, **sampling)

    def evaluate(self, flows, *samplings, samples=None):
        """Return a step for each training step and sampling that measures its samples."""
        arguments, fields = (), {"eval__num_samples": samples}
        if self.images:
            arguments = ("--target_path", "{images}/held_out.zip")
            fields = {"eval__num_samples": self.images.groups * self.images.measured, "eval__batch_size": 250,
                      "eval__nearest": 0, "eval__save_samples": "true", "eval__feature_extractor": "pixels"}
        return [self.step(f"{flow.name}/{'-'.join(map(str, sampling.values()))}", "evaluation_fid.py", "--ckpt_dir",
                          FLOW, *arguments, needs={"flow": flow}, **sampling, **fields)
                for flow in flows for sampling in samplings]

    def look(self, flow, sampling=TWO_STEPS):  # one-step samples have no straightness
        """Return the step that draws samples of the training step `flow` and measures their straightness."""
        return self.step(f"{flow.name}/straightness", "image_sampling.py", "--sampling_dir", FLOW,
                         needs={"flow": flow}, **sampling)


def demo(scale=1.0):
    """Return the steps of `make demo`; `scale` shortens trainings, pairs and evaluation (a test runs 1/250)."""
    def scaled(count, least=1):
        return max(least, round(count * scale))

    setting, width, one_step = Setting("", None, 42), {"model__nf": 16}, {"sampling__use_ode_sampler": "one_step"}
    flow = setting.train("1_flow", scaled(1350), optim__lr=2e-3)
    made = setting.pairs("pairs", flow, scaled(4000, 64), **rk45(1e-2))
    small = setting.train("2_flow", scaled(1300), made, **annealed(scaled(400)), optim__lr=2e-3, **width)
    distilled = setting.train("distilled", scaled(1000), made, small, **T0, optim__lr=1e-3, **GUIDED, **width)
    return [flow, made, small, distilled, *setting.evaluate([flow], one_step, ADAPTIVE, samples=scaled(2000, 64)),
            *setting.evaluate([small, distilled], one_step, samples=scaled(2000, 64)),
            setting.look(flow, ADAPTIVE), setting.look(small, one_step), setting.look(distilled, one_step)]


# The paper in miniature: the main line on digits and Fashion-MNIST, ablations, recipes (docs/miniature.md).
FLOW_UPDATES, REFLOW_UPDATES, DISTIL_UPDATES, ANNEALING = 1000, 1000, 600, 250
PAIRS, WIDE, NARROW = 4000, 24, 12
REFLOW = {"optim__lr": 2e-3, "model__nf": NARROW}
DISTIL = T0 | {"optim__lr": 1e-3, "model__nf": NARROW}


def miniature(images, seed, recipe="", **config):
    """Return the `Setting` of a seed of the miniature."""
    return Setting(f"{images.name}/seed{seed}/{recipe}", images, seed,
                   {"model__attn_resolutions": f"({images.size // 2},)"}, **config)


def main_line(images, seed):
    """Return the steps of a seed, first 1-flow, pairs, annealed small 2-flow; on digits also wide 2-flows."""
    setting = miniature(images, seed)
    flow = setting.train("1_flow", FLOW_UPDATES, optim__lr=2e-3, model__nf=WIDE)
    made = setting.pairs("pairs", flow, PAIRS, **rk45(1e-2))
    small = setting.train("2_flow_annealed", REFLOW_UPDATES, made, **REFLOW | annealed(ANNEALING))
    scratch = setting.train("2_flow_from_scratch", REFLOW_UPDATES, made, **REFLOW)
    distilled = {kind: setting.train(f"distilled_{kind}", DISTIL_UPDATES, made, small, **DISTIL | fields)
                 for kind, fields in DISTILLATIONS.items()}
    found = [flow, made, small, scratch, *distilled.values()]
    found += setting.evaluate([flow], *map(euler, (1, 2, 4, 8, 16)), ADAPTIVE)
    found += setting.evaluate([small], *map(euler, (1, 2, 4)), ADAPTIVE)
    found += setting.evaluate([scratch, *distilled.values()], ONE_STEP)
    found += setting.evaluate([distilled["guided_student"]], euler(2), euler(4))
    if images == DIGITS:
        starts = {"annealed": annealed(ANNEALING), "from_scratch": {}, "from_1_flow": {"start": flow}}
        wide = [setting.train(f"2_flow_wide_{start}", REFLOW_UPDATES, made, **REFLOW | {"model__nf": WIDE} | fields)
                for start, fields in starts.items()]
        found += [*wide, *setting.evaluate(wide, ONE_STEP), *map(setting.look, wide)]
    return found + [setting.look(step) for step in (flow, small, scratch)]


def ablations(seed):
    """Return the steps that change one or a few factors of the main line on digits, measured in one step."""
    setting = miniature(DIGITS, seed)
    flow, made, *_ = main_line(DIGITS, seed)
    linear, cosine, exponential = (annealed(ANNEALING, f"warmup{shape}") for shape in ("", "_cos", "_exp"))
    changed = {f"annealing_{n}": annealed(n) for n in (REFLOW_UPDATES // 2, REFLOW_UPDATES)}
    changed |= {"shape_cos": cosine, "shape_exp": exponential, "time_u_shaped": linear | U_SHAPED,
                "loss_huber": linear | HUBER, "huber_cos": cosine | HUBER,
                "huber_u_shaped_cos": cosine | HUBER | U_SHAPED, "huber_u_shaped": linear | HUBER | U_SHAPED}
    changed |= {f"width_{width}": {"model__nf": width} | linear for width in (8, 16)}
    solvers = {f"euler_{n}": euler(n) for n in (4, 8, 16)} | {f"heun_{n}": euler(n, "heun") for n in (2, 4, 8)}
    solvers |= {f"rk45_{tol:g}": rk45(tol) for tol in (1e-3, 1e-4)}
    pairs = {f"count_{n}": setting.pairs(f"ablation/pairs_{n}", flow, n, **rk45(1e-2)) for n in (500, 1000, 2000, 8000)}
    pairs |= {f"solver_{name}": setting.pairs(f"ablation/pairs_{name}", flow, PAIRS, **sampling)
              for name, sampling in solvers.items()}
    students = {name: setting.train(f"ablation/{name}", REFLOW_UPDATES, made, **REFLOW | fields)
                for name, fields in changed.items()}
    students |= {f"distilled_{loss}": setting.train(
        f"ablation/distilled_{loss}", DISTIL_UPDATES, made, students["huber_u_shaped"],
        **DISTIL | {"training__loss_type": loss} | GUIDED) for loss in ("l2", "huber")}
    students |= {name: setting.train(f"ablation/{name}", REFLOW_UPDATES, own, **REFLOW | linear)
                 for name, own in pairs.items()}
    return [flow, made, *pairs.values(), *students.values(), *setting.evaluate(students.values(), ONE_STEP)]


def recipes(seed):
    """Return the steps of two recipes on digits; their configs hold what all stages share."""
    found, small = [], {"model__nf": NARROW}
    for name, reflow, distillation in (
            ("recommended", annealed(ANNEALING) | HUBER | U_SHAPED, {"optim__lr": 1e-3} | HUBER | GUIDED),
            ("released", annealed(REFLOW_UPDATES * 3 // 8), GUIDED)):
        setting = miniature(DIGITS, seed, f"recipe_{name}/", config=f"configs/rectified_flow/digits_{name}.py")
        flow = setting.train("1_flow", FLOW_UPDATES, model__nf=WIDE)
        made = setting.pairs("pairs", flow)
        student = setting.train("2_flow", REFLOW_UPDATES, made, **small | reflow)
        distilled = setting.train("distilled", DISTIL_UPDATES, made, student, **small | T0 | distillation)
        found += [flow, made, student, distilled, *setting.evaluate([flow], rk45(1e-3)),
                  *setting.evaluate([student, distilled], ONE_STEP)]
    return found


# CIFAR-10 end to end (docs/cifar.md): `large` for one GPU in half an hour, `small` for two CPU cores in 40 minutes.
# Images; updates of the three trainings; number of pairs; widths of teacher and student; learning rate; fields.
CIFAR = {
    "large": (Images("cifar", 32, 3, 5000, 1, 64, 16), (9900, 11500, 3000), 50000, (96, 64), 8e-4, {
        "model__num_res_blocks": 2, "model__ch_mult": "(1,2,2)", "model__dropout": 0.0, "training__precision": "bf16",
        "training__compile": "true", "training__batch_size": 256, "training__snapshot_freq_for_preemption": 1000}),
    "small": (Images("cifar", 16, 3, 2000, 1, 16, 6), (1200, 1200, 400), 4000, (32, 20), 1e-3, {
        "model__num_res_blocks": 1, "model__ch_mult": "(1,2)", "model__attn_resolutions": "(8,)",
        "model__dropout": 0.0, "training__batch_size": 64}),
    "tiny": (Images("cifar", 8, 3, 40, 1, 4, 1), (3, 3, 3), 16, (8, 8), 1e-3, {
        "model__num_res_blocks": 1, "model__ch_mult": "(1,)", "model__attn_resolutions": "(8,)",
        "training__batch_size": 4}),
}


def cifar(size="small", scale=1.0):
    """Return teacher, pairs, small 2-flow, its own pairs, distillation; scale: of updates and number of pairs."""
    images, updates, count, (teacher, student), lr, fields = CIFAR[size]
    first, second, third = (max(1, round(n * scale)) for n in updates)
    count = max(fields["training__batch_size"], round(count * scale))
    setting = Setting(f"cifar_{size}/seed0/", images, 0, fields | {"model__ema_rate": 0.999},
                      "configs/rectified_flow/cifar10_rf_gaussian.py")
    flow = setting.train("1_flow", first, model__nf=teacher, optim__lr=lr, optim__warmup=first // 20)
    made = setting.pairs("pairs", flow, count, **rk45(1e-2))
    small = setting.train("2_flow", second, made, model__nf=student, optim__lr=lr, optim__warmup=second // 20,
                          flow__h_flip="true", **annealed(max(1, second // 4)), **HUBER, **U_SHAPED)
    again = setting.pairs("2_flow_pairs", small, count, **rk45(1e-2))
    distilled = setting.train("distilled", third, again, small, model__nf=student, optim__lr=lr / 2, **T0,
                              flow__h_flip="true", **HUBER, **GUIDED)
    return [flow, made, small, again, distilled, *setting.evaluate([flow, small], ONE_STEP, rk45(1e-3)),
            *setting.evaluate([distilled], ONE_STEP), setting.look(flow), setting.look(small)]


STUDIES = {
    "demo": demo,
    "digits": lambda: [step for seed in (0, 1, 2) for step in main_line(DIGITS, seed)],
    "fashion": lambda: main_line(FASHION, 0),
    "ablations": lambda: [step for seed in (0, 1, 2) for step in ablations(seed)],
    "recipes": lambda: [step for seed in (3, 4, 5) for step in recipes(seed)],
    "cifar": cifar,
}
