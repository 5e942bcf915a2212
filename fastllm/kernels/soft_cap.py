"""Soft-capping, inside the kernels of attention and of the loss:  c(s) = cap * tanh(s / cap).

Most scores are small beside their cap, where 2 sigmoid(2 x) - 1 has lost the digits that tanh(x) ~ x still has: tanh is
an odd polynomial there. Source: Moshier, "Methods and Programs for Mathematical Functions" (Cephes), `tanhf`; Gemma 2,
arXiv 2408.00118.
"""

from .activation import sigmoid_of
from .dispatch import jit, tl


@jit
def soft_capped(scores, cap, PTX: tl.constexpr):
    """`scores` fp32 of any shape, `cap` > 0; in `PTX` where the kernel may hold some."""
    x = scores * (1.0 / cap)
    square = x * x
    near = -5.70498872745e-3
    near = near * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    return cap * tl.where(square < 0.390625, near, 2.0 * sigmoid_of(2.0 * x, PTX) - 1.0)


@jit
def soft_cap_slope(capped, cap):
    """c'(s), from `capped` = c(s) in fp32."""
    return 1.0 - capped * capped * (1.0 / (cap * cap))
