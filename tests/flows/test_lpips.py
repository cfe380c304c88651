"""LPIPS: the package's distance, without its traps. VGG16's weights here are random ones of its exact shapes."""

import copy
import shutil
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


@pytest.fixture(scope="module")
def distance(torch_home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(torch_home))
        return load_lpips("cpu")


@pytest.fixture
def no_network(monkeypatch):
    """Downloads fail at once, as on a machine without network."""
    def fail(url, *args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)


def test_the_value_is_the_packages_at_64_pixels(random_lpips, distance):
    image, reference = images(0), images(1)

    def resized(x):
        return F.interpolate(x, (64, 64), mode="bilinear", align_corners=True)

    expected = random_lpips(resized(image), resized(reference)).flatten()
    assert torch.allclose(distance(image, reference), expected, rtol=1e-5)
    assert torch.equal(distance(image, image), torch.zeros(2))
    same_size = random_lpips(images(0, size=64), images(1, size=64)).flatten()
    assert torch.allclose(distance(images(0, size=64), images(1, size=64)), same_size, rtol=1e-5)


def test_the_gradient_is_the_packages_and_reaches_the_first_image_only(random_lpips, distance):
    ours, theirs, reference = images(0).requires_grad_(), images(0).requires_grad_(), images(1).requires_grad_()
    distance(ours, reference).sum().backward()
    scaled = F.interpolate(theirs, (64, 64), mode="bilinear", align_corners=True)
    random_lpips(scaled, F.interpolate(images(1), (64, 64), mode="bilinear", align_corners=True)).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-3, atol=1e-7)
    assert reference.grad is None


def test_zero_features_give_finite_gradients_where_the_packages_normalisation_gives_nan():
    """With a trunk that hands on the image itself: its features are zero where the image is."""
    bare = types.SimpleNamespace(net=lambda x: [x], scaling_layer=lambda x: x, lins=[lambda x: x.sum(1, keepdim=True)])
    theirs = torch.zeros(1, 3, 64, 64, requires_grad=True)
    lpips.normalize_tensor(theirs).square().sum().backward()
    assert theirs.grad.isnan().all()
    for reference in (images(1, count=1), torch.zeros(1, 3, 16, 16)):
        ours = torch.zeros(1, 3, 16, 16, requires_grad=True)
        value = lpips_distance(bare, ours, reference)
        value.sum().backward()
        assert value.isfinite().all() and ours.grad.isfinite().all()


def test_a_constant_image_with_vanishing_features_gives_finite_gradients_where_the_package_gives_nan(random_lpips):
    """Of the mean colour, only the biases are left as features; the squares of these round to zero."""
    net = copy.deepcopy(random_lpips)
    for name, parameter in net.net.named_parameters():
        if name.endswith("bias"):
            parameter.fill_(1e-25)
    constant = net.scaling_layer.shift.expand(1, 3, 64, 64)
    reference = images(1, count=1, size=64)
    theirs = constant.clone().requires_grad_()
    net(theirs, reference).sum().backward()
    assert theirs.grad.isnan().any()
    ours = constant.clone().requires_grad_()
    value = lpips_distance(net, ours, reference)
    value.sum().backward()
    assert value.isfinite().all() and ours.grad.isfinite().all() and ours.grad.any()


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


def test_its_network_is_frozen_in_eval_mode_and_leaves_the_global_generator_alone(torch_home, monkeypatch):
    kept = []
    original = lpips.LPIPS

    def keep(**options):
        kept.append(original(**options))
        return kept[0]

    monkeypatch.setattr(lpips, "LPIPS", keep)
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    before = torch.get_rng_state()
    load_lpips("cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module.training for module in kept[0].modules())
    assert not any(parameter.requires_grad for parameter in kept[0].parameters())


def test_it_compiles_in_one_graph_with_the_same_loss_and_gradient(distance):
    def loss(v, z0, z1, a):
        point = point_on_path(z0, z1, a, a)
        return lpips_huber(v, point, distance)

    found = []
    for call in (loss, torch.compile(loss, backend="eager", fullgraph=True)):
        v = images(2).requires_grad_()
        losses = call(v, images(0), images(1), torch.tensor([0.2, 0.6]))
        losses.sum().backward()
        found.append((losses.detach(), v.grad))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-7)


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


def test_weights_that_cannot_be_had_are_one_sentence_with_file_and_variable(
        random_lpips, tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(lpips, "LPIPS", lambda **options: random_lpips)
    with pytest.raises(UserError) as caught:
        load_lpips("cpu")
    message = str(caught.value)
    assert str(tmp_path / FILE) in message and "TORCH_HOME" in message and "\n" not in message


@pytest.mark.parametrize("damage", ["truncated", "text", "other network"])
def test_a_damaged_weights_file_is_one_sentence_naming_it(
        damage, random_lpips, torch_home, tmp_path, monkeypatch, no_network):
    path = tmp_path / FILE
    path.parent.mkdir(parents=True)
    if damage == "truncated":
        shutil.copy(torch_home / FILE, path)
        with open(path, "r+b") as opened:
            opened.truncate(1_000_000)
    elif damage == "text":
        path.write_text("<html>not found</html>")
    else:
        torch.save({"0.weight": torch.zeros(64, 3, 3, 3)}, path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(lpips, "LPIPS", lambda **options: random_lpips)  # building one takes a second
    with pytest.raises(UserError) as caught:
        load_lpips("cpu")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
