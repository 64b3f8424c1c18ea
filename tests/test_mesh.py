"""The mesh and the table that maps logical axes to it."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sparseformer_jax import mesh


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ((), PartitionSpec()),
        ((None, None), PartitionSpec(None, None)),
        (("batch", "seq", "heads", None), (("data", "fsdp"), "context", "tensor", None)),
        (("embed", "kv_heads", "head_dim"), ("fsdp", "tensor", None)),
        (("vocab", "embed"), ("tensor", "fsdp")),
        (("mlp", "embed"), ("tensor", "fsdp")),
    ],
    ids=str,
)
def test_spec(axes, expected):
    assert mesh.spec(*axes) == PartitionSpec(*expected)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("heads", "mlp"), r"\('heads', 'mlp'\) use mesh axis 'tensor' twice"),
        (("batch", "embed"), r"\('batch', 'embed'\) use mesh axis 'fsdp' twice"),
        (("vocab", None, "vocab"), r"use mesh axis 'tensor' twice"),
        (("width",), r"'width' is unknown; known: .*'embed'"),
    ],
    ids=str,
)
def test_impossible_specs_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        mesh.spec(*axes)


def test_axes_left_out_have_one_device():
    made = mesh.make_mesh({"tensor": 4, "data": 2})
    assert dict(made.shape) == {"data": 2, "fsdp": 1, "tensor": 4, "context": 1}
    # Neighbouring devices share the axis whose traffic is heaviest.
    assert [d.id for d in made.devices[0].ravel()] == [0, 1, 2, 3]
    assert mesh.make_mesh({}, jax.devices()[:1]).size == 1


@pytest.mark.parametrize("sizes", [{}, {"data": 3}, {"fsdp": 4, "context": 4}], ids=str)
def test_sizes_must_multiply_to_the_devices(sizes):
    needed = np.prod([*sizes.values()], dtype=int)
    with pytest.raises(ValueError, match=rf"needs {needed} devices; there are 8"):
        mesh.make_mesh(sizes)


def test_a_misspelt_axis_is_refused():
    with pytest.raises(ValueError, match="'tensors'"):
        mesh.make_mesh({"tensors": 8})


def test_shard_does_nothing_without_a_mesh_of_ours():
    x = jax.numpy.ones((8, 4))
    assert not mesh.is_active()
    assert mesh.shard(x, "batch", None) is x
    with jax.set_mesh(jax.make_mesh((8,), ("other",))):
        assert not mesh.is_active()
        assert mesh.shard(x, "batch", None) is x


def test_shard_divides_by_logical_names():
    with jax.set_mesh(mesh.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        assert mesh.is_active()
        x = mesh.shard(jax.numpy.ones((8, 4)), "batch", "vocab")
        assert x.sharding.spec == PartitionSpec(("data", "fsdp"), "tensor")
        assert x.addressable_shards[0].data.shape == (2, 2)
        inside = []
        run = jax.sharding.auto_axes(
            lambda x: inside.append(mesh.is_active()) or x, out_sharding=x.sharding.spec
        )
        run(x)
        assert inside == [False]


def test_parameters_in_use_are_whole_along_embed():
    gathered = mesh.gathered_axes(("embed", "heads", "head_dim"))
    assert gathered == (None, "heads", "head_dim")


def test_a_cluster_is_described_wholly_or_not_at_all():
    with pytest.raises(ValueError, match="go together; got 'host:1', None, 0"):
        mesh.initialize_distributed("host:1", process_id=0)
    for address in ("host", "host:0", "host:99999"):
        with pytest.raises(ValueError, match=f"coordinator_address='{address}': must be HOST:PORT"):
            mesh.initialize_distributed(address, 2, 0)
    jax.devices()
    with pytest.raises(ValueError, match="host:1'.* must be called before any JAX calls"):
        mesh.initialize_distributed("host:1", 2, 0)
    assert mesh.is_primary()


def test_a_notebook_that_has_started_jax_stays_as_it_is():
    jax.devices()
    mesh.initialize_distributed()
    assert jax.process_count() == 1
