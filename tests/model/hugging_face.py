"""Weights of transformers' models under this project's names, in one table an architecture."""

import jax

# Our modules and theirs; "*" stands for the number of a layer.
LLAMA = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layers/*/attention_norm": "model.layers.*.input_layernorm",
    "layers/*/attention/query": "model.layers.*.self_attn.q_proj",
    "layers/*/attention/key": "model.layers.*.self_attn.k_proj",
    "layers/*/attention/value": "model.layers.*.self_attn.v_proj",
    "layers/*/attention/out": "model.layers.*.self_attn.o_proj",
    "layers/*/attention/query_norm": "model.layers.*.self_attn.q_norm",
    "layers/*/attention/key_norm": "model.layers.*.self_attn.k_norm",
    "layers/*/mlp_norm": "model.layers.*.post_attention_layernorm",
    "layers/*/mlp/gate": "model.layers.*.mlp.gate_proj",
    "layers/*/mlp/up": "model.layers.*.mlp.up_proj",
    "layers/*/mlp/down": "model.layers.*.mlp.down_proj",
}
GEMMA3 = LLAMA | {
    "layers/*/attention_post_norm": "model.layers.*.post_attention_layernorm",
    "layers/*/mlp_norm": "model.layers.*.pre_feedforward_layernorm",
    "layers/*/mlp_post_norm": "model.layers.*.post_feedforward_layernorm",
}
GPT_NEO = {
    "embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
    "layers/*/attention_norm": "transformer.h.*.ln_1",
    "layers/*/attention/query": "transformer.h.*.attn.attention.q_proj",
    "layers/*/attention/key": "transformer.h.*.attn.attention.k_proj",
    "layers/*/attention/value": "transformer.h.*.attn.attention.v_proj",
    "layers/*/attention/out": "transformer.h.*.attn.attention.out_proj",
    "layers/*/mlp_norm": "transformer.h.*.ln_2",
    "layers/*/mlp/up": "transformer.h.*.mlp.c_fc",
    "layers/*/mlp/down": "transformer.h.*.mlp.c_proj",
}
# The last part of our name -> theirs, and whether it is the transposed one.
PARAMETERS = {
    "kernel": ("weight", True),
    "table": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
}


def parameters(model_def, weights, table):
    """All parameters of a model, stacked as it scans, of transformers' weights by name.

    Every weight is used, but for a head that the embedding is tied to.
    """
    stacked = {n: jax.ShapeDtypeStruct(v.shape, v.dtype) for n, v in model_def.params.items()}
    shapes = jax.eval_shape(model_def.to_layers, stacked)
    unused, found = dict(weights), {}
    for name, shape in shapes.items():
        theirs, is_transposed = their_name(name, table)
        value = unused.pop(theirs)
        found[name] = (value.T if is_transposed else value).reshape(shape.shape)
    assert unused.keys() <= ({"lm_head.weight"} if "head/kernel" not in shapes else set())
    return model_def.from_layers(found)


def their_name(name, table):
    """Their name of one of our parameters, and whether it is transposed there."""
    parts = name.split("/")
    layer = parts[1] if parts[0] == "layers" else ""
    if layer:
        parts[1] = "*"
    kind, is_transposed = PARAMETERS[parts.pop()]
    return f"{table['/'.join(parts)].replace('*', layer)}.{kind}", is_transposed
