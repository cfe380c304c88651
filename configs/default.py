"""All config fields: default (the CIFAR-10 value), meaning, unit, choices and range of each."""

import dataclasses
import difflib
import math
import re
from collections.abc import Collection

import ml_collections

from datasets.sources import DATASETS
from flows.losses import DISTANCES, WEIGHTS
from flows.samplers import COUPLINGS, SAMPLERS, sampler_fields
from flows.schedules import ALPHA_SCHEDULES, ANNEALING_SCHEDULES, TIME_SCHEDULES, name_pattern
from models import NETWORKS
from runtime.terminal import UserError

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text",
         tuple: "numbers such as '1, 2, 2'"}


@dataclasses.dataclass(frozen=True)
class Field:
    """One config field, or a script's own flag: the type of `default` is the type of its values."""

    default: object
    meaning: str
    choices: Collection = ()  # allowed values, or a table whose keys they are
    low: float | None = None  # range, of each entry of a tuple
    high: float | None = None

    def describe(self, value):
        """Return one line of help: meaning, choices, range, the default, and `value` if it differs."""
        text = self.meaning + (f"; one of {' | '.join(map(str, self.choices))}" if self.choices else "")
        if self.low is not None:
            high = f"{self.high:,}" if isinstance(self.high, int) else f"{self.high or 0:g}"
            text += f"; at least {self.low:g}" if self.high is None else f"; from {self.low:g} to {high}"
        now = f"now {value!r}; " if value != self.default else ""
        return f"{text} ({now}default: {self.default!r})"

    def check(self, name, value):
        """Raise UserError, which starts with `name`, unless `value` has the field's type and is an allowed value."""
        kind = type(self.default)
        right = is_number(value) if kind in (int, float) else isinstance(value, kind)
        if not right or (kind is int and value % 1) or (kind is tuple and not all(map(is_number, value))):
            raise UserError(f"{name} must be {KINDS[kind]}, not {value!r}")
        numbers = value if kind is tuple else [value]
        if self.low is not None and any(number < self.low for number in numbers):
            raise UserError(f"{name} must be at least {self.low:g}, not {value!r}")
        if self.high is not None and any(number > self.high for number in numbers):
            raise UserError(f"{name} must be at most {self.high:g}, not {value!r}")
        choices = [str(c) for c in self.choices]
        if choices and not any(re.fullmatch(name_pattern(choice), str(value)) for choice in choices):
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
            raise UserError(f"{name} must be one of {', '.join(choices)}, not {value!r}"
                            + (f"; did you mean {near[0]}?" if near else ""))


def is_number(value):
    """Whether a value is a finite int or float; True and False are neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# In a choice, <number> stands for a decimal number and <int> for a positive whole one.
GROUPS = {
    "": {
        "seed": Field(42, "seed of all randomness, in training, samples and pairs", low=0, high=2**63 - 1),
        "work_dir": Field("./logs/", "folder of all runs; a run lives in {work_dir}/{expr}/"),
        "expr": Field("", "name of the run and of its folder (required for training)"),
    },
    "training": {
        "batch_size": Field(128, "images per update in total; generate_data.py: pairs solved at a time", low=1),
        "n_iters": Field(1300001, "number of updates", low=1),
        "snapshot_freq": Field(20000, "updates between checkpoints/checkpoint_{k}.pth", low=1),
        "snapshot_freq_for_preemption": Field(10000, "updates between writes of the state to continue from", low=1),
        "snapshot_sampling": Field(10000, "updates between sample grids in samples/ (0: never)", low=0),
        "record_iters": Field(500, "updates between entries of log.jsonl", low=1),
        "accumulation_steps": Field(1, "passes that the batch of an update is split into, to save memory", low=1),
        "loss_type": Field("l2", "distance of velocities or images (docs/objectives.md)", choices=DISTANCES),
        "reduce_mean": Field(True, "l1 and l2 as mean over C·H·W (false: half the sum)"),
        "weight_schedule": Field("uniform", "weight of the loss as a function of t", choices=WEIGHTS),
        "x0_randomness": Field("fix_0", "pairs: β(update) in z0' = sqrt(1-β²)·z0 + β·ξ", choices=ANNEALING_SCHEDULES),
        "resume_from": Field("", "run folder from whose last state a new run starts"),
        "progress": Field("auto", "progress bars (auto: on a terminal)", choices=("auto", "true", "false")),
        "precision": Field("tf32", "arithmetic (tf32 and fp16: on CUDA)", choices=("fp32", "tf32", "bf16", "fp16")),
        "compile": Field(False, "compile networks with torch.compile, in training and in sampling"),
        "compile_mode": Field("default", "torch.compile mode", choices=("default", "reduce-overhead", "max-autotune")),
        "deterministic": Field(False, "deterministic algorithms only (slower on a GPU)"),
        "max_skipped": Field(100, "non-finite updates in a row after which training stops", low=1),
        "wandb": Field("", "Weights & Biases project that the TensorBoard log is sent to (needs the package wandb)"),
        "keep_checkpoints": Field(0, "number of the newest checkpoint_{k}.pth to keep (0: all)", low=0),
    },
    "flow": {
        "eps": Field(1e-3, "smallest time: t runs over [eps, 1]", low=0.0, high=0.5),
        "flow_t_schedule": Field("uniform", "distribution of t (docs/objectives.md)", choices=TIME_SCHEDULES),
        "flow_alpha_t": Field("uniform", "α of x_t = α·z1 + (1-α)·z0: t, eps (t0) or 1 (t1)", choices=ALPHA_SCHEDULES),
        "pre_train_model": Field("", "checkpoint of the initial weights (raw; hf://owner/repo/file, too)"),
        "pre_train_partial": Field(False, "load only the tensors of pre_train_model that fit (false: all must fit)"),
        "use_teacher": Field(False, "flow-guided distillation: add the loss of two guided steps"),
        "guidance_first_step": Field("student", "network of the first guidance step", choices=("student", "teacher")),
        "teacher_model": Field("", "checkpoint of the teacher (EMA weights; empty: pre_train_model)"),
        "h_flip": Field(False, "flip z0 and z1 of a pair together, left-right, with probability 1/2"),
        "real_data_share": Field(0.0, "share of each batch from data.real_pairs_root", low=0.0, high=1.0),
    },
    "sampling": {
        "use_ode_sampler": Field("rk45", "sampler", choices=SAMPLERS),
        "ode_tol": Field(1e-5, "rtol = atol of rk45", low=1e-12, high=1.0),
        "step_control": Field("sample", "rk45: step size per sample or per batch", choices=("sample", "batch")),
        "max_steps": Field(10000, "rk45: largest number of steps of a sample", low=1),
        "sample_N": Field(1000, "number of steps N of all samplers but one_step and rk45", low=1),
        "rho": Field(1.0, "heun: exponent ρ of the time grid", low=0.01),
        "sigma_max": Field(80.0, "edm: first noise level (at most 100 for EDM's VE networks, 152 for VP)", low=0.01),
        "sigma_min": Field(0.002, "edm: last noise level before 0", low=1e-5),
        "batch_size": Field(64, "images sampled at a time; with rk45 per sample, the number of slots", low=1),
        "init_type": Field("gaussian", "distribution of z0", choices=("gaussian",)),
        "init_noise_scale": Field(1.0, "standard deviation of z0, in training, too", low=0.0),
        "direction": Field("from_z0", "generate_data.py: how pairs are made", choices=COUPLINGS),
        "total_number_of_samples": Field(50000, "generate_data.py: number of pairs", low=1),
        "train_subset": Field("all", "older name of data.train_subset"),
        "class_label": Field(-1, "class of conditional samples (-1: random)", low=-1),
        "block_size": Field(0, "pairs per block, which is redone if interrupted (0: 4 × training.batch_size)", low=0),
        "pair_storage": Field("full", "z0 and z1 in float32, or z1 alone in float16", choices=("full", "compact")),
        "random_flip": Field(False, "generate_data.py: flip initial images left-right with probability 1/2"),
    },
    "eval": {
        "batch_size": Field(1024, "images sampled at a time", low=1),
        "num_samples": Field(50000, "number of samples", low=2),
        "begin_ckpt": Field(9, "first checkpoint number of a sweep", low=0),
        "end_ckpt": Field(26, "last checkpoint number of a sweep (0: to the newest)", low=0),
        "wait": Field(False, "wait for checkpoints of the sweep that training is still writing"),
        "wait_limit": Field(24.0, "longest wait for one checkpoint, in hours", low=0.0),
        "feature_extractor": Field("inception", "features compared (pixels: no FID)", choices=("inception", "pixels")),
        "inception_path": Field("", "clean-fid's inception-2015-12-05.pt (empty: from the cache, or downloaded)"),
        "nearest": Field(2000, "samples whose distance to the nearest training image is measured (0: none)", low=0),
        "precision_recall": Field(True, "measure precision and recall (quadratic in the number of samples)"),
        "save_samples": Field(False, "save the measured samples, uint8 (N, C, H, W), as an npy in eval/"),
    },
    "data": {
        "dataset": Field("CIFAR10", "data set", choices=DATASETS),
        "data_root": Field("", "file or folder of the data set (empty: data/{dataset})"),
        "custom_data_root": Field("", "older name of data_root"),
        "train_subset": Field("all", "images to train on and to compare with: all, a class name, or random_N of them"),
        "cache_dir": Field("data/cache", "folder of the decoded uint8 arrays"),
        "image_size": Field(32, "height and width of the images", low=1, high=4096),
        "num_channels": Field(3, "colour channels", low=1, high=1024),
        "num_classes": Field(0, "classes of a class-conditional model (0: unconditional)", low=0, high=10**6),
        "centered": Field(True, "images in [-1, 1] (always)", choices=(True,)),
        "random_flip": Field(True, "flip images left-right with probability 1/2 (off by default for digits, MNIST)"),
        "use_aug": Field(False, "flip images, or z0 and z1 of pairs: left-right (1/2) and upside down (0.06)"),
        "on_device": Field("auto", "keep the data on the device (auto: if it fits)", choices=("auto", "true", "false")),
        "skip_corrupt": Field(False, "skip and count corrupt images instead of stopping"),
        "reflow_data_root": Field("", "folder of noise-image pairs to train on (empty: train on images)"),
        "real_pairs_root": Field("", "folder of pairs made from real images (from_z1), for flow.real_data_share"),
    },
    "model": {
        "name": Field("ncsnpp", "network", choices=NETWORKS),
        "nf": Field(128, "channels of the first level", low=4, high=4096),
        "ch_mult": Field((1, 2, 2, 2), "channels of each level, in multiples of nf", low=1, high=64),
        "num_res_blocks": Field(4, "residual blocks per level", low=1, high=64),
        "attn_resolutions": Field((16,), "image sizes at which levels have self-attention"),
        "dropout": Field(0.15, "dropout probability (DhariwalUNet: 0.13 unless given)", low=0.0, high=1.0),
        "preconditioning": Field("none", "as in EDM, for denoisers", choices=("none", "edm", "vp", "ve")),
        "label_dropout": Field(0.0, "probability of hiding a sample's class in training", low=0.0, high=1.0),
        "ema_rate": Field(0.999999, "largest decay of the EMA of the weights", low=0.0, high=1.0),
        "conditional": Field(True, "condition the network on the time"),
        "embedding_type": Field("positional", "time embedding", choices=("positional", "fourier")),
        "fourier_scale": Field(16.0, "scale of the fourier embedding's frequencies"),
        "resblock_type": Field("biggan", "residual block of ncsnpp", choices=("biggan", "ddpm")),
        "nonlinearity": Field("swish", "activation of ncsnpp", choices=("swish", "elu", "relu", "lrelu")),
        "skip_rescale": Field(True, "divide sums of a branch and its skip by sqrt(2)"),
        "resamp_with_conv": Field(True, "resample with a convolution (ddpm blocks and progressive branches)"),
        "fir": Field(False, "resample with the FIR filter fir_kernel"),
        "fir_kernel": Field((1, 3, 3, 1), "taps of the FIR filter"),
        "progressive": Field("none", "output branches of all levels", choices=("none", "output_skip", "residual")),
        "progressive_input": Field("none", "input branches to all levels", choices=("none", "input_skip", "residual")),
        "progressive_combine": Field("sum", "how input branches are joined", choices=("sum", "cat")),
        "init_scale": Field(0.0, "scale of the initial weights of each branch's last layer", low=0.0),
        "scale_by_sigma": Field(False, "divide the output by the noise level at t"),
        "sigma_min": Field(0.01, "smallest entry of the released `sigmas` buffer", low=1e-9),
        "sigma_max": Field(50.0, "largest entry of the released `sigmas` buffer", low=1e-9),
        "num_scales": Field(1000, "entries of the released `sigmas` buffer", low=1, high=10**6),
    },
    "optim": {
        "optimizer": Field("Adam", "optimizer", choices=("Adam", "AdamW", "RAdam")),
        "lr": Field(2e-4, "learning rate after warm-up", low=0.0),
        "beta1": Field(0.9, "decay of the first moment", low=0.0, high=0.9999),
        "eps": Field(1e-8, "added to the root of the second moment", low=1e-30),
        "weight_decay": Field(0.0, "weight decay", low=0.0),
        "warmup": Field(5000, "updates of linear warm-up, from 0 (none with flow.pre_train_model)", low=0),
        "grad_clip": Field(1.0, "largest gradient norm (negative: off)"),
    },
}

FIELDS = {f"{group}.{name}".lstrip("."): field for group, fields in GROUPS.items() for name, field in fields.items()}
# What the scripts that sample from a checkpoint have in common: how the names of the fields begin that they read.
SAMPLING_READS = ("seed", "training.compile", "training.precision", "training.progress", "flow.eps", "model.",
                  *(f"sampling.{name}" for name in ("use_ode_sampler", *sampler_fields(), "max_steps", "class_label")),
                  "sampling.init_noise_scale", "sampling.train_subset", "data.data", "data.custom_data_root",
                  "data.train_subset", "data.cache_dir", "data.image_size", "data.num_", "data.skip_corrupt")


def get_default_config():
    """Return the config of the defaults, an `ml_collections.ConfigDict`."""
    defaults = {group: {name: field.default for name, field in fields.items()} for group, fields in GROUPS.items()}
    return ml_collections.ConfigDict(defaults.pop("") | defaults)


def get_field(config, name):
    """Return the value of the field with the dotted `name`."""
    group, _, last = name.rpartition(".")
    return (config[group] if group else config)[last]


def set_field(config, name, value):
    """Set the field with the dotted `name` to `value`, as it is."""
    group, _, last = name.rpartition(".")
    members = config[group] if group else config
    with members.ignore_type():
        members[last] = value


def check_fields(config):
    """Raise UserError for the first field whose value has the wrong type or is outside its choices or range."""
    for name, field in FIELDS.items():
        field.check(f"config.{name}", get_field(config, name))
