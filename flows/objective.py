"""The training objectives: from a batch and random numbers to one loss per sample.

Every objective is that of rectified flow, E w(t)·D(v(x_t, t), z1 - z0); the config selects the times t, the path α(t),
the annealing β, the distance D and the weight w. Flow-guided distillation adds a second term.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch

from flows import losses, schedules
from flows.rectified_flow import PathPoint, anneal, per_sample, point_on_path
from runtime.terminal import UserError

GUIDANCE_TIMES = (0.2, 0.8)  # range of the time t between the two guiding steps, as in the released code


class Draws:
    """The random numbers of one update, drawn for the global batch of `count` samples; `rows`, a slice, are returned.

    So a sample's numbers depend only on its index in the batch, not on how that is split over processes and
    accumulation steps. Each call draws from `generator` on `device`, so all processes must make the same calls.
    `scale`: the standard deviation of the noise.
    """

    def __init__(self, generator, count, rows=slice(None), device="cpu", scale=1.0):
        self.generator, self.count, self.rows, self.device, self.scale = generator, count, rows, device, scale

    def noise(self, shape):
        """Return normal noise, (rows, *shape)."""
        size = self.count, *shape
        return torch.normal(0.0, self.scale, size, generator=self.generator, device=self.device)[self.rows]

    def times(self, schedule, low, high):
        """Return times (rows,) in [low, high] drawn by a time schedule, see flows/schedules.py."""
        return schedule(self.generator, self.count, self.device, low, high)[self.rows]


@dataclasses.dataclass(frozen=True)
class Choices:
    """The parts of an objective that the config selects."""

    times: Callable  # time schedule, see flows/schedules.py
    alpha: Callable  # t (N,) → α (N,) of x_t = α·z1 + (1-α)·z0
    beta: Callable | None  # update number → β of annealing; None: no annealing
    distance: Callable  # (v, PathPoint) → (N,)
    weigh: Callable  # (losses, t), each (N,) → (N,)
    eps: float = 1e-3


def flow_loss(choices, velocity, batch, draws, update):
    """Return w(t)·D(v(x_t, t), z1 - z0) of each sample, float32 (N,): 1-rectified flow, reflow, one-step distillation.

    arXiv 2209.03003, equation 1, on images with fresh noise; arXiv 2407.12718, equation 9, on annealed pairs, and
    equation 8 where every t is eps. `velocity(x, t, label)`: the network's, called once; `batch`: see
    `datasets.Batch`; `draws`: see `Draws`; `update`: the number of the update, for annealing.
    """
    point = draw_point(choices, batch, draws, update)
    v = velocity(point.x_t, point.t, batch.label)
    return choices.weigh(choices.distance(v, point), point.t)


def guided_loss(choices, velocity, batch, draws, update, *, teacher, first_step="student"):
    """Return flow-guided distillation's loss of each sample, float32 (N,) (arXiv 2407.12718, equation 13).

    It is `flow_loss` plus the distance between one step from fresh noise ξ and two steps, x_t = ξ + t·u and
    x_1 = x_t + (1-t)·teacher(x_t, t) (equations 11 and 12), which get no gradient. There u is the teacher's velocity
    at (ξ, eps); in practice, and in the released code, the student's. One call evaluates the student on x_t and ξ.
    """
    point, xi = draw_point(choices, batch, draws, update), draws.noise(batch.z1.shape[1:])
    t = draws.times(schedules.uniform, *GUIDANCE_TIMES)
    start, label = torch.full_like(t, choices.eps), batch.label
    both_labels = None if label is None else torch.cat([label, label])
    v, v_xi = velocity(torch.cat([point.x_t, xi]), torch.cat([point.t, start]), both_labels).chunk(2)
    with torch.no_grad():
        u = v_xi if first_step == "student" else teacher(xi, start, label)
        x_t = xi + per_sample(t, xi) * u
        x_1 = x_t + per_sample(1 - t, xi) * teacher(x_t, t, label)
        guided = PathPoint(z0=xi, x_t=xi, t=start, alpha=torch.zeros_like(t), target=x_1 - xi)
    return choices.weigh(choices.distance(v, point), point.t) + choices.weigh(choices.distance(v_xi, guided), t)


def draw_point(choices, batch, draws, update):
    """Return the `PathPoint` of each sample: on the path from fresh, paired or annealed noise to its image."""
    t = draws.times(choices.times, choices.eps, 1.0)
    z0 = draws.noise(batch.z1.shape[1:]) if batch.z0 is None else batch.z0
    if choices.beta is not None:
        z0 = anneal(z0, draws.noise(batch.z1.shape[1:]), choices.beta(update))
    return point_on_path(z0, batch.z1, t, choices.alpha(t))


def create_objective(config, teacher=None, device="cpu"):
    """Return the objective of a config: `objective(velocity, batch, draws, update) -> losses (N,)` on `device`.

    `teacher`: the frozen teacher's `velocity(x, t, label)`. Raises UserError as `find_schedule` and `load_lpips`.
    """
    flow, training = config.flow, config.training
    annealed = config.data.reflow_data_root and training.x0_randomness != "fix_0"
    choices = Choices(
        times=schedules.create_time_schedule(flow.flow_t_schedule),
        alpha=functools.partial(schedules.ALPHA_SCHEDULES[flow.flow_alpha_t], eps=flow.eps),
        beta=schedules.create_annealing(training.x0_randomness) if annealed else None,
        distance=losses.create_distance(training.loss_type, training.reduce_mean, device),
        weigh=functools.partial(losses.WEIGHTS[training.weight_schedule], eps=flow.eps),
        eps=flow.eps,
    )
    if flow.use_teacher:
        return functools.partial(guided_loss, choices, teacher=teacher, first_step=flow.guidance_first_step)
    return functools.partial(flow_loss, choices)


def check_config(config):
    """Raise UserError if fields of the objective contradict each other; loads nothing."""
    flow, training, data = config.flow, config.training, config.data
    schedules.create_time_schedule(flow.flow_t_schedule)
    schedules.create_annealing(training.x0_randomness)
    if losses.DISTANCES[training.loss_type].lpips and data.num_channels not in (1, 3):
        raise UserError(f"config.training.loss_type {training.loss_type} compares colour or grey images, but "
                        f"config.data.num_channels is {data.num_channels}: choose l2, l1 or huber")
    if flow.use_teacher and not (flow.teacher_model or flow.pre_train_model):
        raise UserError("config.flow.use_teacher needs a teacher: name its checkpoint in config.flow.teacher_model, or "
                        "in config.flow.pre_train_model if the student starts from it too")
    if flow.real_data_share > 0 and not data.real_pairs_root:
        raise UserError("config.flow.real_data_share needs pairs of real images: make them with generate_data.py "
                        "--config.sampling.direction from_z1 and name their folder in config.data.real_pairs_root")
    times = str(flow.flow_t_schedule)
    need_pairs = {f"flow.flow_t_schedule {times}": times == "t0" or times.isdigit(),
                  "flow.use_teacher": flow.use_teacher, "flow.real_data_share": flow.real_data_share > 0,
                  f"training.x0_randomness {training.x0_randomness}": training.x0_randomness != "fix_0"}
    for field, needed in need_pairs.items():
        if needed and not data.reflow_data_root:
            raise UserError(f"config.{field} needs noise-image pairs: make them with generate_data.py and name their "
                            "folder in config.data.reflow_data_root")
