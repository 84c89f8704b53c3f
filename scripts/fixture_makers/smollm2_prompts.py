"""Texts that the SmolLM2 references are made of."""

STRINGS = (
    "",
    " ",
    "a",
    "Hello, world!",
    "  leading and trailing  ",
    "\n\n\nnew\nlines\r\nand\ttabs\t\t",
    "1234567890",
    "in 2024, 3.14159 and 1,000,000",
    "two  spaces  12 and three   345",
    "\n42\n  7",
    "don't we'll they've I'm it's DON'T",
    "CamelCase snake_case kebab-case SCREAMING",
    "naïve café résumé Übermut straße",
    "Привет, мир!",
    "你好,世界。",
    "こんにちは世界",
    "안녕하세요 세계",
    "مرحبا بالعالم ١٢٣",
    "नमस्ते दुनिया",
    "עברית עם ניקוד: שָׁלוֹם",
    "🙂",
    "👩‍👩‍👧‍👦 family, 🏳️‍🌈 flag, 👍🏽 skin",
    "½ ² Ⅷ ①",
    "e\u0301 combining and \u00e9 composed",
    "zero\u200bwidth and no\u00a0break and em\u2003space",
    "\ufeffbyte order mark",
    "nul \x00 and bell \x07",
    "def f(x):\n    return x ** 2  # squares\n\n\nclass A:\n\tpass\n",
    'for (int i = 0; i < 10; ++i) { printf("%d\\n", i); }',
    '{"key": [1, 2.5, null, true], "nested": {"a": "b"}}',
    '<html><body class="x">&amp;</body></html>',
    "https://example.org/path?query=1&other=two#part",
    "$E = mc^2$ and \\frac{a}{b}",
    "....---___===!!!???",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<|endoftext|>",
    "text<|im_end|>text",
    "<|im_start|><|im_start|>",
    "< |im_start|> is not special, nor is <|im_start",
    "<repo_name>a<file_sep>b<empty_output>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "The quick brown fox jumps over the lazy dog. " * 4,
)
"""For the tokenizer."""

CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You answer in rhymes."},
        {"role": "user", "content": "Describe the sea."},
    ],
    [
        {"role": "user", "content": "Name three primary colours."},
        {"role": "assistant", "content": "Red, yellow and blue."},
        {"role": "user", "content": "And which two make green?"},
    ],
    [{"role": "user", "content": "Write a Python function that adds 12 and 30.\n\n```python\n"}],
    [{"role": "user", "content": "Schreibe einen Satz über Käse 🧀."}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "  spaces  "}],
)

TEXTS = (
    "The",
    "Once upon a time",
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    ",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,\n\nI am writing to",
    "<|endoftext|>",
    "Les sanglots longs des violons",
    "🙂🙂🙂",
)
"""Raw prompts."""

LONG_LENGTHS = (16, 17, 63, 128, 255, 513, 1000, 1900)
"""Prompts cut from `long_text`, in tokens: around page and chunk sizes."""


def long_text() -> str:
    """A text of more than 2,000 tokens that does not repeat itself word for word."""
    places = ("harbour", "mountain", "library", "market", "forest", "station", "island", "workshop")
    people = ("a baker", "two sailors", "the teacher", "an old clockmaker", "three children", "a travelling singer")
    things = ("a brass key", "a map with no names", "a jar of honey", "the last letter", "a red umbrella")
    verbs = ("found", "lost", "painted", "sold", "remembered", "buried", "repaired")
    sentences = []
    for number in range(1, 121):
        person, thing = people[number * 5 % 6], things[number * 3 % 5]
        place, verb = places[number * 7 % 8], verbs[number * 4 % 7]
        sentences.append(f"On day {number}, {person} {verb} {thing} near the {place}.")
    return " ".join(sentences)
