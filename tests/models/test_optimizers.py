"""fastllm.AdamW8bit takes bitsandbytes' steps in few calls: the same bits in every parameter and state, on CPUs through
bitsandbytes' own update, on GPUs through fastllm's kernel."""

import gc
import weakref
from copy import deepcopy

import bitsandbytes
import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from torch import nn

from fastllm import AdamW8bit
from fastllm.kernels.dispatch import backend
from fastllm.models import optimizers

# LoRA matrices, sizes that end inside a block of 256, and two below the size from which states have 8 bits.
SHAPES = [(8, 512), (640, 8), (8, 3420), (8, 511), (97, 61), (5003,), (16, 16), (4, 1024)]


def make_parameters(shapes=SHAPES, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def both(make_optimizer, **options):
    """Optimizers of fastllm and of bitsandbytes over parameters of the same values."""
    return [make_optimizer(cls, make_parameters(**options)) for cls in (AdamW8bit, bitsandbytes.optim.AdamW8bit)]


def plain(cls, parameters):
    return cls(parameters, lr=1e-2, weight_decay=0.1)


def parameters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def take_steps(optimizers, count=1, *, seed=1, without=()):
    """`count` steps of each optimizer with the same gradients; the parameters `without` have none."""
    for optimizer in optimizers:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            for index, p in enumerate(parameters_of(optimizer)):
                gradient = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
                p.grad = None if index in without else gradient
            optimizer.step()


def assert_same_bits(ours, theirs):
    for a, b in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        assert torch.equal(a, b)
        ours_has, theirs_has = ours.state[a], theirs.state[b]
        assert list(ours_has) == list(theirs_has)
        for name, value in theirs_has.items():
            found = ours_has[name]
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name


@pytest.fixture
def calls(monkeypatch):
    """The number of values that each call of a blockwise update by fastllm is given."""
    sizes = []

    def counted(update):
        def counting(*args, **kwargs):
            sizes.append(args[1].numel())  # of gradients
            update(*args, **kwargs)

        return counting

    for name in ("optimizer_update_8bit_blockwise", "adam_8bit"):
        monkeypatch.setattr(optimizers, name, counted(getattr(optimizers, name)))
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_bits_in_one_call(dtype, calls):
    ours, theirs = both(plain, dtype=dtype)
    take_steps((ours, theirs), 20)
    assert_same_bits(ours, theirs)
    together = [p for p in parameters_of(ours) if p.numel() >= 4096]
    assert len(together) == 6 and calls == [sum(-(-p.numel() // 256) * 256 for p in together)] * 20


def test_many_parameters_go_in_chunks(monkeypatch, calls):
    """A parameter larger than a chunk is updated alone; between the steps no chunk has memory for values."""
    monkeypatch.setattr(optimizers, "_CHUNK", 16384)
    ours, theirs = both(plain)
    take_steps((ours, theirs), 3)
    assert_same_bits(ours, theirs)
    assert calls == [27360, 4096 + 5120 + 6144, 5120 + 4096] * 3
    chunks = {place.chunk for place in ours._places.values()}
    assert len(chunks) == 2 and all(chunk.buffer.untyped_storage().nbytes() == 0 for chunk in chunks)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in Triton's interpreter
@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs every test here runs the kernel")
def test_fastllms_kernel_takes_over(monkeypatch, calls):
    """In the middle of a training, in chunks and for what is larger than one: the states stay those of bitsandbytes,
    which goes on with them."""
    monkeypatch.setattr(optimizers, "_CHUNK", 16384)
    monkeypatch.setattr(optimizers, "optimizer_update_8bit_blockwise", lambda *_, **__: pytest.fail("not the kernel"))
    ours, theirs = both(lambda cls, parameters: cls(parameters, lr=1e-2))
    take_steps([theirs], 2)
    ours.load_state_dict(deepcopy(theirs.state_dict()))
    for p, trained in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        p.data.copy_(trained)
    with backend("triton"):
        take_steps([ours], seed=2)
    take_steps([theirs], seed=2)
    assert calls == [27360, 4096 + 5120 + 6144, 5120 + 4096]
    for a, b in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-5)
        mine, its = ours.state[a], theirs.state[b]
        assert list(mine) == list(its) and mine["step"] == its["step"] == 3
        assert mine["state1"].ne(its["state1"]).sum() <= a.numel() / 200  # its CPU search is not exact
    theirs.load_state_dict(deepcopy(ours.state_dict()))
    take_steps([theirs])


def test_groups_with_settings_of_their_own_and_a_schedule():
    def grouped(cls, parameters):
        return cls(
            [{"params": parameters[::2], "weight_decay": 0.0, "lr": 1e-3}, {"params": parameters[1::2], "eps": 1e-4}],
            betas=(0.8, 0.95),
        )

    pair = both(grouped)
    schedules = [torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=5) for optimizer in pair]
    for step in range(7):
        take_steps(pair, seed=step)
        for schedule in schedules:
            schedule.step()
    assert_same_bits(*pair)


def test_parameters_without_gradients_stay_and_count_their_own_steps(calls):
    pair = both(plain)
    take_steps(pair, without=(0, 3))
    take_steps(pair)
    take_steps(pair, 2, without=(1,))
    take_steps(pair, 2)
    assert_same_bits(*pair)
    steps = [pair[0].state[p]["step"] for p in parameters_of(pair[0])]
    assert steps == [5, 4, 6, 5, 6, 6, 6, 6]
    assert len(calls) > 6


def test_a_closure_is_called_once_with_gradients_enabled():
    (p,) = make_parameters([(8, 512)])

    def closure():
        loss = (p**2).sum()
        loss.backward()
        return loss

    expected = (p.detach() ** 2).sum()
    assert AdamW8bit([p]).step(closure) == expected


@pytest.mark.parametrize("saver", [AdamW8bit, bitsandbytes.optim.AdamW8bit])
def test_checkpoints_go_both_ways(saver, tmp_path, calls):
    """Saved by either class and loaded into both, training goes on with the same bits, and in chunks."""
    saved = plain(saver, make_parameters())
    take_steps([saved], 3)
    torch.save(saved.state_dict(), tmp_path / "optimizer.pt")
    pair = both(plain)
    for optimizer in pair:
        for p, trained in zip(parameters_of(optimizer), parameters_of(saved), strict=True):
            p.data.copy_(trained)
        optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    calls.clear()
    take_steps((*pair, saved), 3, seed=2)
    assert_same_bits(pair[0], pair[1])
    assert_same_bits(pair[0], saved)
    assert len(calls) == (6 if saver is AdamW8bit else 3)


def test_loading_an_earlier_state_takes_the_optimizer_back():
    ours, theirs = both(plain)
    take_steps((ours, theirs), 2)
    for optimizer in (ours, theirs):
        earlier = deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(earlier)
        take_steps([optimizer], 2, seed=2)
        optimizer.load_state_dict(earlier)
        take_steps([optimizer], seed=3)
        assert all(optimizer.state[p]["step"] == 3 for p in parameters_of(optimizer))
    assert_same_bits(ours, theirs)


def test_loading_a_state_frees_the_one_before():
    optimizer = plain(AdamW8bit, make_parameters())
    take_steps([optimizer])
    saved = deepcopy(optimizer.state_dict())
    before = weakref.ref(next(iter(optimizer._places.values())).chunk)
    optimizer.load_state_dict(saved)
    gc.collect()
    assert before() is None


def test_states_that_were_cleared_start_anew():
    pair = both(plain)
    take_steps(pair, 2)
    for optimizer in pair:
        optimizer.state[parameters_of(optimizer)[1]].clear()
    take_steps(pair, 2)
    assert_same_bits(*pair)
    assert pair[0].state[parameters_of(pair[0])[1]]["step"] == 2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_not_plain_goes_through_bitsandbytes_own_update(calls, device):
    """Settings of a parameter's own, and one whose values do not lie in order."""

    def odd(cls, parameters):
        manager = GlobalOptimManager.get_instance()
        manager.override_config(parameters[0], "optim_bits", 32)
        manager.override_config(parameters[1], "lr", 0.5)
        parameters[4].data = parameters[4].data.t().contiguous().t()
        return plain(cls, parameters)

    manager = GlobalOptimManager.get_instance()
    try:
        ours, theirs = both(odd, device=device)
        take_steps((ours, theirs))
        assert calls == [27392 + 5120 + 4096]
        take_steps((ours, theirs), 3)
        assert_same_bits(ours, theirs)
        assert ours.state[parameters_of(ours)[0]]["state1"].dtype == torch.float32
    finally:
        manager.initialize()


@pytest.mark.parametrize("settings", [{"is_paged": True}, {"optim_bits": 32}])
def test_paged_and_32_bit_optimizers_are_left_alone(settings):
    optimizer = bitsandbytes.optim.AdamW(make_parameters(), **settings)
    assert not optimizers.update_in_chunks(optimizer) and type(optimizer) is bitsandbytes.optim.AdamW


def test_an_optimizer_of_bitsandbytes_is_turned(calls):
    """In the middle of training; hooks on its steps still run, once each."""
    pair = [bitsandbytes.optim.AdamW(make_parameters(), lr=1e-2, optim_bits=8) for _ in range(2)]
    take_steps(pair, 2)
    ran = []
    pair[0].register_step_post_hook(lambda *_: ran.append(1))
    assert optimizers.update_in_chunks(pair[0]) and isinstance(pair[0], bitsandbytes.optim.AdamW)
    take_steps(pair, 2, seed=2)
    assert_same_bits(*pair)
    assert len(ran) == 2 and len(calls) == 2


def test_other_optimizers_are_not_turned():
    assert not optimizers.update_in_chunks(torch.optim.AdamW(make_parameters()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_without_a_wait(dtype, monkeypatch):
    ours, theirs = both(plain, dtype=dtype, device="cuda")
    take_steps((ours, theirs), 5)
    assert_same_bits(ours, theirs)
    theirs.step()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("waited"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    monkeypatch.undo()
    assert_same_bits(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_parameters_on_a_gpu(dtype, calls):
    """Each has a launch of its own; one of them is not a whole number of blocks."""
    ours, theirs = both(plain, shapes=[(2**22 + 77,), (4096, 1100), (8, 512)], dtype=dtype, device="cuda")
    take_steps((ours, theirs), 3)
    assert_same_bits(ours, theirs)
    assert calls == [2**22 + 77, 4096 * 1100, 4096] * 3


@pytest.mark.gpu
def test_on_a_stream_of_ones_own():
    ours, theirs = both(plain, shapes=[(512, 4096)] * 8, device="cuda")
    take_steps([theirs], 3)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**8)  # gradients come late
        take_steps([ours], 3)
        values = [p.clone() for p in parameters_of(ours)]
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(values, parameters_of(theirs), strict=True))
    assert_same_bits(ours, theirs)
