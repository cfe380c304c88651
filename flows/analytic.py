"""The velocity of the rectified flow of a finite set of images, in closed form."""

import torch

from datasets.batches import pixels_to_float


def analytic_velocity(data, chunk=4096):
    """Return `velocity(x, t, label)` of the flow from N(0, I) to the images `data` `(M, C, H, W)`, each equally likely.

    v(x, t) = (Σ_i w_i·z1_i - x)/(1-t), w = softmax_i(-‖x - t·z1_i‖² / (2(1-t)²)): the conditional mean of z1 - z0
    at x_t = t·z1 + (1-t)·z0 (Liu et al. 2022, equation 2, for a finite data set).

    `data` is float in [-1, 1] or uint8, on the device where x will be; uint8 is spread over [-1, 1] when used.
    `chunk` images are compared with x at a time, so memory is O(N·chunk), whatever M. The comparison is made in
    float64: near t = 1 the exponents are differences of numbers a million times as large.
    t `(N,)` lies in [0, 1); the label is ignored.
    """

    def images(first):
        part = data[first : first + chunk].flatten(1)
        return pixels_to_float(part, torch.float64) if data.dtype == torch.uint8 else part.to(torch.float64)

    def velocity(x, t, label=None):
        flat, t = x.flatten(1).to(torch.float64), t.to(torch.float64).unsqueeze(1)
        highest = torch.full_like(t, -torch.inf)  # the running maximum of the exponents, and sums relative to it
        weight, mean = torch.zeros_like(t), torch.zeros_like(flat)
        for first in range(0, len(data), chunk):
            z1 = images(first)
            # ‖x - t·z1‖² without ‖x‖², which every image shares.
            exponents = t * (2 * flat @ z1.T - t * z1.square().sum(1)) / (2 * (1 - t) ** 2)
            new_highest = torch.maximum(highest, exponents.amax(1, keepdim=True))
            shrink, w = (highest - new_highest).exp(), (exponents - new_highest).exp()
            weight = weight * shrink + w.sum(1, keepdim=True)
            mean = mean * shrink + w @ z1
            highest = new_highest
        return ((mean / weight - flat) / (1 - t)).to(x.dtype).view_as(x)

    return velocity
