"""One update of the weights: clipping, the optimizer, the EMA and its statistics, without reading from the device."""

import torch

from runtime.terminal import UserError

GROWTH_INTERVAL = 2000  # finite updates after which the fp16 loss scale doubles


class RAdam(torch.optim.Optimizer):
    """Rectified Adam (arXiv 1908.03265) with the state of torch.optim.RAdam; steps are skipped on the device."""

    @torch.no_grad()
    def step(self):
        """Do one step, in about a hundred operations and one for each parameter; none where `found_inf` is 1."""
        keep, skip = 1 - self.found_inf, self.found_inf > 0
        for group in self.param_groups:
            parameters, (beta1, beta2) = [p for p in group["params"] if p.grad is not None], group["betas"]
            for p in parameters:
                p.grad.masked_fill_(skip, 0.0)
                if not self.state[p]:
                    self.state[p].update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                                         exp_avg_sq=torch.zeros_like(p))
            steps, m, v = ([self.state[p][name] for p in parameters] for name in ("step", "exp_avg", "exp_avg_sq"))
            g = torch._foreach_add([p.grad for p in parameters], parameters, alpha=group["weight_decay"])
            torch._foreach_add_(steps, [keep] * len(steps))
            for moment, value, beta in ((m, g, beta1), (v, torch._foreach_mul(g, g), beta2)):
                change = torch._foreach_sub(value, moment)
                torch._foreach_mul_(change, keep * (1 - beta))
                torch._foreach_add_(moment, change)
            n = steps[0].double().clamp(min=1)
            unbias1, unbias2 = 1 - beta1**n, 1 - beta2**n
            rho_inf = 2 / (1 - beta2) - 1
            rho = rho_inf - 2 * n * beta2**n / unbias2
            rectify = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)).clamp(min=0).sqrt()
            rectified = (rho > 5).double()  # then divided by sqrt(v), as in Adam
            rate = -group["lr"] * keep / unbias1
            adaptive = torch._foreach_div(m, torch._foreach_add(torch._foreach_sqrt(v), group["eps"]))
            torch._foreach_mul_(adaptive, (rate * rectified * rectify * unbias2.sqrt()).float())
            torch._foreach_add_(parameters, adaptive)
            torch._foreach_add_(parameters, torch._foreach_mul(m, (rate * (1 - rectified)).float()))


def create_optimizer(parameters, optim):
    """Return the optimizer of a `config.optim`, with torch's fused kernels; it skips a step if its `found_inf` is 1."""
    options = {"lr": optim.lr, "betas": (optim.beta1, 0.999), "eps": optim.eps, "weight_decay": optim.weight_decay}
    if optim.optimizer == "RAdam":
        return RAdam(parameters, options)
    return getattr(torch.optim, optim.optimizer)(parameters, fused=True, **options)


class ExponentialMovingAverage:
    """shadow ← shadow + (1 - d)·(parameter - shadow), with d = min(decay, (1 + n) / (10 + n)) at update n = 1, 2, ….

    It averages the `parameters` that require gradients, in their order. `state_dict` has the form of the released
    checkpoints: `decay`, `num_updates` and the list `shadow_params` in that order.
    """

    def __init__(self, parameters, decay):
        self.decay, self.num_updates = decay, 0
        self.parameters = [p for p in parameters if p.requires_grad]
        self.shadow_params = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, keep=1.0):
        """Move the averages towards the parameters; `keep`, 1 or a tensor on the device, is 0 for a skipped update."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        change = torch._foreach_sub(self.parameters, self.shadow_params)
        torch._foreach_mul_(change, keep * (1 - decay))
        torch._foreach_add_(self.shadow_params, change)

    def averaged(self, network):
        """Return a function that calls `network` with the averages in place of its own parameters, without copies."""
        names = {parameter: name for name, parameter in network.named_parameters()}
        weights = {names[p]: shadow for p, shadow in zip(self.parameters, self.shadow_params, strict=True)}
        return lambda *inputs: torch.func.functional_call(network, weights, inputs)

    def state_dict(self):
        """Return {decay, num_updates, shadow_params}; the tensors are the averages themselves, not copies."""
        return {"decay": self.decay, "num_updates": self.num_updates, "shadow_params": list(self.shadow_params)}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Load the result of `state_dict`, except the decay; raise UserError if its tensors have other shapes."""
        theirs, ours = [tuple(s.shape) for s in state["shadow_params"]], [tuple(s.shape) for s in self.shadow_params]
        if theirs != ours:
            raise UserError(f"the EMA of the checkpoint has {len(theirs)} tensors and the network {len(ours)}, or "
                            "their shapes differ; it belongs to another architecture")
        self.num_updates = int(state["num_updates"])
        torch._foreach_copy_(self.shadow_params, list(state["shadow_params"]))


class UpdateStats:
    """Sums and counts over updates, kept on the device until `read`.

    loss_sum, norm_sum, finite: over the finite updates since `restart`. nonfinite: skipped updates of the run;
    consecutive, most_consecutive: skipped in a row up to now, and at most since `restart`. scale, since_overflow: the
    fp16 loss scale and the finite updates since it last changed (1 and unused without fp16).
    """

    NAMES = ("loss_sum", "norm_sum", "finite", "nonfinite", "consecutive", "most_consecutive", "scale",
             "since_overflow")

    def __init__(self, device, scaled=False):
        self.values = torch.tensor([0.0] * 6 + [2.0**16 if scaled else 1.0, 0.0], dtype=torch.float64, device=device)
        self.scaled = scaled

    @property
    def scale(self):
        """The factor of the loss before the backward pass, a 0-dimensional tensor."""
        return self.values[6]

    def count(self, loss, norm, nonfinite):
        """Add an update: loss, gradient norm, and whether it is skipped (`nonfinite` 0 or 1), all 0-dimensional."""
        nonfinite = nonfinite.to(torch.float64)
        sums = torch.stack([loss.to(torch.float64), norm.to(torch.float64), torch.ones_like(nonfinite)])
        self.values[:3] += torch.where(nonfinite > 0, torch.zeros_like(sums), sums)
        total, consecutive, most, scale, finite = self.values[3:]
        total += nonfinite
        consecutive.add_(1.0).mul_(nonfinite)
        torch.maximum(most, consecutive, out=most)
        if self.scaled:  # as torch.amp does: half after an overflow, double after GROWTH_INTERVAL finite updates
            finite.add_(1.0).mul_(1.0 - nonfinite)
            grown = (finite >= GROWTH_INTERVAL).to(torch.float64)
            scale.mul_(1.0 - 0.5 * nonfinite).mul_(1.0 + grown)
            finite.mul_(1.0 - grown)

    def read(self):
        """Return the counters as a dict of floats: the one read from the device."""
        return dict(zip(self.NAMES, self.values.tolist(), strict=True))

    def restart(self):
        """Reset the sums, after they were logged."""
        self.values[:3] = 0.0
        self.values[5] = self.values[4]

    def load_state(self, values):
        """Continue from the `values` of a checkpoint, and from its fp16 scale if both runs use one."""
        self.values[:6] = values[:6]
        if self.scaled and values[6] != 1.0:
            self.values[6:] = values[6:]


def check_skipped(stats, limit):
    """Raise UserError if more than `limit` updates in a row were non-finite (`stats` is what `UpdateStats` read)."""
    if stats["most_consecutive"] > limit:
        raise UserError(f"the loss or its gradient was not finite for {stats['most_consecutive']:.0f} updates in a "
                        "row, more than config.training.max_skipped; earlier checkpoints are intact: start the same "
                        "run again with a lower config.optim.lr or config.training.precision fp32, or a new "
                        "config.expr with this run's folder as config.training.resume_from")


@torch.no_grad()
def apply_update(optimizer, ema, stats, loss, *, grad_clip):
    """Clip the gradients, step the optimizer and the EMA, and count; change no weights if anything is not finite.

    loss: 0-dimensional, like the gradients averaged over all processes. grad_clip: largest norm (negative: off).
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if stats.scaled:
        torch._foreach_mul_(gradients, (1.0 / stats.scale).to(torch.float32))
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    nonfinite = torch.isfinite(loss + norm).logical_not().to(torch.float32)
    if grad_clip >= 0:
        torch._foreach_mul_(gradients, torch.clamp(grad_clip / (norm + 1e-6), max=1.0))
    optimizer.grad_scale, optimizer.found_inf = None, nonfinite
    optimizer.step()
    ema.update(keep=1.0 - nonfinite)
    stats.count(loss, norm, nonfinite)
