"""Exponential moving average (EMA) of a network's weights."""

import contextlib

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
        self._swapped = False

    @torch.no_grad()
    def update(self, keep=1.0):
        """Move the averages towards the current parameters, in three fused operations.

        keep: 1, or a 0-dimensional float tensor on the device that is 0 to leave the averages unchanged, so that a
        skipped update is skipped here, too, without reading from the device.
        """
        if self._swapped:
            raise RuntimeError("the network holds its averaged weights: update the EMA outside average_parameters")
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        change = torch._foreach_sub(self.parameters, self.shadow_params)
        torch._foreach_mul_(change, keep * (1 - decay))
        torch._foreach_add_(self.shadow_params, change)

    @contextlib.contextmanager
    def average_parameters(self):
        """Let the network compute with the averaged weights inside the `with` block.

        Weights and averages are swapped, so nothing is copied. `state_dict` and `update` raise RuntimeError meanwhile.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self):
        for i, parameter in enumerate(self.parameters):
            self.shadow_params[i], parameter.data = parameter.data, self.shadow_params[i]
        self._swapped = not self._swapped

    def state_dict(self):
        """Return {decay, num_updates, shadow_params}; the tensors are the averages themselves, not copies."""
        if self._swapped:
            raise RuntimeError("the network holds its averaged weights: save the EMA outside average_parameters")
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
