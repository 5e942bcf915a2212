"""What recordings read: copies at fixed addresses, and batches of fewer rows than were recorded."""

import pytest
import torch

from fastllm.kernels.attention import AttentionCase
from fastllm.kernels.documents import Documents
from fastllm.kernels.recorded_inputs import SharedBoundaries, SharedInputs, SharedTensor, is_recordable, rounded
from fastllm.kernels.vision_block import BlockCall


def call_with(lengths):
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    documents = Documents.from_cu_seqlens(offsets)
    angles = torch.randn(1, documents.length, 8)
    return BlockCall(AttentionCase(0.2, documents=documents, causal=False), angles, angles.clone())


@pytest.mark.parametrize("lengths", [[64] * 5, [16, 64, 4, 4, 64], [300], [100, 250, 30], [200] * 3])
def test_rounded_boundaries_cover_every_row(lengths):
    """The given documents come first; no other is longer than the longest that the recording is for."""
    rows = 640
    call = rounded(call_with(lengths), rows)
    documents = call.attention.documents
    boundaries = SharedBoundaries(documents)
    source = call.attention.documents.cu_seqlens
    boundaries.update(source, sum(lengths))
    steps = boundaries.value.diff()
    assert boundaries.value[: len(lengths) + 1].tolist() == source.tolist()
    assert int(boundaries.value[-1]) == rows and int(steps.min()) >= 0
    assert int(steps.max()) <= documents.max_seqlen and documents.length == rows


@pytest.mark.parametrize("lengths", [[4] * 60, [70] * 40])
def test_more_documents_than_there_is_room_for(lengths):
    assert rounded(call_with(lengths), -(-sum(lengths) // 128) * 128) is None


def test_calls_of_one_recording_differ_in_contents_only():
    """Windows count as the longest that a window can be, images as a power of two or the whole."""
    longest = [rounded(call_with(lengths), 512).attention.documents.max_seqlen for lengths in ([20] * 9, [60, 8], [64])]
    assert longest == [64, 64, 64]
    assert rounded(call_with([300]), 512).attention.documents.max_seqlen == 512
    assert rounded(call_with([130, 130]), 1024).attention.documents.max_seqlen == 256


def test_a_copy_follows_its_source():
    shared = SharedTensor(torch.zeros(4, 3))
    source = torch.ones(4, 3)
    shared.update(source, 4)
    assert shared.is_of(source) and shared.is_of(source.view(4, 3)) and not shared.is_of(source[:2])
    source.mul_(2)
    assert not shared.is_of(source), "written to since"
    shared.update(source, 4)
    assert torch.equal(shared.value, source)
    other = torch.full((4, 3), 5.0)
    shared.update(other, 4)
    assert torch.equal(shared.value, other)


def test_layers_share_copies_and_hand_on_their_outputs():
    shared, call = SharedInputs(), call_with([5, 6])
    first, second = (shared.copies_of(call, 11) for _ in range(2))
    assert all(a is b for a, b in zip(first, second, strict=True)) and len(first) == 3
    y = torch.randn(11, 4)
    shared.hand_on(y)
    assert shared.fixed(y).data_ptr() == y.data_ptr()
    strange = torch.randn(11, 4)
    assert shared.fixed(strange).data_ptr() != strange.data_ptr() and torch.equal(shared.fixed(strange), strange)


def test_fewer_rows_than_recorded_leave_zeros():
    shared = SharedInputs(rows=16)
    x = torch.randn(11, 4)
    fixed = shared.fixed(x)
    assert fixed.shape == (16, 4) and torch.equal(fixed[:11], x) and not fixed[11:].any()


def test_what_draws_or_runs_elsewhere_is_not_recordable():
    assert is_recordable(call_with([4]))
    assert not is_recordable(BlockCall(AttentionCase(0.2, dropout=0.1)))
    assert not is_recordable(BlockCall(AttentionCase(0.2, function=lambda q, k, v: q)))
