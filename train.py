"""Train a 1-rectified flow, reflow, annealing reflow or flow-guided distillation: one loop, chosen by the config.

    python train.py --config configs/rectified_flow/cifar10_rf_gaussian.py --config.expr 1_rectified_flow
    torchrun --nproc_per_node=8 train.py …       (config.training.batch_size is the global batch)

The run lives in logs/{expr}/: checkpoints/, samples/, log.jsonl, loss.png, tensorboard/. The same command
continues an interrupted run. Ctrl-C and SIGTERM finish the update, save the state and exit with status 130 and 143.
"""

from runtime.terminal import UserError  # isort: skip - first, so that Ctrl-C is quiet while torch is imported

import contextlib
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configs.command_line import config_to_dict, differences, run_script
from datasets import create_batches
from flows.objective import Draws, create_objective
from flows.rectified_flow import velocity_from_network
from flows.schedules import create_annealing
from models.create import create_model
from models.describe import fastest_layout
from runtime.devices import compiled, explained, gather, in_precision, set_deterministic, set_precision, start_processes
from runtime.run_folder import run_path
from runtime.seeds import DRAWS, seed_dropout, step_generator
from training import run, state
from training.update import ExponentialMovingAverage, UpdateStats, apply_update, check_skipped, create_optimizer

READS = ("seed", "work_dir", "expr", "training.", "flow.", "data.", "model.", "optim.", "sampling.init_noise_scale",
         "sampling.train_subset")


def main(config, args, given):
    """Train the run that the config names; return the exit status."""
    messages = state.take_pair_fields(config, given)
    config, adapted = state.take_architecture(config, given)
    with start_processes() as processes, contextlib.ExitStack() as held:
        run.check_training(config, processes.world_size)
        return train(config, processes, messages + adapted, held)


def train(config, processes, messages, held):
    """Update until training.n_iters or a signal; log, sample and write checkpoints; return the exit status."""
    path, options = run_path(config), config.training
    processes.from_main(lambda: held.enter_context(run.locked(path)))  # before its state is read
    changed = state.check_same_run(config, path)
    found = state.find_state(config, messages.append)
    step = first = found["step"] if found else 0
    if len(set(steps := gather(step))) > 1:
        raise UserError(f"the processes find states after {steps} updates: config.work_dir must be one shared folder")
    if step >= options.n_iters:
        processes.say(f"{found['path']} has {step} of config.training.n_iters {options.n_iters} updates: the run is "
                      "finished; raise config.training.n_iters to train on")
        return 0

    advice = (f"raise config.training.accumulation_steps ({options.accumulation_steps}), which splits the batch, or "
              f"lower config.training.batch_size ({options.batch_size})")
    with explained(advice):
        training = Training(config, processes, found)
    data_changed = processes.from_main(lambda: run.open_run(config))
    logger = run.RunLogger(config, start=step, active=processes.is_main)
    messages += [f"continuing from {found['path']}, {step} updates done"] if found else []
    messages += [f"from update {step} on: {phrase}" for phrase in changed] + training.messages + data_changed
    messages += [f"config fields that differ from their defaults (in brackets): {differences(config) or 'none'}",
                 *run.endless_schedules(config), training.describe()]
    for message in messages:
        logger.say(message)

    writer, signal, grid, started = state.Writer(), 0, None, time.monotonic()
    held.callback(writer.wait)  # the lock is kept until everything is on disk, however the training ends
    with run.stop_requests(processes.world_size) as agreed_signal, explained(advice):
        while step < options.n_iters and not signal:
            training.update(step)
            step += 1
            logger.bar.update()
            signal = agreed_signal()
            ended = step == options.n_iters

            if step % options.record_iters == 0 or ended:
                stats = training.stats.read()  # the one regular read from the device
                check_skipped(stats, options.max_skipped)
                training.stats.restart()
                logger.write(step, stats, lr=training.learning_rate(step - 1),
                             beta=create_annealing(options.x0_randomness)(step - 1), device=processes.device)

            if options.snapshot_sampling and (step % options.snapshot_sampling == 0 or ended) and processes.is_main:
                grid = run.sample_grid(training.network, training.ema, config, training.source.shape, step)
                logger.image(grid, step)

            paths = state.due_paths(path, step, ended, signal, options)
            if paths:
                check_skipped(training.stats.read(), options.max_skipped)
                logger.draw()
            if paths and processes.is_main:
                writer.submit(training.state(step), paths, options.keep_checkpoints)
        writer.wait()

    if signal and step < options.n_iters:
        logger.say(f"stopped by signal {signal} after update {step}; the same command continues from here")
    else:
        skipped = f", {stats['nonfinite']:.0f} skipped since they were not finite" if stats["nonfinite"] else ""
        logger.say(f"finished: {step} updates, {step - first} of them in {time.monotonic() - started:.0f} s{skipped}; "
                   f"{paths[-2]}{f' and {grid}' if grid else ''}")
    logger.close()
    return 128 + signal if signal else 0


class Training:
    """What an update changes (network, EMA, optimizer, statistics) and what it needs (data, objective, teacher)."""

    def __init__(self, config, processes, found=None):
        self.config, self.processes, self.device = config, processes, processes.device
        set_precision(config.training.precision)
        set_deterministic(config.training.deterministic)
        self.source = create_batches(config, self.device)
        torch.manual_seed(config.seed)
        self.network = create_model(config).to(self.device, memory_format=torch.channels_last)
        self.messages = [] if found else state.load_pretrained(self.network, config)
        if self.device.type == "cuda" and not (config.training.compile or config.training.deterministic):
            part, velocity = self.parts()[0], self.velocity_of(self.network)
            layout = processes.from_main(lambda: fastest_layout(self.network, velocity, part.stop - part.start))
            self.network.to(memory_format=layout)  # the same in all processes, which DDP demands
            self.messages.append(f"memory layout: {layout}, the faster of two")
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.ema = ExponentialMovingAverage(parameters, config.model.ema_rate)
        self.optimizer = create_optimizer(parameters, config.optim)
        self.stats = UpdateStats(self.device, scaled=config.training.precision == "fp16" and self.device.type == "cuda")
        if found:
            state.restore(found, self.network, self.ema, self.optimizer, self.stats)
        for parameter in getattr(self.network, "idle_parameters", list)():  # processes would wait for their gradients
            parameter.requires_grad_(False)
        teacher = state.load_teacher(config, self.device)
        teacher = teacher and self.velocity_of(compiled(teacher, config.training))
        self.objective = create_objective(config, teacher, self.device)
        self.parallel = self.network
        if processes.world_size > 1:  # gradients are averaged over the processes
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.parallel = DistributedDataParallel(self.network, device_ids=ids, gradient_as_bucket_view=True)
            self.parallel.broadcast_buffers = False  # constants; the argument's default depends on torch
        called = self.parallel
        if config.training.compile:
            self.messages.append("compiling in the first update, which takes a minute or more")
            called = torch.compile(self.parallel, mode=config.training.compile_mode, dynamic=False)  # see `compiled`
        self.keep_gradients = config.training.compile and config.training.accumulation_steps > 1
        if self.keep_gradients:  # a CUDA graph overwrites gradients that it allocated itself
            for parameter in filter(lambda p: p.requires_grad, parameters):
                parameter.grad = torch.zeros_like(parameter)
        self.velocity = self.velocity_of(called)
        self.network.train()

    def velocity_of(self, network):
        """Return the velocity of a network that computes in config.training.precision."""
        return velocity_from_network(in_precision(network, self.config.training.precision, self.device))

    def update(self, update):
        """Do update number `update`; its randomness depends on (seed, update, index in the global batch) alone."""
        config, size = self.config, self.config.training.batch_size
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(update)
        seed_dropout(config.seed, update, self.processes.rank)
        loss, parts = torch.zeros((), device=self.device), self.parts()
        for part in parts:
            # gradients are averaged over the processes once per update, in the last accumulation step
            local = self.processes.world_size > 1 and part is not parts[-1]
            with self.parallel.no_sync() if local else contextlib.nullcontext():
                batch = self.source.batch(update, part.start, part.stop)
                draws = Draws(step_generator(config.seed, update, DRAWS, self.device), size, part, self.device,
                              config.sampling.init_noise_scale)
                mean = self.objective(self.velocity, batch, draws, update).mean() / len(parts)
                (mean * self.stats.scale.float()).backward()
            loss += mean.detach()
        if self.processes.world_size > 1:
            dist.all_reduce(loss.div_(self.processes.world_size))
        apply_update(self.optimizer, self.ema, self.stats, loss, grad_clip=config.optim.grad_clip)
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)

    def learning_rate(self, update):
        """Return the learning rate of `update`: linear warm-up from 0 (none with flow.pre_train_model)."""
        optim = self.config.optim
        warmup = 0 if self.config.flow.pre_train_model else optim.warmup
        return optim.lr * min(1.0, update / warmup) if warmup else optim.lr

    def parts(self):
        """Return the slices of the global batch that this process takes, one per accumulation step."""
        steps, count = self.config.training.accumulation_steps, self.processes.world_size
        size = self.config.training.batch_size // (steps * count)
        firsts = [(step * count + self.processes.rank) * size for step in range(steps)]
        return [slice(first, first + size) for first in firsts]

    def state(self, step):
        """Return the checkpoint after `step` updates: everything that later updates depend on."""
        return {"model": dict(self.network.state_dict()), "ema": self.ema.state_dict(), "step": step,
                "optimizer": self.optimizer.state_dict(), "stats": {"values": self.stats.values},
                "config": config_to_dict(self.config)}

    def describe(self):
        """Return one line about the network, the device and the data."""
        config, device = self.config, self.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        count = sum(p.numel() for p in self.network.parameters())
        return (f"training {run_path(config)}: {config.model.name} of {count:,} parameters on {name} "
                f"({self.processes.world_size} process{'es' * (self.processes.world_size > 1)}), {len(self.source):,} "
                f"{'pairs' if config.data.reflow_data_root else 'images'} of {'×'.join(map(str, self.source.shape))}, "
                f"batch {config.training.batch_size}, {config.training.n_iters} updates")


if __name__ == "__main__":
    run_script(main, __doc__, reads=READS)
