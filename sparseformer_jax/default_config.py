"""Every key there is, with its default: the reference of all options.

Other configs start from this one and change what they need. Override any key on
the command line, `--config.model.num_layers=4`; a key that does not exist, a wrong
type or an impossible combination is refused with one line. Empty strings and empty
tuples mean "not set"; `placeholder` keys take None or the type they name.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Returns the default configuration: a small dense model on Python source text."""
    config = ConfigDict()
    config.seed = 0  # of initialisation, shuffling and dropout
    # WORKDIR or WORKDIR:STEP of another run, whose parameters this one starts with, layer by
    # layer; only what its method adds is initialised. A run that resumes does not read it.
    config.init_from = ""
    # That run's model and tokenizer too, and its attention where this config has the dense one.
    config.init_settings = False  # The command reads them; --config.KEY=VALUE counts more.

    config.model = _model()

    config.attention = attention = ConfigDict()
    attention.name = "dense"  # a module of sparseformer_jax/attention
    # The method's own options stand beside the name: see Options in its module.

    config.sparsity = sparsity = ConfigDict()
    sparsity.name = "none"  # of weights: a module of sparseformer_jax/sparsity; options alike

    config.data = data = ConfigDict()
    data.files = ()  # paths, directories, globs: .txt .py .md .jsonl, also .gz .xz;
    # empty: the standard library of the running Python
    data.text_field = "text"  # field of a JSON line that holds the text
    data.tfds_name = ""  # an installed tfds data set instead, e.g. "pg19"
    data.tfds_data_dir = ""  # where tfds keeps it; empty: tfds' own default
    data.cache_dir = ""  # prepared text and tokens; empty: ~/.cache/sparseformer_jax
    data.validation_fraction = 0.05  # of documents, where the files name no splits;
    data.test_fraction = 0.05  # of bytes at the end, where documents are too few
    data.tokenizer = "bytes"  # "bytes" | path of a Hugging Face tokenizer.json
    data.bos_token = "<bos>"  # put before every document; empty: none
    data.eos_token = "<eos>"  # put after every document; empty: none
    data.stop_tokens = ()  # end a continuation as eos_token does, e.g. that of a chat's turn
    data.seq_len = 512  # tokens in a training example
    data.shuffle = True  # order of documents and of examples, by the seed
    data.prefetch = 16  # batches read ahead; 0: none
    data.num_threads = 2  # that read them; 0: the training loop reads itself

    config.train = train = ConfigDict()
    train.num_steps = 1000
    train.batch_size = 8  # examples in one optimiser step, over all processes
    train.accumulation_steps = 1  # pieces the batch is computed in; same gradient
    train.z_loss = 0.0  # weight of log(Z)^2
    train.trainable = "all"  # "all" | regex on names, "layers/7/attention/query/kernel"
    train.deterministic = True  # on a GPU, sums in one order: equal bits in every run, and on
    # resume; False lets XLA and cuDNN choose. From the command line, before JAX starts.
    train.log_every = 10  # steps
    train.profile_steps = ()  # (first, last): trace these steps for TensorBoard

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"  # "adamw" | "muon" (AdamW for vectors and embeddings)
    optimizer.learning_rate = 3e-3  # peak
    optimizer.schedule = "cosine"  # "cosine" | "constant" | "wsd"
    optimizer.warmup_steps = 100
    optimizer.decay_steps = 200  # last steps of "wsd", where the rate falls
    optimizer.final_fraction = 0.1  # of the peak, where a schedule ends
    optimizer.weight_decay = 0.1  # on matrices only: no bias, norm or embedding
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.eps = 1e-8
    optimizer.momentum = 0.95  # of muon
    optimizer.clip_norm = 1.0  # global gradient norm; 0: no clipping

    config.eval = evaluation = ConfigDict()
    evaluation.every = 0  # steps; 0: only at the end
    evaluation.split = "validation"
    evaluation.num_batches = 16  # 0: the whole split
    evaluation.batch_size = 8
    # Pictures of the model at every evaluation, in TensorBoard where that and matplotlib are
    # installed. Parameters come to the host's memory for them, as they do for a checkpoint, and
    # one device holds the embedding, the output head and a layer more.
    evaluation.plots = True

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every = 500  # steps; the last step is always saved. 0: only that
    checkpoint.keep_last = 2
    checkpoint.keep_every = 0  # steps; keep these for ever. 0: none

    config.mesh = mesh = ConfigDict()  # devices along each axis, in product all; -1: the rest
    mesh.data = -1  # batch; parameters copied
    mesh.fsdp = 1  # batch; parameters sharded
    mesh.tensor = 1  # heads, MLP and vocabulary
    mesh.context = 1  # sequence
    return config


def _model() -> ConfigDict:
    """The transformer, apart from what its attention does."""
    model = ConfigDict()
    model.vocab_size = 258  # at least the tokenizer's; 256 bytes, <bos>, <eos>
    model.num_layers = 4
    model.embed_dim = 128  # width of the residual stream
    model.num_heads = 4  # query heads
    model.num_kv_heads = 4  # key/value heads; divides num_heads (grouped queries)
    model.head_dim = 32
    model.mlp_dim = 384
    model.is_causal = True  # False: bidirectional encoder, no next-token training
    model.position = "rope"  # "rope" | "learned" | "none"
    model.rope_theta = 10000.0  # base wavelength of rotary positions
    # What makes them reach beyond the length of pretraining: "none" | "linear" | "llama3" | "yarn".
    model.rope_scaling = "none"
    model.rope_factor = 1.0  # how many times farther
    model.rope_original_positions = 8192  # length of pretraining, of llama3 and yarn
    model.rope_low_freq_factor = 1.0  # of llama3: pairs that turn less often in that length are
    model.rope_high_freq_factor = 4.0  # scaled, those that turn more often than this are not
    model.rope_beta_slow = 1.0  # of yarn: the same two numbers
    model.rope_beta_fast = 32.0
    model.rope_attention_factor = placeholder(float)  # of yarn; None: 0.1 ln(factor) + 1
    model.partial_rotary_factor = 1.0  # the part of head_dim that is rotated, its first entries
    model.rope_local_layers = ()  # layers with a base of their own and no scaling (Gemma 3)
    model.rope_local_theta = placeholder(float)  # that base
    model.max_positions = 2048  # rows of the learned position table
    model.norm = "rmsnorm"  # "rmsnorm" | "layernorm"
    model.norm_eps = 1e-6
    model.norm_unit_offset = False  # norms multiply by 1 + scale, which starts at 0 (Gemma)
    model.post_norm = False  # attention and MLP outputs are normalised too, before they are added
    model.mlp = "swiglu"  # "swiglu" | "geglu_tanh" | "gelu" | "gelu_tanh"
    model.qk_norm = False  # RMS-normalise queries and keys per head
    model.qkv_bias = False
    model.out_bias = False  # bias of the attention output projection
    model.mlp_bias = False
    model.embedding_scale = 1.0  # of token embeddings, in the compute dtype; Gemma: sqrt(embed_dim)
    model.tie_embeddings = True  # the output head is the embedding table
    model.attention_scale = placeholder(float)  # None: 1/sqrt(head_dim)
    model.attention_soft_cap = placeholder(float)  # c tanh(logits / c) before softmax
    model.logits_soft_cap = placeholder(float)  # the same on the output logits
    model.dropout = 0.0  # rate on embeddings, attention and MLP outputs
    model.remat = "none"  # "none" | "full" | a name in jax.checkpoint_policies
    model.param_dtype = "float32"
    model.compute_dtype = "float32"  # "bfloat16" on TPU and GPU
    model.softmax_dtype = "float32"  # of output logits; attention's is always float32
    return model
