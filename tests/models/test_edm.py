"""EDM's networks: their recorded outputs, their velocities, and what of them is refused."""

import math

import pytest
import torch

from configs.default import get_default_config
from flows.rectified_flow import velocity_from_network
from flows.samplers import create_sampler
from models import edm, edm_pickle
from models.checkpoint import load_matching, load_model, load_with_config, read_checkpoint, write_checkpoint
from models.create import create_from_fields
from models.released import to_released
from runtime.terminal import UserError
from tests.helpers import TINY, config_of
from tests.models.edm_networks import OWN, READABLE, golden_file, golden_numbers
from tests.models.released_numbers import fields_of
from tests.models.test_checkpoint import tiny_checkpoint


def labels(net, numbers, name="label"):
    return numbers[name].float() if net.config_fields["data.num_classes"] else None


def denoise(net, x, sigma, label):
    """D(x; σ) of a velocity: x_t = t·x and v = (D - x_t)/(1-t)."""
    t = 1 / (1 + sigma.double())
    at = t.view(-1, 1, 1, 1)
    x_t = (x * at).float()
    return x_t + (1 - at) * velocity_from_network(net)(x_t, t.float(), label)


@pytest.mark.parametrize("name", READABLE)
@torch.no_grad()
def test_recorded_outputs_come_back(name):
    """Wrong names, orders of rows, filters or scales would each show."""
    net, (about, numbers) = load_model(golden_file(f"{name}.pkl")), golden_numbers(name)
    c_noise, inner = numbers["c_noise"].float().flatten(), net.net
    noise_input = c_noise.exp() if getattr(inner, "fourier", False) else c_noise
    output = inner(numbers["network_input"], noise_input, labels(net, numbers))
    assert (output - numbers["network_output"]).abs().max() < 2e-5
    sigma = numbers["sigma"].flatten()
    limit = torch.full_like(sigma, 1e-5)
    if about["class_name"] != "EDMPrecond":  # there D is the small difference of large numbers
        limit = torch.where(sigma < 10.5, 1e-4, 2e-3)
    error = (denoise(net, numbers["x"], sigma, labels(net, numbers)) - numbers["denoised"]).abs().amax((1, 2, 3))
    assert (error < limit).all(), error
    if "denoised_unlabelled" in numbers:
        unlabelled = denoise(net, numbers["x"], sigma, torch.zeros_like(numbers["label"]).float())
        assert (unlabelled - numbers["denoised_unlabelled"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", READABLE)
def test_every_tensor_is_that_of_the_file_to_the_last_bit(name):
    """The reader's tensors have the recorded names and shapes, and each is somewhere in the network, unchanged."""
    file, (about, _) = golden_file(f"{name}.pkl"), golden_numbers(name)
    snapshot, state = edm_pickle.read_snapshot(file, file), load_model(file).state_dict()
    assert {key: list(value.shape) for key, value in snapshot.tensors.items()} == {
        key: shape for key, (shape, _) in about["state_dict"].items()}
    assert snapshot.arguments == about["init_kwargs"]
    ours = [tuple(sorted(value.flatten().tolist())) for value in state.values()]
    for key, value in snapshot.tensors.items():
        if "augment" not in key and "resample_filter" not in key:
            assert tuple(sorted(value.flatten().tolist())) in ours, key


@pytest.mark.parametrize("kind", edm.SIGMA_RANGE)
@torch.no_grad()
def test_velocity_is_that_of_the_denoiser_at_every_time(kind):
    """The closed forms against (D - x_t)/(1-t) in float64, on both sides of the clamp; edm is finite at both ends."""
    torch.manual_seed(0)
    net = create_from_fields(TINY | {"model.preconditioning": kind, "model.init_scale": 1.0}).double().eval()
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.003, 0.02, 0.3, 0.9, 0.99, 0.9999], dtype=torch.float64)
    at, sigma = t.view(-1, 1, 1, 1), (1 - t) / t
    s, noise = sigma.view(-1, 1, 1, 1), net.noise_input(t)
    scaled = {"edm": x / at / (s**2 + 0.25).sqrt(), "vp": x / at / (s**2 + 1).sqrt(), "ve": x / at}[kind]
    out = net.net(scaled, noise)
    denoised = {"edm": 0.25 / (s**2 + 0.25) * x / at + s / 2 / (s**2 + 0.25).sqrt() * out, "vp": x / at - s * out,
                "ve": x / at + s * out}[kind]
    torch.testing.assert_close(net(x, 999 * t), (denoised - x) / (1 - at), rtol=1e-9, atol=1e-7)
    if kind == "edm":
        assert net(x, 999 * torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)).isfinite().all()


def test_noise_levels_are_clamped_to_what_the_network_knows():
    """Without the clamp a network sees, near t = 0 and t = 1, levels that it was never trained on."""
    t = torch.tensor([1e-3, 1.0])
    for kind, (low, high) in edm.SIGMA_RANGE.items():
        net = edm.Preconditioned(torch.nn.Identity(), kind)
        assert torch.equal(net.noise_input(t), net.noise_input(1 / (1 + torch.tensor([high, low]))))
    vp = edm.Preconditioned(torch.nn.Identity(), "vp").noise_input(1 / (1 + torch.tensor([0.5])))
    beta = 19.9 * (vp / 999) ** 2 / 2 + 0.1 * vp / 999
    assert math.isclose((beta.exp() - 1).sqrt().item(), 0.5, rel_tol=1e-4)


@pytest.mark.parametrize("sampler, reverse", [("rk45", False), ("rk45", True), ("euler", True), ("heun", False)])
def test_samplers_run_on_a_snapshot_in_both_directions(sampler, reverse):
    net, (_, numbers) = load_model(golden_file("edm_adm_cond.pkl")), golden_numbers("edm_adm_cond")
    config = config_of(sampling__use_ode_sampler=sampler, sampling__sample_N=3, sampling__ode_tol=0.1)
    x, nfe = create_sampler(config, reverse=reverse)(velocity_from_network(net), numbers["latents"].float()[:2],
                                                     labels(net, numbers, "sample_label")[:2])
    assert x.isfinite().all() and (nfe >= 3).all()


def test_architecture_comes_from_the_file_and_any_config_serves():
    file, config = golden_file("edm_ddpmpp_cond.pkl"), get_default_config()
    changed, net, _ = load_with_config(file, config, frozenset())
    assert (changed.data.image_size, changed.data.num_classes, changed.model.preconditioning) == (16, 10, "edm")
    assert net.licence_note and not net.training
    config.data.image_size = 64
    with pytest.raises(UserError, match="data.image_size is 16 in the checkpoint and 64 here"):
        load_with_config(file, config, frozenset(["data.image_size"]))


def test_preconditioning_of_a_checkpoint_without_one_cannot_be_asked_for(data_folder):
    """A released velocity read as a denoiser would give noise without a word."""
    path = data_folder / "golden/ncsnpp_cifar.pth"
    config = config_of(**(fields_of("ncsnpp_cifar") | {"model.preconditioning": "edm"}))
    assert load_with_config(path, config, frozenset())[0].model.preconditioning == "none"
    with pytest.raises(UserError, match="model.preconditioning is none in the checkpoint and edm here"):
        load_with_config(path, config, frozenset(["model.preconditioning"]))


def test_preconditioned_checkpoint_of_ours_is_read_again_and_kept_from_the_released_layout(tmp_path):
    net, state = tiny_checkpoint(**{"model.preconditioning": "edm", "data.num_classes": 2})
    write_checkpoint(tmp_path / "checkpoint_1.pth", state)
    again = load_model(tmp_path / "checkpoint_1.pth")
    assert again.config_fields == net.config_fields and again.kind == "edm"
    with pytest.raises(UserError, match="released layout"):
        to_released(state, net)


@pytest.mark.parametrize("change, sentence", [
    (lambda s: s.update(class_name="iDDPMPrecond"), "its preconditioning is 'iDDPMPrecond'"),
    (lambda s: s["attributes"].update(sigma_data=1.0), "its sigma_data is 1.0"),
    (lambda s: s["arguments"].update(encoder_type="skip"), "its encoder_type is 'skip'"),
    (lambda s: s["arguments"].update(decoder_type="skip"), "its decoder_type is 'skip'"),
    (lambda s: s["arguments"].update(channel_mult_emb=2), "its channel_mult_emb is 2"),
    (lambda s: s["arguments"].update(channel_mult_noise=1), "its channel_mult_noise is 1"),
    (lambda s: s["arguments"].update(model_type="UViT"), "its model_type is 'UViT'"),
    (lambda s: s["arguments"].update(rope=True), "it has the argument 'rope'"),
    (lambda s: s["arguments"].update(num_blocks=2**40), "it has fewer tensors than blocks"),
    (lambda s: s["arguments"].update(num_blocks=2**13), "fewer tensors than blocks"),
    (lambda s: s["arguments"].update(channel_mult=[1] * 3000), "it has fewer tensors than blocks"),
    (lambda s: s["arguments"].update(img_resolution=2**30), "data.image_size must be at most 4096"),
    (lambda s: s["arguments"].update(label_dim=-1), "data.num_classes must be at least 0"),
    (lambda s: s["arguments"].update(label_dim=3), "net.class_features.linear.weight is missing"),
    (lambda s: s["arguments"].update(img_resolution=24), "it has the tensor 'enc.16x16_conv.weight'"),
    (lambda s: s["arguments"].update(resample_filter=[1, 2, 2, 1]), "resample_filter is not the filter"),
    (lambda s: s["tensors"].pop("model.map_layer0.bias"), "net.time_embedding.linear0.bias is missing"),
    (lambda s: s["tensors"].update({"model.extra.weight": torch.zeros(1)}), "it has the tensor 'extra.weight'"),
    (lambda s: s["tensors"].update({"model.map_layer0.bias": torch.zeros(1)}), "its shape is not that"),
])
def test_network_that_ours_cannot_be_is_refused_by_name(change, sentence, monkeypatch):
    """Each would otherwise compute something else than EDM does, or take for ever."""
    file = golden_file("edm_ncsnpp.pkl")
    fields = edm_pickle.read_snapshot(file, file)._asdict()
    change(fields)
    monkeypatch.setattr(edm_pickle, "read_snapshot", lambda file, path: edm_pickle.Snapshot(**fields))
    with pytest.raises(UserError) as refused:
        edm.read_checkpoint("x.pkl", "x.pkl", create_from_fields)
    assert sentence in str(refused.value) and "x.pkl" in str(refused.value)


def test_truncated_file_is_called_damaged(tmp_path):
    content = golden_file("edm_ncsnpp.pkl").read_bytes()
    (tmp_path / "half.pkl").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="half.pkl cannot be read: it is cut short"):
        load_model(tmp_path / "half.pkl")


@pytest.mark.parametrize("steps", [5, 18])
@pytest.mark.parametrize("name", READABLE)
def test_recorded_images_come_back_from_their_latents(name, steps):
    """sampling.use_ode_sampler edm is the deterministic sampler of EDM's FID protocol."""
    net, (about, numbers) = load_model(golden_file(f"{name}.pkl")), golden_numbers(name)
    low, high = edm.SIGMA_RANGE[net.kind]
    config = config_of(sampling__use_ode_sampler="edm", sampling__sample_N=steps, sampling__sigma_max=min(80.0, high),
                       sampling__sigma_min=max(0.002, low))
    label = labels(net, numbers, "sample_label")
    images, nfe = create_sampler(config)(velocity_from_network(net), numbers["latents"].float(), label)
    limit = 1e-4 if about["class_name"] == "EDMPrecond" else 2e-3
    assert (images - numbers[f"images_{steps}"]).abs().max() < limit
    assert nfe.tolist() == [2 * steps - 1] * len(images)


def student_of(name, **changes):
    """Return a network in training of the architecture of a recorded one, apart from `changes`, freshly initialised."""
    torch.manual_seed(1)
    return create_from_fields(read_checkpoint(golden_file(f"{name}.pkl"))["fields"] | changes)


@pytest.mark.parametrize("name", OWN)
@torch.no_grad()
def test_student_starts_as_the_velocity_of_its_teacher(name):
    """flow.pre_train_model with a snapshot: the first output gives the recorded denoised images."""
    student, (_, numbers) = student_of(name), golden_numbers(name)
    _, unmatched = load_matching(student, golden_file(f"{name}.pkl"))
    student.eval()
    error = denoise(student, numbers["x"], numbers["sigma"].flatten(), labels(student, numbers)) - numbers["denoised"]
    assert not unmatched and error.abs().max() < 1e-5


@pytest.mark.parametrize("file, changes, sentence", [
    ("edm/edm_ncsnpp.pkl", {"model.preconditioning": "none"}, "model.preconditioning is edm in .* and none here"),
    ("edm/edm_ncsnpp.pkl", {"model.preconditioning": "vp"}, "model.preconditioning is edm in .* and vp here"),
    ("edm/edm_ncsnpp.pkl", {"model.ch_mult": [1, 1]}, r"model.ch_mult is \[1, 2\] in .* and \[1, 1\] here"),
    ("edm/edm_ncsnpp.pkl", {"model.fir": False}, "model.fir is True in .* and False here"),  # no tensor shows it
    ("golden/ncsnpp_cifar.pth", {}, "model.preconditioning is none in the checkpoint and edm here"),
])
def test_weights_that_would_mean_something_else_are_not_copied(data_folder, file, changes, sentence):
    """Copied into a plain velocity network they would train on from a random start without a word."""
    with pytest.raises(UserError, match=sentence):
        load_matching(student_of("edm_ncsnpp", **changes), data_folder / file)
