"""What both networks promise whatever their options: shapes, gradients, start, device, compiler, precision, cost."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from models.create import create_from_fields
from tests.helpers import TINY, Operations

NCSNPP = TINY | {"model.init_scale": 1.0}
DHARIWAL = TINY | {"model.name": "DhariwalUNet", "model.nf": 32, "data.num_classes": 3}
BOTH = pytest.mark.parametrize("fields", [NCSNPP, DHARIWAL], ids=["ncsnpp", "DhariwalUNet"])


def batch(fields, count=2, generator_seed=0):
    """Return (x, 999·t, label or None) for a network of these fields."""
    generator = torch.Generator().manual_seed(generator_seed)
    size, channels = fields["data.image_size"], fields.get("data.num_channels", 3)
    x = torch.randn(count, channels, size, size, generator=generator)
    classes = fields.get("data.num_classes", 0)
    label = torch.eye(classes)[torch.arange(count) % classes] if classes else None
    return x, 999 * torch.rand(count, generator=generator), label


def lively(fields):
    """Return a network whose every layer matters: none starts at zero."""
    torch.manual_seed(0)
    net = create_from_fields(fields)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net


legal = {
    "model.ch_mult": st.lists(st.integers(1, 2), min_size=1, max_size=3).map(tuple),
    "model.num_res_blocks": st.integers(1, 2),
    "data.image_size": st.sampled_from([8, 12]),
    "data.num_channels": st.integers(1, 4),
    "model.attn_resolutions": st.sampled_from([(), "first"]),
}
legal_ncsnpp = st.fixed_dictionaries(legal | {
    "model.nf": st.sampled_from([4, 8, 12]),
    "model.embedding_type": st.sampled_from(["positional", "fourier"]),
    "model.conditional": st.just(True),
    "model.resblock_type": st.sampled_from(["biggan", "ddpm"]),
    "model.fir": st.booleans(),
    "model.fir_kernel": st.sampled_from([(1, 3, 3, 1), (1, 2, 1), (1, 1)]),
    "model.progressive": st.sampled_from(["none", "output_skip", "residual"]),
    "model.progressive_input": st.sampled_from(["none", "input_skip", "residual"]),
    "model.skip_rescale": st.booleans(),
    "model.resamp_with_conv": st.booleans(),
    "model.scale_by_sigma": st.booleans(),
    "model.nonlinearity": st.sampled_from(["swish", "elu", "lrelu"]),
    "model.init_scale": st.just(1.0),
    "model.progressive_combine": st.sampled_from(["sum", "cat"]),
})
legal_dhariwal = st.fixed_dictionaries(legal | {
    "model.name": st.just("DhariwalUNet"),
    "model.nf": st.sampled_from([4, 32]),
    "data.num_classes": st.sampled_from([0, 2]),
})


@settings(max_examples=25, deadline=None)
@given(fields=st.one_of(legal_ncsnpp, legal_dhariwal))
def test_every_legal_network_has_its_shape_and_trains_every_parameter(fields):
    fields = dict(fields)
    if fields["model.attn_resolutions"] == "first":
        fields["model.attn_resolutions"] = (fields["data.image_size"],)
    if len(fields["model.ch_mult"]) == 1:
        fields["model.progressive"] = fields["model.progressive_input"] = "none"
    if fields.get("model.progressive_input") != "input_skip":
        fields["model.progressive_combine"] = "sum"
    net = lively(fields)
    x, t999, label = batch(fields, count=3)
    out = net(x, t999 + 1, label)
    assert out.shape == x.shape and out.dtype == torch.float32 and out.isfinite().all()
    (out * torch.linspace(0.1, 1, out.numel()).reshape(out.shape)).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_unconditional_network_ignores_the_time():
    """model.conditional false: the projections of the time stay, as in the released layout, and are not used."""
    net = lively(NCSNPP | {"model.conditional": False})
    x, t999, _ = batch(NCSNPP | {"data.image_size": 16})  # one network takes images of other sizes, too
    out = net(x, t999)
    assert out.shape == x.shape and torch.equal(out, net(x, t999 / 2))
    out.sum().backward()
    idle = {name: p for name, p in net.named_parameters() if p.grad is None}
    assert {name.split(".")[-2] for name in idle} == {"time"}
    assert {id(p) for p in net.idle_parameters()} == {id(p) for p in idle.values()}
    assert not lively(NCSNPP).idle_parameters()


@BOTH
def test_fresh_network_gives_zero(fields):
    net = create_from_fields({k: v for k, v in fields.items() if k != "model.init_scale"})
    assert not net(*batch(fields)).any()


def test_ncsnpp_starts_with_ddpms_weights():
    """Uniform weights of variance scale / mean(fan in, fan out), biases zero; scale 0.1 in attention, else 1."""
    torch.manual_seed(0)
    net = create_from_fields(NCSNPP | {"model.nf": 64})
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "norm" not in name:
            out, fan_in = (p.shape[0] // 3, p.shape[1]) if "qkv" in name else p.shape[:2]
            area = p[0, 0].numel()
            variance = (0.1 if "qkv" in name else 1.0) * 2 / ((out + fan_in) * area)
            assert p.var().item() == pytest.approx(variance, rel=0.15), name
            assert p.abs().max() <= (3 * variance) ** 0.5


def test_dhariwal_starts_with_adms_weights():
    """Uniform within 1/√(fan in), classes normal, and the last layer of every branch zero."""
    torch.manual_seed(0)
    net = create_from_fields(DHARIWAL)
    zero = {name for name, p in net.named_parameters() if not p.any() and "norm" not in name}
    assert {name.rsplit(".", 2)[-2] for name in zero} == {"conv1", "proj", "output_conv"}
    weight = net.encoder[1].blocks[0].affine.weight
    assert weight.abs().max() <= 128**-0.5 and weight.var().item() == pytest.approx(1 / (3 * 128), rel=0.1)
    assert net.embedding.label.weight.std().item() == pytest.approx(1.0, rel=0.1)


@BOTH
def test_sample_does_not_depend_on_its_batch_nor_on_the_memory_layout(fields):
    net = lively(fields).eval()
    x, t999, label = batch(fields, 3)
    whole = net(x, t999, label)
    alone = net(x[1:2], t999[1:2], None if label is None else label[1:2])
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-5)
    last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t999, label)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, whole, rtol=1e-4, atol=1e-5)


@BOTH
def test_dropout_acts_in_training_only(fields):
    net = lively(fields | {"model.dropout": 0.5})
    inputs = batch(fields)
    assert not torch.equal(net.train()(*inputs), net(*inputs))
    assert torch.equal(net.eval()(*inputs), net(*inputs))


@BOTH
def test_a_pass_on_the_meta_device_costs_no_memory_and_keeps_shapes(fields):
    """Any tensor made on the CPU and any read of a value would raise, forward and backward."""
    with torch.device("meta"):
        net = create_from_fields(fields | {"model.dropout": 0.1})
    x, t999, label = (None if v is None else v.to("meta") for v in batch(fields))
    out = net(x, t999, label)
    assert out.is_meta and out.shape == x.shape
    out.sum().backward()
    assert all(tensor.is_meta for tensor in [*net.parameters(), *net.buffers(), *(p.grad for p in net.parameters())])


def test_compiled_network_is_one_graph_and_is_not_compiled_again():
    """Of DhariwalUNet; of NCSNpp in tests/test_train.py and tests/runtime/test_devices.py."""
    torch._dynamo.reset()
    counter, batches = CompileCounter(), [batch(DHARIWAL, generator_seed=step) for step in range(3)]
    net = lively(DHARIWAL | {"model.dropout": 0.1})
    compiled = torch.compile(net, backend=counter, fullgraph=True)  # which raises at any break
    for inputs in batches:
        compiled(*inputs).sum().backward()
    net.eval()
    for inputs in batches:
        with torch.no_grad():
            torch.testing.assert_close(compiled(*inputs), net(*inputs))
    assert counter.frame_count == 2


@BOTH
def test_autocast_is_near_float32_returns_it_and_normalises_in_it(fields):
    net, kinds = lively(fields).eval(), set()
    exact = net(*batch(fields))
    for module in net.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(*batch(fields))
    assert out.dtype == torch.float32 and kinds == {torch.float32}
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()


def test_number_of_operations_of_the_smallest_published_network():
    """CIFAR 3.4M: the released network dispatches 587 in an eval forward pass, ours at most 400."""
    net = create_from_fields({"model.nf": 64, "model.num_res_blocks": 1, "model.ch_mult": (1, 1, 2)})
    with torch.no_grad(), Operations() as forward:
        net.eval()(torch.randn(1, 3, 32, 32), torch.rand(1))
    assert len(forward.names) <= 400


def test_labels_are_asked_for_and_refused():
    x, t999, label = batch(DHARIWAL)
    with pytest.raises(ValueError, match="has 3 classes, but no labels were given"):
        lively(DHARIWAL)(x, t999)
    with pytest.raises(ValueError, match="has 0 classes, but labels were given"):
        lively(DHARIWAL | {"data.num_classes": 0})(x, t999, label)
    with pytest.raises(ValueError, match="this NCSNpp has 0 classes, but labels were given"):
        lively(NCSNPP)(x, t999, label)


@pytest.mark.parametrize("fields", [NCSNPP | {"data.num_classes": 3}, DHARIWAL], ids=["ncsnpp", "DhariwalUNet"])
def test_label_dropout_hides_whole_labels_in_training_only(fields):
    """With probability 1 every sample looks like the unknown class; in evaluation none does."""
    net = lively(fields | {"model.label_dropout": 1.0})
    x, t999, label = batch(fields | {"data.num_classes": 3})
    unknown = torch.zeros_like(label)
    assert torch.equal(net.train()(x, t999, label), net(x, t999, unknown))
    assert not torch.equal(net.eval()(x, t999, label), net(x, t999, unknown))
