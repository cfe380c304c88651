"""SIGINT and SIGTERM end a run after the update at hand, with its state written."""

import signal

import torch
import torch.distributed as dist

AGREE_EVERY = 10  # updates between two questions whether any process was told to stop


class StopRequest:
    """Remembers the first SIGINT or SIGTERM while it is entered (`with`); the second one interrupts at once.

    The exit status of a stopped run is 128 + signal: 130 after SIGINT, 143 after SIGTERM.
    """

    def __init__(self, world_size):
        self.signal = 0
        self._group = dist.new_group(backend="gloo") if world_size > 1 else None

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number, frame):
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def agreed(self, update):
        """Return the signal on which all processes stop after `update`, or 0.

        Several processes ask each other every AGREE_EVERY updates, on the host: the device is not read.
        """
        if self._group is None:
            return self.signal
        if update % AGREE_EVERY:
            return 0
        verdict = torch.tensor([self.signal])
        dist.all_reduce(verdict, dist.ReduceOp.MAX, group=self._group)
        return int(verdict)
