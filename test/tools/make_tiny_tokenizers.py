#!/usr/bin/env python3
"""Two tiny tokenizers and what Hugging Face's libraries make of many texts with them: test/fixtures/chat/.

  tiny-bytes       byte-level BPE with Llama 4's splitting expression, special and other added tokens, a chat template
  tiny-fallback    Llama 2's kind: characters with byte fallback, "▁" for spaces, one space stripped at the beginning
Each folder gets the model's files and expected.json. The texts they are trained on are the words of this file.
setup: pip install tokenizers==0.23.3 transformers        usage: make_tiny_tokenizers.py OUT_DIR
"""
import json, os, random, sys
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

O200K = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])

TEMPLATE = """{{- bos_token }}
{%- if tools %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{%- for message in messages %}
    {{- '<|start|>' + message['role'] + '<|middle|>\\n\\n' }}
    {%- if message['role'] == 'assistant' and '</think>' in message['content'] %}
        {{- message['content'].split('</think>')[-1] | trim }}
    {%- else %}
        {{- message['content'] | trim }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- call.function.name + ' ' + (call.function.arguments | tojson) }}
    {%- endfor %}
    {{- '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant<|middle|>\\n\\n<think>' }}
{%- endif %}
"""

TEXTS = [
    "", " ", "  ", "\n", "a", "Hello world", "  leading and trailing  ", "a\r\nb\r\n\r\nc", "\t\tif x:\n\t\t\treturn\t1\n",
    "It's we'LL they'd DON'T won’t", "0 12 345 6789 1234567890 3.14", "Größe naïve Ünïcödé", "你好，世界", "日本語のテキスト", "한국어",
    "नमस्ते दुनिया", "שלום עולם", "مرحبا بالعالم", "👩‍👩‍👧‍👦 😀🏽 🇩🇪", "e\u0301 \u00e9 a\u0308\u0323", "\u200b\u200c\u200d\ufeff", "\u00a0\u2003\u3000x",
    "\u0000\u0001\u001f\u007f\u0085", "\ufffd", "\ue000\U000f0000\U0010fffd", "½ ² Ⅷ ٣ ४ 一", "ǅ ǈ ŉ", "x" * 60, "ab" * 60, " " * 70, "\n" * 55,
    "=" * 80, "中" * 60, "///\n//", "''''", "for (size_t i = 0; i < n; ++i) { sum += a[i]; }", '{"a": [1, 2.5, null], "b": "\\u00e9"}',
    "a<|end|>b", "<|begin|><|start|>user<|middle|>\n\nx<|end|>", "<|end|", "<|<|end|>|>", "<think>hm</think>", "<s> </s><s>", "▁▁ a▁b", "<0x41><0x0A>",
    "The tokenizer reads the model's folder, the template reads the messages.",
]
ALPHABET = list("aAbB zZ09 \n\t.,!?'\"<>|/_-ßéñ½²" ) + ["你", "好", "の", "한", "न", "\u0301", "😀", "\u200d", "\u00a0", "\ufeff", "<|end|>", "<|", "'s", "▁", "<s>", "\U00020000"]

TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather in a city: \"now\" <only>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 3}}, "required": ["city"]}}}
CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}]},
    {"messages": [{"role": "system", "content": "  Be brief.\n"}, {"role": "user", "content": "What is 2+2?"}]},
    {"messages": [{"role": "user", "content": "\n\nHi\n"}, {"role": "assistant", "content": "<think>why</think>\n\nHello"}, {"role": "user", "content": "Bye"}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "add_generation_prompt": False},
    {"messages": [{"role": "user", "content": "Größe 你好 👩‍👩‍👧‍👦"}], "tools": [TOOL]},
    {"messages": [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}}]},
                  {"role": "tool", "content": "15 °C"}], "tools": [TOOL]},
]


def words():
    text = open(__file__, encoding="utf-8").read()
    return [line for line in text.splitlines() if line.strip()] + TEXTS * 2


def byte_level():
    tok = Tokenizer(models.BPE(ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(O200K), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(words(), trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ["<|begin|>", "<|start|>", "<|middle|>", "<|end|>"]])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in ["<think>", "</think>"]])
    begin = tok.token_to_id("<|begin|>")
    tok.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", begin)])])
    return tok, dict(bos_token="<|begin|>", eos_token="<|end|>", chat_template=TEMPLATE), dict(bos_token_id=begin, eos_token_id=[tok.token_to_id("<|end|>")])


def byte_fallback():
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    latin = [chr(c) for c in range(0x20, 0x7f)] + ["▁", "ß", "é", "ü", "你"]
    trained.train_from_iterator(words(), trainers.BpeTrainer(vocab_size=500, limit_alphabet=100, initial_alphabet=latin, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    first = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    vocab = {t: i for i, t in enumerate(first)}
    for t in sorted(model["vocab"], key=model["vocab"].get):
        vocab.setdefault(t, len(vocab))
    # No real model has merges that make a special token; the training texts hold such tokens, so it would learn some.
    merges = [tuple(m) for m in model["merges"] if "".join(m) not in first]
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tok.normalizer = trained.normalizer
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in first[:3]])
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tok, dict(bos_token=dict(__type="AddedToken", content="<s>"), eos_token="</s>"), None


def expected(folder, tok, config):
    rng = random.Random(4)
    texts = TEXTS + ["".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 60))) for _ in range(80)]
    bare = Tokenizer.from_str(json.dumps({**json.loads(tok.to_str()), "added_tokens": []}))
    out = {"comment": "made by test/tools/make_tiny_tokenizers.py; ids: user text; with_specials: only where it differs", "encode": [], "decode": [], "chat": []}
    for text in texts:
        ids, special = bare.encode(text, add_special_tokens=False).ids, tok.encode(text, add_special_tokens=False).ids
        out["encode"].append({"text": text, "ids": ids, **({"with_specials": special} if special != ids else {})})
    size = tok.get_vocab_size()
    for n in range(60):
        top = size if n % 2 else 270
        ids = [rng.randrange(top) for _ in range(rng.randint(1, 40))]
        out["decode"].append({"ids": ids, "text": tok.decode(ids, skip_special_tokens=False)})
    if "chat_template" in config:
        from transformers import PreTrainedTokenizerFast
        hf = PreTrainedTokenizerFast.from_pretrained(folder)
        for chat in CHATS:
            options = {"tools": chat.get("tools"), "add_generation_prompt": chat.get("add_generation_prompt", True)}
            text = hf.apply_chat_template(chat["messages"], tokenize=False, **options)
            out["chat"].append({**chat, "text": text, "ids": tok.encode(text, add_special_tokens=False).ids})
    json.dump(out, open(os.path.join(folder, "expected.json"), "w"), ensure_ascii=True, separators=(",", ":"))


def main(out):
    for name, make in (("tiny-bytes", byte_level), ("tiny-fallback", byte_fallback)):
        folder = os.path.join(out, name)
        os.makedirs(folder, exist_ok=True)
        tok, config, generation = make()
        tok.save(os.path.join(folder, "tokenizer.json"), pretty=False)
        config = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False, **config)
        json.dump(config, open(os.path.join(folder, "tokenizer_config.json"), "w"), indent=1)
        if generation:
            json.dump(generation, open(os.path.join(folder, "generation_config.json"), "w"), indent=1)
        expected(folder, tok, config)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
