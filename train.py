"""Train a 1-rectified flow, reflow, annealing reflow or flow-guided distillation: one loop, chosen by the config.

    python train.py --config configs/rectified_flow/cifar10_rf_gaussian.py --config.expr 1_rectified_flow
    torchrun --nproc_per_node=8 train.py …       (config.training.batch_size is the global batch)

The run lives in logs/{expr}/: checkpoints/, samples/, log.jsonl, loss.png, tensorboard/. The same command goes on
where a stopped run ended. Ctrl-C and SIGTERM finish the update, write the state and exit with status 130 and 143.
"""

from runtime.errors import UserError  # isort: skip - first, so that Ctrl-C is quiet while torch is imported

import contextlib
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configs.command_line import config_to_dict, differences, run_script
from configs.validation import check_training
from datasets import create_batches
from flows.objective import Draws, create_objective
from flows.rectified_flow import velocity_from_network
from flows.schedules import create_annealing
from models import create_model
from models.ema import ExponentialMovingAverage
from runtime.devices import (
    in_precision,
    memory_errors,
    set_deterministic,
    set_precision,
    start_processes,
    stop_processes,
)
from runtime.seeds import DRAWS, seed_dropout, step_generator
from training import run, state
from training.update import UpdateStats, apply_update, check_finite, create_optimizer, warmup_factor


def main(config, args, given):
    """Train the run that the config names; return the exit status."""
    config, messages = state.take_architecture(config, given)
    check_training(config)
    processes = start_processes()
    try:
        with contextlib.ExitStack() as held:
            processes.from_main(lambda: held.enter_context(run.lock_run(run.run_path(config))))
            return train(config, processes, messages)
    finally:
        stop_processes()


def train(config, processes, messages):
    """Update until training.n_iters or a signal; log, sample and write checkpoints; return the exit status."""
    path, options = run.run_path(config), config.training
    check_batch(config, processes.world_size)
    changed = run.check_same_run(config, path)
    found, found_path = state.find_state(config, messages.append)
    step = found["step"] if found else 0
    if step != processes.share(step):
        raise UserError(f"process {processes.rank} finds {step} updates done, process 0 another number: "
                        "config.work_dir must be one folder that all processes see")
    if step >= options.n_iters:
        print(f"{found_path} has {step} of config.training.n_iters {options.n_iters} updates: the run is finished; "
              "raise config.training.n_iters to train on")
        return 0

    training = Training(config, processes, found)
    data_changed = processes.from_main(lambda: run.open_run(config))
    logger = run.RunLogger(path, start=step, total=options.n_iters, progress=options.progress,
                           active=processes.is_main)
    if found:
        messages.append(f"continuing from {found_path}, {step} updates done")
    messages += [f"from update {step} on: {phrase}" for phrase in changed] + training.messages + data_changed
    changed = f"config, where it is not the default (in brackets): {differences(config) or 'nowhere'}"
    for message in [*messages, changed, *run.endless_schedules(config), training.describe()]:
        logger.say(message)

    writer, signal, first, started = state.Writer(), 0, step, time.monotonic()
    checkpoint = grid = None
    with (run.StopRequest(processes.world_size) as stop, compiler_failures(options.compile),
          memory_errors(f"raise config.training.accumulation_steps ({options.accumulation_steps}), which splits the "
                        f"batch, or lower config.training.batch_size ({options.batch_size})")):
        while step < options.n_iters and not signal:
            training.update(step)
            step += 1
            logger.tick()
            signal = stop.agreed(step - first)
            ended = step == options.n_iters

            if step % options.record_iters == 0 or ended:
                stats = training.stats.read()  # the one regular read from the device
                check_finite(stats, options.max_skipped)
                training.stats.restart()
                logger.write(step, stats, lr=training.learning_rate(step - 1),
                             beta=create_annealing(options.x0_randomness)(step - 1),
                             batch_size=options.batch_size, device=processes.device)

            if options.snapshot_sampling and (step % options.snapshot_sampling == 0 or ended) and processes.is_main:
                grid = training.sample(path / "samples" / f"step_{step}.png")
                logger.image("samples", grid, step)
                logger.draw()

            paths = [path / "checkpoints" / f"checkpoint_{k}.pth"
                     for k in state.checkpoint_numbers(step, options.snapshot_freq, ended)]
            if paths:
                checkpoint = paths[-1]
                logger.draw()
            if ended or signal or (step > 1 and (step - 1) % options.snapshot_freq_for_preemption == 0):
                paths.append(path / "checkpoints-meta" / state.STATE)  # last: it marks the others as written
            if paths:
                check_finite(training.stats.read(), options.max_skipped)
                if processes.is_main:
                    writer.submit(training.state(step), paths,
                                  keep=lambda: state.keep_newest(path / "checkpoints", options.keep_checkpoints))
        writer.wait()

    logger.draw()
    if signal and step < options.n_iters:
        logger.say(f"stopped by signal {signal} after update {step}; the same command goes on from here")
    else:
        logger.say(f"finished: {step} updates, {step - first} of them in {time.monotonic() - started:.0f} s; "
                   f"{checkpoint}{f' and {grid}' if grid else ''}")
    logger.close()
    return 128 + signal if signal else 0


class Training:
    """What the updates change and need: network, EMA, optimizer, statistics; data, objective, teacher."""

    def __init__(self, config, processes, found=None):
        """Make everything as the config says, and put the state `found` in place, if there is one."""
        self.config, self.processes, self.device = config, processes, processes.device
        set_precision(config.training.precision)
        set_deterministic(config.training.deterministic)
        self.source = create_batches(config, self.device)
        torch.manual_seed(config.seed)
        self.network = create_model(config).to(self.device, memory_format=torch.channels_last)
        self.messages = [] if found else state.load_pretrained(self.network, config)
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.ema = ExponentialMovingAverage(parameters, config.model.ema_rate)
        self.optimizer = create_optimizer(
            parameters, name=config.optim.optimizer, lr=config.optim.lr, beta1=config.optim.beta1,
            eps=config.optim.eps, weight_decay=config.optim.weight_decay)
        self.stats = UpdateStats(self.device,
                                 scaled=config.training.precision == "fp16" and self.device.type == "cuda")
        if found:
            state.restore(found, self.network, self.ema, self.optimizer, self.stats)
        for parameter in self.network.idle_parameters():  # processes would wait for their gradients
            parameter.requires_grad_(False)
        teacher = state.load_teacher(config, self.device)
        self.objective = create_objective(config, teacher and self.velocity_of(teacher), self.device)
        self.velocity = self.velocity_of(self.parallel_network())
        self.network.train()

    def parallel_network(self):
        """Return the network as it is called in training: averaging gradients over processes, and compiled."""
        self.parallel = self.network
        if self.processes.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.network, device_ids=ids, gradient_as_bucket_view=True)
            self.parallel.broadcast_buffers = False  # constants; the constructor's word depends on torch's version
        if not self.config.training.compile:
            return self.parallel
        self.messages.append("compiling the network in the first update, which takes a minute or more")
        return torch.compile(self.parallel, mode=self.config.training.compile_mode)

    def velocity_of(self, network):
        """Return the velocity of a network that computes in config.training.precision."""
        return velocity_from_network(in_precision(network, self.config.training.precision, self.device))

    def describe(self):
        """Return a line about what is trained, on what and where."""
        config, device = self.config, self.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        count = sum(p.numel() for p in self.network.parameters())
        return (f"training {run.run_path(config)}: {config.model.name} of {count:,} parameters on {name} "
                f"({self.processes.world_size} process{'es' * (self.processes.world_size > 1)}), {len(self.source):,} "
                f"{'pairs' if config.data.reflow_data_root else 'images'} of {'×'.join(map(str, self.source.shape))}, "
                f"batch {config.training.batch_size}, {config.training.n_iters} updates")

    def update(self, update):
        """Do update number `update`: its randomness comes from (seed, update, place in the global batch)."""
        config, device = self.config, self.device
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(update)
        seed_dropout(config.seed, update, self.processes.rank)
        loss = torch.zeros((), device=device)
        parts = self.parts()
        for low, high in parts:
            with self.without_synchronisation() if (low, high) != parts[-1] else contextlib.nullcontext():
                batch = self.source.batch(update, low, high)
                generator = step_generator(config.seed, update, DRAWS, device)
                draws = Draws(generator, config.training.batch_size, slice(low, high), device)
                part = self.objective(self.velocity, batch, draws, update).mean() / len(parts)
                (part * self.stats.scale.float() if self.stats.scaled else part).backward()
            loss += part.detach()
        if self.processes.world_size > 1:
            dist.all_reduce(loss.div_(self.processes.world_size))
        apply_update(update, self.optimizer, self.ema, self.stats, loss, grad_clip=config.optim.grad_clip)
        self.optimizer.zero_grad(set_to_none=True)

    def learning_rate(self, update):
        """Return the learning rate of `update`: warm-up from 0, none with flow.pre_train_model."""
        optim = self.config.optim
        return optim.lr * warmup_factor(update, 0 if self.config.flow.pre_train_model else optim.warmup)

    def parts(self):
        """Return the places [low, high) of the global batch that this process takes, one per accumulation step."""
        steps, processes = self.config.training.accumulation_steps, self.processes
        size = self.config.training.batch_size // (steps * processes.world_size)
        firsts = [(step * processes.world_size + processes.rank) * size for step in range(steps)]
        return [(first, first + size) for first in firsts]

    def without_synchronisation(self):
        """Keep gradients to this process: they are averaged once an update, after the last accumulation step."""
        return self.parallel.no_sync() if self.processes.world_size > 1 else contextlib.nullcontext()

    def sample(self, path):
        """Write the grid of one-step and few-step samples of the EMA weights from fixed noise; return its path."""
        return run.sample_grids(self.network, self.ema, velocity_from_network(self.network), self.config,
                                self.source.shape, path)

    def state(self, step):
        """Return the checkpoint after `step` updates: all that the next one depends on."""
        return {
            "model": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": step,
            "stats": self.stats.state_dict(),
            "config": config_to_dict(self.config),
        }


def check_batch(config, world_size):
    """Raise UserError if the global batch cannot be split over processes and accumulation steps."""
    parts = world_size * config.training.accumulation_steps
    if config.training.batch_size % parts:
        raise UserError(f"config.training.batch_size {config.training.batch_size} cannot be split into "
                        f"{world_size} processes × {config.training.accumulation_steps} accumulation steps")


@contextlib.contextmanager
def compiler_failures(compiling):
    """Raise a UserError for what torch.compile cannot do here, for instance without a C++ compiler."""
    try:
        yield
    except RuntimeError as error:
        if not (compiling and isinstance(error, torch._dynamo.exc.TorchDynamoException)):
            raise
        cause = getattr(error, "inner_exception", error)
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        raise UserError(f"config.training.compile is true, but torch.compile fails: {reason}; set it to false, or "
                        "install the compiler that it needs") from error


if __name__ == "__main__":
    run_script(main, __doc__)
