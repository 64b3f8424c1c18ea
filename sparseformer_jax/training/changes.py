"""What may differ when a run resumes: keys that leave its mathematics alone, and the others."""

import dataclasses

from ml_collections import ConfigDict

from sparseformer_jax.config import diff

# These say where, how fast and how often a run computes and writes, never what.
_HARMLESS_SECTIONS = ("mesh.", "eval.", "checkpoint.")
_HARMLESS = {
    "attention.implementation",
    "data.cache_dir",
    "data.num_threads",
    "data.prefetch",
    "data.stop_tokens",
    "model.remat",
    "train.deterministic",
    "train.log_every",
    "train.profile_steps",
}

# Where text and tokens come from. Their fingerprint decides whether they are the same.
_TEXT = {
    "data.bos_token",
    "data.eos_token",
    "data.files",
    "data.test_fraction",
    "data.text_field",
    "data.tfds_data_dir",
    "data.tfds_name",
    "data.tokenizer",
    "data.validation_fraction",
}

# Optimiser schedules that end at the last step.
_SCHEDULES_BY_LENGTH = ("cosine", "wsd")


@dataclasses.dataclass(frozen=True)
class Changes:
    """How a config differs from the one a checkpoint was trained with, as "key: old -> new".

    Attributes:
      harmless: the losses that follow stay those of the run, to rounding.
      changing: the run becomes another one.
    """

    harmless: tuple[str, ...]
    changing: tuple[str, ...]


def compare(old: ConfigDict, new: ConfigDict, *, same_text: bool) -> Changes:
    """Returns what differs between two configs.

    Args:
      old: the checkpoint's.
      new: the one to resume with.
      same_text: whether training text and tokens have the same fingerprint.
    """
    harmless, changing = [], []
    for key, change in diff(old, new).items():
        if _is_harmless(key, new, same_text):
            harmless.append(f"{key}: {change}")
        elif key == "train.num_steps":
            schedule = f"optimizer.schedule={new.optimizer.schedule}"
            changing.append(f"{key}: {change} (where {schedule} ends)")
        else:
            changing.append(f"{key}: {change}")
    if not same_text:
        changing.append("the training text")
    return Changes(tuple(harmless), tuple(changing))


def _is_harmless(key: str, new: ConfigDict, same_text: bool) -> bool:
    if key == "train.num_steps":
        return new.optimizer.schedule not in _SCHEDULES_BY_LENGTH
    return key in _HARMLESS or key.startswith(_HARMLESS_SECTIONS) or (same_text and key in _TEXT)


def evaluated_differently(old: ConfigDict, new: ConfigDict) -> dict[str, str]:
    """Returns {key: "old -> new"} of what makes an evaluation another one than of `old`.

    Text is left out, which its fingerprint tells, and so is the split.
    """
    keys = (
        "model.",
        "attention.",
        "sparsity.targets",
        "data.",
        "eval.batch_size",
        "eval.num_batches",
    )
    irrelevant = _HARMLESS | _TEXT
    return {
        key: change
        for key, change in diff(old, new).items()
        if key.startswith(keys) and key not in irrelevant
    }
