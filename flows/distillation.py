"""Flow-guided distillation: a student's single step follows two steps of guidance (arXiv 2407.12718)."""

import torch

from flows.rectified_flow import PathPoint, per_sample
from flows.time_schedules import uniform
from runtime.errors import UserError

draw_guidance_time = uniform(0.2, 0.8)  # t of the second step


def two_step_velocity(xi, first, t, label, teacher_velocity):
    """Return x_1 - ξ, the mean velocity of two steps from noise, without gradient: (N, C, H, W).

    x_t = ξ + t·u and x_1 = x_t + (1-t)·teacher(x_t, t) (arXiv 2407.12718, Flow-Guided Distillation).
    `xi`: noise (N, C, H, W); `first`: u, the velocity of the first step; `t`: (N,) in (0, 1); `label`: or None.
    """
    with torch.no_grad():
        x_t = xi + per_sample(t, xi) * first.detach()
        x_1 = x_t + per_sample(1 - t, xi) * teacher_velocity(x_t, t, label)
        return x_1 - xi


def student_first_step(teacher_velocity, xi, start, label, student_v):
    """Return u of the released code: the student's own velocity at (ξ, eps), the pass that is its prediction."""
    return student_v


def teacher_first_step(teacher_velocity, xi, start, label, student_v):
    """Return u of the paper's equation: the teacher's velocity at (ξ, eps)."""
    with torch.no_grad():
        return teacher_velocity(xi, start, label)


def create_first_step(name):
    """Return who takes the first step, as `flow.guidance_first_step` names it. Raises UserError for another name."""
    choices = {"student": student_first_step, "teacher": teacher_first_step}
    if name not in choices:
        raise UserError(f"flow.guidance_first_step is {name!r}: use one of {', '.join(choices)}")
    return choices[name]


def guided_point(xi, start, target):
    """Return the `PathPoint` of the guided term: the network sees the noise ξ itself, at time `start` (N,)."""
    return PathPoint(z0=xi, x_t=xi, t=start, a=torch.zeros_like(start), target=target)
