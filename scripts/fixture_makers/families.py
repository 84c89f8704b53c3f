"""A tiny randomly initialised model of each family, as transformers saves it, and its logits in float32."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 320
NUM_TOKENS = 40
SPECIAL_TOKENS = ("<|end|>", "<|start|>", "<|turn|>", "<|pad|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn|>{{ message['role'] }}: {{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
    "bos_token_id": 1,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short enough that the few frequencies of a tiny head fall into all three ranges.
    "original_max_position_embeddings": 64,
}


def _configs() -> dict[str, tuple[PretrainedConfig, torch.dtype]]:
    """By folder name: the configuration and the type of the stored weights."""
    one_to_one: dict[str, Any] = {"num_key_value_heads": 4}
    return {
        "llama2": (LlamaConfig(**{**SIZES, **one_to_one}), torch.float32),
        "llama3": (LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE), torch.bfloat16),
        "mistral": (MistralConfig(**SIZES, sliding_window=8), torch.float16),
        "smollm2": (LlamaConfig(**{**SIZES, "tie_word_embeddings": True}, rope_theta=100000.0), torch.bfloat16),
        "qwen2": (Qwen2Config(**{**SIZES, "tie_word_embeddings": True}), torch.bfloat16),
        "qwen3": (Qwen3Config(**SIZES, head_dim=32), torch.bfloat16),
    }


def make(folder: Path) -> None:
    """Writes one folder a family, each with `expected.npz`: token_ids [token] and logits [token, vocab]."""
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = _tokenizer()
    for number, (name, (config, dtype)) in enumerate(_configs().items()):
        torch.manual_seed(number)
        model = _randomized(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), dtype)
        token_ids = torch.randint(len(SPECIAL_TOKENS), VOCAB_SIZE, (NUM_TOKENS,))
        with torch.no_grad():
            logits = model(token_ids[None]).logits[0]
        model.generation_config = GenerationConfig(eos_token_id=[0, 2] if name == "llama3" else 0, bos_token_id=1)
        shards = {"max_shard_size": "60KB"} if name == "llama3" else {}
        model.to(dtype).save_pretrained(folder / name, **shards)
        tokenizer.save_pretrained(folder / name)
        np.savez_compressed(
            folder / name / "expected.npz", token_ids=token_ids.numpy().astype(np.int32), logits=logits.numpy()
        )
        print(name, "logits", float(logits.abs().max()))


@torch.no_grad()
def _randomized(model: Any, dtype: torch.dtype) -> Any:
    """Weights in float32 that `dtype` holds exactly, large enough that attention is uneven and norms and biases matter.

    The parameters alone are rounded: `model.to(dtype)` would round the rotary frequencies as well.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(0.0, 1.5 / parameter.shape[1] ** 0.5)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.5)
        else:
            parameter.uniform_(0.5, 1.5)
        parameter.copy_(parameter.to(dtype))
    return model


def _tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the cat sat on the mat and then the other cat sat there too while it rained in the town and on the hills"
    tokenizer.train_from_iterator([text] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        bos_token="<|start|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )
