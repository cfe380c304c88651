"""The runs of every study, one list each. A step is one call of one of the four scripts; shared steps run once."""

import dataclasses
import functools
import hashlib
import json
import pathlib

from configs.command_line import load_config
from configs.default import FIELDS, get_field

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = "configs/rectified_flow/digits_rf_gaussian.py"
CHECKPOINT = "checkpoints/checkpoint_1.pth"


@dataclasses.dataclass(frozen=True)
class Images:
    """The images that a study trains on, and how its samples are measured."""

    name: str
    size: int
    channels: int
    measured: int  # images held out, and samples in a group
    groups: int  # groups of samples whose figures are averaged
    classifier: int = 0  # channels of the convolutional classifier's first stage (0: the perceptron of the grey sets)
    epochs: int = 0  # of its training


DIGITS = Images("digits", 8, 1, 898, 2)
FASHION = Images("fashion", 16, 1, 1000, 2)


@dataclasses.dataclass(frozen=True)
class Step:
    """A call of a script.

    In `words`, {root} is the folder of the study, {here} the step's name, which is its folder there, {images} the
    folder of the images, and {key} the folder of the step that `needs` names so. `images` is None where the script's
    own figures are the result.
    """

    name: str
    script: str
    words: tuple
    seed: int
    images: Images | None
    needs: tuple = ()  # of (key, Step)

    @property
    def digest(self):
        """12 hexadecimal digits of all that the result depends on but the code: words, their config, steps needed."""
        config = self.words[self.words.index("--config") + 1]
        content = [self.script, self.images and dataclasses.astuple(self.images), self.words, config_changes(config),
                   [(key, step.digest) for key, step in self.needs]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]

    def command(self, root):
        """Return the words of the command, for the study's folder `root`."""
        places = {key: f"{root}/{step.name}" for key, step in self.needs}
        places |= {"root": str(root), "here": self.name, "images": f"{root}/images/{self.images and self.images.name}"}
        return [self.script, *(word.format(**places) for word in self.words)]


@functools.cache
def config_changes(path):
    """Return {field: value} of what the config file `path` in this repository changes of the defaults."""
    config = load_config(ROOT / path)
    values = {name: get_field(config, name) for name in FIELDS}
    return {name: value for name, value in values.items() if value != FIELDS[name].default}


def flags(fields):
    """Return config flags: {"optim__lr": 1e-3} becomes --config.optim.lr 0.001."""
    return tuple(word for name, value in fields.items()
                 for word in (f"--config.{name.replace('__', '.')}", str(value)))


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all steps of one seed of a study share: prefix of their names, images, and fields of the config."""

    prefix: str
    images: Images | None
    seed: int
    fields: dict = dataclasses.field(default_factory=dict)
    config: str = CONFIG

    def step(self, name, script, words, needs=()):
        """Return the step `name`, its words after those that all steps have."""
        own = {} if self.images is None else {
            "data__dataset": "custom", "data__data_root": "{images}/train.zip", "data__cache_dir": "{root}/cache",
            "data__image_size": self.images.size, "data__num_channels": self.images.channels}
        head = ("--config", self.config, *flags({"seed": self.seed} | own | self.fields))
        return Step(self.prefix + name, script, head + tuple(words), self.seed, self.images, tuple(needs))

    def train(self, name, updates, pairs=None, start=None, **fields):
        """Return a training step. pairs: the step that made its pairs; start: the step of its pre_train_model."""
        needs = [("pairs", pairs)] * bool(pairs) + [("start", start)] * bool(start)
        own = {"work_dir": "{root}", "expr": "{here}", "training__n_iters": updates, "training__snapshot_freq": updates,
               "training__snapshot_sampling": updates}
        own |= {"data__reflow_data_root": "{pairs}"} if pairs else {}
        own |= {"flow__pre_train_model": "{start}/" + CHECKPOINT} if start else {}
        return self.step(name, "train.py", flags(own | fields), needs)

    def pairs(self, name, flow, count=None, **sampling):
        """Return a step that makes `count` noise-image pairs (None: as the config says) with the trained step."""
        fields = {"sampling__total_number_of_samples": count} if count else {}
        fields |= {"training__batch_size": 250} | {f"sampling__{field}": value for field, value in sampling.items()}
        words = ("--ckpt_path", "{flow}/" + CHECKPOINT, "--data_root", "{root}/{here}", *flags(fields))
        return self.step(name, "generate_data.py", words, [("flow", flow)])

    def evaluate(self, flow, samples=None, **sampling):
        """Return the step that samples the trained step `flow` and measures its samples."""
        name = flow.name.removeprefix(self.prefix) + "/" + "-".join(str(value) for value in sampling.values())
        fields = {f"sampling__{field}": value for field, value in sampling.items()}
        words = ("--ckpt_dir", "{flow}/" + CHECKPOINT)
        if self.images is None:
            fields["eval__num_samples"] = samples
        else:
            words += ("--target_path", "{images}/held_out.zip")
            fields |= {"eval__num_samples": self.images.groups * self.images.measured, "eval__batch_size": 250,
                       "eval__nearest": 0, "eval__save_samples": "true", "eval__feature_extractor": "pixels"}
        return self.step(name, "evaluation_fid.py", words + flags(fields), [("flow", flow)])

    def look(self, flow, **sampling):
        """Return the step that draws samples of the trained step `flow` and measures the straightness of its paths."""
        sampling = sampling or euler(2)  # a call with one evaluation measures no straightness
        words = ("--sampling_dir", "{flow}/" + CHECKPOINT,
                 *flags({f"sampling__{field}": value for field, value in sampling.items()}))
        return self.step(flow.name.removeprefix(self.prefix) + "/straightness", "image_sampling.py", words,
                         [("flow", flow)])


def euler(steps):
    """Return the sampling fields of Euler's rule with so many steps."""
    return {"use_ode_sampler": "euler", "sample_N": steps}


ONE_STEP, ADAPTIVE = euler(1), {"use_ode_sampler": "rk45"}
DISTILLATIONS = {
    "naive": {"flow__use_teacher": "false"},
    "guided_student": {"flow__use_teacher": "true", "flow__guidance_first_step": "student"},
    "guided_teacher": {"flow__use_teacher": "true", "flow__guidance_first_step": "teacher"},
}
HUBER, U_SHAPED = {"training__loss_type": "huber"}, {"flow__flow_t_schedule": "u_shaped"}

# make demo: the method on handwritten digits in minutes. Pixel Fréchet distances that count as success, and the
# largest share of the teacher's parameters that the student may have.
THRESHOLDS = {"1_flow/rk45": 0.25, "2_flow/one_step": 0.42, "distilled/one_step": 0.31}
LARGEST_STUDENT = 0.26


def demo(scale=1.0):
    """Return the steps of the demo; `scale` shortens trainings, pairs and evaluation (a test runs 1/60)."""
    def scaled(count, least=1):
        return max(least, round(count * scale))

    setting, student = Setting("", None, 42), {"model__nf": 16}
    flow = setting.train("1_flow", scaled(1350), optim__lr=2e-3)
    made = setting.pairs("pairs", flow, scaled(4000, 64), use_ode_sampler="rk45", ode_tol=1e-2)
    small = setting.train("2_flow", scaled(1300), pairs=made, training__x0_randomness=f"warmup_{scaled(400)}",
                          optim__lr=2e-3, **student)
    distilled = setting.train("distilled", scaled(1000), pairs=made, start=small, flow__flow_t_schedule="t0",
                              optim__lr=1e-3, **DISTILLATIONS["guided_student"], **student)
    one_step, samples = {"use_ode_sampler": "one_step"}, scaled(2000, 64)
    return [flow, made, small, distilled, setting.evaluate(flow, samples, **one_step),
            setting.evaluate(flow, samples, **ADAPTIVE),
            *(setting.evaluate(step, samples, **one_step) for step in (small, distilled)),
            setting.look(flow, **ADAPTIVE), *(setting.look(step, **one_step) for step in (small, distilled))]


# The paper in miniature: the main line on digits and Fashion-MNIST, ablations, recipes (docs/miniature.md).
FLOW_UPDATES, REFLOW_UPDATES, DISTIL_UPDATES, ANNEALING = 1000, 1000, 600, 250
PAIRS, WIDE, NARROW = 4000, 24, 12


def miniature(images, seed):
    """Return the `Setting` of a seed of the miniature."""
    return Setting(f"{images.name}/seed{seed}/", images, seed, {"model__attn_resolutions": f"({images.size // 2},)"})


def two_flow(setting, name, made, *, annealing=0, shape="warmup", **fields):
    """Return a training step on the pairs of the step `made`, annealed over so many updates (0: not at all)."""
    randomness = {"training__x0_randomness": f"{shape}_{annealing}"} if annealing else {}
    return setting.train(name, REFLOW_UPDATES, made, **({"optim__lr": 2e-3, "model__nf": NARROW} | randomness | fields))


def distil(setting, name, made, start, **fields):
    """Return the one-step distillation, on the pairs of `made`, of the trained step `start`."""
    options = {"flow__flow_t_schedule": "t0", "optim__lr": 1e-3, "model__nf": NARROW} | fields
    return setting.train(name, DISTIL_UPDATES, made, start, **options)


def main_line(images, seed):
    """Return the steps of a seed: 1-flow, pairs, annealed small 2-flow first; on digits also wide 2-flows."""
    setting = miniature(images, seed)
    flow = setting.train("1_flow", FLOW_UPDATES, optim__lr=2e-3, model__nf=WIDE)
    made = setting.pairs("pairs", flow, PAIRS, use_ode_sampler="rk45", ode_tol=1e-2)
    annealed = two_flow(setting, "2_flow_annealed", made, annealing=ANNEALING)
    scratch = two_flow(setting, "2_flow_from_nothing", made)
    distilled = {kind: distil(setting, f"distilled_{kind}", made, annealed, **fields)
                 for kind, fields in DISTILLATIONS.items()}
    found = [flow, made, annealed, scratch, *distilled.values()]
    found += [setting.evaluate(flow, **sampling) for sampling in (*map(euler, (1, 2, 4, 8, 16)), ADAPTIVE)]
    found += [setting.evaluate(annealed, **sampling) for sampling in (*map(euler, (1, 2, 4)), ADAPTIVE)]
    found += [setting.evaluate(step, **ONE_STEP) for step in (scratch, *distilled.values())]
    found += [setting.evaluate(distilled["guided_student"], **sampling) for sampling in map(euler, (2, 4))]
    if images == DIGITS:
        wide = {"annealed": {"annealing": ANNEALING}, "from_nothing": {}, "from_1_flow": {"start": flow}}
        steps = [two_flow(setting, f"2_flow_wide_{start}", made, model__nf=WIDE, **fields)
                 for start, fields in wide.items()]
        found += [*steps, *(setting.evaluate(step, **ONE_STEP) for step in steps), *map(setting.look, steps)]
    return found + [setting.look(step) for step in (flow, annealed, scratch)]


def ablations(seed):
    """Return the steps that change one factor of the main line on digits, or a few, measured at one step."""
    setting = miniature(DIGITS, seed)
    flow, made, *_ = main_line(DIGITS, seed)
    plain = {"annealing": ANNEALING}
    changed = {f"annealing_{n}": {"annealing": n} for n in (REFLOW_UPDATES // 2, REFLOW_UPDATES)}
    changed |= {f"shape_{shape}": plain | {"shape": f"warmup_{shape}"} for shape in ("cos", "exp")}
    changed |= {"time_u_shaped": plain | U_SHAPED, "loss_huber": plain | HUBER,
                "huber_cos": plain | HUBER | {"shape": "warmup_cos"},
                "huber_u_shaped_cos": plain | HUBER | U_SHAPED | {"shape": "warmup_cos"},
                "huber_u_shaped": plain | HUBER | U_SHAPED}
    changed |= {f"width_{width}": plain | {"model__nf": width} for width in (8, 16)}
    students = {name: two_flow(setting, f"ablation/{name}", made, **fields) for name, fields in changed.items()}
    students |= {f"distilled_{loss}": distil(setting, f"ablation/distilled_{loss}", made, students["huber_u_shaped"],
                                             training__loss_type=loss, **DISTILLATIONS["guided_student"])
                 for loss in ("l2", "huber")}
    others = {f"count_{n}": (f"pairs_{n}", n, ADAPTIVE | {"ode_tol": 1e-2}) for n in (500, 1000, 2000, 8000)}
    solvers = {f"euler_{n}": euler(n) for n in (4, 8, 16)}
    solvers |= {f"heun_{n}": {"use_ode_sampler": "heun", "sample_N": n} for n in (2, 4, 8)}
    solvers |= {f"rk45_{tol:g}": ADAPTIVE | {"ode_tol": tol} for tol in (1e-3, 1e-4)}
    others |= {f"solver_{name}": (f"pairs_{name}", PAIRS, sampling) for name, sampling in solvers.items()}
    found = [flow, made]
    for name, (folder, count, sampling) in others.items():
        found.append(setting.pairs(f"ablation/{folder}", flow, count, **sampling))
        students[name] = two_flow(setting, f"ablation/{name}", found[-1], **plain)
    return [*found, *students.values(), *(setting.evaluate(step, **ONE_STEP) for step in students.values())]


# What differs between the stages of the two recipes; all else is in the config of that name.
RECIPES = {
    "recommended": ({"training__x0_randomness": f"warmup_{ANNEALING}"} | HUBER | U_SHAPED,
                    {"optim__lr": 1e-3} | HUBER | DISTILLATIONS["guided_student"]),
    "released": ({"training__x0_randomness": f"warmup_{REFLOW_UPDATES * 3 // 8}"}, DISTILLATIONS["guided_student"]),
}


def recipe(name, seed):
    """Return the steps of one of RECIPES on digits: 1-flow, pairs, small 2-flow, distillation, their figures."""
    setting = dataclasses.replace(miniature(DIGITS, seed), prefix=f"digits/seed{seed}/recipe_{name}/",
                                  config=f"configs/rectified_flow/digits_{name}.py")
    reflow, distillation = RECIPES[name]
    flow = setting.train("1_flow", FLOW_UPDATES, model__nf=WIDE)
    made = setting.pairs("pairs", flow)
    student = setting.train("2_flow", REFLOW_UPDATES, made, model__nf=NARROW, **reflow)
    distilled = setting.train("distilled", DISTIL_UPDATES, made, student, model__nf=NARROW,
                              flow__flow_t_schedule="t0", **distillation)
    return [flow, made, student, distilled, setting.evaluate(flow, **ADAPTIVE, ode_tol=1e-3),
            *(setting.evaluate(step, **ONE_STEP) for step in (student, distilled))]


# CIFAR-10 end to end (docs/cifar.md): `large` for one GPU in half an hour, `small` for two CPU cores in 40 minutes.
CIFAR_CONFIG = "configs/rectified_flow/cifar10_rf_gaussian.py"
CIFAR = {
    "large": (Images("cifar", 32, 3, 5000, 1, classifier=64, epochs=16),
              {"updates": (9900, 11500, 3000), "pairs": 50000, "teacher": 96, "student": 64, "batch": 256,
               "lr": (8e-4, 8e-4, 4e-4),
               "fields": {"model__num_res_blocks": 2, "model__ch_mult": "(1,2,2)", "model__dropout": 0.0,
                          "training__precision": "bf16", "training__compile": "true"}}),
    "small": (Images("cifar", 16, 3, 2000, 1, classifier=16, epochs=6),
              {"updates": (1200, 1200, 400), "pairs": 4000, "teacher": 32, "student": 20, "batch": 64,
               "lr": (1e-3, 1e-3, 5e-4),
               "fields": {"model__num_res_blocks": 1, "model__ch_mult": "(1,2)", "model__attn_resolutions": "(8,)",
                          "model__dropout": 0.0}}),
    "tiny": (Images("cifar", 8, 3, 40, 1, classifier=4, epochs=1),
             {"updates": (3, 3, 3), "pairs": 16, "teacher": 8, "student": 8, "batch": 4, "lr": (1e-3, 1e-3, 5e-4),
              "fields": {"model__num_res_blocks": 1, "model__ch_mult": "(1,)", "model__attn_resolutions": "(8,)"}}),
}


def cifar(size="small", scale=1.0):
    """Return the chain on CIFAR-10: teacher, pairs, annealed small 2-flow, its own pairs, guided distillation.

    `scale` multiplies updates and pairs: the figures of a shorter run belong to it alone.
    """
    images, plan = CIFAR[size]
    flow_updates, reflow_updates, distil_updates = (max(1, round(n * scale)) for n in plan["updates"])
    count = max(plan["batch"], round(plan["pairs"] * scale))
    fields = plan["fields"] | {"training__batch_size": plan["batch"], "model__ema_rate": 0.999}
    setting = Setting(f"cifar_{size}/seed0/", images, 0, fields, CIFAR_CONFIG)
    rates = plan["lr"]
    flow = setting.train("1_flow", flow_updates, model__nf=plan["teacher"], optim__lr=rates[0],
                         optim__warmup=flow_updates // 20)
    solver = ADAPTIVE | {"ode_tol": 1e-2}
    made = setting.pairs("pairs", flow, count, **solver)
    student = setting.train("2_flow", reflow_updates, made, model__nf=plan["student"], optim__lr=rates[1],
                            optim__warmup=reflow_updates // 20, flow__h_flip="true",
                            training__x0_randomness=f"warmup_{max(1, reflow_updates // 4)}", **HUBER, **U_SHAPED)
    second = setting.pairs("2_flow_pairs", student, count, **solver)
    distilled = setting.train("distilled", distil_updates, second, student, model__nf=plan["student"],
                              optim__lr=rates[2], flow__flow_t_schedule="t0", flow__h_flip="true", **HUBER,
                              **DISTILLATIONS["guided_student"])
    samplers = {flow: (ONE_STEP, ADAPTIVE | {"ode_tol": 1e-3}), student: (ONE_STEP, ADAPTIVE | {"ode_tol": 1e-3}),
                distilled: (ONE_STEP,)}
    return [flow, made, student, second, distilled,
            *(setting.evaluate(step, **sampling) for step, chosen in samplers.items() for sampling in chosen),
            setting.look(flow), setting.look(student)]


STUDIES = {
    "demo": demo,
    "digits": lambda: [step for seed in (0, 1, 2) for step in main_line(DIGITS, seed)],
    "fashion": lambda: main_line(FASHION, 0),
    "ablations": lambda: [step for seed in (0, 1, 2) for step in ablations(seed)],
    "recipes": lambda: [step for seed in (3, 4, 5) for name in RECIPES for step in recipe(name, seed)],
    "cifar": cifar,
}
