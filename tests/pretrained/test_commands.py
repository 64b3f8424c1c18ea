"""The commands: a model comes in and goes out again, or one line says why not."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sparseformer_jax import command, config_flags, default_config, mesh
from sparseformer_jax import config as config_lib
from sparseformer_jax import data as data_lib
from sparseformer_jax.pretrained import architectures
from sparseformer_jax.pretrained.__main__ import main
from sparseformer_jax.pretrained.fields import Fields
from sparseformer_jax.pretrained.importing import architecture_of, load_params, open_source
from sparseformer_jax.pretrained.layer_windows import read_windows
from sparseformer_jax.training.checkpoint import Checkpoints
from sparseformer_jax.training.init_from import first_state
from sparseformer_jax.training.optimizer import make_optimizer
from sparseformer_jax.training.restore import Stored
from sparseformer_jax.training.state import ModelDef
from tests import commands
from tests.pretrained.files import LLAMA, gguf_tensors, llama_tensors, write_folder, write_gguf


def run(*arguments):
    main(["pretrained", *map(str, arguments)])


def mistake(capsys, *arguments):
    return commands.mistake(run, capsys, *arguments)


def config_of(workdir):
    return config_lib.from_json((workdir / "config.json").read_text())


def stored(workdir):
    """All parameters, by layer."""
    with Checkpoints(workdir) as checkpoints:
        held = Stored(checkpoints, 0)
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        asked = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
            for name, array in held.arrays.items()
        }
        return jax.device_get(held.load({"params": asked, "variables": {}})["params"])


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A folder and the workdir that was made of it."""
    top = tmp_path_factory.mktemp("imported")
    folder = write_folder(top / "in")
    run("import", folder, f"--workdir={top / 'run'}")
    return folder, top / "run"


def test_a_folder_comes_in(imported):
    _, workdir = imported
    config = config_of(workdir)
    config_lib.validate(config)
    model, data = config.model, config.data
    assert (model.num_layers, model.num_heads, model.num_kv_heads, model.head_dim) == (2, 4, 2, 8)
    assert (model.rope_theta, model.norm_eps, model.tie_embeddings) == (5000.0, 1e-5, False)
    assert (data.bos_token, data.eos_token, data.seq_len) == ("<s>", "</s>", 64)
    assert data.tokenizer == str(workdir / "tokenizer.json")
    assert config.attention.name == "dense"
    params, tensors = stored(workdir), llama_tensors()
    query = params["layers/1/attention/query/kernel"]
    theirs = tensors["model.layers.1.self_attn.q_proj.weight"]
    for head in range(4):
        np.testing.assert_array_equal(query[:, head], theirs[8 * head : 8 * head + 8].T)
    out, theirs = params["layers/0/attention/out/kernel"], "model.layers.0.self_attn.o_proj.weight"
    np.testing.assert_array_equal(out[3], tensors[theirs][:, 24:].T)
    np.testing.assert_array_equal(params["head/kernel"], tensors["lm_head.weight"].T)


def test_a_gguf_file_of_the_same_model_is_the_same(imported, tmp_path):
    run("import", write_gguf(tmp_path / "a.gguf"), f"--workdir={tmp_path / 'run'}")
    expected = stored(imported[1])
    found = stored(tmp_path / "run")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert config_of(tmp_path / "run").model.rope_theta == 5000.0


def test_what_goes_out_is_what_came_in(imported, tmp_path):
    folder, workdir = imported
    run("export", f"--workdir={workdir}", f"--out={tmp_path / 'out'}")
    expected = load_file(folder / "model.safetensors")
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    settings = json.loads((tmp_path / "out/config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLM"]
    assert settings["rope_parameters"] == {"rope_theta": 5000.0, "rope_type": "default"}
    for name in set(LLAMA) - {"rope_theta"}:
        assert settings[name] == LLAMA[name]
    names = ("tokenizer.json", "tokenizer_config.json")
    assert (tmp_path / "out" / names[0]).read_text() == (folder / names[0]).read_text()
    special = json.loads((tmp_path / "out" / names[1]).read_text())
    assert (special["bos_token"], special["eos_token"]) == ("<s>", "</s>")
    assert settings["eos_token_id"] == 16


def test_tokens_that_end_a_continuation_come_in_and_go_out(imported, tmp_path):
    folder = write_folder(tmp_path / "in", LLAMA | {"eos_token_id": [16, 4, 3]})
    run("import", folder, f"--workdir={tmp_path / 'run'}")
    data = config_of(tmp_path / "run").data
    assert (data.eos_token, data.stop_tokens) == ("</s>", ("w4", "w3"))
    assert data_lib.make_tokenizer(data).stop_ids == {16, 3, 4}
    run("export", f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}")
    settings = json.loads((tmp_path / "out/config.json").read_text())
    assert settings["eos_token_id"] == [16, 3, 4]


def test_parameters_lie_as_the_mesh_has_them(imported):
    folder, workdir = imported
    source = open_source([folder])
    with jax.set_mesh(mesh.make_mesh({"fsdp": 4}, jax.devices()[:4])):
        params = load_params(source, architecture_of(source), ModelDef(config_of(workdir)))
    query = params["layers/0/attention/query/kernel"]
    assert query.sharding.spec == jax.P("fsdp", "tensor", None)
    assert query.sharding.shard_shape(query.shape) == (4, 4, 8)
    for name, array in stored(workdir).items():
        np.testing.assert_array_equal(np.asarray(params[name]), array)


def test_an_import_streams_into_the_shards_of_its_mesh(imported, tmp_path, monkeypatch):
    """Each device holds its part and no more; the checkpoint is the same."""
    folder, workdir = imported
    written = []

    def spy(self, step, state, meta):
        written.append(state["params"])
        write(self, step, state, meta)

    write = Checkpoints.write
    monkeypatch.setattr(Checkpoints, "write", spy)
    run("import", folder, f"--workdir={tmp_path / 'run'}", "--config.mesh.fsdp=8")
    (params,) = written
    query = params["layers/0/attention/query/kernel"]
    assert {shard.data.shape for shard in query.addressable_shards} == {(2, 4, 8)}
    for array in params.values():
        held = sum(shard.data.nbytes for shard in array.addressable_shards)
        assert held == array.nbytes or array.ndim == 1  # of norms each has a copy
    found = stored(tmp_path / "run")
    for name, array in stored(workdir).items():
        np.testing.assert_array_equal(found[name], array)


def test_settings_can_be_given(imported, tmp_path, capsys):
    folder, _ = imported
    target = f"--workdir={tmp_path / 'run'}"
    run("import", folder, target, "--config.data.seq_len=32", "--config.model.param_dtype=bfloat16")
    assert config_of(tmp_path / "run").data.seq_len == 32
    assert stored(tmp_path / "run")["embedding/table"].dtype == jax.numpy.bfloat16
    other = f"--workdir={tmp_path / 'other'}"
    assert "did you mean" in mistake(capsys, "import", folder, other, "--config.model.embd_dim=4")
    line = mistake(capsys, "import", folder, other, "--config.model.mlp_dim=32")
    assert "mlp.gate_proj.weight is [24, 16] instead of [32, 16]" in line
    line = mistake(capsys, "import", folder, other, "--config.model.qk_norm=True")
    assert "llama has no layers/0/attention/key_norm/scale" in line
    assert not (tmp_path / "other").exists()


def without(name):
    return {key: array for key, array in llama_tensors().items() if key != name}


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"

# Settings that change, tensors, and what the line says.
BAD_MODELS = {
    "unknown": (
        {"model_type": "lama"},
        None,
        "architecture 'lama' is unknown; did you mean llama?",
    ),
    "no_type": ({"model_type": None}, None, "config.json: model_type is missing"),
    "no_size": ({"hidden_size": None}, None, "config.json: hidden_size is missing"),
    "wrong_type": ({"hidden_size": "16"}, None, "hidden_size='16': must be int, not str"),
    "huge": ({"num_hidden_layers": 2**60}, None, "model.num_layers=1152921504606846976: must be"),
    "negative": ({"num_hidden_layers": -1}, None, "model.num_layers=-1: must be"),
    "no_heads": ({"num_attention_heads": 0}, None, "model.num_heads=0: must be"),
    "activation": ({"hidden_act": "relu"}, None, "hidden_act='relu': only 'silu' is supported"),
    "window": (
        {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
        None,
        "layer_types=['full_attention']: must be 2 times full_attention or sliding_attention",
    ),
    "turns": (
        {
            "model_type": "gpt_neo",
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [["global", 2]],
        },
        None,
        "attention_types=[['global', 2]]: must hold pairs",
    ),
    "default_turns": (
        {"model_type": "gpt_neo", "num_layers": 2, "num_heads": 2},
        None,
        "attention_types=None: must hold pairs",
    ),
    "gemma_activation": (
        {"model_type": "gemma3_text", "hidden_activation": "gelu"},
        None,
        "hidden_activation='gelu': only 'gelu_pytorch_tanh' is supported",
    ),
    "rope": ({"rope_scaling": {"rope_type": "dynamic"}}, None, "rope_type='dynamic': only"),
    "rope_type": ({"rope_scaling": [1]}, None, "rope_scaling=[1]: must be dict"),
    "missing": ({}, without(Q_PROJ), f"missing: {Q_PROJ}"),
    "left_over": (
        {},
        llama_tensors() | {"model.layers.2.mlp.up_proj.weight": np.ones(3, np.float32)},
        "left over: model.layers.2.mlp.up_proj.weight",
    ),
    "renamed": (
        {},
        without(Q_PROJ) | {Q_PROJ + "s": llama_tensors()[Q_PROJ]},
        f"missing: {Q_PROJ}; left over: {Q_PROJ}s",
    ),
    "misshapen": (
        {},
        llama_tensors() | {Q_PROJ: np.ones((16, 32), np.float32)},
        f"misshapen: {Q_PROJ} is [16, 32] instead of [32, 16]",
    ),
    "integers": ({}, llama_tensors() | {Q_PROJ: np.ones((32, 16), np.int32)}, f"{Q_PROJ} is I32"),
    "vocabulary": (
        {"vocab_size": 11},
        None,
        "misshapen: model.embed_tokens.weight is [17, 16] instead of [11, 16]",
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_model(name, tmp_path, capsys):
    changes, tensors, message = BAD_MODELS[name]
    folder = write_folder(tmp_path / "in", LLAMA | changes, tensors)
    assert message in mistake(capsys, "import", folder, f"--workdir={tmp_path / 'run'}")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_damage_that_shows_while_weights_are_read(tmp_path, capsys):
    """Everything written up to there is gone."""
    tensors = gguf_tensors()
    del tensors["blk.1.ffn_up.weight"]
    path = write_gguf(tmp_path / "a.gguf", tensors)
    line = mistake(capsys, "import", path, f"--workdir={tmp_path / 'run'}")
    assert "missing: blk.1.ffn_up.weight" in line
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_what_a_tied_model_need_not_hold(tmp_path):
    """Some programs save the head, equal to the embedding, and old ones rotary tables."""
    tensors = llama_tensors()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    folder = write_folder(tmp_path / "in", LLAMA | {"tie_word_embeddings": True}, tensors)
    run("import", folder, f"--workdir={tmp_path / 'run'}")
    assert "head/kernel" not in stored(tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imprt"], "command='imprt': not one of import, export; did you mean import?"),
        (["import", "--workdir=run"], "SOURCE: missing"),
        (["import", "IN"], "--workdir=...: missing"),
        (["import", "absent", "--workdir=run"], "absent: there is no such file or folder"),
        (["import", "IN", "IN", "--workdir=run"], "is a folder; give it alone"),
        (["import", "IN/model.safetensors", "--workdir=run"], "give the folder that it is in"),
        (["import", "IN/config.json", "--workdir=run"], "is no GGUF file"),
        (["import", "IN", "--workdir=IN"], "is there already; take a folder that is new"),
        (["import", "IN", "--workdir=IN/config.json/run"], "cannot be made"),
        (["export", "--workdir=RUN"], "--out=...: missing"),
        (["export", "--workdir=IN", "--out=out"], "architectures: no such key"),
        (["export", "--workdir=RUN", "--out=IN"], "is there already"),
        (["export", "--workdir=RUN", "--out=out", "--step=7"], "no checkpoint of step 7"),
        (
            ["export", "--workdir=RUN", "--out=out", "--dtype=int8"],
            "not one of float32, bfloat16, float16",
        ),
        (
            ["export", "--workdir=RUN", "--out=out", "--config.attention.name=s2"],
            "transformers has no such model",
        ),
    ],
)
def test_mistakes(arguments, message, imported, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {"IN": str(imported[0]), "RUN": str(imported[1])}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    assert message in mistake(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_pickle(tmp_path, capsys):
    (tmp_path / "model.pt").write_bytes(b"\x80\x04")
    line = mistake(capsys, "import", tmp_path / "model.pt", f"--workdir={tmp_path / 'run'}")
    assert "is a pickle, which can run any code" in line


def test_float16_too_small_for_a_weight(tmp_path, capsys):
    tensors = llama_tensors()
    tensors["model.norm.weight"][0] = 1e6
    run("import", write_folder(tmp_path / "in", None, tensors), f"--workdir={tmp_path / 'run'}")
    options = (f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}")
    line = mistake(capsys, "export", *options, "--dtype=float16")
    assert "model.norm.weight has numbers beyond it" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["import", "--help"], ["export", "--help"]])
def test_help(arguments, capsys):
    run(*arguments)
    assert "python -m sparseformer_jax.pretrained" in capsys.readouterr().out


def test_a_damaged_file_among_shards(tmp_path, capsys):
    folder = write_folder(tmp_path / "in")
    weight_map = {name: "model-1.safetensors" for name in llama_tensors()}
    (folder / "model.safetensors").unlink()
    save_file(llama_tensors(), folder / "model-1.safetensors")
    content = (folder / "model-1.safetensors").read_bytes()
    (folder / "model-1.safetensors").write_bytes(content[:-1])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    line = mistake(capsys, "import", folder, f"--workdir={tmp_path / 'run'}")
    assert "model-1.safetensors: " in line
    assert "ends at byte" in line


def pretrained_config(method, workdir):
    config = config_flags.load(f"configs/{method}.py:pretrained")
    config.init_from = str(workdir)
    command.inherit(config)
    return config


def test_a_sparse_run_starts_from_it(imported):
    _, workdir = imported
    config = pretrained_config("s2", workdir)
    config.attention.block_size = 8
    config_lib.validate(config, num_devices=1)
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        optimizer = make_optimizer(config.optimizer, 4, model_def.params)
        state, notes = first_state(model_def, optimizer, jax.random.key(1))
        params = jax.device_get(model_def.to_layers(state.params))
    assert notes == [f"parameters start from step 0 of {workdir}"]
    expected = stored(workdir)
    assert params.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(params[name], array, err_msg=name)


@pytest.mark.parametrize(("window", "expected"), [(8, 8), (None, None), ("absent", 4096)])
def test_a_window_that_is_null_or_absent(window, expected):
    settings = {"model_type": "mistral", "sliding_window": window}
    if window == "absent":
        del settings["sliding_window"]
    config = default_config.get_config()
    (mistral,) = (a for a in architectures.known() if a.model_type == "mistral")
    mistral.read(Fields(LLAMA | settings, "config.json"), config)
    assert read_windows(config)[0] == expected


def test_its_own_attention_goes_on(tmp_path):
    settings = LLAMA | {"model_type": "mistral", "sliding_window": 8}
    run("import", write_folder(tmp_path / "in", settings), f"--workdir={tmp_path / 'run'}")
    attention = pretrained_config("dense", tmp_path / "run").attention
    assert (attention.name, attention.span, attention.span_size) == ("masformer", "window", 8)
    assert attention.num_full_layers == 0


@pytest.mark.parametrize("package", ["gguf", "tokenizers", "safetensors.numpy"])
def test_a_package_that_is_not_installed(package, imported, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    path, name = write_gguf(tmp_path / "a.gguf"), package.partition(".")[0]
    arguments = ("import", path, f"--workdir={tmp_path / 'run'}")
    if name == "safetensors":
        arguments = ("export", f"--workdir={imported[1]}", f"--out={tmp_path / 'run'}")
    line = mistake(capsys, *arguments)
    assert f'needs the package {name}: pip install "sparseformer_jax[pretrained]"' in line


@pytest.mark.exhaustive
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    wide = LLAMA | {"hidden_size": 512}
    write_folder(tmp_path / "in", wide, llama_tensors(wide))
    command = [sys.executable, "-m", "sparseformer_jax.pretrained", "import", str(tmp_path / "in")]
    # Of a file, in units of 1024 bytes; set by a shell, as this process has threads.
    limited = ["bash", "-c", 'ulimit -f 300; exec "$@"', "bash", *command]
    ended = subprocess.run(
        [*limited, f"--workdir={tmp_path / 'run'}"], capture_output=True, text=True
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "a checkpoint cannot be written" in line
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
