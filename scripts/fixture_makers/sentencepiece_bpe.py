"""References made with SentencePiece: a small BPE vocabulary as a GGUF file of the `llama` kind would have it."""

import json
import tempfile
from pathlib import Path

import sentencepiece

from fixture_makers.smollm2_prompts import CHATS, STRINGS, TEXTS

VOCAB_SIZE = 420
# The special tokens' texts are text like any other to SentencePiece, and special tokens to a GGUF file's reader.
SAMPLES = [text for text in STRINGS if "<|" not in text and "<repo_name>" not in text] + ["▁", " ▁ a", "<0x41>", "\n"]


def _train(folder: Path, add_dummy_prefix: bool) -> sentencepiece.SentencePieceProcessor:
    """With the options that Llama's tokenizer was trained with. It sees ASCII alone: all else falls back to bytes."""
    sentences = [*STRINGS, *TEXTS, *(message["content"] for chat in CHATS for message in chat)]
    lines = [line for text in sentences if text.isascii() and "\0" not in text for line in text.splitlines()]
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "model"),
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=add_dummy_prefix,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "model.model"))


def _token_type(model: sentencepiece.SentencePieceProcessor, id: int) -> int:
    if model.is_unknown(id):
        return 2
    if model.is_control(id):
        return 3
    return 6 if model.is_byte(id) else 1


def make(file: Path) -> None:
    """Two vocabularies, with and without a space before a text, and the ids and texts that SentencePiece gives."""
    models = []
    for add_space_prefix in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            model = _train(Path(folder), add_space_prefix)
        ids = range(model.get_piece_size())
        strings = []
        for text in SAMPLES:
            encoded = model.encode(text)
            strings.append({"text": text, "ids": encoded, "decoded": model.decode(encoded)})
        models.append(
            {
                "add_space_prefix": add_space_prefix,
                "tokens": [model.id_to_piece(id) for id in ids],
                "token_types": [_token_type(model, id) for id in ids],
                "scores": [model.get_score(id) for id in ids],
                "unknown_id": model.unk_id(),
                "bos_id": model.bos_id(),
                "eos_id": model.eos_id(),
                "strings": strings,
            }
        )
    file.write_text(json.dumps({"note": f"sentencepiece {sentencepiece.__version__}", "models": models}) + "\n")
    print(f"{file.name}: {VOCAB_SIZE} tokens, {len(SAMPLES)} strings")
