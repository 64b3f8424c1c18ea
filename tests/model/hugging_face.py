"""Weights of transformers' Llama, Qwen and GPT-Neo under this project's names."""

import re

import numpy as np
from flax import nnx

# (name in transformers, name here), for what stands once and for what each layer has.
_TOP = {
    r"(model\.embed_tokens|transformer\.wte)\.weight": "embedding/table",
    r"transformer\.wpe\.weight": "position_embedding/table",
    r"(model\.norm|transformer\.ln_f)": "final_norm",
    r"lm_head": "head",
}
_LAYER = {
    r"(ln_1|input_layernorm)": "attention_norm",
    r"(ln_2|post_attention_layernorm)": "mlp_norm",
    r"(attn\.attention|self_attn)": "attention",
    r"mlp\.(c_fc|up_proj)": "mlp/up",
    r"mlp\.(c_proj|down_proj)": "mlp/down",
    r"mlp\.gate_proj": "mlp/gate",
    r"q_proj": "query",
    r"k_proj": "key",
    r"v_proj": "value",
    r"(o_proj|out_proj)": "out",
    r"q_norm": "query_norm",
    r"k_norm": "key_norm",
}
_LAYER_NAME = re.compile(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.*)")


def load(model, weights):
    """Puts transformers' weights, arrays by name, in a model; all of its parameters."""
    top, layers = {}, [{} for _ in range(model.config.num_layers)]
    for name, value in weights.items():
        found = _LAYER_NAME.match(name)
        if found:
            layers[int(found[1])][_rename(found[2], _LAYER)] = value
        elif not (model.head is None and name == "lm_head.weight"):
            top[_rename(name, _TOP)] = value
    first = 0
    for stack in model.stacks:
        size = len(stack.unit)
        rows = layers[first : first + stack.repeats * size]
        for index, block in enumerate(stack.unit):
            own = rows[index::size]
            _fill(block, {name: np.stack([row[name] for row in own]) for name in own[0]})
        first += len(rows)
    for name in ("embedding", "position_embedding", "final_norm", "head"):
        module = getattr(model, name)
        if module is not None:
            prefix = name + "/"
            own = {k.removeprefix(prefix): v for k, v in top.items() if k.startswith(prefix)}
            _fill(module, own)
    return model


def _rename(name, table):
    for pattern, ours in table.items():
        name = re.sub(pattern, ours, name)
    return name.replace(".", "/")


def _fill(module, arrays):
    """Linear weights come as [.., out, in], flat; norms call their scale a weight."""
    graph = dict(nnx.to_flat_state(nnx.state(module)))
    paths = {"/".join(map(str, path)): path for path in graph}
    found = {}
    for name, value in arrays.items():
        stem, is_weight, _ = name.rpartition("weight")
        if is_weight and stem + "kernel" in paths:
            name, value = stem + "kernel", np.swapaxes(value, -1, -2)
        elif is_weight:
            name = stem + "scale"
        found[paths[name]] = value.reshape(graph[paths[name]].shape)
    assert found.keys() == graph.keys()
    nnx.update(module, nnx.from_flat_state(list(found.items())))
