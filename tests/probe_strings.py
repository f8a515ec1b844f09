"""Texts on which tokenizers differ: digits, spaces, newlines, emoji, code, scripts, special tokens."""

PROBES = (
    "x =  12 y",
    "1234567890",
    "3.14159 and 2,718,281 and 1e-10",
    " leading and trailing  ",
    "a  b   c    d     e",
    "line one\nline two\n\nline four\r\n\tindented",
    "\n\n\n \n  \n\t\n",
    "def f(x: int) -> int:\n    return x ** 2  # squared\n",
    "for (int i = 0; i < n; ++i) { sum += a[i]; }",
    "Hello, world! It's we'll they've I'M DON'T",
    "🚀🚀 rocket 👩‍💻 coder 🇫🇷 flag 😶‍🌫️",
    "我想在苹果公司工作1314151天",
    "日本語のテキスト、カタカナとひらがな。",
    "한국어 문장입니다.",
    "Größe, naïve café, İstanbul, œuvre",
    "Привет, мир! Ёлка №5",
    "हिन्दी में ٣٤٥ अंक ½ ² Ⅷ",
    "<|im_start|>user\nWhat is 2 plus 3?<|im_end|>\n<|im_start|>assistant\n",
    "https://example.com/a?b=1&c=%20#frag $5.00 50% a_b-c~d^e|f`g",
    "tabs\t\tand\u00a0no-break\u2003em\u3000wide spaces",
)
