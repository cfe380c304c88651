"""What only a GPU can tell: the same numbers as the CPU, no waits of the host, the scripts at every precision.

SLIMFLOW_TEST_DEVICE=cuda runs these tests on a GPU, SLIMFLOW_TEST_DEVICE=cpu tries the tests themselves; otherwise they
are skipped. Scripts are started by subprocess: a process that has asked for CUDA cannot be forked.
"""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

DEVICE = os.environ.get("SLIMFLOW_TEST_DEVICE", "")
if not DEVICE or (DEVICE == "cuda" and not torch.cuda.is_available()):
    pytest.skip("needs SLIMFLOW_TEST_DEVICE=cuda and a GPU", allow_module_level=True)

from datasets import create_batches  # noqa: E402
from flows.rectified_flow import velocity_from_network  # noqa: E402
from flows.runge_kutta import rk45  # noqa: E402
from flows.samplers import create_sampler  # noqa: E402
from metrics.features import full_float32  # noqa: E402
from models.checkpoint import load_model  # noqa: E402
from runtime.devices import Processes, compiled, in_precision, set_deterministic, set_precision  # noqa: E402
from tests.helpers import DIGITS, config_of, overrides  # noqa: E402
from tests.models.released_numbers import fields_of, path_of  # noqa: E402
from tests.processes import HANGING  # noqa: E402
from train import Training  # noqa: E402
from training.update import ExponentialMovingAverage, UpdateStats, apply_update, create_optimizer  # noqa: E402

ON_GPU = DEVICE == "cuda"
TOLERANCES = {"fp32": 1e-5, "tf32": 3e-3, "bf16": 3e-2}


@pytest.fixture(autouse=True)
def equal_settings():
    set_precision("fp32")
    set_deterministic(False)
    torch.backends.cudnn.benchmark = False  # it would try ten algorithms for every layer of every network


def relative(found, wanted):
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", ["ncsnpp_cifar", "ncsnpp_deep", "ncsnpp_fourier_fir_residual", "dhariwal_cond"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_networks_compute_what_they_compute_on_a_cpu(name, precision, layout):
    net, there = (load_model(path_of(name), device=device, fields=fields_of(name)) for device in ("cpu", DEVICE))
    there = there.to(memory_format=layout)
    fields = net.config_fields
    x = torch.randn(8, fields["data.num_channels"], fields["data.image_size"], fields["data.image_size"])
    t, classes = torch.rand(8), fields["data.num_classes"]
    label = torch.eye(classes)[torch.arange(8) % classes] if classes else None
    with torch.no_grad():
        wanted = velocity_from_network(net)(x, t, label)
        set_precision(precision)
        velocity = velocity_from_network(in_precision(there, precision, torch.device(DEVICE)))
        found = velocity(x.to(DEVICE), t.to(DEVICE), None if label is None else label.to(DEVICE))
    assert found.dtype == torch.float32 and relative(found, wanted) < TOLERANCES[precision]


class Updates:
    """Updates of a few tensors from gradients made on the CPU."""

    def __init__(self, device, name):
        generator = torch.Generator().manual_seed(0)
        self.parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device))
                           for shape in ((16, 3, 3, 3), (16,), (10, 16))]
        config = config_of(optim__optimizer=name, optim__lr=1e-3, optim__weight_decay=0.01)
        self.optimizer = create_optimizer(self.parameters, config.optim)
        self.ema, self.stats = ExponentialMovingAverage(self.parameters, 0.9), UpdateStats(torch.device(device))

    def __call__(self, number, loss=1.0):
        generator = torch.Generator().manual_seed(number + 1)
        for p in self.parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device)
        loss = torch.tensor(loss, device=p.device)
        apply_update(self.optimizer, self.ema, self.stats, loss, grad_clip=1.0)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RAdam"])
def test_updates_lead_where_they_lead_on_a_cpu_and_a_broken_one_changes_nothing(name):
    here, there = Updates("cpu", name), Updates(DEVICE, name)
    for number in range(8):  # RAdam is rectified from the sixth on
        here(number)
        there(number)
    assert max(map(relative, there.parameters, here.parameters)) < 1e-5
    assert max(map(relative, there.ema.shadow_params, here.ema.shadow_params)) < 1e-5
    before = [t.clone() for t in (*there.parameters, *there.ema.shadow_params)]
    there(8, loss=float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, (*there.parameters, *there.ema.shadow_params), strict=True))
    assert there.stats.read()["nonfinite"] == 1


@pytest.mark.parametrize("name", ["Adam", "RAdam"])
def test_an_optimizer_state_of_the_gpu_continues_on_a_cpu(name):
    here, there = Updates("cpu", name), Updates(DEVICE, name)
    for number in range(7):
        here(number)
        there(number)
    here.optimizer.load_state_dict(copy.deepcopy(there.optimizer.state_dict()))
    here(7)
    there(7)
    assert max(map(relative, there.parameters, here.parameters)) < 1e-5


def create_training(**fields):
    own = {"model__nf": 8, "training__batch_size": 16, "optim__warmup": 0, "training__progress": "false"}
    config = config_of(DIGITS, **(own | fields))
    return Training(config, Processes(0, 1, torch.device(DEVICE, 0) if ON_GPU else torch.device("cpu")))


@pytest.mark.skipif(not ON_GPU, reason="fp16 needs CUDA")
def test_fp16_scale_falls_after_an_overflow_and_training_goes_on():
    training = create_training(training__precision="fp16")
    training.stats.scale.fill_(2.0**40)
    for number in range(40):
        training.update(number)
    stats = training.stats.read()
    assert 0 < stats["nonfinite"] < 40 and stats["scale"] < 2.0**40 and stats["consecutive"] == 0


@pytest.mark.skipif(not ON_GPU, reason="a CPU has nothing to wait for")
@pytest.mark.parametrize("on_device", ["true", "false"])
@pytest.mark.parametrize("optimizer", ["Adam", "RAdam"])
def test_an_update_waits_for_the_device_nowhere(on_device, optimizer):
    training = create_training(data__on_device=on_device, optim__optimizer=optimizer)
    for number in range(3):
        training.update(number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.update(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("on_device", ["true", "false"])
def test_batches_of_images_are_those_of_a_cpu_but_for_the_flips(on_device):
    config = config_of(DIGITS, data__on_device=on_device, data__num_classes=10)
    there, here = create_batches(config, DEVICE), create_batches(config, "cpu")
    for number in range(3):
        found, wanted = there.batch(number, 4, 12), here.batch(number, 4, 12)
        assert found.z1.device.type == DEVICE and torch.equal(found.label.cpu(), wanted.label)
        assert relative(found.z1, wanted.z1) < 1e-6


def test_deterministic_training_repeats_its_bits():
    ends = []
    for _ in range(2):
        training = create_training(training__deterministic=True)
        for number in range(5):
            training.update(number)
        ends.append([p.detach().clone() for p in training.network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_adaptive_steps_take_the_evaluations_that_they_take_on_a_cpu():
    found = {}
    for device in ("cpu", DEVICE):
        net = load_model(path_of("ncsnpp_cifar"), device=device, fields=fields_of("ncsnpp_cifar")).requires_grad_(False)
        size, channels = (net.config_fields[f"data.{name}"] for name in ("image_size", "num_channels"))
        z = torch.randn(6, channels, size, size, generator=torch.Generator().manual_seed(0)).to(device)
        found[device] = rk45(velocity_from_network(net), z, tol=1e-3, slots=4, shrink_slots=True)
    (x, nfe), (y, evaluations) = found["cpu"], found[DEVICE]
    assert relative(y, x) < 1e-3 and (nfe - evaluations).abs().max() <= 12


@pytest.mark.parametrize("sampler", ["heun", "rk45"])
def test_sampling_by_cuda_graphs_gives_what_it_gives_without(sampler):
    set_precision("fp32")
    config = config_of(training__compile=True, training__compile_mode="reduce-overhead", sampling__sample_N=6,
                       sampling__use_ode_sampler=sampler, sampling__ode_tol=1e-3)
    net = load_model(path_of("ncsnpp_cifar"), device=DEVICE, fields=fields_of("ncsnpp_cifar"))
    size, channels = (net.config_fields[f"data.{name}"] for name in ("image_size", "num_channels"))
    z = torch.randn(6, channels, size, size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    wanted, found = (create_sampler(config)(velocity_from_network(network), z, batch_size=4)[0]  # 4 images, then 2
                     for network in (net, compiled(net, config.training)))
    assert relative(found, wanted) < 1e-3


def test_features_in_full_float32_keep_cudnn():
    set_precision("tf32")
    with full_float32():
        assert torch.backends.cudnn.enabled and not torch.backends.cudnn.allow_tf32


def run(log, *arguments):
    """Run a script to its end. Its output goes to a file: a pipe stays open as long as the compiler's helpers live."""
    with open(log, "w") as opened:
        done = subprocess.run([sys.executable, *map(str, arguments)], stdout=opened, stderr=opened, timeout=HANGING)
    assert done.returncode == 0, log.read_text()[-2000:]


@pytest.mark.parametrize("own", ["tf32", "bf16", "fp16", "bf16 compiled"])
def test_the_scripts_run_and_a_run_continues(own, repository, tmp_path):
    precision, _, compiled = own.partition(" ")
    fields = {"model__nf": 8, "model__ch_mult": (1,), "model__attn_resolutions": (), "training__progress": "false",
              "training__precision": precision, "training__batch_size": 32, "eval__batch_size": 32}
    fields |= {"training__compile": True, "training__compile_mode": "reduce-overhead"} if compiled else {}

    def start(script, *arguments, **more):  # batches are equal, so that the compiler finds most graphs in its cache
        run(tmp_path / "log", repository / script, "--config", DIGITS, *arguments, *overrides(**(fields | more)))

    for updates in (20, 40):
        start("train.py", work_dir=tmp_path, expr="flow", training__snapshot_freq=20, training__record_iters=5,
              training__n_iters=updates)
    entries = [json.loads(line) for line in (tmp_path / "flow/log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries] == list(range(5, 41, 5)) and all(e["loss"] < 2 for e in entries[1:])
    checkpoint = tmp_path / "flow/checkpoints/checkpoint_2.pth"
    state = torch.load(checkpoint, weights_only=True)
    assert {t.device.type for t in state["model"].values()} == {"cpu"}
    start("generate_data.py", "--ckpt_path", checkpoint, "--data_root", tmp_path / "pairs",
          sampling__total_number_of_samples=128, sampling__ode_tol=1e-2)
    start("train.py", work_dir=tmp_path, expr="distilled", training__n_iters=10, flow__use_teacher=True,
          data__reflow_data_root=tmp_path / "pairs", flow__flow_t_schedule="t0", flow__pre_train_model=checkpoint,
          training__batch_size=16)
    start("evaluation_fid.py", "--ckpt_dir", checkpoint, eval__num_samples=256, sampling__use_ode_sampler="euler")
    start("image_sampling.py", "--sampling_dir", checkpoint, sampling__use_ode_sampler="euler")
