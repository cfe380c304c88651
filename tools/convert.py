"""Convert a checkpoint: to the other layout, to a small file to share, or to a folder for Hugging Face.

    python -m tools.convert logs/1_rectified_flow/checkpoints/checkpoint_14.pth released_14.pth   ours to released
    python -m tools.convert released.pth ours.pth                                                and back
    python -m tools.convert CHECKPOINT slim.pth --slim              EMA weights alone, in float16
    python -m tools.convert CHECKPOINT model.safetensors            EMA weights alone, without pickle
    python -m tools.convert CHECKPOINT FOLDER --hub                 model.safetensors, config.json and a model card

The first two keep all bits of weights, EMA, Adam's moments and step. The others keep what sampling needs, config, step
and the digest of the source; a file over 16 MiB is split into FILE, FILE.part2, …, to be kept in one folder. Every
script reads all of these as checkpoints.
"""

import io
import pathlib

import torch

from configs.command_line import load_config, run_program
from configs.default import Field
from metrics.results import newest_of_each, protocol_line, read_results
from models.checkpoint import architecture, in_our_layout, load_weights, read_checkpoint, write_checkpoint
from models.create import create_from_fields, model_fields
from models.released import is_released, to_released
from models.safe_load import PART_BYTES, safetensors_bytes
from runtime.files import atomic_path, file_digest, write_json, write_text
from runtime.run_folder import CONFIG, RESULTS, run_folder
from runtime.terminal import UserError, print_message

FLAGS = {
    "source": Field("", "IN: checkpoint file, hf://owner/repo/file or https://…/file"),
    "target": Field("", "OUT: file to write (with --hub: folder)"),
    "slim": Field(False, "only the EMA weights, in float16"),
    "hub": Field(False, "a folder for Hugging Face"),
    "config": Field("", "config file with the architecture, for a checkpoint without it"),
}
CARD = """---
library_name: pytorch
tags: [rectified-flow, one-step, image-generation]
---
# {name}
{network}, {parameters:,} parameters, {channels}×{size}×{size} images{classes}; moving average of the weights after \
{step} updates.

    python image_sampling.py --config configs/rectified_flow/cifar10_rf_gaussian.py \\
        --sampling_dir hf://OWNER/REPO/model.safetensors --config.sampling.use_ode_sampler one_step

Input: standard normal noise; output: about [-1, 1], channels first. config.json is the config of the run.

| file | first 16 digits of its SHA-256 |
|---|---|
| model.safetensors | {digest} |
| checkpoint it was made from | {source} |

## Measured
{results}
"""


def main(args):
    if not args.target:
        raise UserError("name a checkpoint and a file to write: python -m tools.convert IN OUT")
    defaults = model_fields(load_config(args.config)) if args.config else {}  # first: it may add the network's class
    checkpoint, target = read_checkpoint(args.source), pathlib.Path(args.target)
    fields = architecture(checkpoint, {}, defaults)
    net = create_from_fields(fields)
    if args.hub:
        write_folder(target, averaged(checkpoint, net, args.slim), net, run_folder(checkpoint["path"]))
        print_message(f"{target}: model.safetensors, config.json and README.md; check the README before you share it")
    elif args.slim or target.suffix == ".safetensors":
        count = write_parts(target, averaged(checkpoint, net, args.slim))
        print_message(f"{target}: averaged weights{' in float16' if args.slim else ''}, {count} part(s)")
    else:
        to_ours = is_released(checkpoint["model"])
        converted = in_our_layout({"config": nested_config(fields)} | checkpoint, net) if to_ours else to_released(
            checkpoint, net)
        read_only = ("fields", "digest", "path")  # added by `read_checkpoint`
        write_checkpoint(target, {key: value for key, value in converted.items() if key not in read_only})
        print_message(f"{target}: {'our' if to_ours else 'released'} layout")


def averaged(checkpoint, net, half):
    """Return the content of a file of the EMA weights alone; half: parameters in float16."""
    load_weights(net, checkpoint, use_ema=True)
    parameters = {name for name, _ in net.named_parameters()} if half else ()
    state = {name: tensor.half() if name in parameters else tensor for name, tensor in net.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(f"{checkpoint['path']} has weights that are not finite{', or too large for float16' * half}")
    config = checkpoint.get("config", nested_config(net.config_fields))
    return {"model": state, "weights": "EMA", "step": int(checkpoint.get("step", 0)), "config": config,
            "source": checkpoint["digest"]}


def write_parts(target, content):
    """Write a checkpoint to `target`, `target`.part2, … of at most PART_BYTES each; return their number."""
    if target.suffix == ".safetensors":
        whole = safetensors_bytes(content)
    else:
        torch.save(content, buffer := io.BytesIO())
        whole = buffer.getvalue()
    count = max(1, -(-len(whole) // PART_BYTES))
    for left in target.parent.glob(f"{target.name}.part*"):
        left.unlink()
    for number in range(count, 0, -1):  # the first last: before that, no checkpoint of this name exists
        with atomic_path(f"{target}.part{number}" if number > 1 else target) as temporary:
            temporary.write_bytes(whole[(number - 1) * PART_BYTES : number * PART_BYTES])
    return count


def write_folder(folder, content, net, run):
    """Write weights, config and model card for Hugging Face; run: the folder with the results of the checkpoint."""
    with atomic_path(folder / "model.safetensors") as temporary:
        temporary.write_bytes(safetensors_bytes(content))
    write_json(folder / CONFIG, content["config"])
    fields, classes = net.config_fields, net.config_fields["data.num_classes"]
    results = [f"- {protocol_line(result)}" for result in newest_of_each(read_results(run / RESULTS)).values()
               if result["digest"] == content["source"]]
    write_text(folder / "README.md", CARD.format(
        name=folder.resolve().name, network=fields["model.name"], parameters=sum(p.numel() for p in net.parameters()),
        channels=fields["data.num_channels"], size=fields["data.image_size"],
        classes=f" of {classes} classes" if classes else "", step=content["step"],
        digest=file_digest(folder / "model.safetensors"), source=content["source"],
        results="\n".join(results) or "Nothing yet."))


def nested_config(fields):
    """Return dotted fields as the nested dict of a checkpoint, with the groups model and data only."""
    return {group: {name.removeprefix(f"{group}."): value for name, value in fields.items()
                    if name.startswith(f"{group}.")} for group in ("model", "data")}


if __name__ == "__main__":
    run_program(main, __doc__, FLAGS, positional=("source", "target"))
