"""AdamW with 8-bit states: bitsandbytes' codes by its own search, and each step against float64."""

from dataclasses import dataclass

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, optimizer_update_8bit_blockwise

from fastllm.kernels.adam_8bit import adam_8bit, code_tables

from .parity import OverLimit, Setting

# Triton's interpreter computes in numpy, which warns of the log2 of zero and of quotients of zeros.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

MAPS = (create_dynamic_map(signed=True), create_dynamic_map(signed=False))
SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


@dataclass
class Training:
    """A parameter with its states, which start as those of bitsandbytes do."""

    p: torch.Tensor
    step: int = 0

    def __post_init__(self) -> None:
        device, blocks = self.p.device, -(-self.p.numel() // 256)
        self.maps = tuple(m.to(device) for m in MAPS)
        self.codes = tuple(torch.zeros(self.p.shape, dtype=torch.uint8, device=device) for _ in range(2))
        self.absmax = tuple(torch.zeros(blocks, device=device) for _ in range(2))
        self.tables = code_tables(*self.maps)

    def take(self, gradient: torch.Tensor, **changes) -> None:
        self.step += 1
        assert self.tables is not None
        adam_8bit(self.p, gradient, self.codes, self.absmax, self.tables, step=self.step, **(SETTINGS | changes))

    def take_bitsandbytes(self, gradient: torch.Tensor, **changes) -> None:
        self.step += 1
        s = SETTINGS | changes
        optimizer_update_8bit_blockwise(
            "adam", gradient, self.p, *self.codes, *s["betas"], 0.0, 0.0, s["eps"], self.step, s["lr"],
            *self.maps, *self.absmax, s["weight_decay"],
        )  # fmt: skip

    def states(self) -> list[torch.Tensor]:
        """Both states in float64, flat."""
        return [
            m[code.flatten().int()].double() * scale.double().repeat_interleave(256)[: code.numel()]
            for m, code, scale in zip(self.maps, self.codes, self.absmax, strict=True)
        ]


def searched(x: torch.Tensor, ascending: torch.Tensor, lowest: float) -> torch.Tensor:
    """The code of fp32 numbers as bitsandbytes' CUDA kernel finds it: a search through the map in seven steps from its
    middle, then the midpoint of where it ended and of the last value that it passed on the other side."""
    pivot, below, above = torch.full_like(x, 127, dtype=torch.long), torch.zeros_like(x).long(), 0 * x.long() + 255
    low, high = torch.full_like(x, lowest), torch.ones_like(x)
    for width in (64, 32, 16, 8, 4, 2, 1):
        value = ascending[pivot]
        right = x > value
        below, low = torch.where(right, pivot, below), torch.where(right, value, low)
        above, high = torch.where(right, above, pivot), torch.where(right, high, value)
        pivot = torch.where(right, pivot + width, pivot - width)
    value = ascending[pivot]
    up = (x > value) & (x > (high + value) * 0.5)
    down = (x <= value) & (x < (low + value) * 0.5)
    return torch.where(up, above, torch.where(down, below, pivot))


def searched_signed(x: torch.Tensor) -> torch.Tensor:
    code = searched(x, MAPS[0], -1.0)
    differs = torch.signbit(MAPS[0][code]) != torch.signbit(x)
    return torch.where(differs, torch.where(x > 0, code + 1, code - 1), code) % 256


def check_codes(setting: Setting) -> None:
    """Without momentum the states are g and g^2. A one in each block makes its absmax one."""
    edges = torch.cat([(m[:-1] + m[1:]) * 0.5 for m in MAPS])
    edges = torch.cat((edges, *MAPS, edges[255:].sqrt(), torch.logspace(-9, 0, 2000)))
    edges = torch.cat((edges, edges.nextafter(torch.tensor(2.0)), edges.nextafter(torch.tensor(-2.0)))).clamp(-1, 1)
    g = torch.cat((edges, -edges, torch.tensor([0.0, -0.0]))).to(setting.dtype)
    g = torch.nn.functional.pad(g, (0, -g.numel() % 255)).view(-1, 255)
    g = torch.cat((torch.ones(len(g), 1, dtype=g.dtype), g), dim=1).to(setting.device)
    training = Training(torch.zeros_like(g))
    with setting.active():
        training.take(g, betas=(0.0, 0.0))
    g = g.float().cpu()
    for code, expected in zip(training.codes, (searched_signed(g), searched(g * g, MAPS[1], 0.0)), strict=True):
        different = code.cpu().ne(expected).sum().item()
        if different:
            raise OverLimit(f"{different} codes of {g.numel()} differ")


def test_codes_are_those_of_bitsandbytes_search(setting):
    """At, just below and just above every midpoint and value of both maps, and on both sides of zero."""
    check_codes(setting)


def check_steps(setting: Setting, *shape: int, steps: int = 4, scale: float = 1.0, **changes) -> None:
    """Each step from where the one before ended: p to its rounding, absmax to that of fp32, and the nearest codes."""
    options = SETTINGS | changes
    lr, (beta1, beta2), eps, decay = (options[name] for name in ("lr", "betas", "eps", "weight_decay"))
    training = Training(setting.randn(*shape))
    for step in range(1, steps + 1):
        g, p, (s1, s2) = setting.randn(*shape, scale=scale), training.p.clone(), training.states()
        with setting.active():
            training.take(g, **changes)
        wide = g.double().flatten()
        s1, s2 = beta1 * s1 + (1 - beta1) * wide, beta2 * s2 + (1 - beta2) * wide**2
        c1, c2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
        update = (lr * c2 / c1 * s1 / (s2.sqrt() + c2 * eps)).view(shape)
        expected = (p.double() - update) * (1 - lr * decay)
        half = torch.finfo(setting.dtype).eps / 2
        # p is rounded before its decay and after. Of update, the powers of beta have 1e-4.
        limit = (2 if decay else 1) * 1.02 * half * (expected.abs() + update.abs()) + 2e-4 * update.abs()
        if not ((training.p.double() - expected).abs() <= limit + torch.finfo(setting.dtype).tiny).all():
            raise OverLimit(f"p is {(training.p.double() - expected).abs().max():.2e} away at step {step}")
        for index, s in enumerate((s1, s2)):
            check_state(training, index, s)


def check_state(training: Training, index: int, s: torch.Tensor) -> None:
    """`s` is the state in float64 before it got its codes; fp32's 1 - 0.999 alone is 1.3e-5 away."""
    blocks = torch.nn.functional.pad(s, (0, -s.numel() % 256)).view(-1, 256)
    largest, absmax = blocks.abs().amax(dim=1), training.absmax[index].double()
    if not ((absmax - largest).abs() <= 2e-5 * largest).all():
        raise OverLimit(f"absmax{index + 1} is {((absmax - largest) / largest).abs().max():.2e} away")
    code, values = training.codes[index].flatten(), training.maps[index].double()
    x = s / absmax.repeat_interleave(256)[: s.numel()]
    distance = (values[code.int()] - x).abs()
    nearest = (values[None, :] - x[:, None]).abs().amin(dim=1)
    # Where the nearest is zero, a negative s1 has the first code below it.
    slack = 3e-5 * x.abs() + (x < 0) * (values[128] if index == 0 else 0.0)
    if not (distance <= nearest + slack).all():
        raise OverLimit(f"state{index + 1}: {(distance > nearest + slack).sum()} codes are not the nearest")


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(1,), (255,), (256,), (257,), (3, 1000), (8, 256)], ids=str)
def test_steps_match_float64(setting, shape, weight_decay):
    check_steps(setting, *shape, weight_decay=weight_decay)


@pytest.mark.parametrize("changes", [{"betas": (0.8, 0.95)}, {"eps": 1e-2}, {"lr": 1e-5}], ids=str)
def test_settings(setting, changes):
    check_steps(setting, 700, **changes)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e15])
def test_gradients_of_every_size(fp32, scale):
    check_steps(fp32, 700, scale=scale)


def test_many_steps_keep_the_states_nearest(fp32):
    check_steps(fp32, 300, steps=30, weight_decay=0.0)


def check_opposed(setting: Setting) -> None:
    """Gradients that turn leave small states, of which alone absmax is made, not of what a block has past the end."""
    training = Training(torch.zeros(300, dtype=setting.dtype, device=setting.device))
    with setting.active():
        for sign in (1.0, -1.0):
            training.take(torch.full_like(training.p, sign))
    if not torch.allclose(training.absmax[0], torch.full_like(training.absmax[0], 0.01), rtol=1e-5):
        raise OverLimit(f"absmax {training.absmax[0]}")


def test_gradients_that_turn(setting):
    check_opposed(setting)


def check_zeros(setting: Setting) -> None:
    """Blocks of zeros, which get the codes that bitsandbytes gives them, move nothing but by decay."""
    training = Training(torch.ones(3, 256, dtype=setting.dtype, device=setting.device))
    g = torch.zeros_like(training.p)
    g[1] = -0.0
    g[2, 0] = 1.0
    with setting.active():
        training.take(g, weight_decay=0.0)
    code1, code2 = (code.tolist() for code in training.codes)
    expected = [[255] * 256, [0] * 256, [255] + [127] * 255]
    if code1 != expected or code2 != [[0] * 256, [0] * 256, [255] + [0] * 255]:
        raise OverLimit("other codes of zeros")
    assert (training.p.flatten()[1:512] == 1).all() and training.p[2, 0] != 1
    assert training.absmax[0].tolist()[:2] == training.absmax[1].tolist()[:2] == [0.0, 0.0]


def test_zeros(setting):
    check_zeros(setting)


def check_not_finite(setting: Setting) -> None:
    """A gradient that is not finite leaves its value as it is and zero in its states; its neighbours go on."""
    p = setting.randn(512)
    training, sound = Training(p.clone()), Training(p.clone())
    first, second = setting.randn(512), setting.randn(512)
    bad = second.clone()
    bad[3], bad[5], bad[300] = float("nan"), float("inf"), float("-inf")
    with setting.active():
        training.take(first)
        sound.take(first)
        before = training.p.clone()
        training.take(bad)
        sound.take(second)
    hit = ~bad.isfinite()
    if not (training.p[hit].equal(before[hit]) and training.p[~hit].equal(sound.p[~hit])):
        raise OverLimit("p")
    if not all((state[hit] == 0).all() and state.isfinite().all() for state in training.states()):
        raise OverLimit("states")


def test_gradients_that_are_not_finite(setting):
    check_not_finite(setting)


@pytest.mark.parametrize("scale", [1e-25, 1e-37, 1e-44, 1e19, 1e25, 3e38])
def test_sizes_beyond_fp32(fp32, scale):
    """States too small for fp32 are zeros, and p stays finite. Those too large end in NaN, inside the tables."""
    training = Training(fp32.randn(512))
    with fp32.active():
        for _ in range(3):
            training.take(fp32.randn(512) * 0.1 * scale)
    if scale < 1:
        assert training.p.isfinite().all() and all((absmax >= 0).all() for absmax in training.absmax)


def check_neighbours(setting: Setting) -> None:
    """Views in wider buffers: what lies beside them stays."""
    size, room = 600, 1536
    wide = [torch.full((room,), 7, dtype=t, device=setting.device) for t in (setting.dtype, torch.uint8, torch.uint8)]
    scales = torch.full((2, 8), 7.0, device=setting.device)
    for buffer, value in zip((*wide, *scales), (1, 0, 0, 0, 0), strict=True):
        buffer[: size if buffer.numel() == room else 3] = value
    p, *codes = (buffer[:size] for buffer in wide)
    training = Training(p)
    training.codes, training.absmax = tuple(codes), tuple(scales[:, :3])
    with setting.active():
        training.take(setting.randn(size))
    if not all((buffer[size:] == 7).all() for buffer in wide) or not (scales[:, 3:] == 7).all():
        raise OverLimit("wrote past the end")
    assert (p != 1).all()


def test_views(setting):
    check_neighbours(setting)


def test_no_values(setting):
    training = Training(setting.randn(0))
    with setting.active():
        training.take(setting.randn(0))


def test_other_maps_have_no_tables():
    linear = torch.linspace(-1, 1, 256)
    assert code_tables(linear, MAPS[1]) is None and code_tables(MAPS[0], linear) is None
    assert code_tables(MAPS[1], MAPS[0]) is None and code_tables(*MAPS) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nearly_bitsandbytes_on_a_cpu(dtype):
    """Its CPU code decays p before the update, so that p has no decay here, and its search there finds another code for
    up to one value in 300 of state 1 and one in 30 of state 2: a neighbour, or near zero one of the next few."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(20_000, generator=generator).to(dtype)
    ours, theirs = Training(p.clone()), Training(p.clone())
    g = torch.randn(20_000, generator=generator).to(dtype)
    ours.take(g, weight_decay=0.0)
    theirs.take_bitsandbytes(g, weight_decay=0.0)
    assert torch.allclose(ours.p, theirs.p, rtol=torch.finfo(dtype).eps, atol=1e-7)
    for index, few in enumerate((100, 1000)):
        assert ours.codes[index].ne(theirs.codes[index]).sum() <= few
        scale = ours.absmax[index].repeat_interleave(256)[: p.numel()]
        assert ((ours.states()[index] - theirs.states()[index]).abs() <= 0.015 * scale).all()
        assert torch.allclose(ours.absmax[index], theirs.absmax[index], rtol=2e-5)


def units_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many floats of their dtype lie between two finite tensors."""
    integers = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}[a.dtype]

    def ordered(x: torch.Tensor) -> torch.Tensor:
        bits = x.view(integers).long()
        return torch.where(bits < 0, torch.iinfo(integers).min - bits, bits)

    return (ordered(a) - ordered(b)).abs()


@pytest.mark.gpu
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_bitsandbytes_on_a_gpu(dtype, weight_decay):
    """From the same states each step, p to a unit in the last place, and all but a few codes in a million."""
    generator = torch.Generator("cuda").manual_seed(0)
    size = 2**22 + 77
    p = torch.randn(size, generator=generator, device="cuda").to(dtype)
    ours, theirs = Training(p.clone()), Training(p.clone())
    for _ in range(5):
        g = torch.randn(size, generator=generator, device="cuda") * torch.rand(size, device="cuda") ** 8
        ours.take(g.to(dtype), weight_decay=weight_decay)
        theirs.take_bitsandbytes(g.to(dtype), weight_decay=weight_decay)
        assert units_apart(ours.p, theirs.p).max() <= 1
        for mine, its in zip(ours.codes, theirs.codes, strict=True):
            assert mine.ne(its).sum() <= 5e-6 * size
        for mine, its in zip(ours.absmax, theirs.absmax, strict=True):
            assert units_apart(mine, its).max() <= 1
        for mine, its in zip(
            (ours.p, *ours.codes, *ours.absmax), (theirs.p, *theirs.codes, *theirs.absmax), strict=True
        ):
            mine.copy_(its)
