"""Checkpoints: what stays, what comes back, on another mesh, and what is refused."""

import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseformer_jax import mesh
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.training.checkpoint import Checkpoints, Meta
from tests.training.processes import ROOT

META = Meta(data={"next_index": 7}, corpus="text", config='{"seed": 1}')


def sharded(sizes, spec):
    device_mesh = mesh.make_mesh(sizes)
    return jax.NamedSharding(device_mesh, jax.P(*spec))


def test_old_checkpoints_go_and_chosen_ones_stay(tmp_path):
    with Checkpoints(tmp_path, keep_last=2, keep_every=4) as checkpoints:
        assert checkpoints.latest_step is None
        for step in range(1, 8):
            checkpoints.save(step, {"x": jnp.full(3, step)}, META)
        checkpoints.wait()
        assert checkpoints.latest_step == 7
    steps = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert steps == {4, 6, 7}


def test_arrays_come_back_on_another_mesh(tmp_path):
    values = np.arange(64.0).reshape(8, 8)
    state = {"w": jax.device_put(values, sharded({"fsdp": 8}, ["fsdp"])), "key": jax.random.key(3)}
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(2, state, META)
        checkpoints.wait()
        other = sharded({"data": 2, "fsdp": 2, "tensor": 2}, ["tensor", "fsdp"])
        abstract = {"w": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=other)}
        restored = checkpoints.restore(2, abstract)
        assert checkpoints.meta(2) == META
    assert restored["w"].sharding == other
    np.testing.assert_array_equal(restored["w"], values)


def test_what_does_not_fit_or_is_not_there_is_one_line(tmp_path):
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(2, {"w": jnp.ones(4)}, META)
        checkpoints.wait()
        place = sharded({"fsdp": 8}, [None])
        for abstract, difference in (
            ({"w": jax.ShapeDtypeStruct((5,), jnp.float32, sharding=place)}, "5"),
            ({"v": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=place)}, "v"),
        ):
            with pytest.raises(
                ConfigError, match="checkpoint 2 .* is damaged or does not fit"
            ) as error:
                checkpoints.restore(2, abstract)
            assert "\n" not in str(error.value)
            assert difference in str(error.value).split("does not fit the config:")[1]
        with pytest.raises(ConfigError, match=r"no checkpoint of step 3 .* there are \[2\]"):
            checkpoints.meta(3)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, capfd):
    """A limit on the size of files stands for it; orbax' threads are quiet."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).normal(size=300_000)
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(2, {"w": jnp.ones(4)}, META)
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        checkpoints.save(3, {"w": jnp.asarray(noise)}, META)
        with pytest.raises(ConfigError, match="cannot be written to .*; make room") as error:
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        checkpoints.__exit__()
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step == 2
        assert checkpoints.meta(2) == META


def test_metadata_that_are_no_object_are_one_line(tmp_path):
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        checkpoints.save(2, {"params": {"w": jnp.ones(4)}}, META)
    (tmp_path / "checkpoints/2/_CHECKPOINT_METADATA").write_text("[]")
    with pytest.raises(ConfigError, match="metadata of a checkpoint are damaged") as error:
        Checkpoints(tmp_path)
    assert "\n" not in str(error.value)


READ = """
import sys, pathlib, jax, jax.numpy as jnp
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.training.checkpoint import Checkpoints
place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
array = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=place)
abstract = {"params": {f"layers/{i}/w": array for i in range(20)}}
with Checkpoints(pathlib.Path(sys.argv[1])) as checkpoints:
    for step in (2, 3):
        for read in (lambda: checkpoints.restore(step, abstract), lambda: checkpoints.meta(step),
                     lambda: checkpoints.arrays(step)):
            try:
                read()
            except ConfigError as error:
                print(error)
"""


def test_damaged_files_are_one_line(tmp_path):
    """In a process of its own, whose end tells all that orbax leaves running."""
    state = {"params": {f"layers/{i}/w": jnp.ones(4) for i in range(20)}}
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        for step in (2, 3):
            checkpoints.save(step, state, META)
    folder = tmp_path / "checkpoints"
    for item in ("state", "meta"):
        for file in (folder / "2" / item).rglob("*"):
            if file.is_file() and file.stat().st_size > 20:
                file.write_bytes(file.read_bytes()[:10])
    for file in (folder / "3" / "state" / "d").iterdir():
        content = bytearray(file.read_bytes())
        content[4] ^= 0x55
        file.write_bytes(content)
    command = [sys.executable, "-c", READ, str(tmp_path)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.stderr == ""
    lines = process.stdout.splitlines()
    assert [line.split(" in ")[0] for line in lines] == ["checkpoint 2"] * 3 + ["checkpoint 3"] * 2
    assert all("is damaged" in line for line in lines)
    assert "its metadata names no arrays; others are [3]: --step=3" in lines[2]
