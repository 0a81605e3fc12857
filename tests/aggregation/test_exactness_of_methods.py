"""The exactness command itself: every method is as far from the fp64 ideal as it declares, for one and for three clients."""

import pytest
from benchmarks import exactness_of_methods as command


@pytest.mark.parametrize("method", [*command.LORA, "fedex+balanced", "fedit+balanced", "fedex-best+procrustes"])
def test_every_method_is_as_far_off_as_it_declares(method):
    worst, declared = command.measure(method, clients=(1, 3)), command.get_method(method).exactness
    assert set(worst.by_rounds) == {1, 2, 3}
    assert worst.gap < 1e-6  # from what theory says, which is zero for exact methods
    if declared in ("exact", "personalised"):
        assert worst.factors < 1e-6
        assert worst.outputs < 1e-6
    else:
        assert worst.factors > 0.1
        assert worst.outputs == pytest.approx(worst.factors, rel=1e-4)
