"""Tokens a second of a pretrained model, evaluated and generated, beside transformers.

    python -m sparseformer_jax.pretrained import MODEL --workdir=/tmp/model
    python -m sparseformer_jax.pretrained export --workdir=/tmp/model --out=/tmp/folder
    python benchmarks/pretrained_throughput.py --workdir=/tmp/model --folder=/tmp/folder \
        --text=wikitext2/test.txt

Same model, float32 weights, same cores: 8 windows of 1024 tokens are evaluated; 1 and 8 prompts of
64 tokens are continued by 48, greedily, in a cache of 1024 places, the first tokens and compilation
not counted. Each side is a process of its own, the two in turn, `--rounds` times; a figure is the
median. Two cores, 3 GB, two minutes a round; transformers and PyTorch must be installed.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

WINDOW, NUM_WINDOWS = 1024, 8
PROMPT, NEW = 64, 48  # tokens
BATCHES = (1, 8)
SIDES = ("sparseformer_jax", "transformers")


def main() -> None:
    """Prints the table; with --side, measures one side and prints its figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="an imported model")
    parser.add_argument("--folder", type=Path, required=True, help="the same, exported")
    parser.add_argument("--text", type=Path, required=True, help="of 8192 tokens or more")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        ids = tokens(args.workdir, args.text)
        measure = ours(args.workdir, ids) if args.side == SIDES[0] else theirs(args.folder, ids)
        print(json.dumps(dict(measure)))
        return
    found = {side: list[dict[str, float]]() for side in SIDES}
    for _, side in itertools.product(range(args.rounds), SIDES):
        command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}"]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[side].append(json.loads(run.stdout.splitlines()[-1]))
    print(f"| tokens/s | {' | '.join(SIDES)} | ratio |")
    print("| --- | --- | --- | --- |")
    for what in found[SIDES[0]][0]:
        one, other = (statistics.median(x[what] for x in found[side]) for side in SIDES)
        print(f"| {what} | {one:.1f} | {other:.1f} | {one / other:.2f} |")


def tokens(workdir: Path, text: Path) -> np.ndarray:
    """Returns the first windows of a text, [windows, tokens]."""
    from sparseformer_jax import command
    from sparseformer_jax.data import make_tokenizer

    count = WINDOW * NUM_WINDOWS
    ids = make_tokenizer(command.saved(str(workdir)).data).encode(text.read_text()[: 16 * count])
    if len(ids) < count:
        raise SystemExit(f"--text={text}: {len(ids)} tokens; {count} are needed")
    return np.asarray(ids[:count]).reshape(NUM_WINDOWS, WINDOW)


def ours(workdir: Path, ids: np.ndarray) -> Iterator[tuple[str, float]]:
    """Yields what is measured, and tokens a second."""
    import jax
    import jax.numpy as jnp

    from sparseformer_jax import command, mesh
    from sparseformer_jax.evaluation.perplexity import make_eval_step
    from sparseformer_jax.generation.choice import Choice
    from sparseformer_jax.generation.decoder import Decoder
    from sparseformer_jax.training.restore import restore_state
    from sparseformer_jax.training.state import ModelDef

    config = command.saved(str(workdir))
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        state = restore_state(model_def, workdir)
        sharding = jax.NamedSharding(jax.sharding.get_mesh(), mesh.spec("batch", "seq"))
        window = {
            "inputs": jnp.asarray(ids),
            "targets": jnp.roll(ids, -1, axis=1),
            "positions": jnp.broadcast_to(jnp.arange(WINDOW), ids.shape),
            "segment_ids": jnp.ones(ids.shape, jnp.int32),
            "weights": jnp.ones(ids.shape).at[:, -1].set(0),
        }
        batch = {name: jax.device_put(x, sharding) for name, x in window.items()}
        evaluate = jax.jit(make_eval_step(model_def))
        jax.block_until_ready(evaluate(state, batch))
        start = time.perf_counter()
        jax.block_until_ready(evaluate(state, batch))
        yield "evaluated", ids.size / (time.perf_counter() - start)
    for size in BATCHES:
        with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
            vocab_size = config.model.vocab_size
            choice = Choice(temperature=0.0)
            decoder = Decoder(model_def, state, size=WINDOW, choose=choice, vocab_size=vocab_size)
        texts = decoder.continuations([ids[0, :PROMPT].tolist()] * size, jax.random.key(0))
        list(itertools.islice(texts, 2))
        start = time.perf_counter()
        list(itertools.islice(texts, NEW))
        yield f"generated, batch {size}", size * NEW / (time.perf_counter() - start)


def theirs(folder: Path, ids: np.ndarray) -> Iterator[tuple[str, float]]:
    """Yields the same of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = torch.tensor(ids, dtype=torch.long)

    def seconds(function: Any) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def generate(size: int, new: int) -> Any:
        prompt = inputs[:1, :PROMPT].repeat(size, 1)
        mask = torch.ones_like(prompt)
        counts = {"max_new_tokens": new, "min_new_tokens": new}
        return model.generate(
            prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **counts
        )

    with torch.inference_mode():
        model(inputs[:1])
        yield "evaluated", ids.size / seconds(lambda: model(inputs, labels=inputs))
        for size in BATCHES:
            generate(size, 2)
            first = seconds(lambda size=size: generate(size, 2))
            all_tokens = seconds(lambda size=size: generate(size, 2 + NEW))
            yield f"generated, batch {size}", size * NEW / (all_tokens - first)


if __name__ == "__main__":
    main()
