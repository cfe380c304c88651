"""train.py against a second computation of the same training: plain torch, written from the formulas alone.

Losses, weights and averages of six updates must agree. Only the network is shared (recorded numbers of its own).
"""

import types

import numpy as np
import pytest
import torch

from configs.command_line import config_to_dict
from datasets import load_images
from models.checkpoint import write_checkpoint
from models.create import create_model
from runtime.devices import Processes
from tests.helpers import DIGITS, config_of
from train import Training

UPDATES, BATCH, PAIRS, SEED = 6, 8, 20, 7  # the second epoch of the pairs begins within the third batch
ORDER, FLIP, DRAWS, DROPOUT = 4, 5, 7, 8  # the streams of runtime/seeds.py
LEARNING_RATE, WARMUP, RATE, EPS, CLIP = 0.01, 4, 0.5, 1e-3, 2.5
SCALE = 1.25  # standard deviation of the noise


def seed_of(*numbers):
    """Return torch's seed of (seed, update, …, stream)."""
    high, low = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return (int(high) << 31) ^ int(low)


def generator(update, stream):
    """Return the generator of an update's stream."""
    return torch.Generator().manual_seed(seed_of(SEED, update, stream))


def indices(update, count):
    """Return the samples of an update: epoch e in the order of Philox words of (seed, e)."""
    def place(position):
        epoch, inside = divmod(position, count)
        words = np.random.Philox(key=[SEED, ORDER], counter=[0, 0, 0, epoch]).random_raw(count)
        return np.argsort(words, kind="stable")[inside]

    return [place(position) for position in range(update * BATCH, (update + 1) * BATCH)]


def mirrored(images, update):
    """Return images with half of them mirrored, as the update's coins fall."""
    coins = torch.rand(BATCH, generator=generator(update, FLIP)) < 0.5
    return torch.stack([image.flip(-1) if coin else image for image, coin in zip(images, coins, strict=True)])


def images_loss(network, data, teacher, update):
    """E ‖v(x_t, t) - (z1 - z0)‖², t and z0 drawn."""
    z1 = mirrored(data.z1[indices(update, len(data.z1))], update)
    draws = generator(update, DRAWS)
    t, z0 = EPS + torch.rand(BATCH, generator=draws) * (1 - EPS), SCALE * torch.randn(z1.shape, generator=draws)
    return path_loss(network, z0, z1, t)


def annealed_loss(network, data, teacher, update):
    """The same on pairs, their noise annealed: z0' = sqrt(1-β²)·z0 + β·ξ, β = 1 - i/4."""
    chosen = indices(update, PAIRS)
    z0, z1 = mirrored(data.z0[chosen], update), mirrored(data.z1[chosen], update)
    draws = generator(update, DRAWS)
    t, xi = EPS + torch.rand(BATCH, generator=draws) * (1 - EPS), SCALE * torch.randn(z1.shape, generator=draws)
    beta = max(0.0, 1 - update / 4)
    return path_loss(network, (1 - beta**2) ** 0.5 * z0 + beta * xi, z1, t)


def guided_loss(network, data, teacher, update):
    """Distillation at t = eps plus ‖v(ξ) - (x_1 - ξ)‖², x_t = ξ + t·v(ξ), x_1 = x_t + (1-t)·teacher(x_t, t)."""
    chosen = indices(update, PAIRS)
    z0, z1 = data.z0[chosen], data.z1[chosen]
    draws = generator(update, DRAWS)
    xi = SCALE * torch.randn(z1.shape, generator=draws)
    t = 0.2 + 0.6 * torch.rand(BATCH, generator=draws)
    start = torch.full((2 * BATCH,), EPS)
    v, v_xi = network(torch.cat([(1 - EPS) * z0 + EPS * z1, xi]), 999 * start).chunk(2)
    s = t.view(-1, 1, 1, 1)
    with torch.no_grad():
        x_t = xi + s * v_xi
        target = x_t + (1 - s) * teacher(x_t, 999 * t) - xi
    return (v - (z1 - z0)).square().mean() + (v_xi - target).square().mean()


def path_loss(network, z0, z1, t):
    """Return the mean squared error of the velocity at t on the straight paths."""
    s = t.view(-1, 1, 1, 1)
    return (network(s * z1 + (1 - s) * z0, 999 * t) - (z1 - z0)).square().mean()


def train_by_hand(network, loss_of, data, teacher, warmup):
    """Yield (loss, gradient norm) of each update of Adam with clipping, warm-up and an average of the weights."""
    network.train().to(memory_format=torch.channels_last)  # dropout draws in the order of memory
    parameters = list(network.parameters())
    data.average = [p.detach().clone() for p in parameters]
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    for update in range(UPDATES):
        torch.manual_seed(seed_of(SEED, update, 0, DROPOUT))
        loss = loss_of(network, data, teacher, update)
        gradients = torch.autograd.grad(loss, parameters)
        norm = sum(g.double().square().sum() for g in gradients).sqrt()
        rate, n = LEARNING_RATE * (min(1.0, update / warmup) if warmup else 1.0), update + 1
        decay = min(RATE, (1 + n) / (10 + n))
        with torch.no_grad():
            for p, g, m, v, average in zip(parameters, gradients, first, second, data.average, strict=True):
                g = g * min(1.0, CLIP / float(norm))
                m.copy_(0.9 * m + 0.1 * g)
                v.copy_(0.999 * v + 0.001 * g * g)
                p -= rate * (m / (1 - 0.9**n)) / ((v / (1 - 0.999**n)).sqrt() + 1e-8)
                average.copy_(decay * average + (1 - decay) * p)
        yield loss.item(), norm.item()


@pytest.fixture
def data(tmp_path):
    """A folder of pairs, and a teacher whose averages are other weights than its raw ones."""
    z0, z1 = (torch.randn(PAIRS, 1, 8, 8, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    (tmp_path / "pairs" / "0").mkdir(parents=True)
    for name, array in (("z0", z0), ("z1", z1.clamp(-1, 1))):
        np.save(tmp_path / "pairs" / "0" / f"{name}.npy", array.numpy())
    return types.SimpleNamespace(z0=z0, z1=z1.clamp(-1, 1), pairs=str(tmp_path / "pairs"), teacher=None,
                                 teacher_path=str(tmp_path / "teacher.pth"))


def tiny_config():
    """The config that all three trainings share."""
    return config_of(DIGITS, seed=SEED, expr="reference", model__nf=8, model__ch_mult=(1, 2), model__num_res_blocks=1,
                     model__dropout=0.3, model__attn_resolutions=(4,), model__ema_rate=RATE, model__init_scale=1.0,
                     optim__lr=LEARNING_RATE, optim__warmup=WARMUP, optim__grad_clip=CLIP, training__batch_size=BATCH,
                     training__n_iters=UPDATES, sampling__init_noise_scale=SCALE)


def write_teacher(config, path):
    """Write a checkpoint whose averaged weights differ from the raw ones; return (network, teacher)."""
    torch.manual_seed(3)
    raw, averaged = create_model(config), create_model(config).eval()
    write_checkpoint(path, {"model": raw.state_dict(), "step": 1, "optimizer": {}, "config": config_to_dict(config),
                            "ema": {"decay": RATE, "num_updates": 1, "shadow_params": list(averaged.parameters())}})
    return raw, averaged


@pytest.mark.parametrize("loss_of", [images_loss, annealed_loss, guided_loss])
def test_six_updates_are_those_of_a_computation_by_hand(loss_of, data, repository, monkeypatch):
    monkeypatch.chdir(repository)
    config, warmup = tiny_config(), WARMUP
    if loss_of is images_loss:
        config.data.random_flip = True
        data.z1 = torch.from_numpy(np.array(load_images(config).images)).float() / 127.5 - 1
    else:
        config.data.reflow_data_root = data.pairs
    if loss_of is annealed_loss:
        config.training.x0_randomness, config.flow.h_flip = "warmup_4", True
    torch.manual_seed(SEED)
    network, teacher = create_model(config), None
    if loss_of is guided_loss:
        network, teacher = write_teacher(config, data.teacher_path)
        config.flow.update(flow_t_schedule="t0", use_teacher=True, pre_train_model=data.teacher_path)
        config.flow.flow_alpha_t = "uniform"
        warmup = 0  # none with pre_train_model
    start = [p.detach().clone() for p in network.parameters()]
    training = Training(config, Processes(0, 1, torch.device("cpu")))
    by_hand = list(train_by_hand(network, loss_of, data, teacher, warmup))
    assert min(norm for _, norm in by_hand) < CLIP < max(norm for _, norm in by_hand)  # clipped now and then
    for update, expected in enumerate(by_hand):
        training.update(update)
        stats = training.stats.read()
        training.stats.restart()
        assert (stats["loss_sum"], stats["norm_sum"]) == pytest.approx(expected, rel=2e-4), update
    for ours, theirs in ((training.network.parameters(), network.parameters()),
                         (training.ema.shadow_params, data.average)):
        error, change = 0.0, 0.0
        for a, b, before in zip(ours, theirs, start, strict=True):
            error, change = error + (a - b).norm() ** 2, change + (b - before).norm() ** 2
        assert change > 0 and error < 1e-4 * change
