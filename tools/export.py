"""Export a one-step model to ONNX: noise in, image out, the sampler folded in, no torch needed to use it.

    python -m tools.export logs/distilled/checkpoints/checkpoint_1.pth
    python -m tools.export logs/2_rectified_flow/checkpoints/checkpoint_16.pth --sampler euler --steps 2

Writes {run}/export/{checkpoint}.onnx and {checkpoint}_int8.onnx (8-bit weights and activations) and
{checkpoint}.json with their sizes, one-image latencies on this CPU beside PyTorch's, and how far they are from
PyTorch: at most 1e-4 for the float32 file, or the command fails; docs/export.md shows how to use the files. The number
of images is free; a class-conditional model has a second input, the class numbers, and refuses those it does not know.
flow.eps and the noise scale are those of the checkpoint's run. The same command twice gives the same model, though not
the same bytes.

A picture, with onnxruntime and Pillow alone:

    import numpy as np
    import onnxruntime
    from PIL import Image

    model = onnxruntime.InferenceSession("logs/distilled/export/checkpoint_1.onnx")
    _, channels, height, width = model.get_inputs()[0].shape
    noise = np.random.default_rng(0).standard_normal((16, channels, height, width), dtype=np.float32)
    images = model.run(None, {"noise": noise})[0]  # a class-conditional model takes "label", too: int64 (16,)
    pixels = ((images.clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    sheet = pixels.reshape(4, 4, channels, height, width).transpose(0, 3, 1, 4, 2)
    Image.fromarray(sheet.reshape(4 * height, 4 * width, channels).squeeze()).save("images.png")
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import io
import logging
import pathlib
import statistics
import sys
import tempfile
import time
import warnings

import numpy as np
import torch

from configs.command_line import load_config
from configs.default import get_default_config
from flows.rectified_flow import velocity_from_network
from flows.samplers import euler, one_step
from metrics.sweep import run_folder
from models.checkpoint import is_remote, load_with_config
from runtime.errors import UserError, one_sentence
from runtime.files import atomic_path, write_json
from runtime.seeds import EVALUATION, index_labels, index_noise

TOLERANCE = 1e-4  # of the float32 file, largest difference of a pixel in [-1, 1]
CHECKED, CALIBRATED = 16, 64  # images
REPEATS = 15


class Generator(torch.nn.Module):
    """noise (N, C, H, W), and class numbers (N,) int64 for a conditional network → images (N, C, H, W)."""

    def __init__(self, net, steps, eps=1e-3, noise_scale=1.0):
        """Take a network, the number of Euler steps (None: the sampler `one_step`), and two numbers of its training.

        eps is the smallest time (flow.eps), noise_scale the standard deviation of z0 (sampling.init_noise_scale).
        """
        super().__init__()
        self.net, self.steps, self.eps, self.noise_scale = net, steps, eps, noise_scale
        self.shape = (net.config_fields["data.num_channels"], *[net.config_fields["data.image_size"]] * 2)
        self.classes = net.config_fields["data.num_classes"]

    def forward(self, noise, label=None):
        """Return the images, about [-1, 1], not clipped."""
        if label is not None:
            # Indexing, which onnxruntime checks, refuses a number that is no class: all zeros mean the unknown class.
            index = torch.where(label < 0, torch.full_like(label, self.classes), label)
            known = torch.ones(self.classes).index_select(0, index)
            label = (label[:, None] == torch.arange(self.classes)).float() * known[:, None]
        velocity, z = velocity_from_network(self.net), noise * self.noise_scale
        if self.steps is None:
            return one_step(velocity, z, label, t_start=self.eps)[0]
        return euler(velocity, z, label, steps=self.steps, t_start=self.eps)[0]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A way of running the model: bytes of its file, one-image latency, largest and mean difference from PyTorch."""

    name: str
    file: str
    bytes: int
    latency_ms: float
    largest_difference: float
    mean_difference: float


def main(words=None):
    """Write the two ONNX files and the report that the words name, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tools.export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a checkpoint file; hf://owner/repo/file or https://…/file, too")
    parser.add_argument("--out", default="", help="folder of the files (default: {run}/export)")
    parser.add_argument("--sampler", choices=("one_step", "euler"), default="one_step")
    parser.add_argument("--steps", type=int, default=1, help="number of Euler steps")
    parser.add_argument("--config", help="config file with the architecture, of a file that does not tell it")
    parser.add_argument("--raw", action="store_true", help="the raw weights, not their moving average")
    args = parser.parse_args(words)
    onnxruntime = require_packages()
    if args.steps < 1:
        raise UserError(f"--steps must be 1 or more, not {args.steps}")
    config = load_config(args.config) if args.config else get_default_config()
    config, net, digest = load_with_config(args.checkpoint, config, frozenset(), not args.raw, say=lambda remark: None)
    model = Generator(net, args.steps if args.sampler == "euler" else None, config.flow.eps,
                      config.sampling.init_noise_scale).eval()
    folder = pathlib.Path(args.out) if args.out else default_folder(args.checkpoint)
    path = folder / f"{pathlib.Path(args.checkpoint).stem}.onnx"
    small = path.with_name(f"{path.stem}_int8.onnx")
    write_onnx(model, path, vars(args))
    write_int8(model, path, small)
    torch.set_num_threads(1)
    rows = [measure_torch(model),
            measure_onnx(onnxruntime, "onnx float32", path, model),
            measure_onnx(onnxruntime, "onnx int8", small, model)]
    report = {"checkpoint": args.checkpoint, "digest": digest, "sampler": args.sampler, "steps": args.steps,
              "eps": model.eps, "noise_scale": model.noise_scale, "shape": model.shape,
              "classes": model.classes, "parameters": sum(p.numel() for p in net.parameters()), "threads": 1,
              "files": [dataclasses.asdict(row) for row in rows],
              "versions": {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxruntime")}}
    write_json(path.with_suffix(".json"), report)
    print_table(rows, report)
    if not rows[1].largest_difference <= TOLERANCE:
        raise UserError(f"{path} differs from PyTorch by {rows[1].largest_difference:.1e}, more than {TOLERANCE:g}: "
                        "do not use it; report the versions in the .json beside it")


def require_packages():
    """Return onnxruntime; raise UserError if the packages of the export are missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"the export needs the package {error.name}: pip install onnx onnxscript onnxruntime") from None
    return onnxruntime


def default_folder(checkpoint):
    """Return {run}/export; a checkpoint from elsewhere has no run, its files go to ./export."""
    return pathlib.Path("export") if is_remote(checkpoint) else run_folder(checkpoint) / "export"


def draw_inputs(model, count, first=0):
    """Return {input name: array} of `count` samples: noise, and class numbers for a conditional model."""
    indices = range(first, first + count)
    inputs = {"noise": index_noise(0, indices, model.shape, EVALUATION)}
    if model.classes:
        inputs["label"] = index_labels(0, indices, model.classes)
    return inputs


def write_onnx(model, path, settings):
    """Write the float32 file; what the model is stands in its metadata."""
    import onnx

    inputs = draw_inputs(model, 2)
    batch = torch.export.Dim("batch")
    with quiet(), atomic_path(path) as temporary:
        program = torch.onnx.export(model, tuple(inputs.values()), dynamo=True, input_names=list(inputs),
                                    output_names=["image"], dynamic_shapes=[{0: batch} for _ in inputs])
        proto = program.model_proto
        for part in (*proto.graph.node, *proto.graph.value_info):  # where in our code each came from: half the file
            part.ClearField("metadata_props")
        onnx.helper.set_model_props(proto, {name: str(value) for name, value in settings.items()} | {
            "values": "noise is standard normal; the image is about [-1, 1], channels first"})
        onnx.save(proto, temporary)


def write_int8(model, path, small):
    """Write the 8-bit file, its activations' ranges measured on samples of noise, as in use.

    The first and the last convolution stay in float32, as is usual: they are small, and see noise and image. Weights
    and activations are both unsigned: with signed weights, processors without VNNI instructions overflow.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Noise(CalibrationDataReader):
        def __init__(self):
            self.first = CHECKED  # not the samples that the result is checked with

        def get_next(self):
            if self.first >= CHECKED + CALIBRATED:
                return None
            inputs = draw_inputs(model, 8, self.first)
            self.first += 8
            return {name: value.numpy() for name, value in inputs.items()}

    with quiet(), atomic_path(small) as temporary, tempfile.TemporaryDirectory() as folder:
        prepared = pathlib.Path(folder, "prepared.onnx")
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        convolutions = [node.name for node in onnx.load(prepared).graph.node if node.op_type == "Conv"]
        quantize_static(prepared, temporary, Noise(), quant_format=QuantFormat.QDQ, per_channel=True,
                        op_types_to_quantize=["Conv", "Gemm"], nodes_to_exclude=[convolutions[0], convolutions[-1]],
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QUInt8)


@contextlib.contextmanager
def quiet():
    """Keep the exporters' own reports off the terminal: they speak of their own workings, not of the user's."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def measure_torch(model):
    """Return the `Measured` of PyTorch, on one thread; its bytes are those of the weights alone."""
    inputs = tuple(draw_inputs(model, 1).values())
    with torch.inference_mode():
        latency = median_ms(lambda: model(*inputs))
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.net.state_dict().values())
    return Measured("PyTorch", "", size, latency, 0.0, 0.0)


def measure_onnx(onnxruntime, name, path, model):
    """Return the `Measured` of an ONNX file in onnxruntime, on one thread of the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs):
        return session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]

    checked, one = draw_inputs(model, CHECKED), draw_inputs(model, 1)
    with torch.inference_mode():
        expected = model(*checked.values()).numpy()
    difference = np.abs(np.concatenate([run(checked)[:-1], run({k: v[-1:] for k, v in checked.items()})]) - expected)
    return Measured(name, str(path), path.stat().st_size, median_ms(lambda: run(one)), float(difference.max()),
                    float(difference.mean()))


def median_ms(call):
    """Return the median time of a call in milliseconds, after two that are not counted."""
    times = []
    for _ in range(REPEATS + 2):
        started = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[2:])


def print_table(rows, report):
    """Print what was written, one line a file."""
    print(f"{report['parameters']:,} parameters, {report['sampler']} with {report['steps']} step(s), one thread")
    print(f"{'':14}{'MB':>8}{'ms/image':>10}{'largest':>10}{'mean':>10}  difference from PyTorch, file")
    for row in rows:
        print(f"{row.name:14}{row.bytes / 1e6:8.2f}{row.latency_ms:10.2f}{row.largest_difference:10.1e}"
              f"{row.mean_difference:10.1e}  {row.file}")


if __name__ == "__main__":
    with one_sentence("export"):
        sys.exit(main())
