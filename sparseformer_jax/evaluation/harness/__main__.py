"""The command: `python -m sparseformer_jax.evaluation.harness`."""

import difflib
import importlib.metadata
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from sparseformer_jax import command
from sparseformer_jax.checks import ConfigError

_USAGE = """\
Tasks of lm-evaluation-harness, answered by a checkpoint: pip install "sparseformer_jax[lm_eval]"

  python -m sparseformer_jax.evaluation.harness --workdir=/tmp/smollm2 --tasks=lambada_openai
  python -m sparseformer_jax.evaluation.harness --workdir=/tmp/smollm2 --tasks=mmlu,gsm8k \\
      --num_fewshot=5 --limit=100 --config.data.seq_len=2048
  python -m sparseformer_jax.evaluation.harness --workdir=/tmp/smollm2 --tasks=capitals \\
      --include_path=my_tasks

Its own tasks fetch their data from the Hugging Face hub; a task of local files is a YAML file in
--include_path, with dataset_path: json and dataset_kwargs: {data_files: {test: FILE}}. The model
sees --config.data.seq_len tokens, of longer inputs the last ones, --config.eval.batch_size inputs
at a time. Prints a table and writes JSON.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; `argv` is sys.argv unless given.

    A user's mistake ends the process with one line on stderr and exit code 2.
    """
    own = command.new_flags()
    command.text(own, "workdir", "folder that training or an import wrote")
    command.text(own, "tasks", "names of tasks, groups or tags, with commas between them")
    command.text(own, "include_path", "folder of more tasks, as YAML files")
    command.text(own, "config", "config file; default: the config saved in the workdir")
    command.number(own, "step", "checkpoint to load; default: the latest")
    command.number(own, "num_fewshot", "examples before each question; default: the task's")
    flags.DEFINE_float(
        "limit", None, "questions of each task; below 1 a share; default: all", flag_values=own
    )
    command.text(own, "gen_kwargs", "changes generation_kwargs of tasks: max_gen_toks=64,..")
    command.text(own, "output", "JSON of the results; default: harness_TASKS_STEP.json there")
    command.run(_main, own, _USAGE, sys.argv if argv is None else argv)


def _main(own: flags.FlagValues, argv: list[str]) -> None:
    for name in ("workdir", "tasks"):
        command.require(own, argv, name)
    config = command.chosen(own)
    command.override(config, own, argv)
    if own.limit is not None and own.limit <= 0:
        raise ConfigError(f"--limit={own.limit:g}: must be above 0; leave it out for all")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import handle_non_serializable, make_table
    except ImportError as error:
        raise ConfigError(
            'this needs the package lm_eval: pip install "sparseformer_jax[lm_eval]"'
        ) from error
    command.start_jax(own)
    command.validate(config)
    from sparseformer_jax.evaluation import results
    from sparseformer_jax.evaluation.harness.language_model import CheckpointLM

    workdir, output = Path(own.workdir), own.output and Path(own.output)
    results.check_folder("--output" if output else "--workdir", output or workdir / "a.json")
    if own.include_path and not Path(own.include_path).is_dir():
        raise ConfigError(f"--include_path={own.include_path}: there is no such folder")
    manager = TaskManager(include_path=own.include_path)
    tasks = own.tasks.split(",")
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            advice = f"did you mean {near[0]}?" if near else "--include_path names more"
            raise ConfigError(f"--tasks={name}: no such task; {advice}")
    model = CheckpointLM(config, workdir, own.step)
    found: Any = lm_eval.simple_evaluate(
        model,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=own.num_fewshot,
        limit=own.limit,
        gen_kwargs=own.gen_kwargs,
        log_samples=False,
    )
    print(make_table(found))
    if found.get("groups"):
        print(make_table(found, "groups"))
    subject = {
        "step": model.step,
        "attention": config.attention.name,
        "window": model.max_length,
        "tokenizer": model.tokenizer_name,
        "limit": own.limit,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    numbers = json.loads(json.dumps(_of_tasks(found), default=handle_non_serializable))
    name = re.sub(r"[^\w.-]+", "_", f"harness_{own.tasks[:100]}_{model.step}")
    file = output or workdir / f"{name}.json"
    print(results.write(file, {**subject, **numbers}), file=sys.stderr)


def _of_tasks(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the results say of tasks; the rest is of the machine."""
    names = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")
    return {name: found[name] for name in names if name in found}


if __name__ == "__main__":
    main()
