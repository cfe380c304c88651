"""Show the cost of a network per level: parameters, GMACs, activation memory of one image, memory of training.

    python -m tools.describe --config configs/rectified_flow/cifar10_rf_gaussian.py --config.model.nf 64
    python -m tools.describe --config configs/rectified_flow/cifar10_rf_gaussian.py \\
        --ckpt_path logs/1_rectified_flow/checkpoints/checkpoint_14.pth --measure

With --ckpt_path (any checkpoint file, or hf://owner/repo/file) the architecture is the checkpoint's.
GMACs: 10⁹ multiply-accumulates of a forward pass; the paper's tables leave those of attention out. activations: memory
per image that a float32 forward pass keeps for the backward pass, with the config's dropout.
"""

import torch

from configs.command_line import run_script
from configs.default import Field
from models.checkpoint import apply_architecture, read_checkpoint
from models.create import create_model, model_fields
from models.describe import describe, median_seconds, table
from runtime.devices import autocast, set_precision
from runtime.terminal import print_message, progress_bar
from training.update import ExponentialMovingAverage, UpdateStats, apply_update, create_optimizer

BATCHES = (16, 32, 64, 128, 256, 512)

FLAGS = {
    "ckpt_path": Field("", "checkpoint to describe"),
    "measure": Field(False, "measure the seconds of an update of config.training.batch_size images on this machine"),
}


def main(config, args, given):
    if args.ckpt_path:
        config = apply_architecture(config, read_checkpoint(args.ckpt_path), given)
    rows = describe(model_fields(config))
    print(table(rows))
    # Weights, gradients, EMA and Adam's two moments, and activations; the workspace of convolutions comes on top.
    fixed, image = 5 * 4 * rows[-1].parameters, rows[-1].activation_bytes
    memory = (f"{batch}: {(fixed + batch * image) / 2**30:.1f}" for batch in BATCHES)
    print_message(f"GiB to train in float32, by images per pass: {', '.join(memory)}")
    if args.measure:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        name = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
        print_message(f"{seconds_of_update(config, device):.3f} s per update of {config.training.batch_size} images, "
                      f"without reading data or LPIPS, on {name}")


def seconds_of_update(config, device):
    """Return the median seconds of an update (network, optimizer, EMA) of one batch, in config.training.precision.

    The loss is a squared error. Raises UserError as `create_model` does.
    """
    set_precision(config.training.precision)
    data, steps = config.data, config.training.accumulation_steps
    net = create_model(config).to(device, memory_format=torch.channels_last)
    ema, stats = ExponentialMovingAverage(net.parameters(), 0.999), UpdateStats(device)
    optimizer = create_optimizer(list(net.parameters()), config.optim)
    x = torch.randn(config.training.batch_size // steps, data.num_channels, data.image_size, data.image_size,
                    device=device)
    t999 = torch.full((len(x),), 500.0, device=device)
    label = torch.zeros(len(x), data.num_classes, device=device) if data.num_classes else None

    def update():
        for _ in range(steps):
            with autocast(config.training.precision, device):
                loss = (net(x, t999, label).float() - x).square().mean() / steps
            loss.backward()
        apply_update(optimizer, ema, stats, loss.detach(), grad_clip=1.0)
        optimizer.zero_grad(set_to_none=True)
        bar.update()

    with progress_bar(desc="measuring", unit="updates") as bar:
        return median_seconds(update, seconds=2.0)


if __name__ == "__main__":
    run_script(main, __doc__, FLAGS)
