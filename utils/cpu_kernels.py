"""Group normalisation and attention in forms that are faster on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _CPUGroupNorm(torch.autograd.Function):
    """Group normalisation of a bfloat16 (B, C, H, W) with channels last in memory, on a CPU.

    PyTorch's own kernels there take a quarter of a training step: its backward, and below
    32x32 its forward in bfloat16, are slow (tests/benchmarks/train_speed.py --ablate shows it).
    Sums are accumulated in float32; those of the backward pass are then rounded to bfloat16.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        b, c, h, w = x.shape
        wide = x if h * w >= 1024 else x.float()  # where the float32 kernel is the faster one
        out, mean, rstd = torch.native_group_norm(wide, weight, bias, b, c, h * w, groups, eps)
        ctx.save_for_backward(x, weight, mean.float(), rstd.float())
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """With g = weight * grad and x^ = (x - mean) * rstd, the gradient of x is
        rstd * (g - mean(g) - x^ * mean(g * x^)): one linear map of x and grad per channel."""
        x, weight, mean, rstd = ctx.saved_tensors
        (b, c, h, w), groups = x.shape, mean.shape[1]
        x_rows, grad_rows = (t.permute(0, 2, 3, 1).reshape(b, h * w, c) for t in (x, grad))
        mean, rstd = mean.view(b, groups, 1), rstd.view(b, groups, 1)
        grad_sum = grad_rows.sum(1).float().view(b, groups, -1)  # (B, groups, C / groups)
        product_sum = (grad_rows * x_rows).sum(1).float().view(b, groups, -1)
        normed_sum = (product_sum - mean * grad_sum) * rstd  # of grad * x^

        weight = weight.view(1, groups, -1)
        count = h * w * c // groups
        mean_g = (weight * grad_sum).sum(2, keepdim=True) / count
        mean_gx = (weight * normed_sum).sum(2, keepdim=True) / count
        by_x = -mean_gx * rstd**2
        offset = -mean_g * rstd - by_x * mean
        by_grad, by_x, offset = (t.expand(b, groups, c // groups).reshape(b, 1, c).to(x.dtype)
                                 for t in (weight * rstd, by_x, offset))
        grad_x = torch.addcmul(torch.addcmul(offset, x_rows, by_x), grad_rows, by_grad)
        return (grad_x.view(b, h, w, c).permute(0, 3, 1, 2), normed_sum.sum(0).view(c),
                grad_sum.sum(0).view(c), None, None)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm`, by a faster formulation where a CPU computes in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype == torch.bfloat16:
            return _CPUGroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
        return super().forward(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention: (B, heads, N, d) each -> (B, heads, N, d).

    For training on a CPU as plain matrix products, whose backward is 5 (64 positions) to 3 times
    (256) faster there than that of the fused kernel, for B * heads * N^2 numbers of memory.
    """
    if q.device.type == "cpu" and torch.is_grad_enabled():
        scores = q @ (k * k.shape[-1] ** -0.5).transpose(-1, -2)
        return scores.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)
