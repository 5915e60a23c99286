"""Inputs drawn for a model: right names, dtypes, shapes; seeded; open axes never guessed."""

from __future__ import annotations

import numpy as np
import pytest

from edgetok.devices.base import TensorSpec
from edgetok.errors import InputError
from edgetok.feeds import can_batch, fixed_shape, random_feeds

IMAGE = TensorSpec("x", "float32", ("batch", 3, 8, 8))
IDS = TensorSpec("input_ids", "int64", ("batch", "sequence"))
MASK = TensorSpec("attention_mask", "int64", ("batch", "sequence"))
TYPES = TensorSpec("token_type_ids", "int64", ("batch", "sequence"))


def test_same_seed_same_inputs() -> None:
    a, b = random_feeds([IMAGE], seed=3)["x"], random_feeds([IMAGE], seed=3)["x"]
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, random_feeds([IMAGE], seed=4)["x"])


def test_open_first_axis_is_the_batch() -> None:
    assert random_feeds([IMAGE])["x"].shape == (1, 3, 8, 8)
    assert random_feeds([IMAGE], batch=8)["x"].shape == (8, 3, 8, 8)


def test_text_inputs_have_text_like_values() -> None:
    feeds = random_feeds([IDS, MASK, TYPES], shapes={s.name: (1, 5) for s in (IDS, MASK, TYPES)})
    assert feeds["input_ids"].min() >= 1
    assert feeds["attention_mask"].tolist() == [[1] * 5]
    assert feeds["token_type_ids"].tolist() == [[0] * 5]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16", "int32", "uint8", "bool"])
def test_dtype_is_the_graphs(dtype: str) -> None:
    assert random_feeds([TensorSpec("x", dtype, (2,))])["x"].dtype.name == dtype


def test_an_open_axis_is_an_error_that_names_the_flag() -> None:
    with pytest.raises(InputError) as caught:
        random_feeds([IDS])
    assert caught.value.next is not None
    assert "--shape input_ids=1xN" in caught.value.next


def test_a_shape_against_the_graph_is_refused() -> None:
    with pytest.raises(InputError, match="is 3, --shape says 4"):
        fixed_shape(IMAGE, {"x": (1, 4, 8, 8)}, None)
    with pytest.raises(InputError, match="has 4 axes"):
        fixed_shape(IMAGE, {"x": (1, 3)}, None)
    with pytest.raises(InputError, match="no input"):
        random_feeds([IMAGE], shapes={"y": (1,)})


def test_can_batch_only_with_an_open_or_equal_first_axis() -> None:
    assert can_batch([IMAGE, IDS], 8)
    assert can_batch([TensorSpec("x", "float32", (8, 3))], 8)
    assert not can_batch([IMAGE, TensorSpec("y", "float32", (1, 3))], 8)
    assert not can_batch([TensorSpec("y", "float32", ())], 8)
