"""Every architecture against transformers: in, out, and in again."""

import itertools

import jax
import numpy as np
import pytest

from sparseformer_jax import config as config_lib
from sparseformer_jax import mesh
from sparseformer_jax.generation.choice import Choice
from sparseformer_jax.generation.sampling import Sampler
from sparseformer_jax.pretrained import architectures
from sparseformer_jax.pretrained.exporting import export_model
from sparseformer_jax.pretrained.importing import import_model
from sparseformer_jax.training.restore import restore_state
from sparseformer_jax.training.state import ModelDef
from tests.pretrained.files import write_tokenizer

pytestmark = pytest.mark.oracle

V = 17
DECODER = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
ROTARY = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}

# Name in transformers, and settings.
MODELS = {
    "llama": ("Llama", DECODER | {"rms_norm_eps": 1e-5}),
    "llama_tied_biases": (
        "Llama",
        DECODER | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama_wide_heads": ("Llama", DECODER | {"head_dim": 16, "num_key_value_heads": 1}),
    **{
        f"llama_{name}": ("Llama", DECODER | {"rope_parameters": rope | {"rope_theta": 100.0}})
        for name, rope in ROTARY.items()
    },
    "mistral": ("Mistral", DECODER | {"sliding_window": 5}),
    "mistral_full": ("Mistral", DECODER | {"sliding_window": None}),
    "qwen2": ("Qwen2", DECODER | {"tie_word_embeddings": True}),
    "qwen2_windows": (
        "Qwen2",
        DECODER | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", DECODER | {"head_dim": 16}),
    "gemma3": (
        "Gemma3",
        DECODER
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "final_logit_softcapping": 8.0,
            "rope_parameters": {
                "full_attention": ROTARY["linear"] | {"rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gpt_neo": (
        "GPTNeo",
        {
            "vocab_size": V,
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "max_position_embeddings": 64,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 4,
        },
    ),
}

# Of each kind of cache one.
GREEDY = ("llama_yarn", "mistral", "qwen2_windows", "qwen3", "gemma3", "gpt_neo")


def make(name):
    """A random model whose biases and norms are no zeros and ones."""
    import torch
    import transformers

    family, settings = MODELS[name]
    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    write_tokenizer(folder, V)
    return folder


def logits_there(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def logits_here(workdir, tokens):
    config = config_lib.from_json((workdir / "config.json").read_text())
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        state = restore_state(model_def, workdir)
        model = model_def.model(state.params, state.variables, 0)
        return np.asarray(jax.jit(lambda t: model(t).logits)(tokens))


def greedy_there(model, tokens, number):
    """The likeliest token again and again, by a full pass each time."""
    tokens = tokens.tolist()
    for _ in range(number):
        tokens.append(int(logits_there(model, [tokens])[0, -1].argmax()))
    return tokens[-number:]


def greedy_here(workdir, tokens, number):
    config = config_lib.from_json((workdir / "config.json").read_text())
    sampler = Sampler(config, workdir, choice=Choice(temperature=0.0))
    chosen = itertools.islice(sampler.tokens([tokens.tolist()]), number)
    return [token for (token,) in chosen]


def assert_weights_equal(one, other):
    """Bit by bit, whatever the order; both of transformers."""
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value.numpy(), other[name].numpy(), err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_weights_in_and_out(name, tmp_path):
    import transformers

    model = make(name)
    tokens = np.random.default_rng(0).integers(0, V, (2, 40))
    workdir, folder = tmp_path / "run", tmp_path / "out"
    import_model([save(model, tmp_path / "in")], workdir, lambda config: None)
    expected = logits_there(model, tokens)
    # float32 throughout, in another order: 1e-4 of logits that are of the order of 1.
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(logits_here(workdir, tokens), expected, atol=1e-4 * scale)
    if name in GREEDY:  # beyond every window
        assert greedy_here(workdir, tokens[0, :9], 20) == greedy_there(model, tokens[0, :9], 20)

    config = config_lib.from_json((workdir / "config.json").read_text())
    export_model(config, workdir, folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(again).__name__.startswith(MODELS[name][0]) or name == "mistral_full"
    np.testing.assert_array_equal(logits_there(again, tokens), expected)
    if name != "mistral_full":  # a Llama, then, whose weights have the same names
        assert_weights_equal(model, again)
    # Not AutoTokenizer, which takes Qwen2's own class whatever the folder says.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer("w3 w1", add_special_tokens=False)["input_ids"] == [3, 1]


def test_every_architecture_is_compared():
    compared = {MODELS[name][0].lower() for name in MODELS}
    known = {a.class_name.removesuffix("ForCausalLM").lower() for a in architectures.known()}
    assert compared == known


def test_shards_and_half_precision(tmp_path):
    """As most models come: several files, in bfloat16, which float32 holds exactly."""
    import torch
    import transformers

    model = make("llama_tied_biases").to(torch.bfloat16)
    folder = save(model, tmp_path / "in", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    import_model([folder], tmp_path / "run", lambda config: None)
    config = config_lib.from_json((tmp_path / "run/config.json").read_text())
    out = tmp_path / "out"
    export_model(config, tmp_path / "run", out, dtype="bfloat16", shard_bytes=20_000)
    assert len(list(out.glob("*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    one, other = model.state_dict(), again.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_zeros_stay_in_their_places(tmp_path):
    import torch
    import transformers

    model = make("llama")
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.ndim == 2:
                parameter.reshape(-1, 4)[:, 1:3] = 0
    import_model([save(model, tmp_path / "in")], tmp_path / "run", lambda config: None)
    config = config_lib.from_json((tmp_path / "run/config.json").read_text())
    export_model(config, tmp_path / "run", tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_weights_equal(model, again)
