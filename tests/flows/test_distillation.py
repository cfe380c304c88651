"""Flow-guided distillation: the two guiding steps, in both forms, against hand-written lines."""

import types

import pytest
import torch
from scipy import stats

from configs.default import get_default_config
from flows.distillation import create_first_step, draw_guidance_time, two_step_velocity
from flows.objectives import create_objective
from runtime.errors import UserError

EPS = 1e-3
SHAPE = (2, 4, 4)


def noise(seed, count=3):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


class Linear(torch.nn.Module):
    """v(x, t, label) = w·x + b·t + the class number: a velocity whose steps can be written down."""

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = torch.nn.Parameter(torch.tensor(w)), torch.nn.Parameter(torch.tensor(b))
        self.calls = []

    def forward(self, x, t, label=None):
        self.calls.append((len(x), torch.is_grad_enabled()))
        number = 0 if label is None else label.argmax(1).view(-1, 1, 1, 1)
        return self.w * x + self.b * t.view(-1, 1, 1, 1) + number


def guided_objective(first_step, teacher, **fields):
    config = get_default_config()
    config.data.reflow_data_root = "pairs"
    config.flow.use_teacher = True
    config.flow.flow_t_schedule = "t0"
    config.flow.guidance_first_step = first_step
    for name, value in fields.items():
        config.training[name] = value
    return create_objective(config, teacher)


@pytest.mark.parametrize("first_step", ["student", "teacher"])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("weight_schedule", ["uniform", "karras"])
def test_the_loss_is_distillation_on_pairs_plus_the_two_step_term(first_step, labelled, weight_schedule):
    student, teacher = Linear(0.3, -0.2), Linear(0.7, 0.4)
    objective = guided_objective(first_step, teacher, weight_schedule=weight_schedule)
    label = torch.eye(3) if labelled else None
    batch = types.SimpleNamespace(z0=noise(1), z1=noise(2), label=label)
    draws = objective.draw(torch.Generator().manual_seed(5), 3, SHAPE, "cpu")
    found = objective(student, batch, draws, 0)

    def squared(difference):
        return difference.square().mean(dim=(1, 2, 3))

    def weight(t):
        return 1 if weight_schedule == "uniform" else (t / (1 - t + EPS)) ** 2 + 4

    number = torch.arange(3.0).view(-1, 1, 1, 1) if labelled else 0
    z0, z1, xi, t = batch.z0, batch.z1, draws["guidance_xi"], draws["guidance_t"].view(-1, 1, 1, 1)
    # the two lines of the method, on v = w·x + b·t + number
    x_t = xi + t * ((0.3 * xi - 0.2 * EPS if first_step == "student" else 0.7 * xi + 0.4 * EPS) + number)
    x_1 = x_t + (1 - t) * (0.7 * x_t + 0.4 * t + number)
    guided = squared(0.3 * xi - 0.2 * EPS + number - (x_1 - xi))
    pairs = squared(0.3 * (EPS * z1 + (1 - EPS) * z0) - 0.2 * EPS + number - (z1 - z0))
    expected = weight(torch.tensor(EPS)) * pairs + weight(t.flatten()) * guided
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first_step", ["student", "teacher"])
def test_the_gradient_reaches_the_student_only_and_as_if_the_target_were_a_number(first_step):
    student, teacher = Linear(0.3, -0.2), Linear(0.7, 0.4)
    objective = guided_objective(first_step, teacher)
    batch = types.SimpleNamespace(z0=noise(1), z1=noise(2), label=None)
    draws = objective.draw(torch.Generator().manual_seed(5), 3, SHAPE, "cpu")
    objective(student, batch, draws, 0).sum().backward()
    assert teacher.w.grad is None and teacher.b.grad is None

    xi, start = draws["guidance_xi"], torch.full((3,), EPS)
    u = (student if first_step == "student" else teacher)(xi, start).detach()
    target = two_step_velocity(xi, u, draws["guidance_t"], None, teacher)
    x_eps = EPS * batch.z1 + (1 - EPS) * batch.z0
    by_hand = ((student(xi, start) - target).square().mean(dim=(1, 2, 3))
               + (student(x_eps, start) - (batch.z1 - batch.z0)).square().mean(dim=(1, 2, 3))).sum()
    expected = torch.autograd.grad(by_hand, list(student.parameters()))
    assert torch.allclose(torch.stack(expected), torch.stack([student.w.grad, student.b.grad]), rtol=1e-5)
    assert not target.requires_grad


@pytest.mark.parametrize(("first_step", "teacher_calls"), [("student", 1), ("teacher", 2)])
def test_the_student_is_called_once_and_the_teacher_without_gradient(first_step, teacher_calls):
    student, teacher = Linear(0.3, -0.2), Linear(0.7, 0.4)
    objective = guided_objective(first_step, teacher)
    batch = types.SimpleNamespace(z0=noise(1), z1=noise(2), label=None)
    objective(student, batch, objective.draw(torch.Generator(), 3, SHAPE, "cpu"), 0)
    assert student.calls == [(6, True)]
    assert teacher.calls == [(3, False)] * teacher_calls


def test_the_perceptual_distance_of_the_guided_term_starts_from_its_noise(monkeypatch):
    images = []
    monkeypatch.setattr("flows.perceptual.load_lpips", lambda device: lambda image, reference: (
        images.append((image, reference)) or torch.zeros(len(image))))
    student, teacher = Linear(0.3, -0.2), Linear(0.7, 0.4)
    objective = guided_objective("student", teacher, loss_type="lpips")
    batch = types.SimpleNamespace(z0=noise(1), z1=noise(2), label=None)
    draws = objective.draw(torch.Generator().manual_seed(5), 3, SHAPE, "cpu")
    objective(student, batch, draws, 0)
    (_, true_image), (image, guided_image) = images
    xi, t = draws["guidance_xi"], draws["guidance_t"].view(-1, 1, 1, 1)
    u = 0.3 * xi - 0.2 * EPS
    x_t = xi + t * u
    assert torch.allclose(true_image, batch.z1, atol=1e-6)
    assert torch.allclose(image, xi + u, atol=1e-6)
    assert torch.allclose(guided_image, x_t + (1 - t) * (0.7 * x_t + 0.4 * t), atol=1e-6)


def test_the_guided_term_takes_fresh_noise_and_a_time_in_the_middle():
    objective = guided_objective("student", Linear(0.7, 0.4))
    draws = objective.draw(torch.Generator().manual_seed(0), 5000, (1, 2, 2), "cpu")
    assert stats.kstest(draws["guidance_xi"].flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(draws["guidance_t"].numpy(), stats.uniform(0.2, 0.6).cdf).pvalue > 1e-3
    times = draw_guidance_time(torch.Generator().manual_seed(1), 5000, "cpu")
    assert times.min() >= 0.2 and times.max() <= 0.8


def test_a_wrong_first_step_is_one_sentence_naming_the_field():
    with pytest.raises(UserError, match="flow.guidance_first_step"):
        create_first_step("nobody")
