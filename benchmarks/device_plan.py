"""What `device.py` runs, the most valuable first, on a GPU or at toy sizes on a CPU."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Step:
    """A process of its own.

    Attributes:
        name: unique.
        function: of `device_steps`.
        arguments: keyword arguments, as JSON holds them.
        compile_limit: seconds before its turn on the GPU.
        gpu_limit: seconds of its turn.
        after: names of steps that must have ended before its turn.
        is_alone: whether later steps start only once it has ended.
    """

    name: str
    function: str
    arguments: dict[str, Any]
    compile_limit: float = 120.0
    gpu_limit: float = 20.0
    after: tuple[str, ...] = ()
    is_alone: bool = False


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is on a platform.

    Attributes:
        matrix: edge of the square matrices of the product.
        copied: numbers of 4 bytes that are copied.
        check: the case of the checks, as `pallas_kernels.bench.cases.Case` takes it.
        table: that of the table, without density and block_size.
        blocks: block sizes of the table.
        densities: of the table.
        kernels: implementations in the table.
        autotuned: implementations to tune.
        errors: that whose float32 errors are measured, without length.
        lengths: of these.
        models: configs of the training steps.
        tests: arguments of pytest, by name of the step.
        rounds: of a timing.
        steps: of training that are timed.
    """

    matrix: int
    copied: int
    check: dict[str, Any]
    table: dict[str, Any]
    blocks: tuple[int, ...]
    densities: tuple[float, ...]
    kernels: tuple[str, ...]
    autotuned: tuple[str, ...]
    errors: dict[str, Any]
    lengths: tuple[int, ...]
    models: tuple[str, ...]
    tests: dict[str, list[str]]
    rounds: int
    steps: int


# pytest-benchmark, where it is installed, warns that it will not time side by side.
_DEVICE_TESTS = ["tests/pallas_kernels/test_device.py", "-p", "no:benchmark", "-m", "device"]
_DEVICE_TESTS += ["-n", "8"]
GPU = Sizes(
    matrix=8192,
    copied=2**30,
    check={"length": 2048, "head_dim": 128, "heads": 8, "kv_heads": 2, "block_size": 64}
    | {"dtype": "bfloat16"},
    table={"length": 32768, "head_dim": 128, "heads": 32, "kv_heads": 8, "dtype": "bfloat16"},
    blocks=(64, 128),
    densities=(1.0, 0.5, 0.2, 0.1),
    kernels=("mosaic_gpu", "triton"),
    autotuned=("mosaic_gpu", "triton"),
    errors={"head_dim": 128, "heads": 4, "kv_heads": 1, "block_size": 64, "density": 1.0}
    | {"dtype": "float32"},
    lengths=(1024, 4096, 16384),
    models=("s2.py:small", "dense.py:small"),
    tests={
        "pytest mosaic_gpu": [*_DEVICE_TESTS, "-k", "mosaic_gpu"],
        "pytest others": [*_DEVICE_TESTS, "-k", "not mosaic_gpu"],
    },
    rounds=7,
    steps=5,
)
CPU = Sizes(
    matrix=128,
    copied=2**12,
    check={"length": 128, "head_dim": 16, "heads": 2, "kv_heads": 1, "block_size": 64}
    | {"dtype": "bfloat16"},
    table={"length": 256, "head_dim": 16, "heads": 2, "kv_heads": 1, "dtype": "bfloat16"},
    blocks=(64,),
    densities=(1.0, 0.5),
    kernels=("xla",),
    autotuned=("xla",),
    errors={"head_dim": 16, "heads": 2, "kv_heads": 1, "block_size": 64, "density": 1.0}
    | {"dtype": "float32"},
    lengths=(128,),
    models=("s2.py:tiny",),
    tests={
        "pytest xla": ["tests/pallas_kernels/test_device.py", "-m", "device", "-n", "0"]
        + ["-k", "xla and dense_longer_keys"]
    },
    rounds=1,
    steps=1,
)


def steps(platform: str) -> list[Step]:
    """Returns the steps for a platform, "gpu" or "cpu"."""
    sizes = {"gpu": GPU, "cpu": CPU}[platform]
    ceilings = {"matrix": sizes.matrix, "copied": sizes.copied, "rounds": sizes.rounds}
    return [
        Step("machine", "machine", ceilings, is_alone=True),
        *_checks(sizes),
        *_table(sizes),
        *(
            Step(name, "tests", {"name": name.replace(" ", "_"), "options": options}, 60, 150)
            for name, options in sizes.tests.items()
        ),
        *_autotune(sizes),
        *(
            Step(
                f"float32 {name} {length}",
                "errors",
                {"implementation": name, "case": case},
                gpu_limit=45,
            )
            for length in sizes.lengths
            for case in [sizes.errors | {"length": length}]
            for name in dict.fromkeys([*sizes.kernels, "xla"])
        ),
        *(
            Step(f"train {model}", "training", {"config": model, "steps": sizes.steps}, 150, 120)
            for model in sizes.models
        ),
    ]


def _checks(sizes: Sizes) -> list[Step]:
    sparse, dense = sizes.check | {"density": 0.5}, sizes.check | {"density": 1.0}
    attention = {"mosaic_gpu": sparse, "triton": sparse, "cudnn": dense, "xla": sparse}
    checked = [
        Step(f"check {name}", "check_attention", {"implementation": name, "case": case})
        for name, case in attention.items()
    ]
    return checked + [
        Step(f"check {name} block_max", "check_block_max", {"implementation": name, "case": dense})
        for name in ("mosaic_gpu", "triton", "xla")
    ]


def _table(sizes: Sizes) -> list[Step]:
    """Contender by contender, so that those of others cannot use up the time of ours."""
    cases = {
        f"{block} {density}": sizes.table | {"block_size": block, "density": density}
        for block in sizes.blocks
        for density in sizes.densities
    }
    first = next(iter(cases))
    truths = [Step(f"truth {name}", "truths", {"case": case}) for name, case in cases.items()]

    def timed(contender: str, name: str) -> Step:
        arguments = {"contender": contender, "case": cases[name], "rounds": sizes.rounds}
        after = (f"truth {name}",)
        return Step(f"time {contender} {name}", "timed", arguments, after=after, gpu_limit=30)

    ours, *others = sizes.kernels
    sparse = [name for name in cases if not name.endswith(" 1.0")]
    return [
        *truths,
        *(timed(ours, name) for name in cases),
        timed("cudnn", first),
        *(timed(other, name) for other in others for name in cases),
        *(
            Step(f"lists {name}", "lists", {"implementation": ours, "case": cases[name]})
            for name in sparse
        ),
        *(timed("flex", name) for name in cases),
    ]


def _autotune(sizes: Sizes) -> list[Step]:
    """At a sparse and at the dense shape of the table."""
    shape = sizes.table | {"block_size": sizes.blocks[0]}
    return [
        Step(
            f"autotune {name} {density}",
            "autotuned",
            {"implementation": name, "case": shape | {"density": density}},
            gpu_limit=75,
        )
        for name in sizes.autotuned
        for density in (sizes.densities[-1], 1.0)
    ]
