"""What the tests of recordings notice: bugs planted where tensors are copied, held and compared."""

import pytest

from ..planting import Bug, plant
from . import test_recordings as tests
from .test_recordings import make as make

BUGS = {
    "kernels.recorded_pass": {
        "input_not_copied": Bug("first_rows(self._x, rows).copy_(x)", "pass", tests.test_gradients_accumulate),
        "gradient_not_copied": Bug("first_rows(self._dy, rows).copy_(dy)", "pass", tests.test_gradients_accumulate),
        "gradients_handed_out": Bug(
            "_unflatten_dense_tensors(flat.clone()", "_unflatten_dense_tensors(flat", tests.test_gradients_accumulate
        ),
    },
    "kernels.recorded_inputs": {
        "positions_not_copied": Bug(
            "            self._write(source, given_rows)",
            "            self._source is None and self._write(source, given_rows)",
            tests.test_positions_and_masks_of_each_batch_count,
        ),
    },
    "models.recordings": {
        "busy_recording_replayed": Bug(
            "or shape.is_busy", "", tests.test_two_forwards_may_wait_for_their_backwards
        ),
        "other_tensors_ignored": Bug(
            "(known.layer is not layer or known.signature != signature)", "False",
            lambda make, device: tests.test_what_changes_is_recorded_anew(make, device, tests.CHANGES["a scaling"]),
        ),
        "hidden_states_overwritten": Bug(
            "or collects_outputs()", "", tests.test_hidden_states_that_are_asked_for_stay_what_they_are
        ),
    },
    "models.blocks": {
        "filler_is_read": Bug(
            "[:, : shift_labels.shape[1]].to(device)", ".to(device)",
            tests.test_lengths_are_rounded_up_so_that_shapes_come_again,
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize(("module", "bug"), [
    pytest.param(module, bug, id=f"{module}-{name}") for module, bugs in BUGS.items() for name, bug in bugs.items()
])  # fmt: skip
def test_planted_bug_is_noticed(module, bug, make, device, monkeypatch, tmp_path):
    with monkeypatch.context() as planting:
        plant(f"fastllm.{module}", bug, planting, tmp_path)
        with pytest.raises((AssertionError, RuntimeError)):
            bug.check(make, device)
