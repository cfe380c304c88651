"""The objectives: which distribution they train on, what they draw, what they cost, and which are refused."""

import copy
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from configs.default import get_default_config
from flows import perceptual
from flows.objectives import check_config, create_objective
from flows.rectified_flow import velocity_from_network
from runtime.errors import UserError

SHAPE = (3, 4, 4)


def config_of(**fields):
    """The default config with fields changed: flow__use_teacher=True is flow.use_teacher."""
    config = get_default_config()
    for name, value in fields.items():
        group, field = name.split("__")
        config[group][field] = value
    return config


def on_pairs(**fields):
    return config_of(data__reflow_data_root="pairs", **fields)


def noise(seed, count=6, device="cpu"):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed)).to(device)


def batch_of(z0=None, z1=None, label=None):
    return types.SimpleNamespace(z0=z0, z1=noise(1) if z1 is None else z1, label=label)


def draw(objective, seed=0, count=6):
    return objective.draw(torch.Generator().manual_seed(seed), count, SHAPE, "cpu")


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
    plain = create_objective(config_of(flow__flow_t_schedule=schedule))
    annealed = create_objective(on_pairs(flow__flow_t_schedule=schedule, training__x0_randomness="fix_1"))
    draws = draw(annealed, seed)
    ours, theirs = Recorder(), Recorder()
    found = annealed(ours, batch_of(z0=noise(2) + shift), draws, 0)
    expected = plain(theirs, batch_of(), {"t": draws["t"], "z0": draws["xi"]}, 0)
    assert torch.equal(found, expected)
    assert torch.equal(ours.calls[0][0], theirs.calls[0][0]) and torch.equal(ours.calls[0][1], theirs.calls[0][1])


def test_plain_and_annealed_training_draw_the_same_times_and_noise():
    plain = draw(create_objective(config_of()), count=3000)
    annealed = draw(create_objective(on_pairs(training__x0_randomness="fix_1")), seed=1, count=3000)
    assert stats.ks_2samp(plain["t"].numpy(), annealed["t"].numpy()).pvalue > 1e-3
    for values in (plain["z0"], annealed["xi"]):
        assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 1e-3


@pytest.mark.parametrize(("schedule", "update"), [("fix_0", 0), ("warmup_10", 10), ("warmup_cos_10", 25)])
def test_at_beta_zero_pairs_come_through_untouched(schedule, update):
    """At t = 0 the network sees z0 itself, bit for bit; elsewhere the path between z0 and z1."""
    objective = create_objective(on_pairs(training__x0_randomness=schedule, flow__eps=0.0))
    z0, seen = noise(2), Recorder()
    draws = draw(objective)
    draws["t"][:3] = 0
    objective(seen, batch_of(z0=z0), draws, update)
    x, t, _ = seen.calls[0]
    assert torch.equal(x[:3], z0[:3])
    place = t.view(-1, 1, 1, 1)
    assert torch.allclose(x, place * noise(1) + (1 - place) * z0, atol=1e-6)


def test_a_warmup_moves_the_noise_from_fresh_to_paired():
    objective = create_objective(on_pairs(training__x0_randomness="warmup_10", flow__eps=0.0,
                                          flow__flow_t_schedule="t0"))
    z0, draws, seen = noise(2), draw(objective), Recorder()
    for update, beta in [(0, 1.0), (4, 0.6), (10, 0.0)]:
        assert objective.beta(update) == pytest.approx(beta)
        objective(seen, batch_of(z0=z0), draws, update)
        assert torch.allclose(seen.calls[-1][0], (1 - beta**2) ** 0.5 * z0 + beta * draws["xi"], atol=1e-6)


def test_images_are_never_annealed_and_get_fresh_noise():
    objective = create_objective(config_of(training__x0_randomness="warmup_10"))
    assert objective.beta(3) == 0 and set(draw(objective)) == {"t", "z0"}


# What a loss is


def test_the_plain_loss_is_the_papers_line():
    objective, velocity = create_objective(config_of()), Recorder()
    draws = draw(objective)
    z0, z1, t = draws["z0"], noise(1), draws["t"].view(-1, 1, 1, 1)
    x_t = t * z1 + (1 - t) * z0
    expected = (0.5 * x_t + t - (z1 - z0)).square().mean(dim=(1, 2, 3))
    assert torch.allclose(objective(velocity, batch_of(), draws, 0), expected, rtol=1e-5)


@pytest.mark.parametrize(("alpha", "place"), [("t0", 1e-3), ("t1", 1.0)])
def test_the_place_on_the_path_may_differ_from_the_time_the_network_sees(alpha, place):
    objective, seen = create_objective(config_of(flow__flow_alpha_t=alpha)), Recorder()
    draws = draw(objective)
    objective(seen, batch_of(), draws, 0)
    x, t, _ = seen.calls[0]
    assert torch.allclose(x, place * noise(1) + (1 - place) * draws["z0"], atol=1e-6)
    assert torch.equal(t, draws["t"])


def test_losses_are_weighed_by_the_time_drawn():
    draws = draw(create_objective(config_of()))
    plain = create_objective(config_of())(Recorder(), batch_of(), draws, 0)
    weighed = create_objective(config_of(training__weight_schedule="1mt"))(Recorder(), batch_of(), draws, 0)
    assert torch.allclose(weighed, plain * (1 - draws["t"]) ** 2)


@pytest.mark.parametrize("use_teacher", [False, True])
def test_labels_reach_the_network_with_every_sample_of_theirs(use_teacher):
    label, seen, teacher = torch.eye(6), Recorder(), Recorder()
    objective = create_objective(on_pairs(flow__use_teacher=use_teacher), teacher)
    objective(seen, batch_of(z0=noise(2), label=label), draw(objective), 0)
    (x, _, given_label), = seen.calls
    assert torch.equal(given_label, torch.cat([label, label]) if use_teacher else label) and len(x) == len(given_label)
    assert all(other is label for _, _, other in teacher.calls) and len(teacher.calls) == use_teacher


@pytest.mark.parametrize("fields", [{}, {"training__x0_randomness": "fix_0.5"}, {"flow__use_teacher": True}])
def test_a_sample_keeps_its_loss_when_the_batch_is_split(fields):
    objective = create_objective(on_pairs(**fields), Recorder())
    draws, z0, z1 = draw(objective), noise(2), noise(1)
    whole = objective(Recorder(), batch_of(z0, z1), draws, 3)
    parts = [objective(Recorder(), batch_of(z0[a:b], z1[a:b]), {k: d[a:b] for k, d in draws.items()}, 3)
             for a, b in [(0, 2), (2, 3), (3, 6)]]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-6)


# What is drawn, and what it costs


@pytest.mark.parametrize(("config", "names"), [
    (config_of(), {"t", "z0"}),
    (on_pairs(), {"t"}),
    (on_pairs(training__x0_randomness="warmup_exp_5"), {"t", "xi"}),
    (on_pairs(flow__use_teacher=True), {"t", "guidance_xi", "guidance_t"}),
])
def test_only_what_is_needed_is_drawn_and_belongs_to_the_generator(config, names):
    objective = create_objective(config, Recorder())
    first, again, other = draw(objective), draw(objective), draw(objective, seed=1)
    assert set(first) == names
    for name, value in first.items():
        assert value.shape == ((6,) if name in ("t", "guidance_t") else (6, *SHAPE))
        assert torch.equal(value, again[name]) and not torch.equal(value, other[name])


class Operations(TorchDispatchMode):
    """The names of the operations dispatched within."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


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
    return lambda image, reference: perceptual.lpips_distance(net, image, reference)


@pytest.mark.parametrize("fields", EVERY, ids=lambda fields: "-".join(map(str, fields.values())))
@pytest.mark.parametrize("label", [False, True], ids=["", "labelled"])
def test_no_objective_reads_the_device(fields, label, meta_lpips, monkeypatch):
    """Forward and backward on the meta device, which has no values to read; nothing but the student gets gradients."""
    monkeypatch.setattr(perceptual, "load_lpips", lambda device: meta_lpips)
    student, teacher = Student().to("meta"), Student().to("meta")
    objective = create_objective(on_pairs(**fields), velocity_from_network(teacher), "meta")
    batch = batch_of(noise(2, device="meta"), noise(1, device="meta"),
                     torch.zeros(6, 5, device="meta") if label else None)
    with Operations() as operations:
        draws = objective.draw(None, 6, SHAPE, "meta")
        losses = objective(velocity_from_network(student), batch, draws, 3)
        losses.mean().backward()
    assert losses.shape == (6,) and losses.dtype == torch.float32 and losses.device.type == "meta"
    assert student.conv.weight.grad is not None and all(p.grad is None for p in teacher.parameters())
    assert not {"_local_scalar_dense", "nonzero", "item", "equal"} & set(operations.names)


@pytest.mark.parametrize("config", [config_of(), on_pairs(), config_of(training__loss_type="l1")])
def test_a_plain_loss_costs_few_operations(config):
    """Path, target, distance and their backward passes together: the rest of a step is the network's."""
    objective = create_objective(config)
    batch, draws = batch_of(None if not config.data.reflow_data_root else noise(2)), draw(objective)
    v = noise(3).requires_grad_()
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
    (on_pairs(flow__flow_alpha_t="t2"), ["flow.flow_alpha_t"]),
    (on_pairs(training__x0_randomness="fix_2"), ["training.x0_randomness"]),
    (on_pairs(training__loss_type="l3"), ["training.loss_type"]),
    (on_pairs(training__weight_schedule="snr2"), ["training.weight_schedule"]),
    (on_pairs(flow__guidance_first_step="nobody"), ["flow.guidance_first_step"]),
    (config_of(data__num_channels=4, training__loss_type="lpips+l1"), ["training.loss_type", "data.num_channels"]),
])
def test_a_contradictory_objective_is_one_sentence_naming_its_fields(config, fields):
    with pytest.raises(UserError) as caught:
        check_config(config)
    message = str(caught.value)
    assert "\n" not in message and all(field in message for field in fields)
