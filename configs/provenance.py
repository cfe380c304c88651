"""What a run was trained on and with, taken from the config that its checkpoint holds."""

from configs.default import FIELDS, get_field, set_field
from datasets.pairs import RECORD, open_folders

# These decide nothing once a network is trained: where this machine keeps data, and what training drew.
NOT_OF_THE_RUN = ("data.cache_dir", "data.on_device", "data.random_flip", "data.use_aug", "data.reflow_data_root",
                  "data.real_pairs_root")
RUN_FIELDS = ("flow.eps", "flow.flow_t_schedule", "sampling.init_noise_scale",
              *(name for name in FIELDS if name.startswith("data.") and name not in NOT_OF_THE_RUN))
ROOTS = {"data.data_root", "data.custom_data_root"}


def take_pair_fields(config, given):
    """Set the fields data.* to those of the run whose pairs data.reflow_data_root has, unless given; return remarks."""
    root, fields = config.data.reflow_data_root, [name for name in RUN_FIELDS if name.startswith("data.")]
    for folder in open_folders(root) if root else ():
        if folder.record:  # pairs without pairs.json change nothing
            path, saved = folder.path / RECORD, folder.record.get("config", {})
            return [f"{path}: {remark}" for remark in take_run_fields(config, saved, given, path, fields)]
    return []


def take_run_fields(config, saved, given, path, fields=RUN_FIELDS):
    """Set the fields of `config` that say what the run of a checkpoint was trained on and with, unless given.

    saved: the config in the checkpoint at `path` as a nested dict, perhaps with fields missing. given: dotted names of
    the fields on the command line, which win. fields: those that are taken. Returns remarks where command line or
    config file differ from the run.
    """
    run = {}
    for name in fields:
        group, field = name.split(".")
        members = saved.get(group)
        if isinstance(members, dict) and field in members:
            run[name] = members[field]
            FIELDS[name].check(f"{path}: config.{name}", run[name])
    before = {name: get_field(config, name) for name in run}
    different = [name for name in run if run[name] != before[name]]
    kept = set(given)
    if kept & ROOTS or "data.dataset" in kept.intersection(different):
        kept |= ROOTS  # the run's folder belongs to the run's data set
    elif "data.dataset" not in different:  # of a usual data set without a root, the config knows the place here
        kept |= {name for name in ROOTS if not run.get(name)}
    taken = [name for name in different if name not in kept]
    for name in taken:
        set_field(config, name, run[name])
    remarks = [f"trained with {name} {run[name]!r}, but {before[name]!r} of the command line is used"
               for name in different if name in given]
    if taken:
        phrases = [f"{name} {run[name]!r} (not {before[name]!r})" for name in taken]
        remarks.append(f"as in training, not as in the config file: {', '.join(phrases)}")
    return remarks
