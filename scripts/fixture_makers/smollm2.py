"""References made with SmolLM2 as transformers reads it from its GGUF file."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from fixture_makers.smollm2_prompts import CHATS, LONG_LENGTHS, STRINGS, TEXTS, long_text

NEW_TOKENS = 32


def _tokenizer(gguf: Path) -> Any:
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def _published(tokenizer: Any) -> Tokenizer:
    """The tokenizer as SmolLM2's own tokenizer.json has it: digits are split off before the byte-level pattern runs.

    transformers does not read the `smollm` pre-tokenizer of a GGUF file and takes the byte-level pattern alone.
    """
    published = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    published.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return published


def make_tokenizer_fixture(gguf: Path, file: Path) -> None:
    """Token ids of strings, with special tokens recognized in the text and none added."""
    tokenizer = _tokenizer(gguf)
    published = _published(tokenizer)
    entries = []
    for text in STRINGS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        entries.append(
            {
                "text": text,
                "transformers_ids": ids,
                "published_ids": published.encode(text, add_special_tokens=False).ids,
                "decoded": tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
            }
        )
    chats = []
    for messages in CHATS:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        chats.append({"messages": messages, "text": text, "ids": ids})
    note = (
        "transformers_ids: transformers reading the GGUF file, which ignores the `smollm` pre-tokenizer. "
        "published_ids: the same vocabulary with the pre-tokenizer of the model's own tokenizer.json (single digits, "
        "then byte level). They differ where white space stands before a digit, and in digits other than ASCII's."
    )
    file.write_text(json.dumps({"note": note, "strings": entries, "chats": chats}, indent=1) + "\n")
    differing = [entry["text"] for entry in entries if entry["transformers_ids"] != entry["published_ids"]]
    print(f"{file.name}: {len(entries)} strings, of which the pre-tokenizers differ in {differing}")


def make_greedy_fixture(gguf: Path, file: Path) -> None:
    """Greedy continuations in float32 with the end-of-sequence id masked out."""
    tokenizer = _tokenizer(gguf)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    eos = tokenizer.eos_token_id
    prompts: list[dict[str, Any]] = [{"text": text} for text in TEXTS]
    prompts += [{"messages": messages} for messages in CHATS]
    words = tokenizer(long_text(), add_special_tokens=False).input_ids
    prompts += [{"token_ids": words[:length]} for length in LONG_LENGTHS]
    for prompt in prompts:
        if "messages" in prompt:
            prompt["text"] = tokenizer.apply_chat_template(
                prompt["messages"], tokenize=False, add_generation_prompt=True
            )
        if "token_ids" not in prompt:
            prompt["token_ids"] = tokenizer(prompt["text"], add_special_tokens=False).input_ids
        prompt |= greedy(model, prompt["token_ids"], eos)
        print(
            f"{len(prompt['token_ids'])} tokens -> {tokenizer.decode(prompt['generated_ids'])!r}, {min(prompt['gaps'])}"
        )
    note = (
        f"transformers, float32, eager, greedy with end-of-sequence id {eos} masked out. logprobs: of the chosen token "
        "under the softmax of the raw logits, EOS not masked. gaps: between the two best logits, EOS masked."
    )
    lines = ",\n".join(json.dumps(prompt) for prompt in prompts)
    file.write_text(f'{{"note": {json.dumps(note)},\n"eos_ids": [{eos}],\n"prompts": [\n{lines}\n]}}\n')


@torch.no_grad()
def greedy(model: Any, token_ids: list[int], eos: int) -> dict[str, list[Any]]:
    """Generated ids, and for each the logprob and the gap to the second best logit."""
    ids, cache = torch.tensor([token_ids]), None
    generated: dict[str, list[Any]] = {"generated_ids": [], "logprobs": [], "gaps": []}
    for _ in range(NEW_TOKENS):
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = output.past_key_values, output.logits[0, -1].float()
        masked = logits.clone()
        masked[eos] = -torch.inf
        best = torch.topk(masked, 2)
        token = int(best.indices[0])
        generated["generated_ids"].append(token)
        generated["logprobs"].append(round(float(torch.log_softmax(logits, -1)[token]), 6))
        generated["gaps"].append(round(float(best.values[0] - best.values[1]), 6))
        ids = torch.tensor([[token]])
    return generated
