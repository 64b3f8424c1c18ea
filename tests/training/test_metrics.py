"""What the metric writer leaves on disk."""

import json
import math

from sparseformer_jax.training import metrics, workdir


def strict(line):
    """A line of JSON as the standard has it: NaN and Infinity are no numbers."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_lines_are_strict_json(tmp_path, capsys):
    writer = metrics.MetricWriter(tmp_path, 0, 10, is_primary=True)
    writer.train(1, {"loss": 2.5, "odd": math.nan}, eta=math.nan)
    writer.evaluation(1, {"loss": 1e3, "perplexity": metrics.perplexity(1e3)})
    writer.close()
    lines = [strict(line) for line in (tmp_path / workdir.METRICS_FILE).read_text().splitlines()]
    assert lines == [
        {"step": 1, "train/loss": 2.5, "train/odd": None},
        {"step": 1, "eval/loss": 1000.0, "eval/perplexity": None},
    ]
    assert "perplexity inf" in capsys.readouterr().out


def test_a_step_shows_what_the_device_achieves(tmp_path, capsys):
    writer = metrics.MetricWriter(tmp_path, 0, 10, is_primary=True)
    speed = {"tokens_per_second": 4e3, "flops_per_second": 2.5e13, "mfu": 0.025}
    writer.train(1, {"loss": 0.0, **speed}, eta=60.0)
    writer.close()
    line = "step 1/10  loss 0.0000  ppl 1.00  tok/s 4000  FLOP/s 25 T  mfu 2.5%  eta 0:01:00\n"
    assert capsys.readouterr().out == line


def test_a_person_reads_no_single_layers(tmp_path, capsys):
    writer = metrics.MetricWriter(tmp_path, 0, 10, is_primary=True)
    writer.evaluation(1, {"overflow": 0.25, "overflow/layer_0": 0.5, "overflow/layer_1": 0.0})
    writer.close()
    assert capsys.readouterr().out.strip() == "eval at step 1: overflow 0.25"
    assert '"eval/overflow/layer_0": 0.5' in (tmp_path / workdir.METRICS_FILE).read_text()
