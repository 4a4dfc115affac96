import pytest
import torch

from probekit.decoding.caches import PassPositions, PositionCache, cache_bytes, cache_shape
from probekit.models.families import FAMILIES
from probekit.models.family import FULL, LayerKind
from probekit.models.synthetic import synthetic


@pytest.fixture
def cache(tiny):
    return PositionCache(tiny.anatomy, rows=3, length=8)


def write(cache, positions, value):
    """Write `value` + the position to each row's positions, (rows or 1, tokens); returns what attention would see."""
    positions = torch.tensor(positions)
    cache.places = PassPositions(cache.slots(positions), int(positions.max()) + 1, {}, ())
    heads, width = cache.keys.shape[2], cache.keys.shape[4]
    states = (value + positions.float())[:, None, :, None].expand(cache.rows, heads, -1, width)
    return cache.update(states, -states, 1)


def test_shape_follows_the_keys_not_the_queries(tiny):
    assert cache_shape(tiny.anatomy, 3, 8) == (5, 3, 2, 8, 10)
    assert cache_bytes(tiny.anatomy, 3, 8) == 2 * 5 * 3 * 2 * 8 * 10 * 4
    llama = synthetic("tiny", width=32, layers=32, heads=32, key_value_heads=8, head_dim=128, dtype="bfloat16")
    assert cache_bytes(llama.anatomy, 1, 8192) == 2**30  # Llama-3-8B's published 1 GiB at its whole context


def test_each_row_is_written_at_its_own_positions_and_read_up_to_the_last(cache):
    keys, values = write(cache, [[0, 1], [2, 3], [1, 2]], 10)
    assert keys.shape == (3, 2, 4, 10)
    assert keys[:, 0, :, 0].tolist() == [[10, 11, 0, 0], [0, 0, 12, 13], [0, 11, 12, 0]]
    assert torch.equal(values, -keys)
    assert not cache.keys[0].any()
    assert not cache.keys[2:].any()


def test_rollback_is_a_smaller_position(cache):
    write(cache, [[0, 1, 2, 3]], 10)
    keys, _ = write(cache, [[2]], 50)
    assert keys.shape[2] == 3
    assert keys[0, 0, :, 0].tolist() == [10, 11, 52]
    assert keys.data_ptr() == cache.keys[1].data_ptr()  # a view: nothing was copied


def test_rows_leave_and_the_last_take_their_places(cache):
    write(cache, [[0], [1], [2]], 10)
    cache.keep([2, 1])
    assert cache.rows == 2
    keys, _ = write(cache, [[3], [3]], 20)
    assert keys[:, 0, :, 0].tolist() == [[0, 0, 12, 23], [0, 11, 0, 23]]


def test_mask_shows_each_token_the_slots_up_to_its_own():
    mask = FAMILIES["llama"].mask(LayerKind(FULL), torch.tensor([[1, 2], [3, 4]]), 5, torch.float32)
    assert mask.shape == (2, 1, 2, 5)
    assert (mask == 0)[:, 0].int().tolist() == [
        [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
        [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
    ]
    assert mask.min() == torch.finfo(torch.float32).min
