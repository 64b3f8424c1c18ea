"""The commands on a tiny imported model: what they write, and the one line where they refuse."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from sparseformer_jax import command, mesh, registry
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.pretrained.__main__ import main as pretrained
from sparseformer_jax.pretrained.mask_files import read_masks
from sparseformer_jax.sparsity import report, workdirs
from sparseformer_jax.sparsity.__main__ import main
from sparseformer_jax.training.init_from import first_state
from sparseformer_jax.training.optimizer import make_optimizer
from sparseformer_jax.training.restore import restore_state
from sparseformer_jax.training.state import ModelDef
from tests import commands
from tests.pretrained.files import write_folder

NUM_WEIGHTS = 2 * 7


def run(*arguments):
    main(["sparsity", *map(str, arguments)])


def mistake(capsys, *arguments):
    return commands.mistake(run, capsys, *arguments)


def checkpoint(workdir):
    return workdirs.read(command.saved(str(workdir)), workdir, None)


def logits(workdir, tokens):
    config = command.saved(str(workdir))
    with jax.set_mesh(mesh.make_mesh({}, jax.local_devices()[:1])):
        model_def = ModelDef(config)
        state = restore_state(model_def, workdir)
        return model_def.model(state.params, state.variables, 0)(tokens).logits


def same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    workdir = folder / "workdir"
    pretrained(
        ["pretrained", "import", str(write_folder(folder / "model")), f"--workdir={workdir}"]
    )
    return workdir


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Flags of calibration on a few words."""
    folder = tmp_path_factory.mktemp("text")
    words = np.random.default_rng(0).integers(0, 15, (8, 60))
    lines = [json.dumps({"text": " ".join(f"w{word}" for word in row)}) for row in words]
    (folder / "train.jsonl").write_text("\n".join(lines))
    data = {"files": folder / "train.jsonl", "cache_dir": folder / "cache"}
    data |= {"validation_fraction": 0.1, "test_fraction": 0.1}
    flags = [f"--config.data.{name}={value}" for name, value in data.items()]
    return [*flags, "--config.eval.batch_size=8", "--num_samples=8", "--seq_len=16"]


@pytest.fixture(scope="module")
def magnitude(dense):
    out = dense.with_name("magnitude")
    run("prune", f"--workdir={dense}", f"--out={out}", "--method=magnitude", "--pattern=2:4")
    return out


def test_masks_stand_beside_dense_weights(dense, magnitude):
    before, after = checkpoint(dense), checkpoint(magnitude)
    same(after.params, before.params)
    assert len(after.variables) == len(after.targets) == NUM_WEIGHTS
    for name, weight, mask in after.masks():
        in_dims = 2 if "/out/" in name else 1
        shape = (-1, 4, int(np.prod(weight.shape[in_dims:])))
        groups, kept = (np.asarray(x).reshape(shape) for x in (np.abs(weight), mask))
        assert (kept.sum(axis=1) == 2).all()
        least_kept = np.where(kept, groups, np.inf).min(axis=1)
        assert (least_kept >= np.where(kept, 0, groups).max(axis=1)).all()
    config, other = command.saved(str(magnitude)), command.saved(str(dense))
    assert config.sparsity.name == "fixed"
    assert config.data.tokenizer == str(magnitude / "tokenizer.json")
    config.sparsity, config.data.tokenizer = other.sparsity, other.data.tokenizer
    assert config == other


def test_baked_zeros_give_the_same_logits(dense, magnitude, tmp_path):
    run("bake", f"--workdir={magnitude}", f"--out={tmp_path / 'baked'}")
    sparse, baked = checkpoint(magnitude), checkpoint(tmp_path / "baked")
    assert not baked.variables
    assert baked.params.keys() == sparse.params.keys()
    for name, weight, mask in sparse.masks():
        np.testing.assert_array_equal(baked.params[name], np.where(mask, weight, 0))
    tokens = jnp.arange(10)[None]
    found = logits(magnitude, tokens)
    np.testing.assert_array_equal(found, logits(tmp_path / "baked", tokens))
    assert np.abs(found - logits(dense, tokens)).max() > 0.1


def test_a_run_starts_from_masks_and_a_dense_one_does_not(dense, magnitude):
    config = command.saved(str(dense))
    config.init_from = str(magnitude)
    with jax.set_mesh(mesh.make_mesh({}, jax.local_devices()[:1])):
        with pytest.raises(ConfigError, match="left over: layers/0/.*/mask"):
            first(config)
        config.sparsity = registry.method_config("sparsity", "fixed", targets=("ff",))
        with pytest.raises(ConfigError, match="left over: layers/0/attention/.*/mask"):
            first(config)
        config.sparsity.targets = ("all",)
        model_def, state = first(config)
        found = model_def.to_layers(state.variables)
    same(found, checkpoint(magnitude).variables)


def first(config):
    """A model, and its state before the first step."""
    model_def = ModelDef(config)
    optimizer = make_optimizer(config.optimizer, 4, model_def.params)
    return model_def, first_state(model_def, optimizer, jax.random.key(1))[0]


def test_updated_weights_are_zero_where_dropped(dense, text, tmp_path):
    options = ["--method=sparsegpt", "--update_weights", "--pattern=4:8", "--targets=ff,out/kernel"]
    run("prune", f"--workdir={dense}", f"--out={tmp_path / 'out'}", *options, *text)
    before, after = checkpoint(dense), checkpoint(tmp_path / "out")
    assert len(after.targets) == 2 * 4
    for name, weight, mask in after.masks():
        assert not weight[~mask].any()
        changed = np.asarray(weight) != np.asarray(before.params[name])
        assert changed[np.asarray(mask)].any()
    for name in before.params.keys() - after.targets.keys():
        np.testing.assert_array_equal(after.params[name], before.params[name])


def test_a_fraction_refined(dense, text, tmp_path):
    options = ["--method=ria", "--dsnot", "--pattern=0.75", "--targets=qkv"]
    run("prune", f"--workdir={dense}", f"--out={tmp_path / 'out'}", *options, *text)
    after = checkpoint(tmp_path / "out")
    assert all(target.pattern is None for target in after.targets.values())
    for _, weight, mask in after.masks():
        assert mask.sum() == weight.size - weight.size // 4 - 1


def test_report(dense, magnitude, tmp_path, capsys):
    other, options = tmp_path / "other", ["--method=magnitude", "--pattern=0.5"]
    run("prune", f"--workdir={dense}", f"--out={other}", *options)
    capsys.readouterr()
    run("report", f"--workdir={magnitude}", f"--prior={other}", f"--output={tmp_path}")
    head, names, *lines = capsys.readouterr().out.splitlines()
    assert head == f"entries whose mask differs from that of {other}, in %"
    assert names.split()[-7:] == ["query", "key", "value", "out", "gate", "up", "down"]
    assert [line.split()[:3] for line in lines] == [[n, "50.00", "2:4"] for n in ("0", "1", "all")]
    found = json.loads((tmp_path / "sparsity.json").read_text())
    assert found["holds"]
    assert (found["density"], found["from_magnitude"]) == (0.5, 0.0)
    assert len(found["weights"]) == NUM_WEIGHTS
    masks, others = (
        {n: np.asarray(m) for n, _, m in checkpoint(w).masks()} for w in (magnitude, other)
    )
    for own in found["weights"]:
        assert own["from_prior"] == np.mean(masks[own["name"]] != others[own["name"]])
    assert (tmp_path / "sparsity.png").read_bytes()[1:4] == b"PNG"
    # Of a fraction the largest weights of a matrix are compared.
    found = report.measure(command.saved(str(other)), other)
    assert (found["holds"], found["from_magnitude"]) == (None, 0.0)
    assert found["density"] < 0.5
    assert " -  " in report.table(found)


def test_a_broken_group_shows(magnitude, monkeypatch):
    held = checkpoint(magnitude)
    name = next(iter(held.targets)).replace("kernel", "mask")
    mask = held.variables[name]
    held.variables[name] = jax.device_put(np.ones(mask.shape, bool), mask.sharding)
    monkeypatch.setattr(workdirs, "read", lambda *_: held)
    found = report.measure(command.saved(str(magnitude)), magnitude)
    assert [own["holds"] for own in found["weights"]].count(False) == 1
    assert "BROKEN" in report.table(found)
    assert not found["holds"]


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_export_has_zeros_and_masks(dense, magnitude, pattern, tmp_path):
    workdir, folder = magnitude, tmp_path / "folder"
    if pattern != "2:4":
        workdir = tmp_path / "fraction"
        options = ["--method=magnitude", f"--pattern={pattern}"]
        run("prune", f"--workdir={dense}", f"--out={workdir}", *options)
    pretrained(["pretrained", "export", f"--workdir={workdir}", f"--out={folder}"])
    tensors, masks = load_file(folder / "model.safetensors"), read_masks(folder)
    assert len(masks) == NUM_WEIGHTS
    held = checkpoint(workdir)
    for name, weight, mask in held.masks():
        outputs, inputs = masks[_elsewhere(name)].shape
        ours, kept = (np.asarray(x).reshape(inputs, outputs).T for x in (weight, mask))
        np.testing.assert_array_equal(masks[_elsewhere(name)], kept)
        np.testing.assert_array_equal(tensors[_elsewhere(name)], np.where(kept, ours, 0))
    packed = load_file(folder / "masks.safetensors")
    bits = 8 * sum(x.size for x in packed.values()) / sum(x.size for x in masks.values())
    assert bits == (0.75 if pattern == "2:4" else 1)
    folder.joinpath("masks.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ConfigError, match=r"masks\.safetensors: is damaged"):
        read_masks(folder)


def _elsewhere(name):
    """The name of a kernel in transformers."""
    _, layer, part, projection, _ = name.split("/")
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    part = {"attention": "self_attn"}.get(part, part)
    own = names.get(projection, f"{projection}_proj")
    return f"model.layers.{layer}.{part}.{own}.weight"


def test_refusals(dense, magnitude, text, capsys, tmp_path):
    there = [f"--workdir={dense}", f"--out={tmp_path / 'out'}"]
    good = ["--method=magnitude", "--pattern=2:4"]

    def refused(*arguments):
        line = mistake(capsys, "prune", *there, *arguments)
        assert not list(tmp_path.iterdir())
        return line

    assert "--pattern=...: missing" in refused("--method=wanda")
    assert "pattern 'x': must be n:m, as 2:4, or the kept fraction" in refused(*good, "--pattern=x")
    assert "groups of 5 do not divide the 16 entries" in refused(*good, "--pattern=2:5")
    assert "--method='wander': not one of" in refused(*good, "--method=wander")
    assert "'lfp=2:4': matches no weight" in refused(*good, "--targets=lfp")
    assert "embeddings, norms, biases" in refused(*good, "--targets=embedding")
    assert "--update_weights: magnitude changes no weights" in refused(*good, "--update_weights")
    assert "no checkpoint of step 7" in refused(*good, "--step=7")
    assert "--smaples" in refused(*good, "--smaples=3")
    short = refused("--method=wanda", "--pattern=2:4", *text, "--num_samples=500")
    assert "--num_samples=500: with --seq_len=16 they take 8001 tokens, split 'train' has" in short
    assert "is there already" in mistake(capsys, "prune", *good, there[0], f"--out={magnitude}")
    sparse = f"--workdir={magnitude}"
    again = mistake(capsys, "prune", *good, sparse, there[1])
    assert "its weights are sparse already, sparsity.name='fixed'" in again
    assert "is a dense checkpoint, it has no masks" in mistake(capsys, "bake", *there)
    assert "is a dense checkpoint, it has no masks" in mistake(capsys, "report", there[0])
    prior = f"--prior={dense}"
    assert f"{prior}: " in mistake(capsys, "report", sparse, prior, f"--output={tmp_path}")
    assert "command='prun': not one of prune" in mistake(capsys, "prun")


@pytest.mark.parametrize("name", ["prune", "report", "bake", ""])
def test_help(name, capsys):
    run(*([name, "--help"] if name else []))
    assert "python -m sparseformer_jax.sparsity" in capsys.readouterr().out


def test_tools_are_no_methods():
    assert {"calibration", "one_shot", "report", "workdirs"}.isdisjoint(registry.names("sparsity"))
