"""A checkpoint under lm-evaluation-harness, beside the harness's own model of transformers."""

import json
import string

import jax
import numpy as np
import pytest
import tokenizers

from sparseformer_jax import command, mesh
from sparseformer_jax.build import make_tokenizer
from sparseformer_jax.checks import ConfigError
from sparseformer_jax.evaluation.harness.__main__ import main
from sparseformer_jax.pretrained.importing import import_model
from sparseformer_jax.training.restore import restore_state
from sparseformer_jax.training.state import ModelDef

pytestmark = pytest.mark.oracle

LENGTH = 48  # tokens that the models see
MERGES = ["t h", "th e", "Ġ the", "Ġ a", "i n", "e r", "Ċ Ċ", "c a", "ca t", "Ġ cat"]

# What a folder of tasks holds.
TASKS = {
    "colours": """
output_type: multiple_choice
doc_to_choice: [" red", " blue", " thin"]
doc_to_target: answer
""",
    "next": """
output_type: generate_until
doc_to_target: "thing"
generation_kwargs: {until: ["a"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
}


def write_tokenizer(folder, bos):
    """Byte-level merges of ASCII, in which words and ends of lines join across a context's end."""
    space = {" ": "Ġ", "\n": "Ċ"}
    letters = [space.get(c, c) for c in string.ascii_letters + string.digits + ".,:?! \n"]
    tokens = [*letters, *(merge.replace(" ", "") for merge in MERGES), "<s>", "</s>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    if not bos:
        del config["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": bos}))
    return vocab


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def models(request, tmp_path_factory):
    """The harness's model of a random Llama, ours of the same, and the workdir."""
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    from sparseformer_jax.evaluation.harness.language_model import CheckpointLM

    top = tmp_path_factory.mktemp("models")
    folder, workdir = top / "in", top / "run"
    folder.mkdir()
    vocab = write_tokenizer(folder, request.param)
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=vocab["<s>"],
        eos_token_id=[vocab["</s>"], vocab["!"]],
    )
    model = transformers.LlamaForCausalLM(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.lm_head.weight[vocab["<s>"]] = 0  # which text leaves out there
    model.save_pretrained(folder)
    import_model([folder], workdir, lambda config: None)
    config = command.saved(str(workdir))
    config.eval.batch_size = 4
    config.mesh.update({"data": 2, "fsdp": 2, "context": 2})
    options = {"device": "cpu", "dtype": "float32", "batch_size": 2, "max_length": LENGTH}
    # Its cache takes the first token's place where a text is cut at two places.
    theirs = HFLM(str(folder), logits_cache=False, **options)
    return theirs, CheckpointLM(config, workdir), workdir


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]


TEXT = "the cat in the inner car, then a cat: is the other cat there?\n\nthe end. "


def test_log_likelihoods_are_those_of_the_harness(models):
    """Of contexts that are empty, end within a token or a space, or are cut; greedy ones, too."""
    theirs, ours, _ = models
    pairs = [
        ("the", " cat"),
        ("the ", "cat in"),
        ("the i", "n cat"),  # a token across the border
        ("the end\n", "\nthe"),
        ("", "the cat"),
        (TEXT * 3, " the cat"),
        (TEXT, "a" * LENGTH),
        ("a", "b"),
    ]
    starts = ["the cat", TEXT[:30], "in"]
    requests = instances("generate_until", [(s, {"max_gen_toks": 4}) for s in starts])
    pairs += zip(starts, theirs.generate_until(requests, disable_tqdm=True), strict=True)
    requests = instances("loglikelihood", pairs)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [greedy for _, greedy in found[-3:]] == [True] * 3
    # float32 throughout, sums of some dozens of numbers of the order of 5.
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-5)


def test_continuations_that_cannot_be_predicted_are_refused(models):
    _, ours, _ = models
    for context, continuation, message in [
        ("a c", "at", "a continuation of 0 tokens after"),  # the tokenizer makes two of three
        ("a", "a" * (LENGTH + 1), f"a continuation of {LENGTH + 1} tokens after"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ours.loglikelihood(instances("loglikelihood", [(context, continuation)]))
    with pytest.raises(ConfigError, match=f"max_gen_toks={LENGTH}: the model sees {LENGTH} tokens"):
        ours.generate_until(instances("generate_until", [("a", {"max_gen_toks": LENGTH})]))


def test_texts_are_those_of_the_harness(models):
    theirs, ours, _ = models
    requests = instances("loglikelihood_rolling", [(TEXT,), (TEXT * 3,), ("a",), ("",)])
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    found = ours.loglikelihood_rolling(requests)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_generation_is_that_of_the_harness(models):
    """Alone there: padding on the left moves nothing but rounding, and alone it is none."""
    theirs, ours, _ = models
    theirs.batch_size_per_gpu = 1
    prompts = ["the cat", "a", TEXT, TEXT * 3, "in the end.", "cat"]
    settings = [{"until": ["\n", "a"], "max_gen_toks": 12}, {"max_gen_toks": 30}]
    requests = instances("generate_until", [(p, s) for p in prompts for s in settings])
    expected = theirs.generate_until(requests, disable_tqdm=True)
    found = ours.generate_until(requests, disable_tqdm=True)
    assert found == expected
    assert len(set(found)) > 6


def test_a_task_of_local_files(models, tmp_path, capsys):
    """Its accuracy is that of the log-likelihoods by the model's own logits."""
    _, _, workdir = models
    things = [
        {"thing": thing, "answer": n % 3} for n, thing in enumerate("sky cat inner end".split())
    ]
    data = tmp_path / "things.json"
    data.write_text("\n".join(map(json.dumps, things)))
    for name, own in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            f'doc_to_text: "the {{{{thing}}}} is"{own}'
        )
    output = tmp_path / "found.json"
    flags = [f"--include_path={tmp_path}", f"--output={output}", "--config.mesh.fsdp=8"]
    main(["harness", f"--workdir={workdir}", "--tasks=colours,next", "--limit=3", *flags])
    out, _ = capsys.readouterr()
    found = json.loads(output.read_text())
    choices = [" red", " blue", " thin"]
    right = 0
    for thing in things[:3]:
        values = [log_p(workdir, f"the {thing['thing']} is", choice) for choice in choices]
        right += np.argmax(values) == thing["answer"]
    assert found["results"]["colours"]["acc,none"] == pytest.approx(right / 3)
    assert (found["step"], found["limit"], found["window"]) == (0, 3, LENGTH)
    assert found["n-samples"]["colours"]["effective"] == 3
    assert f"{right / 3:.4f}" in next(line for line in out.splitlines() if "colours" in line)

    with pytest.raises(SystemExit) as stopped:
        main(["harness", f"--workdir={workdir}", "--tasks=colors", *flags])
    assert stopped.value.code == 2
    assert "--tasks=colors: no such task; did you mean colours?" in capsys.readouterr().err


def log_p(workdir, context, continuation):
    """Of a continuation, by a pass over all of it."""
    config = command.saved(str(workdir))
    tokenizer = make_tokenizer(config)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    tokens = np.array([*start, *tokenizer.encode(context + continuation)])
    count = len(tokens) - len(start) - len(tokenizer.encode(context))
    with jax.set_mesh(mesh.make_mesh({}, jax.devices()[:1])):
        model_def = ModelDef(config)
        state = restore_state(model_def, workdir)
        model = model_def.model(state.params, state.variables, 0)
        logits = jax.jit(lambda tokens: model(tokens).logits[0])(tokens[None])
    logits = np.asarray(logits, np.float64)
    values = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return values[np.arange(len(tokens) - 1), tokens[1:]][-count:].sum()
