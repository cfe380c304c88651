"""Rewrite a checkpoint: in the other layout, as a small file to share, or as a folder for Hugging Face.

    python -m tools.convert logs/1_rectified_flow/checkpoints/checkpoint_14.pth released_14.pth   ours to released
    python -m tools.convert released.pth ours.pth                                                and back
    python -m tools.convert CHECKPOINT slim.pth --slim              EMA weights alone, in float16
    python -m tools.convert CHECKPOINT model.safetensors            EMA weights alone, without pickle
    python -m tools.convert CHECKPOINT FOLDER --hub                 model.safetensors, config.json and a model card

The first two keep weights, EMA, Adam's moments and step to the last bit. The others keep what sampling needs, the
config, the step and the digest of the source; a slim file over 16 MiB is cut into FILE, FILE.part2, …, which belong
side by side. Every script reads all of these wherever it takes a checkpoint.
"""

import argparse
import io
import pathlib
import sys

import torch

from configs.command_line import load_config
from metrics.results import newest_of_each, protocol_line, read_results, results_path
from metrics.sweep import run_folder
from models.checkpoint import architecture, in_our_layout, load_weights, model_fields, read_checkpoint, write_checkpoint
from models.create import create_from_fields
from models.released import is_released, to_released
from models.safe_load import PART_BYTES, safetensors_bytes
from runtime.errors import UserError, one_sentence
from runtime.files import atomic_path, file_digest, write_json, write_text

OWN_ENTRIES = ("fields", "digest", "path")  # that `read_checkpoint` adds
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
| checkpoint that it was made of | {source} |

## Measured
{results}
"""


def main(words=None):
    """Convert what the words name."""
    parser = argparse.ArgumentParser(prog="python -m tools.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="checkpoint; hf://owner/repo/file or https://…/file, too")
    parser.add_argument("target", metavar="OUT", help="file to write (with --hub: folder)")
    parser.add_argument("--slim", action="store_true", help="the averaged weights alone, in float16")
    parser.add_argument("--hub", action="store_true", help="a folder for Hugging Face")
    parser.add_argument("--config", help="config file with the architecture, of a file that does not tell it")
    args = parser.parse_args(words)
    checkpoint = read_checkpoint(args.source)
    fields = architecture(checkpoint, {}, model_fields(load_config(args.config)) if args.config else {})
    net = create_from_fields(fields)
    target = pathlib.Path(args.target)
    if args.hub:
        write_folder(target, checkpoint, net, args.slim)
        print(f"{target}: model.safetensors, config.json and README.md, to be read before it is shared")
    elif args.slim or target.suffix == ".safetensors":
        count = write_parts(target, encode(averaged(checkpoint, net, args.slim), target))
        print(f"{target}: averaged weights{' in float16' if args.slim else ''}, {count} part(s)")
    elif is_released(checkpoint["model"]):
        write_checkpoint(target, without_own(in_our_layout({"config": nested_config(fields)} | checkpoint, net)))
        print(f"{target}: our layout")
    else:
        write_checkpoint(target, without_own(to_released(checkpoint, net)))
        print(f"{target}: released layout")


def without_own(checkpoint):
    """Return a checkpoint without what `read_checkpoint` adds."""
    return {key: value for key, value in checkpoint.items() if key not in OWN_ENTRIES}


def averaged(checkpoint, net, half):
    """Return the averaged weights of a checkpoint and what is known of it; `half`: parameters in float16."""
    load_weights(net, checkpoint, use_ema=True)
    parameters = {name for name, _ in net.named_parameters()} if half else ()
    state = {name: tensor.half() if name in parameters else tensor for name, tensor in net.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError(f"{checkpoint['path']} has weights that are not finite{', or too large for float16' * half}")
    config = checkpoint.get("config", nested_config(net.config_fields))
    return {"model": state, "weights": "EMA", "step": int(checkpoint.get("step", 0)), "config": config,
            "source": checkpoint["digest"]}


def encode(content, target):
    """Return the bytes of a file: safetensors by its suffix, otherwise torch's."""
    if target.suffix == ".safetensors":
        return safetensors_bytes(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write_parts(target, whole):
    """Write bytes to `target`, `target`.part2, … of at most PART_BYTES each; return how many."""
    count = max(1, -(-len(whole) // PART_BYTES))
    for left in target.parent.glob(f"{target.name}.part*"):
        left.unlink()
    for number in range(count, 0, -1):  # the first comes last: until then there is no checkpoint of this name
        with atomic_path(f"{target}.part{number}" if number > 1 else target) as temporary:
            temporary.write_bytes(whole[(number - 1) * PART_BYTES : number * PART_BYTES])
    return count


def write_folder(folder, checkpoint, net, half):
    """Write what a model on Hugging Face consists of."""
    content = averaged(checkpoint, net, half)
    with atomic_path(folder / "model.safetensors") as temporary:
        temporary.write_bytes(safetensors_bytes(content))
    write_json(folder / "config.json", content["config"])
    fields, classes = net.config_fields, net.config_fields["data.num_classes"]
    results = [result for result in newest_of_each(read_results(results_path(run_folder(checkpoint["path"])))).values()
               if result["digest"] == checkpoint["digest"]]
    write_text(folder / "README.md", CARD.format(
        name=folder.resolve().name, network=fields["model.name"], parameters=sum(p.numel() for p in net.parameters()),
        channels=fields["data.num_channels"], size=fields["data.image_size"],
        classes=f" of {classes} classes" if classes else "", step=content["step"],
        digest=file_digest(folder / "model.safetensors"), source=checkpoint["digest"],
        results="\n".join(f"- {protocol_line(result)}" for result in results) or "Nothing yet."))


def nested_config(fields):
    """Return dotted fields as the nested dict that a checkpoint holds; what is unknown, the data set too, is absent."""
    groups = {}
    for name, value in fields.items():
        group, field = name.split(".")
        groups.setdefault(group, {})[field] = value
    return groups


if __name__ == "__main__":
    with one_sentence("convert"):
        sys.exit(main())
