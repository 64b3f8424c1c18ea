"""What preparing a large text costs, and starting again on it.

    python benchmarks/data.py --gigabytes=1 --folder=/tmp/text

Writes a text of that size, JSON lines in eight files, made of other text by repetition
with a number in every paragraph. Then prepares it in processes of their own, as the
trainer does on its start: with bytes as tokens, and with a byte-pair encoding learned on
a part of it. The second start finds everything prepared. Takes twice the size of the text
on disk beside it, and deletes all it wrote. Linux; some minutes.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sparseformer_jax import data, default_config

DOCUMENT_BYTES = 2**15
NUM_FILES = 8
VOCABULARY = 8192


def main() -> None:
    """Prints the table; with --start, is one of the processes that are measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="10^9 bytes of text")
    parser.add_argument("--source", nargs="*", default=[], help="data.files to repeat")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary one")
    parser.add_argument("--start", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(json.loads(args.start))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        size = write_text(folder / "text", args.source, int(args.gigabytes * 1e9))
        print(f"{size / 1e9:.2f} GB of documents\n")
        print("| tokens | start | seconds | CPU seconds | MB/s | peak memory MB | cache MB |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        for tokenizer in ("bytes", learn_tokenizer(folder)):
            measure(folder, tokenizer, size)


def measure(folder: Path, tokenizer: str, size: int) -> None:
    """Prints the rows of one tokenizer: a first start and a second one."""
    cache = folder / "cache"
    settings = {"files": [str(folder / "text")], "cache_dir": str(cache), "tokenizer": tokenizer}
    for name in ("first", "second"):
        command = [sys.executable, __file__, "--start", json.dumps(settings)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        found = json.loads(output)
        cached = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        speed = f"{size / found['seconds'] / 1e6:.0f}" if name == "first" else ""
        kind = "bytes" if tokenizer == "bytes" else f"BPE, {VOCABULARY}"
        print(
            f"| {kind} | {name} | {found['seconds']:.2f} |"
            f" {found['cpu_seconds']:.2f} | {speed} |"
            f" {found['peak'] / 1e6:.0f} | {cached / 1e6:.0f} |",
            flush=True,
        )
    shutil.rmtree(cache)


def start(settings: dict[str, Any]) -> dict[str, float]:
    """Returns the seconds and the peak memory in bytes of what the trainer does at its start."""
    config = default_config.get_config().data
    with config.ignore_type():
        config.update(settings)
    config.files = tuple(config.files)
    if config.tokenizer != "bytes":
        config.bos_token = config.eos_token = ""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    tokenizer = data.make_tokenizer(config)
    for split in ("train", "validation"):
        data.load_corpus(config, split, tokenizer)
    seconds = time.perf_counter() - begin
    cpu_seconds = time.process_time() - begin_cpu
    status = Path("/proc/self/status").read_text()
    (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", status)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak": int(peak) * 1024}


def write_text(folder: Path, source: list[str], size: int) -> int:
    """Writes documents of about `size` bytes in all and returns how many bytes they have."""
    folder.mkdir()
    streams = [(folder / f"{i}.jsonl").open("w") for i in range(NUM_FILES)]
    written = 0
    for i, document in enumerate(documents(source)):
        streams[i % NUM_FILES].write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
        written += len(document.encode())
        if written >= size:
            break
    for stream in streams:
        stream.close()
    return written


def documents(source: list[str]) -> Iterator[str]:
    """Yields pieces of the source for ever, all different."""
    config = default_config.get_config().data
    config.files = tuple(source)
    corpus = data.load_corpus(config, "train", data.ByteTokenizer("", ""))
    text = corpus.tokens.astype(np.uint8).tobytes().decode()
    copy = 0
    while True:
        for begin in range(0, len(text), DOCUMENT_BYTES):
            piece = text[begin : begin + DOCUMENT_BYTES]
            yield piece.replace("\n\n", f"\n\n{copy} ")
        copy += 1


def learn_tokenizer(folder: Path) -> str:
    """Returns the path of a byte-pair encoding learned on the begin of the first file."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with (folder / "text" / "0.jsonl").open() as stream:
        sample = [json.loads(stream.readline())["text"] for _ in range(20)]
    tokenizer.train_from_iterator(sample, trainer)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


if __name__ == "__main__":
    main()
