"""Train a 1-rectified flow, reflow, annealing reflow or flow-guided distillation: one loop, chosen by the config.

    python train.py --config configs/rectified_flow/cifar10_rf_gaussian.py --config.expr 1_rectified_flow
    torchrun --nproc_per_node=8 train.py …       (config.training.batch_size is the global batch)

The run lives in logs/{expr}/: checkpoints/, samples/, log.jsonl, loss.png, tensorboard/. The same command goes on
where a stopped run ended. Ctrl-C and SIGTERM finish the update, write the state and exit with status 130 and 143.
"""

import contextlib

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configs.command_line import config_to_dict, run_script
from configs.validation import check_training
from datasets import create_batches
from flows.objectives import create_objective
from flows.rectified_flow import velocity_from_network
from models import create_model
from models.ema import ExponentialMovingAverage
from runtime.devices import start_processes, stop_processes
from runtime.errors import UserError
from runtime.seeds import DRAWS, step_generator
from training import networks, run_folder, snapshots
from training.record import Record
from training.state import STATE, Writer, keep_newest
from training.stopping import StopRequest
from training.update import (
    Guard,
    apply_update,
    check_skipped,
    create_optimizer,
    in_precision,
    set_precision,
    warmup_factor,
)


def main(config, args, given):
    """Train the run that the config names; return the exit status."""
    check_training(config)
    processes = start_processes()
    try:
        return Training(config, processes).run()
    finally:
        stop_processes()


class Training:
    """A run: what it is made of (the constructor) and what it does (the other methods, in order of use)."""

    def __init__(self, config, processes):
        self.config, self.processes, self.device = config, processes, processes.device
        check_batch(config, processes.world_size)
        run_folder.check_same_run(config, run_folder.run_path(config))
        set_precision(config.training.precision)
        torch.backends.cudnn.benchmark = True  # a run has one shape: time cuDNN's algorithms once, take the fastest
        torch.manual_seed(config.seed)
        self.source = create_batches(config, self.device)
        self.network = create_model(config).to(self.device, memory_format=torch.channels_last)
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = create_optimizer(
            parameters, name=config.optim.optimizer, lr=config.optim.lr, beta1=config.optim.beta1,
            eps=config.optim.eps, weight_decay=config.optim.weight_decay, device=self.device)
        self.guard = Guard(self.device, scaled=config.training.precision == "fp16" and self.device.type == "cuda")
        self.step, messages = self.start_weights(parameters)
        teacher = networks.load_teacher(config, self.device)
        self.objective = create_objective(config, teacher and self.velocity_of(teacher), self.device)
        self.velocity = self.velocity_of(self.trained_network())
        if self.step >= config.training.n_iters:
            raise UserError(f"{run_folder.run_path(config)} has its {self.step} updates already: raise "
                            f"config.training.n_iters ({config.training.n_iters}) to train on")
        self.path = processes.from_main(lambda: run_folder.open_run(config))
        self.record = Record(self.path, start=self.step, total=config.training.n_iters,
                             progress=config.training.progress, active=processes.is_main)
        if config.training.compile:
            messages.append("compiling the network in the first update, which takes a minute or more")
        for message in messages:
            self.record.say(message)
        self.writer = Writer()

    def start_weights(self, parameters):
        """Continue this run, another (resume_from) or start from pre_train_model or from nothing.

        Returns the number of updates done and what to tell about it.
        """
        state, messages = networks.find_state(self.config)
        if state is None:
            messages += networks.load_pretrained(self.network, self.config)
        self.ema = ExponentialMovingAverage(parameters, self.config.model.ema_rate)
        step = 0
        if state is not None:
            networks.restore(state, self.network, self.ema, self.optimizer, self.guard)
            step = state["step"]
        if step != self.processes.share(step):
            raise UserError(f"process {self.processes.rank} finds {step} updates done, process 0 another number: "
                            "config.work_dir must be one folder that all processes see")
        return step, messages

    def trained_network(self):
        """Return the network as it is called in training: compiled, and averaging gradients over processes.

        Processes would wait for the gradients of parameters that have none; optimizer and EMA hold these by now.
        """
        for parameter in self.network.idle_parameters():
            parameter.requires_grad_(False)
        network = torch.compile(self.network) if self.config.training.compile else self.network
        if self.processes.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            network = DistributedDataParallel(network, device_ids=ids, gradient_as_bucket_view=True)
            network.broadcast_buffers = False  # constants; the constructor's word for it depends on torch's version
        self.parallel = network
        return network

    def velocity_of(self, network):
        """Return the velocity of a network that computes in config.training.precision."""
        return velocity_from_network(in_precision(network, self.config.training.precision, self.device))

    def run(self):
        """Update until n_iters, or until told to stop; return the exit status."""
        self.network.train()
        signal = 0
        compiling = networks.compiler_failures(self.config.training.compile)
        with StopRequest(self.processes.world_size) as stop, compiling:
            while self.step < self.config.training.n_iters and not signal:
                self.update(self.step)
                self.step += 1
                self.record.tick()
                signal = stop.agreed(self.step)
                self.after_update(last=bool(signal) or self.step == self.config.training.n_iters)
            self.writer.wait()
        self.record.draw()
        if signal:
            self.record.say(f"stopped by signal {signal} after update {self.step}; the same command goes on from here")
        self.record.close()
        return 128 + signal if signal else 0

    def update(self, update):
        """Do update number `update`: its randomness comes from (seed, update, place in the global batch)."""
        config, device = self.config, self.device
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(update)
        generator = step_generator(config.seed, update, DRAWS, device)
        draws = self.objective.draw(generator, config.training.batch_size, self.source.shape, device)
        networks.seed_dropout(config.seed, update, self.processes.rank)
        loss = torch.zeros((), device=device)
        parts = self.parts()
        for low, high in parts:
            with self.without_synchronisation() if (low, high) != parts[-1] else contextlib.nullcontext():
                batch = self.source.batch(update, low, high)
                own = {name: draw[low:high] for name, draw in draws.items()}
                part = self.objective(self.velocity, batch, own, update).mean() / len(parts)
                (part * self.guard.scale.float() if self.guard.scaled else part).backward()
            loss += part.detach()
        if self.processes.world_size > 1:
            dist.all_reduce(loss.div_(self.processes.world_size))
        apply_update(update, self.optimizer, self.ema, self.guard, loss, grad_clip=config.optim.grad_clip)
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

    def after_update(self, last):
        """Record, sample and write checkpoints where the config says so after `self.step` updates."""
        training, done = self.config.training, self.step - 1
        if self.step % training.record_iters == 0 or self.step == training.n_iters:
            self.write_record()
        if training.snapshot_sampling and (self.step % training.snapshot_sampling == 0):
            self.sample()
        paths, number = [], self.checkpoint_number(last)
        if number:
            paths.append(self.path / "checkpoints" / f"checkpoint_{number}.pth")
            self.record.draw()
        if last or (done and done % training.snapshot_freq_for_preemption == 0):  # at the end: it marks both as written
            paths.append(self.path / "checkpoints-meta" / STATE)
        if paths:
            check_skipped(self.guard.read(), training.max_skipped)
            if self.processes.is_main:
                self.writer.submit(self.state(), paths, keep=lambda: keep_newest(
                    self.path / "checkpoints", training.keep_checkpoints))

    def checkpoint_number(self, last):
        """Return k where checkpoint_k is due, otherwise 0: after update k·snapshot_freq, the first being update 0.

        A run that ends after exactly k·snapshot_freq updates gets its checkpoint_k then.
        """
        frequency = self.config.training.snapshot_freq
        if (self.step - 1) % frequency == 0:
            return (self.step - 1) // frequency
        ended = last and self.step == self.config.training.n_iters
        return self.step // frequency if ended and self.step % frequency == 0 else 0

    def write_record(self):
        """Log the means since the last record: the one regular read from the device."""
        found = self.guard.read()
        check_skipped(found, self.config.training.max_skipped)
        self.guard.restart()
        self.record.write(self.step, found, lr=self.learning_rate(self.step - 1),
                          beta=self.objective.beta(self.step - 1), batch_size=self.config.training.batch_size,
                          device=self.device)

    def sample(self):
        """Write the grids of this step: one-step and few-step samples of the EMA weights from fixed noise."""
        if self.processes.is_main:
            velocity = velocity_from_network(self.network)
            picture = snapshots.sample_grids(self.network, self.ema, velocity, self.config, self.source.shape,
                                             self.path / "samples" / f"step_{self.step}.png")
            self.record.picture("samples", picture, self.step)
            self.record.draw()

    def state(self):
        """Return the checkpoint: all that the next update depends on."""
        return {
            "model": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "guard": self.guard.state_dict(),
            "config": config_to_dict(self.config),
        }


def check_batch(config, world_size):
    """Raise UserError if the global batch cannot be split over processes and accumulation steps."""
    parts = world_size * config.training.accumulation_steps
    if config.training.batch_size % parts:
        raise UserError(f"config.training.batch_size {config.training.batch_size} cannot be split into "
                        f"{world_size} processes × {config.training.accumulation_steps} accumulation steps")


if __name__ == "__main__":
    run_script(main, __doc__)
