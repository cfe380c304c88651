"""Exponential moving average (EMA) of a network's weights."""

import torch

from runtime.terminal import UserError


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
