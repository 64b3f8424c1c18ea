"""Text from any tfds data set that is prepared on this machine."""

import hashlib

import numpy as np
import tensorflow_datasets as tfds

from sparseformer_jax.checks import ConfigError
from sparseformer_jax.data.stored import StoredText


class InstalledText:
    """The documents of a tfds data set in array_record.

    Args:
      name: Its name for `tfds.builder`, e.g. "pg19" or "wiki40b/en".
      data_dir: Where tfds keeps it; "" is tfds' own default.
      text_field: The feature that holds the text; "text", the default, also stands for
        the only `tfds.features.Text`.

    Attributes:
      fingerprint: Changes with the data set's version, sizes and features.

    Raises:
      ConfigError: the data set is unknown, not prepared, not in array_record, or
        without such a feature.
    """

    def __init__(self, name: str, data_dir: str, text_field: str) -> None:
        self._name = name
        self._builder = _load(name, data_dir)
        self._field = _text_feature(name, self._builder.info.features, text_field)
        described = self._builder.data_path.glob("*.json")
        parts = [path.read_bytes() for path in sorted(described)]
        parts.append(self._field.encode())
        self.fingerprint = hashlib.sha256(b"\0".join(parts)).hexdigest()

    def documents(self, split: str) -> StoredText:
        """Returns the documents of `split`; raises ConfigError where it has none."""
        splits = self._builder.info.splits
        if split not in splits:
            raise ConfigError(
                f"data.tfds_name={self._name!r} has no split {split!r}; it has {', '.join(splits)}"
            )
        return StoredText(self._builder, split, self._field)


def _load(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    where = {"data_dir": data_dir} if data_dir else {}
    prepare = (
        'prepare it with: python -c "import tensorflow_datasets as tfds; tfds.builder('
        f"{', '.join([repr(name), *(f'{k}={v!r}' for k, v in where.items())])},"
        " file_format='array_record').download_and_prepare()\""
    )
    try:
        builder = tfds.builder(name, **where)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"data.tfds_name={name!r}: {reason} If it exists, {prepare}") from error
    if not builder.data_path.exists():
        raise ConfigError(
            f"data.tfds_name={name!r} is not prepared in {builder.data_dir}; {prepare}"
        )
    formats = {known.value for known in builder.info.available_file_formats()}
    if "array_record" not in formats:
        raise ConfigError(
            f"data.tfds_name={name!r} is stored as {', '.join(formats)} in"
            f" {builder.data_dir}, only array_record can be read; set another"
            f" data.tfds_data_dir and {prepare}"
        )
    return builder


def _text_feature(name: str, features: tfds.features.FeaturesDict, text_field: str) -> str:
    texts = [key for key, value in features.items() if _is_text(value)]
    if text_field in texts:
        return text_field
    only = [key for key in texts if isinstance(features[key], tfds.features.Text)]
    if text_field == "text" and len(only) == 1:
        return only[0]
    raise ConfigError(
        f"data.text_field={text_field!r}: data.tfds_name={name!r} has no such text;"
        f" choose one of {', '.join(texts) or 'another data set: it has no text'}"
    )


def _is_text(feature: tfds.features.FeatureConnector) -> bool:
    return (
        isinstance(feature, tfds.features.Tensor)  # of which Text is one
        and feature.shape == ()
        and feature.np_dtype == np.object_
    )
