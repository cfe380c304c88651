"""What a run was trained on comes from its checkpoint, in every script that uses one."""

import json

import pytest

from configs.command_line import config_to_dict
from configs.default import get_default_config, get_field, set_field
from configs.provenance import take_run_fields
from runtime.terminal import UserError


def config_with(**fields):
    """The default config with fields set, `__` for the dot."""
    config = get_default_config()
    for name, value in fields.items():
        set_field(config, name.replace("__", "."), value)
    return config


def taken(config, run, *given):
    """Return (remarks, the fields that are the run's now) of a config and the config of a run."""
    saved = json.loads(json.dumps(config_to_dict(run)))
    remarks = take_run_fields(config, saved, frozenset(given), "c.pth")
    return remarks, {name for name in ("data.dataset", "data.data_root", "flow.eps", "sampling.init_noise_scale")
                     if get_field(config, name) == get_field(run, name)}


RUN = {"data__dataset": "custom", "data__data_root": "/own", "flow__eps": 0.1, "sampling__init_noise_scale": 2.0}


def test_data_set_eps_and_noise_scale_are_the_runs_and_the_config_files_are_named():
    remarks, own = taken(config_with(data__cache_dir="/here"), config_with(**RUN))
    assert own == {"data.dataset", "data.data_root", "flow.eps", "sampling.init_noise_scale"}
    assert len(remarks) == 1
    assert "data.dataset 'custom' (not 'CIFAR10')" in remarks[0] and "flow.eps 0.1 (not 0.001)" in remarks[0]
    assert taken(config_with(**RUN), config_with(**RUN)) == ([], own)


def test_the_command_line_wins_and_is_said_to_contradict():
    remarks, own = taken(config_with(flow__eps=0.01), config_with(**RUN), "flow.eps")
    assert own == {"data.dataset", "data.data_root", "sampling.init_noise_scale"}
    assert remarks[0] == "trained with flow.eps 0.1, but 0.01 of the command line is used"
    remarks, own = taken(config_with(data__data_root="/moved"), config_with(**RUN), "data.data_root")
    assert own == {"data.dataset", "flow.eps", "sampling.init_noise_scale"} and "'/moved' of the command" in remarks[0]


def test_a_data_set_of_the_command_line_is_not_looked_for_in_the_runs_folder():
    config = config_with(data__dataset="digits")
    remarks, own = taken(config, config_with(**RUN), "data.dataset")
    assert own == {"flow.eps", "sampling.init_noise_scale"} and config.data.data_root == ""
    assert "trained with data.dataset 'custom', but 'digits' of the command line is used" in remarks


def test_where_this_machine_keeps_a_usual_data_set_is_the_configs_matter():
    config = config_with(data__data_root="/disk/cifar", data__cache_dir="/disk/cache", data__on_device="false")
    assert taken(config, config_with(data__cache_dir="/theirs"))[0] == []
    assert (config.data.data_root, config.data.cache_dir) == ("/disk/cifar", "/disk/cache")


def test_a_config_without_the_groups_changes_nothing_and_a_damaged_one_is_named():
    config = get_default_config()
    assert take_run_fields(config, {}, frozenset(), "released.pth") == [] and config == get_default_config()
    with pytest.raises(UserError, match=r"c\.pth: config\.flow\.eps must be a number, not 'x'"):
        take_run_fields(config, {"flow": {"eps": "x"}}, frozenset(), "c.pth")
