"""Networks from config fields, and checks that name the fields of an impossible combination."""

import inspect

from configs.default import FIELDS
from models import NETWORKS
from models.edm import Preconditioned
from runtime.terminal import UserError

DATA_FIELDS = ("image_size", "num_channels", "num_classes")
# Arguments of a network that are not part of its architecture: a checkpoint may be used with other values.
FREE_ARGUMENTS = ("dropout", "label_dropout", "init_scale")
# Sizes that every config file sets: a network without such an argument ignores them.
SIZES = ("model.nf", "model.ch_mult", "model.num_res_blocks", "model.attn_resolutions", "model.dropout")


def create_model(config):
    """Return the network of a config, in training mode, with fresh weights from torch's global generator."""
    return create_from_fields(model_fields(config))


def model_fields(config):
    """Return the dotted fields of a config's groups model and data."""
    return {f"{group}.{name}": value for group in ("model", "data") for name, value in config[group].items()}


def create_from_fields(fields):
    """Return the network of {dotted config field: value}; missing fields have the CIFAR-10 config's values.

    `net.config_fields` has those of its architecture, tuples as lists. Options of other networks must have their
    default value. Raises UserError for fields outside the choices and ranges of configs/default.py, and for fields that
    contradict each other.
    """
    fields = {field: tuple_of(value) for field, value in fields.items()}
    name = fields.get("model.name", "ncsnpp")
    FIELDS["model.name"].check("model.name", name)
    refuse_foreign_fields(name, fields)
    values = {"model.name": name, "model.preconditioning": fields.get("model.preconditioning", "none"),
              "data.num_classes": 0}
    values |= {field: fields.get(field, default) for _, field, default in argument_fields(name)}
    for field, value in values.items():
        if field in FIELDS:
            FIELDS[field].check(field, value)
    arguments = {argument: values[field] for argument, field, _ in argument_fields(name)}
    if "ch_mult" in arguments:
        check_levels(arguments)
    if arguments.get("label_dropout", 0) > 0 and not arguments["num_classes"]:
        raise UserError("model.label_dropout hides class labels, but data.num_classes is 0; set one of them")
    if values["model.preconditioning"] != "none" and arguments.get("scale_by_sigma"):
        raise UserError(f"model.preconditioning is {values['model.preconditioning']}, which scales the output itself; "
                        "set model.scale_by_sigma to false")
    if name == "ncsnpp":
        check_ncsnpp(arguments)

    net = NETWORKS[name](**arguments)
    if values["model.preconditioning"] != "none":
        net = Preconditioned(net, values["model.preconditioning"])
    net.config_fields = {field: list(value) if isinstance(value, tuple) else value for field, value in values.items()
                         if field.partition(".")[2] not in FREE_ARGUMENTS}
    return net


def argument_fields(name):
    """Return (argument, dotted config field, default) for every argument of the network called `name`."""
    parameters = list(inspect.signature(NETWORKS[name]).parameters.values())
    return [(p.name, f"{'data' if p.name in DATA_FIELDS else 'model'}.{p.name}", p.default) for p in parameters]


def refuse_foreign_fields(name, fields):
    """Raise UserError if an option that only other networks have differs from its default."""
    own = {field for _, field, _ in argument_fields(name)} | set(SIZES)
    foreign = {field: default for other in NETWORKS for _, field, default in argument_fields(other) if field not in own}
    for field, default in foreign.items():
        if fields.get(field, default) != default:
            raise UserError(f"{field} is {fields[field]}, but {name} has no such option; leave it at {default}")


def tuple_of(value):
    """Return a list as a tuple, anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def check_levels(arguments):
    """Raise UserError if the levels cannot be built at this image size."""
    size, mult, nf = arguments["image_size"], arguments["ch_mult"], arguments["nf"]
    if not mult or any(not isinstance(m, int) for m in mult):
        raise UserError(f"model.ch_mult is {mult}; it needs one positive whole number for each level")
    sizes = [size >> level for level in range(len(mult))]
    if size % 2 ** (len(mult) - 1):
        raise UserError(f"data.image_size is {size}, but the {len(mult)} levels of model.ch_mult halve it "
                        f"{len(mult) - 1} times; it must be a multiple of {2 ** (len(mult) - 1)}")
    if nf % 2:
        raise UserError(f"model.nf is {nf}; it must be an even number")
    if absent := sorted(set(arguments["attn_resolutions"]) - set(sizes)):
        raise UserError(f"model.attn_resolutions has {absent[0]}, but the levels have sizes "
                        f"{', '.join(map(str, sizes))} at data.image_size {size}")


def check_ncsnpp(arguments):
    """Raise UserError for options of ncsnpp that contradict each other."""
    if arguments["progressive_combine"] == "cat" and arguments["progressive_input"] != "input_skip":
        raise UserError("model.progressive_combine is cat, which only model.progressive_input input_skip can use; "
                        "set one of them")
    joins_levels = arguments["progressive"] == "residual" or arguments["progressive_input"] != "none"
    if joins_levels and len(arguments["ch_mult"]) == 1:
        raise UserError("model.progressive residual and model.progressive_input join levels, but model.ch_mult has "
                        "only one level")
    taps = arguments["fir_kernel"]
    if arguments["fir"] and (not 2 <= len(taps) <= 16 or sum(taps) == 0):
        raise UserError(f"model.fir_kernel is {str(taps)[:80]}; a filter needs two to sixteen taps, with a sum other "
                        "than zero")
    if arguments["scale_by_sigma"] and arguments["embedding_type"] == "positional" and arguments["num_scales"] < 1000:
        raise UserError(f"model.num_scales is {arguments['num_scales']}, but model.scale_by_sigma looks up the noise "
                        "level of the times 0 to 999; it must be at least 1000")
    if arguments["num_classes"] and not arguments["conditional"]:
        raise UserError(f"data.num_classes is {arguments['num_classes']}, but with model.conditional false ncsnpp has "
                        "no embedding to add a class to; set one of them")
