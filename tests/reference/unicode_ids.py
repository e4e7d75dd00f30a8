"""Writes tests/reference/unicode_ids.json: what Hugging Face's library gives for tokenizer_small.json and variants of it.

python3 tests/reference/unicode_ids.py > tests/reference/unicode_ids.json     (needs: pip install tokenizers)

`chunks`: the CRC-32 of the ids (int32, little-endian) of a text that holds 4096 code points (without surrogates) three
times: next to each other, with "a" between, with " " between. `ids`: those of each of `texts`.
"""
import json
import os
import random
import struct
import sys
import zlib

import tokenizers

here = os.path.dirname(os.path.abspath(__file__))
with open(os.path.join(here, "tokenizer_small.json"), encoding="utf-8") as f:
    base = json.load(f)

VARIANTS = [  # digits, add_prefix_space, use_regex, ignore_merges, encode_special_tokens (special text stays text)
    ("each", False, True, False, False),
    ("each", True, True, False, True),
    ("runs", False, True, False, False),
    ("together", False, True, False, False),
    ("together", True, True, True, False),
    ("together", False, False, False, False),
]

draw = random.Random(7)
pieces = ["a", "the", "Holmes", " ", " ", "\n", "\t", "\u00a0", "\u3000", "\u180e", "\x85", "'s", "'re", "'ll", "'LL", "'",
          "1", "23", "٣", "½", "Ⅷ", "一", "é", "e\u0301", "!", "…", "👍", "<|endoftext|>", "<|pad|>", "<|endo", "\r\n",
          "\u200b", "\ufeff", "\x00", "\x1c", "₂", "𝟙", "१२"]
texts = [
    "", " ", "  ", "a", " a", "a ", "  a  ", "\n\n\nThe end.\n\n", "I'm don't you're we've I'll he'd 'tis 'S '' 'r 're'll",
    "x" * 40 + " " * 70 + "y" * 200, "\t" * 100 + "z" + "\u00a0" * 9 + "w", "2024-11-24 3.14 1e400 ١٢٣ १२३ ½ Ⅷ ² 一二三 𝟙𝟚",
    "<|endoftext|>", "a<|endoftext|> <|endoftext|><|pad|>b", "<|endoftext|", "He said <|pad|> twice <|pad|><|pad|>",
    "naïve café déjà-vu — “quoted” … 日本語のテキスト 한국어 العربية עברית ไทย 👩‍👩‍👧 🇫🇷",
    "".join(draw.choice("abcdefghij") for _ in range(300)), "abcabcabc" * 40, "To Sherlock Holmes she is always THE woman.",
] + ["".join(draw.choice(pieces) for _ in range(60)) for _ in range(40)]


def chunk_text(first):
    codes = [chr(c) for c in range(first, first + 0x1000) if not 0xD800 <= c <= 0xDFFF]
    return "".join(codes) + "a".join(codes) + " ".join(codes)


out = {"tokenizers": tokenizers.__version__, "texts": texts, "variants": []}
for digits, add_prefix_space, use_regex, ignore_merges, plain in VARIANTS:
    content = json.loads(json.dumps(base))
    byte_level = {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": use_regex}
    step = {"type": "Digits", "individual_digits": digits == "each"}
    content["pre_tokenizer"] = byte_level if digits == "together" else {"type": "Sequence", "pretokenizers": [step, byte_level]}
    content["model"]["ignore_merges"] = ignore_merges
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.encode_special_tokens = plain

    def ids_of(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    chunks = []
    for first in range(0, 0x110000, 0x1000):
        ids = ids_of(chunk_text(first))
        chunks.append(zlib.crc32(struct.pack(f"<{len(ids)}i", *ids)))
    out["variants"].append({"digits": digits, "add_prefix_space": add_prefix_space, "use_regex": use_regex,
                            "ignore_merges": ignore_merges, "special_in_text": "plain" if plain else "allow",
                            "chunks": chunks, "ids": [ids_of(text) for text in texts]})
json.dump(out, sys.stdout, separators=(",", ":"))
print()
