"""Export a one-step model to ONNX: noise in, image out, the sampler folded in, no torch needed to use it.

    python -m tools.export logs/distilled/checkpoints/checkpoint_1.pth
    python -m tools.export logs/2_rectified_flow/checkpoints/checkpoint_16.pth --sampler euler --steps 2

Writes {run}/export/{checkpoint}.onnx, {checkpoint}_int8.onnx (8-bit weights and activations) and {checkpoint}.json
with their sizes, their one-image latencies on this CPU beside PyTorch's, and their differences from PyTorch; above 1e-4
for the float32 file the command fails. docs/export.md shows how to use the files. The number of images is free; a
class-conditional model has a second input, the class numbers, and refuses numbers that are not classes. flow.eps and
the noise scale are those of the checkpoint's run. Repeated exports give the same model, though not the same bytes.
"""

import contextlib
import importlib.metadata
import io
import logging
import pathlib
import tempfile
import warnings

import numpy as np
import torch

from configs.command_line import load_config, run_program
from configs.default import Field, get_default_config
from flows.rectified_flow import velocity_from_network
from flows.samplers import euler, one_step
from models.checkpoint import is_remote, load_with_config
from models.describe import median_seconds
from runtime.files import atomic_path, write_json
from runtime.run_folder import run_folder
from runtime.seeds import EVALUATION, index_labels, index_noise
from runtime.terminal import UserError, print_message, progress_bar

TOLERANCE = 1e-4  # largest difference of a pixel in [-1, 1] of the float32 file
CHECKED, CALIBRATED, BATCH = 16, 64, 8  # images of the check, of the calibration, of one of its batches

FLAGS = {
    "checkpoint": Field("", "checkpoint file, hf://owner/repo/file or https://…/file"),
    "out": Field("", "output folder (empty: {run}/export)"),
    "sampler": Field("one_step", "sampler that is built in", choices=("one_step", "euler")),
    "steps": Field(1, "number of Euler steps", low=1),
    "config": Field("", "config file with the architecture, for a checkpoint without it"),
    "raw": Field(False, "use the raw weights, not their EMA"),
}


class Generator(torch.nn.Module):
    """Maps noise (N, C, H, W), and class numbers (N,) int64 of a conditional network, to images (N, C, H, W).

    steps: of Euler, None for the sampler `one_step`. eps and noise_scale: flow.eps and sampling.init_noise_scale.
    """

    def __init__(self, net, steps, eps=1e-3, noise_scale=1.0):
        super().__init__()
        self.net, self.steps, self.eps, self.noise_scale = net, steps, eps, noise_scale
        self.shape = (net.config_fields["data.num_channels"], *[net.config_fields["data.image_size"]] * 2)
        self.classes = net.config_fields["data.num_classes"]

    def forward(self, noise, label=None):
        """Return the images, about [-1, 1], not clipped."""
        if label is not None:
            # onnxruntime checks indices, so indexing refuses invalid numbers; all zeros would mean the unknown class.
            index = torch.where(label < 0, torch.full_like(label, self.classes), label)
            known = torch.ones(self.classes).index_select(0, index)
            label = (label[:, None] == torch.arange(self.classes)).float() * known[:, None]
        velocity, z = velocity_from_network(self.net), noise * self.noise_scale
        if self.steps is None:
            return one_step(velocity, z, label, t_start=self.eps)[0]
        return euler(velocity, z, label, steps=self.steps, t_start=self.eps)[0]


def main(args):
    if not args.checkpoint:
        raise UserError("name a checkpoint: python -m tools.export CHECKPOINT")
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"the export needs the package {error.name}: pip install onnx onnxscript onnxruntime") from None
    config = load_config(args.config) if args.config else get_default_config()
    config, net, digest = load_with_config(args.checkpoint, config, frozenset(), not args.raw, say=lambda remark: None)
    model = Generator(net, args.steps if args.sampler == "euler" else None, config.flow.eps,
                      config.sampling.init_noise_scale).eval()
    run = pathlib.Path() if is_remote(args.checkpoint) else run_folder(args.checkpoint)
    path = (pathlib.Path(args.out) if args.out else run / "export") / f"{pathlib.Path(args.checkpoint).stem}.onnx"
    small = path.with_name(f"{path.stem}_int8.onnx")
    print_message(f"exporting {args.checkpoint}; the first stage, tracing it, takes most of the time", stderr=True)
    with progress_bar(total=2 + CALIBRATED // BATCH + 3, desc="exporting", unit="stages") as bar:
        write_onnx(model, path, {name: args[name].value for name in FLAGS}, bar.update)
        write_int8(model, path, small, bar.update)
        torch.set_num_threads(1)
        with torch.inference_mode():
            expected = model(*draw_inputs(model, CHECKED).values()).numpy()
        rows = []
        for name, run, file in (("PyTorch", lambda inputs: model(*inputs.values()).numpy(), None),
                                ("onnx float32", runner(path), path), ("onnx int8", runner(small), small)):
            rows.append(measure(model, expected, name, run, file))
            bar.update()
    report = {"checkpoint": args.checkpoint, "digest": digest, "sampler": args.sampler, "steps": args.steps,
              "eps": model.eps, "noise_scale": model.noise_scale, "shape": model.shape, "classes": model.classes,
              "parameters": sum(p.numel() for p in net.parameters()), "threads": 1, "files": rows,
              "versions": {name: importlib.metadata.version(name) for name in ("torch", "onnx", "onnxruntime")}}
    write_json(path.with_suffix(".json"), report)
    print_message(f"{path.parent}: {report['parameters']:,} parameters, {args.sampler} with {args.steps} step(s), one "
                  "thread; largest and mean difference from PyTorch")
    print(f"{'':14}{'MB':>8}{'ms/image':>10}{'largest':>10}{'mean':>10}  file")
    for row in rows:
        print(f"{row['name']:14}{row['bytes'] / 1e6:8.2f}{row['latency_ms']:10.2f}{row['largest_difference']:10.1e}"
              f"{row['mean_difference']:10.1e}  {pathlib.Path(row['file']).name}")
    if not rows[1]["largest_difference"] <= TOLERANCE:
        raise UserError(f"{path} differs from PyTorch by {rows[1]['largest_difference']:.1e}, more than {TOLERANCE:g}: "
                        "do not use it; report the versions in the .json beside it")


def draw_inputs(model, count, first=0):
    """Return {input name: tensor} of `count` samples: noise, and class numbers for a conditional model."""
    indices = range(first, first + count)
    labels = {"label": index_labels(0, indices, model.classes)} if model.classes else {}
    return {"noise": index_noise(0, indices, model.shape, EVALUATION)} | labels


def write_onnx(model, path, settings, finished):
    """Write the float32 file, with `settings` in its metadata; call `finished()` after each of two stages."""
    import onnx

    inputs = draw_inputs(model, 2)
    batch = torch.export.Dim("batch")
    with quiet(), atomic_path(path) as temporary:
        program = torch.onnx.export(model, tuple(inputs.values()), dynamo=True, input_names=list(inputs),
                                    output_names=["image"], dynamic_shapes=[{0: batch} for _ in inputs], optimize=False)
        finished()
        program.optimize()
        proto = program.model_proto
        for part in (*proto.graph.node, *proto.graph.value_info):  # places in our code: half of the file
            part.ClearField("metadata_props")
        onnx.helper.set_model_props(proto, {name: str(value) for name, value in settings.items()} | {
            "values": "noise is standard normal; the image is about [-1, 1], channels first"})
        onnx.save(proto, temporary)
    finished()


def write_int8(model, path, small, finished):
    """Write the 8-bit file, with ranges of activations measured on samples of noise, as in use.

    It calls `finished()` after each batch of them.

    The first and the last convolution stay in float32, as usual: they are small, at noise and image. Weights and
    activations are unsigned: with signed weights, sums overflow on processors without VNNI instructions.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    def batches():  # other samples than those of the check
        for first in range(CHECKED, CHECKED + CALIBRATED, BATCH):
            yield {name: value.numpy() for name, value in draw_inputs(model, BATCH, first).items()}
            finished()

    class Noise(CalibrationDataReader):
        inputs = batches()

        def get_next(self):
            return next(self.inputs, None)

    with quiet(), atomic_path(small) as temporary, tempfile.TemporaryDirectory() as folder:
        prepared = pathlib.Path(folder, "prepared.onnx")
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        convolutions = [node.name for node in onnx.load(prepared).graph.node if node.op_type == "Conv"]
        quantize_static(prepared, temporary, Noise(), quant_format=QuantFormat.QDQ, per_channel=True,
                        op_types_to_quantize=["Conv", "Gemm"], nodes_to_exclude=[convolutions[0], convolutions[-1]],
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QUInt8)


@contextlib.contextmanager
def quiet():
    """Suppress the exporters' messages, which concern their internals."""
    with contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        yield


def runner(path):
    """Return a function {input name: tensor} → images that runs an ONNX file on one thread of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, {name: value.numpy() for name, value in inputs.items()})[0]


@torch.inference_mode()
def measure(model, expected, name, run, file):
    """Return a row of the report on `run`, {input name: tensor} → images, of an ONNX `file` or of PyTorch (None).

    It has the size in bytes, the median latency of one image, and the largest and mean difference from `expected`, the
    images that PyTorch computes in one batch.
    """
    checked, one = draw_inputs(model, CHECKED), draw_inputs(model, 1)
    parts = [{key: value[part] for key, value in checked.items()} for part in (slice(-1), slice(-1, None))]
    difference = np.abs(np.concatenate([run(part) for part in parts]) - expected)
    size = file.stat().st_size if file else sum(t.nbytes for t in model.net.state_dict().values())
    return {"name": name, "file": str(file or ""), "bytes": size, "latency_ms": 1000 * median_seconds(run, one),
            "largest_difference": float(difference.max()), "mean_difference": float(difference.mean())}


if __name__ == "__main__":
    run_program(main, __doc__, FLAGS, positional=("checkpoint",))
