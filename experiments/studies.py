"""The studies: which steps there are. A step that several studies share is one step, and runs once."""

import dataclasses

from experiments.steps import DIGITS, FASHION, evaluate, look, pairs, train

FLOW_UPDATES, REFLOW_UPDATES, DISTIL_UPDATES = 1000, 1000, 600
FLOW_LR, DISTIL_LR = 2e-3, 1e-3  # of both flows; of distillation
PAIRS, PAIR_TOL = 4000, 1e-2
ANNEALING = 250  # updates: a quarter of the reflow
ONE_STEP = {"use_ode_sampler": "euler", "sample_N": 1}
ADAPTIVE = {"use_ode_sampler": "rk45"}


def euler(steps):
    """Return the sampling fields of Euler's rule with so many steps."""
    return {"use_ode_sampler": "euler", "sample_N": steps}


@dataclasses.dataclass(frozen=True)
class Line:
    """The main line of one seed: its 1-flow, pairs and annealed small 2-flow, and all steps by name."""

    flow: object
    pairs: object
    annealed: object
    steps: tuple


def main_line(images, seed, *, large):
    """Return the `Line` of a seed; with `large`, also 2-flows of the 1-flow's width, from it and from nothing."""
    prefix, width = f"{images.name}/seed{seed}", images.student_width
    flow = train(f"{prefix}/1_flow", images, seed, FLOW_UPDATES, width=images.teacher_width, optim__lr=FLOW_LR)
    made = pairs(f"{prefix}/pairs", flow, PAIRS, use_ode_sampler="rk45", ode_tol=PAIR_TOL)
    annealed = two_flow(f"{prefix}/2_flow_annealed", made, width=width, annealing=ANNEALING)
    nothing = two_flow(f"{prefix}/2_flow_from_nothing", made, width=width)
    distilled = {kind: distil(f"{prefix}/distilled_{kind}", made, annealed, **fields)
                 for kind, fields in DISTILLATIONS.items()}
    found = [flow, made, annealed, nothing, *distilled.values()]
    found += [evaluate(flow, **sampling) for sampling in (*map(euler, (1, 2, 4, 8, 16)), ADAPTIVE)]
    found += [evaluate(annealed, **sampling) for sampling in (*map(euler, (1, 2, 4)), ADAPTIVE)]
    found += [evaluate(nothing, **ONE_STEP), *(evaluate(step, **ONE_STEP) for step in distilled.values())]
    found += [evaluate(distilled["guided_student"], **sampling) for sampling in map(euler, (2, 4))]
    if large:
        wide = {"annealed": {"annealing": ANNEALING}, "from_nothing": {}, "from_1_flow": {"start": flow}}
        for start, fields in wide.items():
            step = two_flow(f"{prefix}/2_flow_wide_{start}", made, width=images.teacher_width, **fields)
            found += [step, evaluate(step, **ONE_STEP), look(step)]
    found += [look(step) for step in (flow, annealed, nothing)]
    return Line(flow, made, annealed, tuple(found))


DISTILLATIONS = {
    "naive": {"flow__use_teacher": "false"},
    "guided_student": {"flow__use_teacher": "true", "flow__guidance_first_step": "student"},
    "guided_teacher": {"flow__use_teacher": "true", "flow__guidance_first_step": "teacher"},
}


def two_flow(name, made, *, width, annealing=0, shape="warmup", start=None, **fields):
    """Return a training step on the pairs of the step `made`, annealed over so many updates (0: not at all)."""
    randomness = {"training__x0_randomness": f"{shape}_{annealing}"} if annealing else {}
    options = {"optim__lr": FLOW_LR} | randomness | fields
    return train(name, made.images, made.seed, REFLOW_UPDATES, width=width, pairs=made, start=start, **options)


def distil(name, made, start, **fields):
    """Return the one-step distillation, on the pairs of `made`, of the trained step `start`."""
    return train(name, made.images, made.seed, DISTIL_UPDATES, width=made.images.student_width, pairs=made, start=start,
                 flow__flow_t_schedule="t0", optim__lr=DISTIL_LR, **fields)


# What makes the pairs, as (sampling fields, name): at how many evaluations a pair does the student suffer?
SOLVERS = (
    *((euler(n), f"euler_{n}") for n in (4, 8, 16)),
    *(({"use_ode_sampler": "heun", "sample_N": n}, f"heun_{n}") for n in (2, 4, 8)),
    *(({"use_ode_sampler": "rk45", "ode_tol": tol}, f"rk45_{tol:g}") for tol in (1e-3, 1e-4)),
)
HUBER, U_SHAPED = {"training__loss_type": "huber"}, {"flow__flow_t_schedule": "u_shaped"}
COMBINATIONS = {  # of what one seed showed to be better alone
    "huber_cos": HUBER | {"shape": "warmup_cos"},
    "huber_u_shaped_cos": HUBER | U_SHAPED | {"shape": "warmup_cos"},
    "huber_u_shaped": HUBER | U_SHAPED,  # distilled as well
}
PAIR_COUNTS = (500, 1000, 2000, 8000)  # beside the main line's


def ablations(line):
    """Return the steps that change one factor of a `Line`, or a few: small networks, measured at one step."""
    images, seed = line.flow.images, line.flow.seed
    prefix, width = f"{images.name}/seed{seed}/ablation", images.student_width
    plain = {"width": width, "annealing": ANNEALING}
    made, students = [], []

    def student(name, on=line.pairs, **changed):
        students.append(two_flow(f"{prefix}/{name}", on, **(plain | changed)))

    for updates in (REFLOW_UPDATES // 2, REFLOW_UPDATES):
        student(f"annealing_{updates}", annealing=updates)
    for shape in ("warmup_cos", "warmup_exp"):
        student(f"shape_{shape.removeprefix('warmup_')}", shape=shape)
    student("time_u_shaped", **U_SHAPED)
    student("loss_huber", **HUBER)
    for name, changed in COMBINATIONS.items():
        student(name, **changed)
    start = students[-1]
    distilled = [distil(f"{prefix}/distilled_{loss}", line.pairs, start, training__loss_type=loss,
                        **DISTILLATIONS["guided_student"]) for loss in ("l2", "huber")]
    for other in images.widths:
        if other not in (width, images.teacher_width):  # the main line has these two
            student(f"width_{other}", width=other)
    for count in PAIR_COUNTS:
        made.append(pairs(f"{prefix}/pairs_{count}", line.flow, count, use_ode_sampler="rk45", ode_tol=PAIR_TOL))
        student(f"count_{count}", made[-1])
    for sampling, name in SOLVERS:
        made.append(pairs(f"{prefix}/pairs_{name}", line.flow, PAIRS, **sampling))
        student(f"solver_{name}", made[-1])
    students += distilled
    return (*made, *students, *(evaluate(step, **ONE_STEP) for step in students))


# The recommended recipe, chosen on the seeds of the main line, and the released code's; what differs between the stages
# is here, all else in the config of that name. In the released commands annealing takes 300,000 of 800,000 updates.
RECIPES = {
    "recommended": {"reflow": {"training__x0_randomness": f"warmup_{ANNEALING}"} | HUBER | U_SHAPED,
                    "distil": {"optim__lr": DISTIL_LR} | HUBER | DISTILLATIONS["guided_student"]},
    "released": {"reflow": {"training__x0_randomness": f"warmup_{REFLOW_UPDATES * 3 // 8}"},
                 "distil": DISTILLATIONS["guided_student"]},
}


def recipe(name, seed, images=DIGITS):
    """Return the steps of one of RECIPES: 1-flow, pairs, small 2-flow, distillation, and their figures."""
    prefix, config = f"{images.name}/seed{seed}/recipe_{name}", f"configs/rectified_flow/digits_{name}.py"
    plain = {"config": config, "width": images.student_width}
    flow = train(f"{prefix}/1_flow", images, seed, FLOW_UPDATES, config=config, width=images.teacher_width)
    made = pairs(f"{prefix}/pairs", flow, config=config)
    student = train(f"{prefix}/2_flow", images, seed, REFLOW_UPDATES, pairs=made, **plain, **RECIPES[name]["reflow"])
    distilled = train(f"{prefix}/distilled", images, seed, DISTIL_UPDATES, pairs=made, start=student,
                      flow__flow_t_schedule="t0", **plain, **RECIPES[name]["distil"])
    return (flow, made, student, distilled, evaluate(flow, config=config, **ADAPTIVE, ode_tol=1e-3),
            *(evaluate(step, config=config, **ONE_STEP) for step in (student, distilled)))


MAIN_SEEDS, ABLATION_SEEDS, RECIPE_SEEDS = (0, 1, 2), (0, 1, 2), (3, 4, 5)


def digits_main(seeds=MAIN_SEEDS):
    """Return the main line on digits, seed by seed."""
    return [step for seed in seeds for step in main_line(DIGITS, seed, large=True).steps]


def fashion_main():
    """Return the main line on Fashion-MNIST, one seed."""
    return list(main_line(FASHION, 0, large=False).steps)


def digits_ablations(seeds=ABLATION_SEEDS):
    """Return the ablations on digits and the steps of the main line that they need, seed by seed."""
    found = []
    for seed in seeds:
        line = main_line(DIGITS, seed, large=True)
        found += [line.flow, line.pairs, *ablations(line)]
    return found


def digits_recipes(seeds=RECIPE_SEEDS):
    """Return both recipes on digits, seed by seed: seeds on which nothing was chosen."""
    return [step for seed in seeds for name in RECIPES for step in recipe(name, seed)]


STUDIES = {"digits": digits_main, "fashion": fashion_main, "ablations": digits_ablations, "recipes": digits_recipes}


def all_steps(names=tuple(STUDIES)):
    """Return the steps of the named studies, each once, in the order in which they are wanted."""
    return list(dict.fromkeys(step for name in names for step in STUDIES[name]()))
