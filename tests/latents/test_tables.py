"""Digests and tables: what is computed once is found again, and only by its own key."""

import itertools
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_hf.latents import table as tables
from ddpm_hf.latents.cache import flipped, weights_digest
from ddpm_hf.latents.table import TensorTable, digest
from tests.support.fixtures_pipeline import tiny_vae
from tests.support.latents import TENSORS, keys_of, rank

# Digests


@settings(max_examples=200)
@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_contents_share_a_digest_only_if_they_are_equal(ours, theirs):
    """Else what is cached of one image or network is taken for another's."""
    assert (digest(*ours) == digest(*theirs)) == (ours == theirs)


def test_parts_do_not_run_into_each_other():
    """Else a name's end and a weight's beginning could trade places."""
    contents = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"", b"abc"), (b"abc", b""), (b"ab", b"", b"c")]
    found = {digest(*parts) for parts in contents}
    assert len(found) == len(contents)
    assert {len(one) for one in found} == {16}
    assert len({digest(b"x"), flipped(digest(b"x")), flipped(flipped(digest(b"x")))}) == 3


def test_every_weight_is_in_the_networks_digest(vae):
    """Else a retrained autoencoder reads the latents of the one before."""
    before = weights_digest(vae)
    assert weights_digest(tiny_vae(scaling_factor=0.7, shift_factor=0.3)) == before
    assert weights_digest(tiny_vae(seed=1)) != before
    other = tiny_vae()
    for tensor in other.state_dict().values():
        first = tensor.view(-1)[-1:]
        kept = first.clone()
        first += torch.finfo(torch.float32).eps * first.abs() + 1e-30
        assert weights_digest(other) != before
        first.copy_(kept)
    assert weights_digest(other) == before


def test_the_order_of_modules_is_not_in_the_networks_digest():
    """Else the same network under another version of its library would be encoded with anew."""
    first, second = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
    ours = torch.nn.ModuleDict({"first": first, "second": second})
    theirs = torch.nn.ModuleDict({"second": second, "first": first})
    swapped = torch.nn.ModuleDict({"first": second, "second": first})
    assert list(ours.state_dict()) != list(theirs.state_dict())
    assert weights_digest(ours) == weights_digest(theirs) != weights_digest(swapped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_precision_is_in_the_networks_digest(dtype):
    """Else latents of a network in half precision serve one in full, or such a network has no digest."""
    network = torch.nn.BatchNorm1d(3)  # has a counter, of another type, without a dimension
    full = weights_digest(network)
    assert weights_digest(network.to(dtype)) != full


@pytest.mark.parametrize("shape", TENSORS)
@pytest.mark.parametrize("cuts", [(), (7,), (1, 2, 19)])
def test_a_table_gives_back_what_was_added(shape, cuts, memory, tmp_path):
    """Else training sees rounded tensors, or those of other keys."""
    tensors, table = TENSORS[shape], TensorTable(tmp_path / "table")
    assert len(table) == 0
    for begin, end in itertools.pairwise((0, *cuts, 20)):
        table.add(keys_of(range(begin, end)), tensors[begin:end])
    for read in (table.read(), TensorTable(tmp_path / "table")):
        one = read or table
        assert len(one) == 20
        assert isinstance(one.values, np.ndarray) == (memory == "in memory")
        generator = np.random.default_rng(0)
        for wanted in (range(20), [3], [19, 0, 19, 19], generator.permutation(20), generator.integers(0, 20, 50)):
            found = one.look_up(keys_of(wanted))
            assert found.dtype == torch.float32
            assert torch.equal(found, tensors[torch.as_tensor(list(wanted))])


def test_a_table_keeps_extreme_values(memory, tmp_path):
    """Else a latent is changed on its way through the disk."""
    tensors = torch.tensor([[0.0, -0.0, 1e-42], [3.4e38, -torch.inf, torch.nan]])
    table = TensorTable(tmp_path / "table")
    table.add(keys_of("ab"), tensors)
    found = TensorTable(tmp_path / "table").look_up(keys_of("ab"))
    assert found.numpy().tobytes() == tensors.numpy().tobytes()


def test_an_unknown_key_is_an_error(memory, tmp_path):
    """Else an image without a latent would get some other one's."""
    TensorTable(tmp_path / "table").add(keys_of("a"), torch.zeros(1, 2))
    with pytest.raises(KeyError):
        TensorTable(tmp_path / "table").look_up(keys_of("ab"))


def filled(table, count, accelerator=None, seen=None):
    """Fill a table with what belongs to the numbers below `count`."""

    def compute(places):
        if seen is not None:
            seen.extend(places)
        return TENSORS[2, 3][places]

    table.fill(keys_of(range(count)), compute, accelerator or rank(), "filling")
    return table


@pytest.mark.parametrize("writes", [0, 1, 3])
def test_a_table_is_taken_up_where_it_was_killed(writes, monkeypatch, tmp_path):
    """Else a kill while encoding a large dataset costs all of it, or leaves a table that cannot be read."""
    monkeypatch.setattr(tables, "ROWS_A_FILE", 4)
    left, replace = [writes], os.replace

    def replace_or_die(source, target):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(source, target)

    with monkeypatch.context() as killed:
        killed.setattr(tables.os, "replace", replace_or_die)
        with pytest.raises(KeyboardInterrupt):
            filled(TensorTable(tmp_path / "table"), 18)
    assert not list((tmp_path / "table").glob(".writing-*"))
    half = tmp_path / "table" / ".writing-half"  # what a kill that nothing can catch leaves behind
    half.mkdir()
    (half / "data-00000-of-00001.arrow").write_bytes(b"cut off")

    table = TensorTable(tmp_path / "table")
    assert len(table) == 4 * writes
    seen = []
    filled(table, 18, seen=seen)
    assert sorted(seen) == list(range(4 * writes, 18))
    for one in (table, TensorTable(tmp_path / "table")):
        assert torch.equal(one.look_up(keys_of(range(18))), TENSORS[2, 3][:18])
    filled(TensorTable(tmp_path / "table"), 18, seen=seen)
    assert len(seen) == 18 - 4 * writes


def test_only_what_is_missing_is_computed(tmp_path):
    """Else a dataset that grew is encoded all anew, or an image that it holds twice, twice."""
    seen = []
    filled(TensorTable(tmp_path / "table"), 6, seen=seen)
    table = filled(TensorTable(tmp_path / "table"), 11, seen=seen)
    assert sorted(seen) == list(range(11))
    assert len(table) == 11
    repeated, places = keys_of([3, 12, 12, 12]), []
    table.fill(repeated, lambda some: places.extend(some) or TENSORS[2, 3][12:13], rank(), "filling")
    assert len(places) == 1
    assert repeated[places[0]] == keys_of([12])[0]
    assert torch.equal(table.look_up(repeated), TENSORS[2, 3][[3, 12, 12, 12]])


def test_a_part_that_is_there_already_is_left(tmp_path):
    """Else two runs that share a cache would break each other's tables."""
    one, other = TensorTable(tmp_path / "table"), TensorTable(tmp_path / "table")
    filled(one, 9)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "table").rglob("*")}
    filled(other, 9)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "table").rglob("*")} == before
    assert torch.equal(one.look_up(keys_of(range(9))), other.look_up(keys_of(range(9))))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("there", [0, 5])
def test_ranks_fill_a_table_together(world, there, tmp_path):
    """Else two processes encode everything twice, or an image is encoded by neither."""
    if there:
        filled(TensorTable(tmp_path / "table"), there)
    tables, seen = [TensorTable(tmp_path / "table") for _ in range(world)], [[] for _ in range(world)]
    for number, table in enumerate(tables):
        filled(table, 17, rank(number, world), seen[number])
    assert sorted(itertools.chain(*seen)) == list(range(there, 17))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1
    for table in tables:
        table.read()  # as each does once all have written
        assert torch.equal(table.look_up(keys_of(range(17))), TENSORS[2, 3][:17])
