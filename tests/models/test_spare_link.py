"""How many rows go to the host beside attention halves: what the link has time for, as the second forward shows."""

import pytest
import torch

from fastllm.models import spare_link
from fastllm.models.host_offload import HostOffload, LinkTimes
from fastllm.models.spare_link import SpareLink

from ..determinism import deterministic

ROWS, ROW_BYTES, LAYERS = 8192, 57344, 32


class Link:
    """Stands for the copies of a machine: what they take shows one forward after they were timed."""

    def __init__(self, times):
        self.known, self.begun, self.is_timed = times, 0, False

    def begin(self, *, is_timed=False):
        self.begun, self.is_timed = self.begun + 1, is_timed

    def times(self):
        return self.known if self.is_timed else None


@pytest.fixture(autouse=True)
def host(monkeypatch):
    """A host with so many bytes free."""

    def has(count):
        monkeypatch.setattr(spare_link, "free_host_bytes", lambda: count)

    has(2**40)
    return has


def forwards(spare: SpareLink, link: Link, count: int, *, sends: bool = True) -> list[int]:
    """Rows that go to the host in each of these forwards."""
    found = []
    for _ in range(count):
        spare.begin(link, sends=sends, layers=LAYERS, rows=ROWS, row_bytes=ROW_BYTES, host_share=0.5)
        found.append(spare.rows(ROWS))
    return found


@pytest.mark.parametrize(
    ("rate", "idle", "expected"),
    [
        (50e9, 2e-3, 1408),  # 0.85 of 100 MB, in rows of 57 kB, 128 at a time
        (50e9, 0.05e-3, 0),  # fewer than 128
        (50e9, -1e-3, 0),  # the layers waited for the link
        (25e9, 1.0, ROWS),
    ],
)
def test_rows_that_the_link_has_time_for(messages, rate, idle, expected):
    assert forwards(SpareLink(), Link(LinkTimes(rate, idle)), 4) == [0, 0, expected, expected]
    more = f"about {LAYERS * expected * ROW_BYTES / 2**30:.1f} GiB more wait in host memory for 8,192 tokens"
    assert (more in messages()) == (expected > 0)


def test_copies_are_timed_once_and_not_in_the_first_forward():
    link, spare, timed = Link(LinkTimes(50e9, 2e-3)), SpareLink(), []
    for _ in range(4):
        forwards(spare, link, 1)
        timed.append(link.is_timed)
    assert timed == [False, True, False, False] and link.begun == 4


def test_copies_that_are_not_done_are_timed_again():
    link, spare = Link(None), SpareLink()
    assert forwards(spare, link, 3) == [0, 0, 0] and link.is_timed
    link.known = LinkTimes(50e9, 2e-3)
    assert forwards(spare, link, 1) == [1408]


def test_the_host_has_to_have_room(host):
    host(2 * LAYERS * 1000 * ROW_BYTES)
    assert forwards(SpareLink(), Link(LinkTimes(25e9, 1.0)), 3)[-1] == 896  # of 1,000


def test_longer_batches_take_no_more_of_the_host():
    """Its room was asked for once; what their attention halves take is planned for each length."""
    spare = SpareLink()
    assert forwards(spare, Link(LinkTimes(50e9, 2e-3)), 3)[-1] == spare.rows(4 * ROWS) == 1408
    assert spare.rows(ROWS // 2) == 640  # of 741


def test_no_rows_without_attention_halves_and_where_bits_matter():
    link, spare = Link(LinkTimes(25e9, 1.0)), SpareLink()
    assert forwards(spare, link, 5, sends=False) == [0] * 5 and not link.is_timed
    forwards(spare, link, 3)
    with deterministic():
        assert spare.rows(ROWS) == 0
    assert spare.rows(ROWS) == ROWS and spare.rows(100) == 0


@pytest.mark.gpu
def test_rows_come_back_where_they_belong():
    """Behind each layer's parcel, and on their way once the layer after it has its own back."""
    offload, matrices, fetches, away = HostOffload(), [], [], []
    offload.begin(is_timed=True)
    for _ in range(4):
        matrices.append(torch.randn(4096, 512, device="cuda"))
        fetches.append(offload.put([matrices[-1][:, :8].contiguous(), matrices[-1][:, 8:]]))
        away.append(offload.put_rows(matrices[-1], 1024))
    offload.turn()
    matrices = [matrix.clone() for matrix in matrices]
    torch.cuda.synchronize()
    times = offload.times()
    assert times is not None and 1e8 < times.rate < 1e12
    for i in (3, 2, 1, 0):
        assert (away[i]._buffer is None) == (i == 3), "rows of the layer before follow the last tensor of a parcel"
        for fetch, columns in zip(fetches[i], (slice(0, 8), slice(8, None)), strict=True):
            assert torch.equal(fetch(), matrices[i][:, columns])
        found = away[i].start()
        away[i].arrive()
        assert found.shape == matrices[i].shape and torch.equal(found[:1024], matrices[i][:1024])


@pytest.mark.gpu
def test_rows_that_nobody_wants_leave_nothing_under_way():
    offload = HostOffload()
    for _ in range(3):
        offload.begin()
        ones = torch.ones(64 << 20, 1, device="cuda")
        offload.put([ones])
        rows = offload.put_rows(ones, 32 << 20)
        rows.start()
        del rows, ones
        offload.begin()
        zeros = torch.zeros(64 << 20, device="cuda")
        torch.cuda.synchronize()
        assert not zeros.any()
