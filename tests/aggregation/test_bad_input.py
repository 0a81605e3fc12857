"""What cannot be averaged is refused, in one line that names the culprit."""

import math
from dataclasses import replace

import pytest
import torch
from tests.conftest import make_pair, make_updates

from fedex_lora import METHODS, LoRAPair, aggregate
from fedex_lora.aggregation import normalised_weights
from fedex_lora.aggregation.server_state import init
from fedex_lora.config import Truncation
from fedex_lora.errors import AggregationError, FedexLoraError, UsageError


def altered(index, **changes):
    updates = make_updates(3)
    updates[index] = replace(updates[index], **changes)
    return updates


def with_value(value, part):
    pair = make_pair(1)
    getattr(pair, part)[0, 0] = value
    return altered(1, adapter={**make_updates(3)[1].adapter, "m0": pair})


@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.lora and row.trained(1) == "AB"])
def test_nan_and_infinity(method, value, part):
    with pytest.raises(AggregationError, match=r"client client-1 sent NaN or infinity in m0"):
        aggregate(with_value(value, part), method)


def test_nan_of_a_client_without_weight():
    with pytest.raises(AggregationError, match="client-1"):
        aggregate(with_value(math.nan, "A"), weights=[1, 0, 1])


def test_overflow_is_not_called_nan():
    with pytest.raises(AggregationError, match="overflows"):
        aggregate([replace(update, adapter={"m": LoRAPair(A=sign * torch.full((2, 4), 3e38), B=torch.ones(4, 2))}) for sign, update in
                   zip((1, -1), make_updates(2), strict=True)], weights=[0.4, 0.6])  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2], "2 weights for 3 updates: give one weight for each adapter"),
        ([1, -1, 1], "not negative"),
        ([0, 0, 0], "sum to zero"),
        ([1, math.nan, 1], "finite"),
        ([1e308, 1e308, 1e308], "infinity"),
        ("majority", "unknown weights"),
        (["a", "b", "c"], r"weights \['a', 'b', 'c'\]: give one number for each update"),
        ([1, None, 1], "give one number for each update"),
        (3, "weights 3: give one number for each update"),
    ],
)
def test_impossible_weights(weights, message):
    with pytest.raises(AggregationError, match=message):
        aggregate(make_updates(3), weights=weights)


def test_rows_that_are_no_number():
    with pytest.raises(AggregationError, match=r"weights \[.*None.*\]: give one number for each update"):
        aggregate(altered(1, num_examples=None))


def test_weights_by_name_are_in_no_order():
    with pytest.raises(AggregationError, match="give one number an update"):
        normalised_weights(make_updates(2), {"1": 100, "2": 100})


def test_no_updates():
    with pytest.raises(AggregationError, match="no updates"):
        aggregate([])


def test_clients_without_examples():
    with pytest.raises(AggregationError, match="zero"):
        aggregate([replace(update, num_examples=0) for update in make_updates(3)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"client_id": "client-0"}, "not unique"),
        ({"adapter": {"m0": make_pair(0)}}, "different modules"),
        (
            {"adapter": {**make_updates(1)[0].adapter, "m0": make_pair(0, 20, 12)}},
            r"differ in m0: shape \(12, 20\) rank 3 against shape \(20, 12\)",
        ),
        ({"adapter": {**make_updates(1)[0].adapter, "m0": make_pair(0, rank=2)}}, "rank 3 against .* rank 2"),
        ({"adapter": {**make_updates(1)[0].adapter, "m0": make_pair(0, scaling=math.nan)}}, "scaling nan"),
        ({"other": {}}, "different other tensors"),
        ({"other": {"head.weight": torch.ones(12, 4)}}, "differ in head.weight"),
        ({"other": {"head.weight": torch.full((4, 12), math.nan)}}, "head.weight of some client holds NaN"),
    ],
)
def test_updates_that_do_not_fit(changes, message):
    with pytest.raises(AggregationError, match=message):
        aggregate(altered(1, **changes))


def test_factors_without_numbers():
    updates = [replace(update, adapter={"m": LoRAPair(A=torch.ones(0, 5), B=torch.ones(3, 0))}) for update in make_updates(2)]
    with pytest.raises(AggregationError, match="client client-0 has no numbers in m: give factors of rank 1 or more"):
        aggregate(updates)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"k": make_pair(0)}, "client client-0 does not continue module k"),
        ({"m0": make_pair(0), "m1": make_pair(1, 6, 9)}, "client client-0 does not continue module m1"),
        ({"m0": make_pair(0)}, "client client-0 sent modules that the global adapter does not have"),
        ("folder", "state is of type str: give the ServerState that the clients went on from"),
    ],
)
def test_a_state_that_the_updates_do_not_continue(state, message):
    with pytest.raises(FedexLoraError, match=message):
        aggregate(make_updates(2), state=state if isinstance(state, str) else init(state, {}))


def test_a_truncation_for_a_method_that_does_not_truncate():
    with pytest.raises(UsageError, match="truncation is for fedex-svd, and the method is fedex: leave it out"):
        aggregate(make_updates(2), truncation=Truncation(rank=1))


def test_integer_tensors_have_no_mean():
    updates = [replace(update, other={"steps": torch.tensor([3])}) for update in make_updates(2)]
    with pytest.raises(AggregationError, match="no mean"):
        aggregate(updates)


def test_ffa_needs_one_shared_a():
    with pytest.raises(AggregationError, match="ffa needs one A"):
        aggregate(make_updates(2), "ffa")


def test_unknown_method_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'fedex'"):
        aggregate(make_updates(2), "fedx")


def test_factors_that_do_not_chain():
    with pytest.raises(AggregationError, match="no LoRA product"):
        LoRAPair(A=torch.ones(2, 5), B=torch.ones(3, 3))


@pytest.mark.parametrize("method", ["ffa", "fedsvd", "rolora"])
def test_nan_under_a_frozen_a(method):
    updates = [replace(update, adapter={"m0": LoRAPair(A=make_pair(0).A, B=make_pair(i).B)}) for i, update in enumerate(make_updates(3))]
    updates[1].adapter["m0"].B[0, 0] = math.nan
    with pytest.raises(AggregationError, match="client client-1 sent NaN or infinity in m0"):
        aggregate(updates, method)
