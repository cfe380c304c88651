"""From config fields to a network."""

import pytest

from configs.default import FIELDS, get_default_config
from models import NETWORKS
from models.create import argument_fields, create_from_fields, create_model
from runtime.terminal import UserError
from tests.helpers import TINY

WIDE = TINY | {"model.name": "DhariwalUNet"}


def test_config_makes_the_network_and_its_fields_make_the_config():
    config = get_default_config()
    config.model.nf, config.model.ch_mult, config.model.num_res_blocks = 8, (1, 2), 1
    net = create_model(config)
    assert net.config_fields["model.ch_mult"] == [1, 2] and net.config_fields["data.num_classes"] == 0
    assert "model.dropout" not in net.config_fields
    assert create_from_fields(net.config_fields).config_fields == net.config_fields


@pytest.mark.parametrize("name", NETWORKS)
def test_arguments_have_the_configs_defaults(name):
    """A field that a file does not tell means the same everywhere; dropout is off where nothing trains."""
    for argument, field, default in argument_fields(name):
        if argument != "dropout":
            assert FIELDS[field].default == default, field


@pytest.mark.parametrize("base, changes, sentence", [
    (TINY, {"model.name": "unet"}, "model.name must be one of ncsnpp, DhariwalUNet, not 'unet'"),
    (TINY, {"data.num_classes": 10, "model.conditional": False}, "data.num_classes is 10, but with model.conditional"),
    (TINY, {"model.preconditioning": "iddpm"}, "model.preconditioning must be one of none, edm, vp, ve, not 'iddpm'"),
    (TINY, {"model.preconditioning": "edm", "model.scale_by_sigma": True}, "set model.scale_by_sigma to false"),
    (TINY, {"data.image_size": 9}, "data.image_size is 9, but the 2 levels of model.ch_mult halve it 1 times"),
    (TINY, {"model.ch_mult": ()}, "model.ch_mult is"),
    (TINY, {"model.ch_mult": (1, 0)}, "model.ch_mult must be at least 1"),
    (TINY, {"model.ch_mult": (1, 1.5)}, "model.ch_mult is"),
    (TINY, {"model.nf": 2}, "model.nf must be at least 4"),
    (TINY, {"model.nf": 9}, "model.nf is 9"),
    (TINY, {"model.nf": 90}, "make a layer of 90 channels"),
    (TINY, {"model.attn_resolutions": (16,)}, "model.attn_resolutions has 16, but the levels have sizes 8, 4"),
    (TINY, {"model.resblock_type": "resnet"}, "model.resblock_type must be one of biggan, ddpm, not 'resnet'"),
    (TINY, {"model.progressive_combine": "cat"}, "model.progressive_combine is cat"),
    (TINY, {"model.ch_mult": (1,), "model.attn_resolutions": (), "model.progressive": "residual"},
     "model.progressive residual and model.progressive_input join levels, but model.ch_mult has only one level"),
    (TINY, {"model.fir": True, "model.fir_kernel": (1,)}, "model.fir_kernel is"),
    (TINY, {"model.scale_by_sigma": True, "model.num_scales": 10}, "model.num_scales is 10"),
    (TINY, {"model.sigma_min": 0.0}, "model.sigma_min must be at least"),
    (TINY, {"model.num_res_blocks": 10**9}, "model.num_res_blocks must be at most 64"),
    (TINY, {"model.num_scales": 10**12}, "model.num_scales must be at most 1e+06"),
    (TINY, {"data.image_size": 2**40, "model.ch_mult": (1,) * 40}, "data.image_size must be at most 4096"),
    (TINY, {"model.ch_mult": (1, 10**9)}, "model.ch_mult must be at most 64"),
    (TINY, {"model.fir": True, "model.fir_kernel": (1,) * 10**5}, "a filter needs two to sixteen taps"),
    (WIDE, {"model.fir": True}, "model.fir is True, but DhariwalUNet has no such option"),
    (WIDE, {"model.progressive": "residual"}, "model.progressive is residual, but DhariwalUNet"),
    (WIDE, {"model.label_dropout": 0.1}, "model.label_dropout hides class labels, but data.num_classes is 0"),
    (WIDE, {"model.nf": 224, "model.ch_mult": (1, 1)}, "attention of 224 channels"),
])
def test_senseless_combination_is_refused_by_name(base, changes, sentence):
    """Each with the field, what it is and what it must be; sizes that would be built for ever, too."""
    with pytest.raises(UserError) as refused:
        create_from_fields(base | changes)
    assert sentence in str(refused.value)
