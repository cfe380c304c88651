"""Show what a network costs, level by level: parameters, GMACs and activation memory of one image.

    python -m tools.describe --config configs/rectified_flow/cifar10_rf_gaussian.py --config.model.nf 64
    python -m tools.describe --config configs/rectified_flow/cifar10_rf_gaussian.py \
        --ckpt_path logs/1_rectified_flow/checkpoints/checkpoint_14.pth

With --ckpt_path (a file, ours, released or EDM's, hf:// or https://) the architecture is the checkpoint's.
GMACs: 10⁹ multiply-accumulates of a forward pass. activations: what a float32 forward pass keeps for the backward pass
for each image, with the config's dropout.
"""


from configs.command_line import run_script
from configs.default import Field
from models.checkpoint import apply_architecture, read_checkpoint
from models.describe import describe, table

FLAGS = {
    "ckpt_path": Field("", "checkpoint to describe"),
}


def main(config, args, given):
    """Print the table."""
    if args.ckpt_path:
        config = apply_architecture(config, read_checkpoint(args.ckpt_path), given)
    fields = {f"{group}.{name}": value for group in ("model", "data") for name, value in config[group].items()}
    print(table(describe(fields)))


if __name__ == "__main__":
    run_script(main, __doc__, FLAGS)
