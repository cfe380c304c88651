"""One update of the weights: precision, clipping, the non-finite guard, optimizer and EMA, without a host read."""

import contextlib

import torch

from runtime.errors import UserError

STEPS_KEPT = 16  # how many of the last skipped updates are named
GROWTH_INTERVAL = 2000  # finite updates after which the fp16 loss scale doubles


def create_optimizer(parameters, *, name, lr, beta1, eps, weight_decay, device):
    """Return Adam, AdamW (fused) or RAdam (foreach) over `parameters`, betas (beta1, 0.999).

    The fused kernels skip a step on the device when told `found_inf`; RAdam has none and is guarded by copies.
    """
    options = {"lr": lr, "betas": (beta1, 0.999), "eps": eps, "weight_decay": weight_decay}
    if name == "RAdam":
        return torch.optim.RAdam(parameters, foreach=True, capturable=torch.device(device).type == "cuda", **options)
    kinds = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}
    return kinds[name](parameters, fused=True, **options)


def warmup_factor(update, warmup):
    """Return the factor of the learning rate at `update` (0, 1, …): linear from 0 to 1 over `warmup` updates."""
    return min(1.0, update / warmup) if warmup > 0 else 1.0


def set_precision(precision):
    """Let float32 products of the network use TF32 for "tf32", and nothing but float32 for the others."""
    allowed = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def autocast(precision, device):
    """Return the context in which the network computes: bfloat16, float16 (CUDA only) or as it is."""
    kind = torch.device(device).type
    if precision == "bf16":
        return torch.autocast(kind, torch.bfloat16)
    if precision == "fp16" and kind == "cuda":
        return torch.autocast(kind, torch.float16)
    return contextlib.nullcontext()


def in_precision(network, precision, device):
    """Return `network(x, t, label)` computing in `precision`, its output in float32."""

    def call(x, t, label=None):
        with autocast(precision, device):
            return network(x, t, label).float()

    return call


class Guard:
    """The counters of the training loop, on the device: nothing is read back until `read`.

    loss_sum, norm_sum, count: over the finite updates since `restart`; skipped: updates left out in all; in_row,
    worst_row: left out one after the other now, and at most since `restart`; scale, good: the fp16 loss scale and
    the finite updates since it last changed. `steps` holds the numbers of the last updates left out.
    """

    NAMES = ("loss_sum", "norm_sum", "count", "skipped", "in_row", "worst_row", "scale", "good")

    def __init__(self, device, scaled=False):
        initial = 2.0**16 if scaled else 1.0
        self.values = torch.tensor([0.0] * 6 + [initial, 0.0], dtype=torch.float64, device=device)
        self.steps = torch.full((STEPS_KEPT,), -1, dtype=torch.int64, device=device)
        self._places = torch.arange(STEPS_KEPT, device=device)
        self.scaled = scaled

    @property
    def scale(self):
        """The factor of the loss before the backward pass, a 0-dimensional tensor (1 without fp16)."""
        return self.values[6]

    def count(self, update, loss, norm, bad):
        """Add update number `update`: its loss and gradient norm, and whether it is left out (`bad` 0 or 1).

        loss, norm and bad are 0-dimensional tensors.
        """
        bad = bad.to(torch.float64)
        sums = torch.stack([loss.to(torch.float64), norm.to(torch.float64), torch.ones_like(bad)])
        self.values[:3] += torch.where(bad > 0, torch.zeros_like(sums), sums)
        skipped, in_row, worst = self.values[3], self.values[4], self.values[5]
        here = (self._places == skipped % STEPS_KEPT) & (bad > 0)
        self.steps.masked_fill_(here, update)
        skipped += bad
        in_row.add_(1.0).mul_(bad)
        torch.maximum(worst, in_row, out=worst)
        if self.scaled:
            self._rescale(bad)

    def _rescale(self, bad):
        """Halve the scale after an overflow, double it after GROWTH_INTERVAL finite updates (as torch.amp does)."""
        scale, good = self.values[6], self.values[7]
        good.add_(1.0).mul_(1.0 - bad)
        grown = (good >= GROWTH_INTERVAL).to(torch.float64)
        scale.mul_(1.0 - 0.5 * bad).mul_(1.0 + grown)
        good.mul_(1.0 - grown)

    def read(self):
        """Return the counters as a dict of floats, and `steps` as a sorted list: the one read from the device."""
        found = dict(zip(self.NAMES, self.values.tolist(), strict=True))
        found["steps"] = sorted(step for step in self.steps.tolist() if step >= 0) if found["skipped"] else []
        return found

    def restart(self):
        """Start the sums anew, after a record."""
        self.values[:3] = 0.0
        self.values[5] = self.values[4]

    def state_dict(self):
        """Return the counters for a checkpoint."""
        return {"values": self.values, "steps": self.steps}

    def load_state_dict(self, state):
        """Continue from a checkpoint's counters; the fp16 scale only where it is used."""
        scale = self.values[6].clone()
        self.values.copy_(state["values"])
        self.steps.copy_(state["steps"])
        if not self.scaled or state["values"][6] == 1.0:
            self.values[6] = scale


def check_skipped(found, limit):
    """Raise UserError if more than `limit` updates in a row were non-finite."""
    if found["worst_row"] > limit:
        raise UserError(f"the loss or its gradient was not finite for {found['worst_row']:.0f} updates in a row, more "
                        "than config.training.max_skipped; the last checkpoint is intact: lower config.optim.lr, or "
                        "use config.training.precision fp32")


@torch.no_grad()
def apply_update(update, optimizer, ema, guard, loss, *, grad_clip):
    """Clip the gradients, step the optimizer and the EMA, and count; leave all as it was if anything is not finite.

    update: its number. loss: 0-dimensional tensor of the whole update. grad_clip: largest norm (negative: off).
    With several processes loss and gradients are those averaged over all of them, so that all come to one verdict.
    Nothing is read from the device.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradients = [p.grad for p in parameters]
    if guard.scaled:
        torch._foreach_mul_(gradients, (1.0 / guard.scale).to(torch.float32))
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    bad = torch.isfinite(loss + norm).logical_not().to(torch.float32)
    if grad_clip >= 0:
        torch._foreach_mul_(gradients, torch.clamp(grad_clip / (norm + 1e-6), max=1.0))
    if optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, bad
        optimizer.step()
    else:
        _step_or_restore(optimizer, parameters, bad)
    ema.update(keep=1.0 - bad)
    guard.count(update, loss, norm, bad)


def _step_or_restore(optimizer, parameters, bad):
    """Step, then take back every parameter and moment where `bad`: for optimizers whose kernel cannot skip."""
    before = [p.clone() for p in parameters]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in parameters]
    optimizer.step()
    for p, old, state in zip(parameters, before, states, strict=True):
        p.copy_(torch.where(bad > 0, old, p))
        for key, value in optimizer.state[p].items():
            old_value = state.get(key, torch.zeros_like(value))
            value.copy_(torch.where(bad.to(value.device) > 0, old_value, value))
