"""LPIPS: the package's distance, without its traps. VGG16's weights here are random ones of its exact shapes."""

import copy
import functools
import types
import urllib.error

import lpips
import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from flows.losses import load_lpips, lpips_at_start, lpips_distance, lpips_huber
from flows.rectified_flow import point_on_path
from runtime.terminal import UserError

FILE = "hub/checkpoints/vgg16-397923af.pth"


def images(seed, count=2, channels=3, size=16):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def resized(x):
    return F.interpolate(x, (64, 64), mode="bilinear", align_corners=True)


def value_and_gradient(distance, image, *arguments):
    image = image.clone().requires_grad_()
    value = distance(image, *arguments)
    value.sum().backward()
    return value.detach().flatten(), image.grad


@pytest.fixture(scope="module")
def distance(torch_home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(torch_home))
        return load_lpips("cpu")


def test_value_and_gradient_are_the_packages_at_64_pixels_and_the_reference_gets_none(random_lpips, distance):
    image, reference = images(0), images(1).requires_grad_()
    value, gradient = value_and_gradient(distance, image, reference)
    expected, theirs = value_and_gradient(lambda x: random_lpips(resized(x), resized(images(1))), image)
    assert torch.allclose(value, expected, rtol=1e-5) and torch.allclose(gradient, theirs, rtol=1e-3, atol=1e-7)
    assert reference.grad is None and torch.equal(distance(image, image), torch.zeros(2))
    large, other = images(0, size=64), images(1, size=64)
    assert torch.allclose(distance(large, other), random_lpips(large, other).flatten(), rtol=1e-5)


def test_zero_features_give_finite_gradients_where_the_packages_normalisation_gives_nan():
    """With a trunk that hands on the image itself: its features are zero where the image is."""
    bare = types.SimpleNamespace(net=lambda x: [x], scaling_layer=lambda x: x, lins=[lambda x: x.sum(1, keepdim=True)])
    zero = torch.zeros(1, 3, 64, 64)
    assert value_and_gradient(lambda x: lpips.normalize_tensor(x).square(), zero)[1].isnan().all()
    for reference in (images(1, count=1), zero):
        for found in value_and_gradient(functools.partial(lpips_distance, bare), zero, reference):
            assert found.isfinite().all()


def test_a_constant_image_with_vanishing_features_gives_finite_gradients_where_the_package_gives_nan(random_lpips):
    """Of the mean colour, only the biases are left as features; the squares of these round to zero."""
    net = copy.deepcopy(random_lpips)
    for name, parameter in net.net.named_parameters():
        if name.endswith("bias"):
            parameter.fill_(1e-25)
    constant = net.scaling_layer.shift.expand(1, 3, 64, 64)
    reference = images(1, count=1, size=64)
    assert value_and_gradient(net, constant, reference)[1].isnan().any()
    value, gradient = value_and_gradient(functools.partial(lpips_distance, net), constant, reference)
    assert value.isfinite().all() and gradient.isfinite().all() and gradient.any()


def test_a_grey_image_counts_as_three_equal_channels(distance):
    grey, other = images(0, channels=1, size=8), images(1, channels=1, size=8)
    colour = distance(grey.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1))
    assert torch.allclose(distance(grey, other), colour, rtol=1e-6)


def test_autocast_does_not_reach_it(distance):
    image, reference = images(0), images(1)
    expected = distance(image, reference)
    with torch.autocast("cpu", torch.bfloat16):
        found = distance(image, reference)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    half = distance(image.bfloat16(), reference)
    assert half.dtype == torch.float32 and torch.allclose(half, expected, rtol=0.05)


def test_its_network_is_frozen_in_eval_mode_and_leaves_the_global_generator_alone(
        random_lpips, torch_home, monkeypatch):
    net = copy.deepcopy(random_lpips).train().requires_grad_()
    monkeypatch.setattr(lpips, "LPIPS", lambda **options: (torch.rand(1), net)[1])  # as its random weights are drawn
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    before = torch.get_rng_state()
    load_lpips("cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in net.modules())
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_it_compiles_in_one_graph_with_the_same_loss_and_gradient(distance):
    def loss(v, z0, z1, a):
        return lpips_huber(v, point_on_path(z0, z1, a, a), distance)

    arguments = images(2), images(0), images(1), torch.tensor([0.2, 0.6])
    eager = value_and_gradient(loss, *arguments)
    compiled = value_and_gradient(torch.compile(loss, backend="eager", fullgraph=True), *arguments)
    assert torch.allclose(eager[0], compiled[0], rtol=1e-5)
    assert torch.allclose(eager[1], compiled[1], rtol=1e-3, atol=1e-7)


def test_it_trains_a_distributed_network_with_dropout_in_train_mode(distance, tmp_path):
    """DistributedDataParallel sees the student's parameters only: each gets its gradient, LPIPS's get none."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        student = DistributedDataParallel(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Dropout()))
        student.train()
        x, z1 = images(0, size=8), images(1, size=8)
        point = point_on_path(x, z1, torch.zeros(2), torch.zeros(2))
        lpips_at_start(student(x), point, distance).mean().backward()
        assert all(p.grad.any() for p in student.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("state", ["absent", "truncated", "text", "other network"])
def test_weights_that_cannot_be_had_are_one_sentence_with_file_and_variable(
        state, random_lpips, torch_home, tmp_path, monkeypatch):
    def no_network(url, *args, **kwargs):
        raise urllib.error.URLError("no route to host")

    path = tmp_path / FILE
    path.parent.mkdir(parents=True)
    if state == "truncated":
        with open(torch_home / FILE, "rb") as whole:
            path.write_bytes(whole.read(1_000_000))
    elif state == "text":
        path.write_text("<html>not found</html>")
    elif state == "other network":
        torch.save({"0.weight": torch.zeros(64, 3, 3, 3)}, path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(lpips, "LPIPS", lambda **options: random_lpips)  # building one takes a second
    with pytest.raises(UserError) as caught:
        load_lpips("cpu")
    message = str(caught.value)
    assert str(path) in message and "TORCH_HOME" in message and "\n" not in message
