"""The ops as Hugging Face models compute them, in any dtype: the yardstick in the tested dtype, the truth in float64.

`test_eager.py` compares them with transformers' own modules, bit for bit.
"""

import torch
import torch.nn.functional as F


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0) -> torch.Tensor:
    """Llama rounds before it multiplies by the weight; Gemma, whose weight has the offset 1, after."""
    x32 = at_least_fp32(x)
    normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (normed * (offset + at_least_fp32(weight))).to(x.dtype)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin take the dtype of q; features past their width pass."""
    cos, sin = (t.unsqueeze(1).to(q.dtype) for t in (cos, sin))
    width = cos.shape[-1]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        turning, rest = x[..., :width], x[..., width:]
        low, high = turning.chunk(2, dim=-1)
        return torch.cat((turning * cos + torch.cat((-high, low), dim=-1) * sin, rest), dim=-1)

    return rotated(q), rotated(k)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """torch's own. On a GPU it takes one dtype: activations are widened to that of finer parameters."""
    return F.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, eps).to(x.dtype)


def activated(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "silu":
        return F.silu(x)
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return activated(gate, activation) * up


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    *,
    scaling: float = 1.0,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """A PEFT LoRA layer; `mask` says which inputs its dropout kept."""
    y = F.linear(x, weight, bias)
    if lora_a is None or lora_b is None:
        return y
    kept = x if mask is None else x * mask * (1.0 / (1.0 - dropout))
    return y + F.linear(F.linear(kept, lora_a), lora_b) * scaling


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, scale: float = 1.0, softcap: float = 0.0, ignore_index: int = -100
) -> torch.Tensor:
    """Loss per row: Cohere's scale and Gemma's cap act in the model's dtype, the softmax is fp32."""
    z = logits * scale
    if softcap:
        z = torch.tanh(z / softcap) * softcap
    return F.cross_entropy(at_least_fp32(z), labels, ignore_index=ignore_index, reduction="none")


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float = 0.0,
    causal: bool = True,
) -> torch.Tensor:
    """`mask` bool or additive; without one, `causal` or all to all. Returns [B, H, S, E]."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask.to(scores.dtype)
    return at_least_fp32(scores).softmax(dim=-1).to(q.dtype) @ v
