"""What a network costs, and the command that tells it."""

import functools
import re
import sys

import pytest
import torch

from configs.command_line import run_script
from models.checkpoint import write_checkpoint
from models.create import create_from_fields
from models.describe import cost_line, cost_of, describe, fastest_layout, measure
from tests.helpers import CIFAR10, overrides
from tests.models.released_numbers import LAYOUTS, layout_fields
from tests.models.test_checkpoint import tiny_checkpoint
from tests.test_docs import same, sections
from tools import describe as command

SMALL = {"model.nf": 64, "model.ch_mult": (1, 2), "model.num_res_blocks": 1, "data.image_size": 16,
         "model.attn_resolutions": (16, 8)}

ONE_FLOW = "cifar10_1flow_61.8M"
PLAIN = {ONE_FLOW: 10.3, "cifar32_27.9M": 6.6, "cifar32_15.7M": 3.7}  # GMACs of the paper's tables


@functools.cache
def costs(name):
    """Return the costs of training a configuration of the paper, such as "ffhq64_3.4M", with its dropout."""
    return describe(layout_fields(name) | {"model.dropout": 0.13 if name.startswith("imagenet") else 0.15})


@pytest.mark.parametrize("name", LAYOUTS)
def test_totals_are_those_of_the_paper(name):
    """Its tables' counter does not see the products of attention nor their projections."""
    *parts, total = costs(name)
    assert total.parameters == LAYOUTS[name]["parameters"]
    assert round(total.gmacs, 4) == LAYOUTS[name]["gmacs"]
    assert round(total.plain_gmacs, 1) == PLAIN.get(name, round(total.plain_gmacs, 1))
    levels = len(layout_fields(name).get("model.ch_mult", (1, 2, 2, 2)))
    assert [p.part for p in parts] == ["time and class", "input", *(f"encoder {i + 1}" for i in range(levels)),
                                       "middle", *(f"decoder {i + 1}" for i in range(levels)), "output"]


def test_memory_of_training_on_own_images_is_that_of_describe():
    found = [cells for cells in sections("own-images.md")["2. Choices"] if len(cells) == 4]
    batches = [int(cell.removeprefix("batch ")) for cell in found[0][1:]]
    assert len(found) == 5 and batches == [32, 128, 256]
    for name, *cells in found[1:]:
        totals = [costs(f"{images}_{name}".replace("cifar32_61.8M", ONE_FLOW))[-1] for images in ("cifar32", "ffhq64")]
        assert cells == [" / ".join(f"{(20 * c.parameters + batch * c.activation_bytes) / 2**30:.1f}" for c in totals)
                         for batch in batches], name


def test_activations_of_the_page_on_scale_are_those_of_describe():
    found = [cells for cells in sections("scale.md")["Memory and disk"] if cells[0].startswith("activations")]
    totals = [costs(name)[-1] for name in ("imagenet64_80.7M", ONE_FLOW)]
    for (_, text, _), one in zip(found, totals, strict=True):
        size, many, few = re.findall(r"[\d.]+(?= [MG]iB)", text)
        assert same(size, [one.activation_bytes / 2**20])
        assert same(many, [128 * one.activation_bytes / 2**30]) and same(few, [16 * one.activation_bytes / 2**30])


@pytest.mark.parametrize("network", ["ncsnpp", "DhariwalUNet"])
def test_activations_are_those_of_a_real_forward_pass(network):
    """The same meter on real tensors counts the same: attention keeps no matrix of pixels × pixels."""
    fields = SMALL | {"model.name": network}
    net = create_from_fields(fields)
    real = measure(net, 2).kept.total() - measure(net, 1).kept.total()
    assert describe(fields)[-1].activation_bytes == real
    assert real > 4 * 2 * 64 * 16 * 16


def test_parts_have_the_sizes_and_parameters_of_their_levels():
    rows = {row.part: row for row in describe(SMALL)}
    order = ("input", "encoder 1", "encoder 2", "middle", "decoder 1", "decoder 2", "output")
    assert [rows[part].size for part in order] == [16, 16, 8, 8, 8, 16, 16]
    with torch.device("meta"):
        net = create_from_fields(SMALL)
    assert rows["decoder 1"].parameters == sum(p.numel() for p in net.decoder[0].parameters())


@pytest.mark.parametrize("classes", [0, 3])
def test_the_measured_cost_is_of_one_image_and_of_a_batch(classes):
    net = create_from_fields(SMALL | {"model.nf": 16, "model.name": "DhariwalUNet", "data.num_classes": classes})
    seen = set()
    net.register_forward_pre_hook(lambda net, inputs: seen.add((*inputs[0].shape, inputs[2] is None)))
    cost = cost_of(net.eval())
    assert seen == {(1, 3, 16, 16, classes == 0), (8, 3, 16, 16, classes == 0)}
    assert cost["gmacs"] == pytest.approx(measure(net, 1).macs.total() / 1e9, abs=1e-6)
    assert cost["gflops"] == pytest.approx(2 * cost["gmacs"], abs=2e-6)
    assert min(cost["latency_ms"], cost["batch_latency_ms"]) > 0 and cost["peak_memory_mib"] > 10
    assert f"{sum(p.numel() for p in net.parameters()):,} parameters" in cost_line(cost)


@pytest.mark.parametrize(("times", "layout"), [([2, 1], torch.contiguous_format), ([1, 2], torch.channels_last)])
def test_the_faster_memory_layout_is_chosen_and_the_network_stays_the_same(monkeypatch, times, layout):
    def timed(call, seconds):
        call()
        return times.pop(0)

    monkeypatch.setattr("models.describe.median_seconds", timed)
    net = create_from_fields(SMALL)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert fastest_layout(net, net, 2) is layout
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


# python -m tools.describe


@pytest.fixture
def described(monkeypatch, capsys):
    """A function that runs the command and returns its exit status, the printed lines, and its error message."""
    def run(*arguments, **fields):
        monkeypatch.setattr(sys, "argv", ["describe", "--config", CIFAR10, *map(str, arguments), *overrides(**fields)])
        with pytest.raises(SystemExit) as ended:
            run_script(command.main, command.__doc__, command.FLAGS)
        printed = capsys.readouterr()
        return ended.value.code, printed.out.splitlines(), printed.err

    return run


def test_configuration_is_described_in_a_table(described):
    status, lines, _ = described(model__nf=64, model__num_res_blocks=1, model__ch_mult=(1, 1, 2))
    titles = next(line for line in lines if line.startswith("part")).split()
    assert titles == ["part", "size", "parameters", "GMACs", "no", "attention", "activations"]
    assert not status and lines[-2].split()[:3] == ["total", "3,437,123", "0.7356"] and lines[-2].endswith("MiB")
    total = describe({"model.nf": 64, "model.num_res_blocks": 1, "model.ch_mult": (1, 1, 2)})[-1]
    bytes_of_16 = 20 * total.parameters + 16 * total.activation_bytes  # five numbers of four bytes a parameter
    assert lines[-1].startswith(f"GiB to train in float32, by images per pass: 16: {bytes_of_16 / 2**30:.1f}, 32: ")


def test_seconds_of_an_update_are_measured_on_request(described):
    """With accumulation, in the config's precision, and for a network with classes."""
    status, lines, _ = described("--measure", training__batch_size=4, training__accumulation_steps=2, model__nf=8,
                            model__ch_mult=(1, 2), model__num_res_blocks=1, data__num_classes=3)
    assert not status and float(lines[-1].split()[0]) > 0
    assert "s per update of 4 images" in lines[-1] and "on the CPU" in lines[-1]


def test_checkpoint_is_described_without_its_architecture_and_a_contradiction_is_one_sentence(described, tmp_path):
    write_checkpoint(tmp_path / "ours.pth", tiny_checkpoint(**{"model.ch_mult": (1, 1, 2)})[1])
    status, lines, _ = described("--ckpt_path", tmp_path / "ours.pth")
    assert not status and "decoder 3" in "".join(lines) and "8²" in "".join(lines)
    status, _, error = described("--ckpt_path", tmp_path / "ours.pth", model__nf=64)
    assert status == 2 and "model.nf is 8 in the checkpoint and 64 here" in error
