"""Text to token ids and back: tokenizers, chat templates, and the text of a stream."""
