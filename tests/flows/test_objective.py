"""The objectives: which distribution they train on, what they draw, what they cost, and which are refused."""

import copy
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flows import losses
from flows.objective import Draws, check_config, create_objective
from flows.rectified_flow import velocity_from_network
from runtime.terminal import UserError
from tests.helpers import Operations, config_of

SHAPE = (3, 4, 4)
EPS = 1e-3


def on_pairs(**fields):
    return config_of(data__reflow_data_root="pairs", **fields)


def noise(seed, count=6, device="cpu"):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)).to(device)


def batch_of(z0=None, z1=None, label=None):
    return types.SimpleNamespace(z0=z0, z1=noise(1) if z1 is None else z1, label=label)


class Kept(Draws):
    """Draws from a seed, which it keeps: `t`, the first times, and `z`, the first noise; `names` are all in order."""

    def __init__(self, seed=0, count=6, rows=slice(None), t=None, noise=None):
        super().__init__(torch.Generator().manual_seed(seed), count, rows)
        self.given, self.names, self.all_times, self.all_noise = (t, noise), [], [], []

    def noise(self, shape):
        self.names.append("noise")
        self.all_noise.append(super().noise(shape) if self.given[1] is None else self.given[1])
        return self.all_noise[-1]

    def times(self, *arguments):
        self.names.append("times")
        self.all_times.append(super().times(*arguments) if self.given[0] is None else self.given[0])
        return self.all_times[-1]

    t = property(lambda self: self.all_times[0])
    z = property(lambda self: self.all_noise[0])


class Recorder:
    """A velocity v = 0.5·x + t that keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, label=None):
        self.calls.append((x, t, label))
        return 0.5 * x + t.view(-1, 1, 1, 1)


class Student(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.embed = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Linear(5, 3)

    def forward(self, x, t999, label=None):
        embedded = 0 if label is None else self.embed(label).view(-1, 3, 1, 1)
        return self.conv(x) + t999.view(-1, 1, 1, 1) / 999 + embedded


# Which distribution is trained on


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["uniform", "u_shaped", "range_0.2_0.8"]), st.integers(0, 1000), st.floats(-5, 5))
def test_at_beta_one_training_on_pairs_is_plain_training_on_their_images(schedule, seed, shift):
    """Whatever noise the pairs hold: the network sees, and must predict, what plain 1-flow training shows it."""
    ours, theirs = Recorder(), Recorder()
    annealed = create_objective(on_pairs(flow__flow_t_schedule=schedule, training__x0_randomness="fix_1"))
    expected = create_objective(config_of(flow__flow_t_schedule=schedule))(theirs, batch_of(), Kept(seed), 0)
    assert torch.equal(annealed(ours, batch_of(z0=noise(2) + shift), Kept(seed), 0), expected)
    assert torch.equal(ours.calls[0][0], theirs.calls[0][0]) and torch.equal(ours.calls[0][1], theirs.calls[0][1])


@pytest.mark.parametrize(("schedule", "update"), [("fix_0", 0), ("warmup_10", 10), ("warmup_cos_10", 25)])
def test_at_beta_zero_pairs_come_through_untouched(schedule, update):
    """At t = 0 the network sees z0 itself, bit for bit; elsewhere the path between z0 and z1."""
    objective = create_objective(on_pairs(training__x0_randomness=schedule, flow__eps=0.0))
    z0, seen = noise(2), Recorder()
    objective(seen, batch_of(z0=z0), Kept(t=torch.tensor([0, 0, 0, 0.2, 0.5, 1.0])), update)
    x, t, _ = seen.calls[0]
    assert torch.equal(x[:3], z0[:3])
    place = t.view(-1, 1, 1, 1)
    assert torch.allclose(x, place * noise(1) + (1 - place) * z0, atol=1e-6)


def test_a_warmup_moves_the_noise_from_fresh_to_paired():
    objective = create_objective(on_pairs(training__x0_randomness="warmup_10", flow__eps=0.0,
                                          flow__flow_t_schedule="t0"))
    z0, seen = noise(2), Recorder()
    for update, beta in [(0, 1.0), (4, 0.6), (10, 0.0)]:
        draws = Kept()
        objective(seen, batch_of(z0=z0), draws, update)
        assert torch.allclose(seen.calls[-1][0], (1 - beta**2) ** 0.5 * z0 + beta * draws.z, atol=1e-6)


# What a loss is


@pytest.mark.parametrize("weight_schedule", ["uniform", "1mt"])
def test_the_plain_loss_is_the_papers_line_weighted_by_the_time_drawn(weight_schedule):
    objective, velocity = create_objective(config_of(training__weight_schedule=weight_schedule)), Recorder()
    found = objective(velocity, batch_of(), draws := Kept(), 0)
    z0, z1, t = draws.z, noise(1), draws.t.view(-1, 1, 1, 1)
    x_t = t * z1 + (1 - t) * z0
    expected = (0.5 * x_t + t - (z1 - z0)).square().mean(dim=(1, 2, 3))
    weight = (1 - draws.t) ** 2 if weight_schedule == "1mt" else 1
    assert torch.allclose(found, weight * expected, rtol=1e-5)


@pytest.mark.parametrize(("alpha", "place"), [("t0", 1e-3), ("t1", 1.0)])
def test_the_place_on_the_path_may_differ_from_the_time_the_network_sees(alpha, place):
    objective, seen = create_objective(config_of(flow__flow_alpha_t=alpha)), Recorder()
    objective(seen, batch_of(), draws := Kept(), 0)
    x, t, _ = seen.calls[0]
    assert torch.allclose(x, place * noise(1) + (1 - place) * draws.z, atol=1e-6)
    assert torch.equal(t, draws.t)


@pytest.mark.parametrize("use_teacher", [False, True])
def test_labels_reach_the_network_with_every_sample_of_theirs(use_teacher):
    label, seen, teacher = torch.eye(6), Recorder(), Recorder()
    objective = create_objective(on_pairs(flow__use_teacher=use_teacher), teacher)
    objective(seen, batch_of(z0=noise(2), label=label), Kept(), 0)
    (x, _, given_label), = seen.calls
    assert torch.equal(given_label, torch.cat([label, label]) if use_teacher else label) and len(x) == len(given_label)
    assert all(other is label for _, _, other in teacher.calls) and len(teacher.calls) == use_teacher


@pytest.mark.parametrize("fields", [{}, {"training__x0_randomness": "fix_0.5"}, {"flow__use_teacher": True}])
def test_a_sample_keeps_its_loss_when_the_batch_is_split(fields):
    objective = create_objective(on_pairs(**fields), Recorder())
    z0, z1 = noise(2), noise(1)
    whole = objective(Recorder(), batch_of(z0, z1), Kept(), 3)
    parts = [objective(Recorder(), batch_of(z0[a:b], z1[a:b]), Kept(rows=slice(a, b)), 3)
             for a, b in [(0, 2), (2, 3), (3, 6)]]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-6)


# Flow-guided distillation: the two guiding steps, in both forms, against hand-written lines


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


def guided(first_step, label=None, count=3, **fields):
    """Return (values, student, teacher, batch, fresh noise, guiding times) of a guided loss."""
    student, teacher = Linear(0.3, -0.2), Linear(0.7, 0.4)
    objective = create_objective(on_pairs(flow__use_teacher=True, flow__flow_t_schedule="t0",
                                          flow__guidance_first_step=first_step, **fields), teacher)
    batch, draws = batch_of(noise(1, count), noise(2, count), label), Kept(5, count)
    values = objective(student, batch, draws, 0)
    return values, student, teacher, batch, draws.z, draws.all_times[1].view(-1, 1, 1, 1)


@pytest.mark.parametrize("first_step", ["student", "teacher"])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("weight_schedule", ["uniform", "karras"])
def test_the_loss_is_distillation_on_pairs_plus_the_two_step_term(first_step, labelled, weight_schedule):
    found, _, _, batch, xi, t = guided(first_step, torch.eye(3) if labelled else None,
                                       training__weight_schedule=weight_schedule)

    def squared(difference):
        return difference.square().mean(dim=(1, 2, 3))

    def weight(t):
        return 1 if weight_schedule == "uniform" else (t / (1 - t + EPS)) ** 2 + 4

    number = torch.arange(3.0).view(-1, 1, 1, 1) if labelled else 0
    # the two lines of the method, on v = w·x + b·t + number
    x_t = xi + t * ((0.3 * xi - 0.2 * EPS if first_step == "student" else 0.7 * xi + 0.4 * EPS) + number)
    x_1 = x_t + (1 - t) * (0.7 * x_t + 0.4 * t + number)
    two_step = squared(0.3 * xi - 0.2 * EPS + number - (x_1 - xi))
    pairs = squared(0.3 * (EPS * batch.z1 + (1 - EPS) * batch.z0) - 0.2 * EPS + number - (batch.z1 - batch.z0))
    expected = weight(torch.tensor(EPS)) * pairs + weight(t.flatten()) * two_step
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first_step", ["student", "teacher"])
def test_the_gradient_reaches_the_student_only_and_as_if_the_target_were_a_number(first_step):
    values, student, teacher, batch, xi, t = guided(first_step)
    values.sum().backward()
    assert teacher.w.grad is None and teacher.b.grad is None
    start = torch.full((3,), EPS)
    u = (student if first_step == "student" else teacher)(xi, start)
    x_t = xi + t * u
    target = (x_t + (1 - t) * teacher(x_t, t) - xi).detach()
    x_eps = EPS * batch.z1 + (1 - EPS) * batch.z0
    by_hand = ((student(xi, start) - target).square().mean(dim=(1, 2, 3))
               + (student(x_eps, start) - (batch.z1 - batch.z0)).square().mean(dim=(1, 2, 3))).sum()
    expected = torch.autograd.grad(by_hand, list(student.parameters()))
    assert torch.allclose(torch.stack(expected), torch.stack([student.w.grad, student.b.grad]), rtol=1e-5)


@pytest.mark.parametrize(("first_step", "teacher_calls"), [("student", 1), ("teacher", 2)])
def test_the_student_is_called_once_and_the_teacher_without_gradient(first_step, teacher_calls):
    _, student, teacher, *_ = guided(first_step)
    assert student.calls == [(6, True)]
    assert teacher.calls == [(3, False)] * teacher_calls


def test_the_perceptual_distance_of_the_guided_term_starts_from_its_noise(monkeypatch):
    images = []
    monkeypatch.setattr("flows.losses.load_lpips", lambda device: lambda image, reference: (
        images.append((image, reference)) or torch.zeros(len(image))))
    *_, batch, xi, t = guided("student", training__loss_type="lpips")
    (_, true_image), (image, guided_image) = images
    u = 0.3 * xi - 0.2 * EPS
    x_t = xi + t * u
    assert torch.allclose(true_image, batch.z1, atol=1e-6)
    assert torch.allclose(image, xi + u, atol=1e-6)
    assert torch.allclose(guided_image, x_t + (1 - t) * (0.7 * x_t + 0.4 * t), atol=1e-6)


def test_the_guided_term_takes_fresh_noise_and_a_time_in_the_middle():
    *_, xi, t = guided("student", count=5000)
    times = t.flatten()
    assert stats.kstest(xi.flatten().numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(times.numpy(), stats.uniform(0.2, 0.6).cdf).pvalue > 1e-3
    assert times.min() >= 0.2 and times.max() <= 0.8


# What is drawn, and what it costs


@pytest.mark.parametrize(("config", "names"), [
    (config_of(), ["times", "noise"]),
    (on_pairs(), ["times"]),
    (on_pairs(training__x0_randomness="warmup_exp_5"), ["times", "noise"]),
    (on_pairs(flow__use_teacher=True), ["times", "noise", "times"]),
])
def test_only_what_is_needed_is_drawn_and_belongs_to_the_generator(config, names):
    first, again, other = Kept(), Kept(), Kept(1)
    for draws in (first, again, other):
        z0 = noise(2) if config.data.reflow_data_root else None
        create_objective(config, Recorder())(Recorder(), batch_of(z0), draws, 0)
    assert first.names == names
    for draw in ("all_times", "all_noise"):
        for one, same, another in zip(*(getattr(draws, draw) for draws in (first, again, other)), strict=True):
            assert torch.equal(one, same) and not torch.equal(one, another)


EVERY = [
    *({"flow__flow_t_schedule": name} for name in ["t0", "t1", "t0t1", "u_shaped", "exp_10", "fix_0.5", "range_0.2_0.8",
                                                   "4"]),
    *({"flow__flow_alpha_t": name} for name in ["t0", "t1"]),
    *({"training__x0_randomness": name} for name in ["fix_0.5", "warmup_10", "warmup_exp_10", "warmup_cos_10"]),
    *({"training__loss_type": name} for name in ["l2", "l1", "huber", "lpips", "lpips+l2", "lpips+l1", "lpips+huber",
                                                 "lpips/1mt+huber"]),
    *({"training__weight_schedule": name} for name in ["snr", "snr_inv", "snr+1", "karras", "truncated-snr", "1mt"]),
    {"training__reduce_mean": False},
    {"flow__use_teacher": True},
    {"flow__use_teacher": True, "flow__guidance_first_step": "teacher", "flow__flow_t_schedule": "t0",
     "training__loss_type": "lpips"},
]


@pytest.fixture(scope="module")
def meta_lpips(random_lpips):
    net = copy.deepcopy(random_lpips).to("meta")
    return lambda image, reference: losses.lpips_distance(net, image, reference)


@pytest.mark.parametrize("fields", EVERY, ids=lambda fields: "-".join(map(str, fields.values())))
@pytest.mark.parametrize("label", [False, True], ids=["", "labelled"])
def test_no_objective_reads_the_device(fields, label, meta_lpips, monkeypatch):
    """Forward and backward on the meta device, which has no values to read; nothing but the student gets gradients."""
    monkeypatch.setattr(losses, "load_lpips", lambda device: meta_lpips)
    student, teacher = Student().to("meta"), Student().to("meta")
    objective = create_objective(on_pairs(**fields), velocity_from_network(teacher), "meta")
    batch = batch_of(noise(2, device="meta"), noise(1, device="meta"),
                     torch.zeros(6, 5, device="meta") if label else None)
    with Operations() as operations:
        values = objective(velocity_from_network(student), batch, Draws(None, 6, device="meta"), 3)
        values.mean().backward()
    assert values.shape == (6,) and values.dtype == torch.float32 and values.device.type == "meta"
    assert student.conv.weight.grad is not None and all(p.grad is None for p in teacher.parameters())
    assert not Operations.READS & set(operations.names)


@pytest.mark.parametrize("config", [config_of(), on_pairs(), config_of(training__loss_type="l1")])
def test_a_plain_loss_costs_few_operations(config):
    """Path, target, distance and their backward passes together: the rest of a step is the network's."""
    objective = create_objective(config)
    batch, v = batch_of(None if not config.data.reflow_data_root else noise(2)), noise(3).requires_grad_()
    draws = Kept(t=torch.rand(6), noise=noise(4))
    with Operations() as operations:
        objective(lambda x, t, label: v, batch, draws, 0).backward(torch.ones(6))
    assert len(operations.names) <= 15, operations.names


# Which configs are refused


def test_every_objective_that_is_meant_is_accepted():
    check_config(config_of())
    for fields in EVERY:
        check_config(on_pairs(flow__pre_train_model="big.pth", **fields))
    check_config(on_pairs(flow__use_teacher=True, flow__teacher_model="big.pth"))
    check_config(on_pairs(flow__real_data_share=0.3, data__real_pairs_root="real"))
    check_config(config_of(data__num_channels=1, training__loss_type="lpips"))


@pytest.mark.parametrize(("config", "fields"), [
    (on_pairs(flow__use_teacher=True), ["flow.teacher_model", "flow.pre_train_model"]),
    (config_of(flow__use_teacher=True, flow__pre_train_model="big.pth"), ["flow.use_teacher", "data.reflow_data_root"]),
    (config_of(flow__flow_t_schedule="t0"), ["flow.flow_t_schedule", "data.reflow_data_root"]),
    (config_of(flow__flow_t_schedule="4"), ["flow.flow_t_schedule", "data.reflow_data_root"]),
    (config_of(training__x0_randomness="warmup_10"), ["training.x0_randomness", "data.reflow_data_root"]),
    (config_of(flow__real_data_share=0.3, data__real_pairs_root="real"), ["flow.real_data_share", "reflow_data_root"]),
    (on_pairs(flow__real_data_share=0.3), ["data.real_pairs_root"]),
    (on_pairs(flow__flow_t_schedule="range_0.8_0.2"), ["flow.flow_t_schedule", "range_0.8_0.2"]),
    (on_pairs(flow__flow_t_schedule="1"), ["flow.flow_t_schedule", "k > 1"]),
    (on_pairs(training__x0_randomness="fix_2"), ["training.x0_randomness"]),
    (config_of(data__num_channels=4, training__loss_type="lpips+l1"), ["training.loss_type", "data.num_channels"]),
])
def test_a_contradictory_objective_is_one_sentence_naming_its_fields(config, fields):
    with pytest.raises(UserError) as caught:
        check_config(config)
    message = str(caught.value)
    assert "\n" not in message and all(field in message for field in fields)
