"""Language models of a few thousand weights and data for them, made here: nothing is downloaded."""

import importlib
import json
import random
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "head_dim": 8,
}
MODELS = {
    "llama": {"rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    "qwen3": {"rms_norm_eps": 1e-6, "tie_word_embeddings": True},
}
WORDS = "the a cat dog tree house runs sleeps jumps over under green blue small".split()


def make_tokenizer(folder: Path) -> int:
    """A tokenizer of bytes, with a chat template; returns the number of its tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    fast.save_pretrained(str(folder))
    return len(tokens)


def make_model(folder: Path, name: str = "llama", dtype: str = "float32", bits: int | None = None) -> Path:
    """A model that mlx-lm loads from ``folder``, quantised to so many bits if any are given."""
    folder.mkdir(parents=True)
    vocabulary = make_tokenizer(folder)
    config = COMMON | MODELS[name] | {"model_type": name, "vocab_size": vocabulary, "eos_token_id": vocabulary - 1}
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(tree_map(lambda w: w.astype(getattr(mx, dtype)), model.parameters()))
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
        config["quantization"] = {"group_size": 32, "bits": bits}
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_data(folder: Path, examples: int = 20) -> Path:
    """Sentences of a few words: train.jsonl, valid.jsonl and test.jsonl."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for split, number in (("train", examples), ("valid", 12), ("test", 8)):
        lines = [" ".join(draw.choice(WORDS) for _ in range(draw.randint(2, 6))) for _ in range(number)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder
