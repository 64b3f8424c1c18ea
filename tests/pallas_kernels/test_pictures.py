import builtins

import jax
import matplotlib.image
import numpy as np
import pytest

from pallas_kernels import BlockMask, Dense, Local, Strided


def test_text():
    mask = BlockMask.from_rule(Strided(8, 3, num_heads=2, left=1), 30, is_causal=True)
    assert mask.picture().splitlines() == [
        "30 queries x 30 keys in tiles of 8 x 8, density 0.600",
        ". empty  + partial  # full",
        *("pattern 0 of 2", "+...", "#+..", "#.+.", "+..+"),  # The last row is ragged.
        *("pattern 1 of 2", "+...", ".+..", "..+.", "..++"),
    ]


def test_text_of_many_blocks_is_coarse():
    mask = BlockMask.from_rule(Local(8, left=40), 8 * 150, is_causal=True)
    lines = mask.picture().splitlines()
    assert lines[2] == "each character is 3 x 3 blocks"
    rows = lines[3:]
    assert [len(row) for row in rows] == [50] * 50
    empty = ~mask.block_map()[0].reshape(50, 3, 50, 3).any((1, 3))
    np.testing.assert_array_equal(np.array([list(row) for row in rows]) == ".", empty)
    assert rows[30] == "." * 17 + "+" + "#" * 12 + "+" + "." * 19


def test_batch_entry():
    block_map = np.zeros((2, 1, 2, 3), bool)
    block_map[1, 0, :, 1] = True
    mask = BlockMask.from_block_map(block_map, 16, 24, 8, 8, is_causal=False)
    assert mask.picture(batch=1).splitlines()[0].endswith("batch entry 1")
    assert mask.picture(batch=0).splitlines()[2:] == ["...", "..."]
    assert mask.picture(batch=1).splitlines()[2:] == [".#.", ".#."]


def test_png(tmp_path):
    path = tmp_path / "mask.png"
    rule = Strided(64, 4, num_heads=3, left=2)
    BlockMask.from_rule(rule, 1000, is_causal=True).save_picture(path)
    picture = matplotlib.image.imread(path)[..., :3]
    colours = {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in ("#0b3c5d", "#8ecae6")}
    found = {tuple(pixel) for pixel in np.round(picture * 255).astype(int).reshape(-1, 3)}
    assert colours <= found


def test_png_of_jax_arrays_and_a_decoding_step(tmp_path):
    build = jax.jit(lambda n: BlockMask.from_rule(Dense(), 1, 300, is_causal=True, query_offset=n))
    build(99).save_picture(tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes()[1:4] == b"PNG"


def test_traced_masks_have_no_picture():
    def draw(block_map):
        return BlockMask.from_block_map(block_map, 8, 8, 8, 8, is_causal=True).picture()

    with pytest.raises(ValueError, match="block_mask is traced.*draw it outside jit"):
        jax.jit(draw)(np.ones((1, 1, 1), bool))


def test_without_matplotlib(monkeypatch, tmp_path, untyped):
    load = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    mask = BlockMask.from_rule(Dense(), 8, is_causal=True)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'sparseformer_jax\[plots\]'"):
        mask.save_picture(tmp_path / "mask.png")
