"""What weight sparsity costs a training step: time and memory beside the dense step.

    python benchmarks/sparsity_overhead.py

One model, dense attention, and a step of each method, compiled and run in turn, round after round;
a time is the median over rounds, a ratio that to the dense step of the same round. Peak memory is
what the compiler plans for arguments and temporaries. No sparse product is faster here: hardware
that skips what is dropped would have to show that.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sparseformer_jax import default_config, mesh, registry

sys.path.insert(0, str(Path(__file__).parent))
import trainer

METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "fixed": {"name": "fixed", "targets": ("all=2:4",)},
    "sr_ste": {"name": "pgf", "recipe": "sr_ste", "targets": ("all=2:4",)},
    "mdgf_exponential": {"name": "pgf", "targets": ("all=2:4",)},
    "sdgf_stepwise 1:8": {"name": "pgf", "recipe": "sdgf_stepwise", "targets": ("all=1:8",)},
    "maskllm": {"name": "maskllm", "targets": ("all=2:4",)},
    "maskllm, frozen weights": {"name": "maskllm", "targets": ("all=2:4",)},
}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embed_dim", type=int, default=256)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        runs = {name: list(trainer.compiled_step(get_config(name, args))) for name in METHODS}
        seconds = {name: list[float]() for name in METHODS}
        for _ in range(args.rounds + 1):
            for name, run in runs.items():
                seconds[name].append(timed(run))
    print("| step | ms | of the dense step's | peak MB | of the dense step's |")
    print("| --- | --- | --- | --- | --- |")
    dense = seconds["dense"][1:]
    peaks = {name: peak(compiled) for name, (compiled, _, _) in runs.items()}
    for name, found in seconds.items():
        # The first round reads pages that nothing has touched.
        ratio = statistics.median(x / y for x, y in zip(found[1:], dense, strict=True))
        print(
            f"| {name} | {1e3 * statistics.median(found[1:]):.0f} | {ratio:.2f} "
            f"| {peaks[name] / 1e6:.0f} | {peaks[name] / peaks['dense']:.2f} |"
        )


def get_config(name: str, args: argparse.Namespace) -> ConfigDict:
    """Returns the config of a row."""
    config = default_config.get_config()
    options = dict(METHODS[name])
    if options:
        config.sparsity = registry.method_config("sparsity", options.pop("name"), **options)
    if "frozen" in name:
        config.train.trainable = "/mask_logits$"
    config.model.embed_dim = args.embed_dim
    config.model.num_layers = args.num_layers
    config.model.num_heads = config.model.num_kv_heads = args.embed_dim // 64
    config.model.head_dim = 64
    config.model.mlp_dim = 4 * args.embed_dim
    config.data.seq_len = args.seq_len
    config.train.batch_size = args.batch_size
    return config


def timed(run: list[Any]) -> float:
    """Returns the seconds of a step, whose state goes on to the next."""
    compiled, state, batch = run
    start = time.perf_counter()
    run[1], _ = jax.block_until_ready(compiled(state, batch))
    return time.perf_counter() - start


def peak(compiled: Any) -> int:
    """Returns the bytes of arguments and temporaries."""
    analysis = compiled.memory_analysis()
    return analysis.argument_size_in_bytes + analysis.temp_size_in_bytes


if __name__ == "__main__":
    main()
