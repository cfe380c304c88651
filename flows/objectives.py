"""The training objective: from a batch and its random draws to one loss per sample.

Every objective is the one of rectified flow, E ‖v(x_t, t) - (z1 - z0)‖², with its parts chosen by the config: the
coupling (images with fresh noise, pairs, annealed pairs), the times, the distance, the weight, and the guided term.
The README (Objectives) says which switch is which equation.
"""

import dataclasses
from collections.abc import Callable

import torch

from flows import annealing, distillation, losses, perceptual, time_schedules
from flows.rectified_flow import point_on_path
from runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The guided term of flow-guided distillation: who guides, and who takes the first step."""

    teacher_velocity: Callable
    first_step: Callable
    eps: float


@dataclasses.dataclass(frozen=True)
class Objective:
    """One training objective; calling it gives the losses of a batch, deterministic given the draws.

    `random`: what an update draws, name → function (generator, count, shape, device) → (count, …).
    """

    random: dict
    path_place: Callable  # t (N,) → a (N,)
    beta: Callable  # update number → β of annealing, 0 where there is none
    distance: Callable  # (v, PathPoint) → (N,)
    weigh: Callable  # (losses, t), each (N,), → (N,)
    guidance: Guidance | None

    def draw(self, generator, count, shape, device):
        """Return every random tensor that an update needs: name → (count, …), from `generator` on `device`.

        `count`: samples of the global batch; `shape`: (C, H, W).
        """
        return {name: draw(generator, count, shape, device) for name, draw in self.random.items()}

    def __call__(self, velocity, batch, draws, update):
        """Return the weighted loss of each sample, float32 (N,).

        `velocity`: the student's, called once; `batch`: with z0 (None for images), z1 (N, C, H, W) and label;
        `draws`: what `draw` gave, or the same slice of each of its tensors as of the batch; `update`: its number.
        """
        point = self._point(batch, draws, update)
        if self.guidance is None:
            return self._weighted(velocity(point.x_t, point.t, batch.label), point, point.t)
        return self._guided(velocity, point, batch.label, draws)

    def _point(self, batch, draws, update):
        """Return where on which path each sample stands."""
        z0 = draws["z0"] if batch.z0 is None else batch.z0
        if "xi" in draws:
            z0 = annealing.anneal(z0, draws["xi"], self.beta(update))
        return point_on_path(z0, batch.z1, draws["t"], self.path_place(draws["t"]))

    def _guided(self, velocity, point, label, draws):
        """Return the loss on the pairs plus the guided term on fresh noise, the student's two passes in one call.

        Its memory is that of two calls, whose activations would both wait for the backward pass.
        """
        xi, t = draws["guidance_xi"], draws["guidance_t"]
        start = torch.full_like(t, self.guidance.eps)
        both_labels = None if label is None else torch.cat([label, label])
        v, v_xi = velocity(torch.cat([point.x_t, xi]), torch.cat([point.t, start]), both_labels).chunk(2)

        teacher = self.guidance.teacher_velocity
        first = self.guidance.first_step(teacher, xi, start, label, v_xi)
        target = distillation.two_step_velocity(xi, first, t, label, teacher)
        guided = distillation.guided_point(xi, start, target)
        return self._weighted(v, point, point.t) + self._weighted(v_xi, guided, t)

    def _weighted(self, v, point, t):
        return self.weigh(self.distance(v, point), t)


def create_objective(config, teacher_velocity=None, device="cpu"):
    """Return the `Objective` of a config.

    `teacher_velocity`: `velocity(x, t, label)` of the frozen teacher in eval mode, needed with flow.use_teacher.
    `device`: where the losses are computed (LPIPS is loaded there). Raises UserError for values out of range and
    where LPIPS lacks its weights.
    """
    eps = config.flow.eps
    on_pairs = bool(config.data.reflow_data_root)
    draw_time = time_schedules.create_time_schedule(config.flow.flow_t_schedule, eps)
    random = {"t": _times(draw_time)}
    beta = annealing.create_annealing(config.training.x0_randomness if on_pairs else "fix_0")
    if not on_pairs:
        random["z0"] = _noise
    elif config.training.x0_randomness != "fix_0":
        random["xi"] = _noise
    guidance = None
    if config.flow.use_teacher:
        random |= {"guidance_xi": _noise, "guidance_t": _times(distillation.draw_guidance_time)}
        first_step = distillation.create_first_step(config.flow.guidance_first_step)
        guidance = Guidance(teacher_velocity, first_step, eps)
    return Objective(
        random=random,
        path_place=time_schedules.create_path_place(config.flow.flow_alpha_t, eps),
        beta=beta,
        distance=losses.create_distance(config.training.loss_type, config.training.reduce_mean,
                                        lambda: perceptual.load_lpips(device)),
        weigh=losses.create_weighting(config.training.weight_schedule, eps),
        guidance=guidance,
    )


def check_config(config):
    """Raise UserError where the fields of the objective do not fit together; nothing is loaded."""
    flow, training, data = config.flow, config.training, config.data
    time_schedules.create_time_schedule(flow.flow_t_schedule, flow.eps)
    time_schedules.create_path_place(flow.flow_alpha_t, flow.eps)
    annealing.create_annealing(training.x0_randomness)
    losses.create_weighting(training.weight_schedule, flow.eps)
    losses.create_distance(training.loss_type, training.reduce_mean, load_lpips=lambda: None)
    distillation.create_first_step(flow.guidance_first_step)
    if "lpips" in training.loss_type and data.num_channels not in (1, 3):
        raise UserError(f"config.training.loss_type {training.loss_type} compares colour or grey images, but "
                        f"config.data.num_channels is {data.num_channels}: choose l2, l1 or huber")
    if flow.use_teacher and not (flow.teacher_model or flow.pre_train_model):
        raise UserError("config.flow.use_teacher needs a teacher: name its checkpoint in config.flow.teacher_model, or "
                        "in config.flow.pre_train_model if the student starts from it too")
    if flow.real_data_share > 0 and not data.real_pairs_root:
        raise UserError(f"config.flow.real_data_share is {flow.real_data_share:g}, but config.data.real_pairs_root is "
                        "empty: make such pairs with generate_data.py --config.sampling.direction from_z1")
    if not data.reflow_data_root:
        _refuse_pair_objectives(config)


def _refuse_pair_objectives(config):
    """Raise UserError for an objective that is one on pairs."""
    schedule, x0_randomness = str(config.flow.flow_t_schedule), config.training.x0_randomness
    share = config.flow.real_data_share
    for field, value, needs_pairs in [
        ("flow.flow_t_schedule", schedule, schedule == "t0" or schedule.isdigit()),
        ("flow.use_teacher", "true", config.flow.use_teacher),
        ("training.x0_randomness", x0_randomness, x0_randomness != "fix_0"),
        ("flow.real_data_share", f"{share:g}", share > 0),
    ]:
        if needs_pairs:
            raise UserError(f"config.{field} {value} needs noise-image pairs: make them with generate_data.py and name "
                            "their folder in config.data.reflow_data_root")


def _noise(generator, count, shape, device):
    return torch.randn(count, *shape, generator=generator, device=device)


def _times(draw):
    """Return a time schedule as a draw that is told the shape of a sample, too."""
    return lambda generator, count, shape, device: draw(generator, count, device)
