"""Which perplexity: how a text is cut into windows to be scored, and what its log-probabilities add up to. No HTTP.

NLL is the negative log-likelihood in nats. Four conventions, all exact sums over tokens that are scored once:

`full`      One window. Without BOS the first token has nothing before it and is not scored.
`sliding`   Windows of max_length tokens that begin stride tokens after one another; each scores what those before it
            did not, so beyond the first window every token has at least max_length - stride tokens of context. BOS,
            if any, stands before the text, in the first window. The snippet in Hugging Face's "Perplexity of
            fixed-length models" cuts the same windows, but multiplies the mean of each window that scores n tokens by
            n - 1, except the first (whose first token is not scored anyway), and divides by the sum of those weights;
            its older form averages the windows' means unweighted. Here every token weighs the same.
`rolling`   lm-evaluation-harness' loglikelihood_rolling: the first token follows BOS (EOS if the model has no BOS),
            each window scores max_length - 1 tokens, and its one token of context is the last one of the window
            before. The last window, if it scores fewer, is filled up with earlier context to max_length.
            (The harness' own max_length is larger: by 1 in its API models, which count a generated token. Its local
            models count the tokens fed, which leave out the last: smaller by 1.)
`chunks`    llama-perplexity: windows of max_length = n_ctx tokens that do not overlap, of which tokens n_ctx//2 + 1 to
            n_ctx - 1 are scored. With BOS, it stands before the text and replaces the first token of every further
            window. At least 2 n_ctx tokens, BOS included; an incomplete last window is dropped.

`max_length` counts all tokens of a window: context, BOS and scored ones. A text that was tokenized with its own BOS in
front does not get a second one (`own_tokens`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import tokenizers

Method = Literal["full", "sliding", "rolling", "chunks"]


@dataclass(frozen=True)
class Window:
    """The model reads `prefix`, if there is one, and tokens start..end-1 of a text; first_scored..end-1 are scored."""

    start: int
    end: int
    first_scored: int
    prefix: int | None = None  # token id

    @property
    def num_scored(self) -> int:
        return self.end - self.first_scored

    @property
    def length(self) -> int:
        """All tokens, prefix included."""
        return self.end - self.start + (self.prefix is not None)

    @property
    def first_index(self) -> int:
        """Where the first scored token stands among those of `tokens`; at least 1."""
        return self.length - self.num_scored

    def tokens(self, ids: Sequence[int]) -> list[int]:
        """What the model is given of a text's ids; the logits after the last of them are not needed."""
        own = list(ids[self.start : self.end])
        return own if self.prefix is None else [self.prefix, *own]


@dataclass(frozen=True)
class Convention:
    """Which perplexity is computed: a method and all its parameters, as the answer repeats them."""

    method: Method
    max_length: int
    stride: int | None  # sliding only
    add_bos: bool
    prefix_token_id: int | None  # BOS with add_bos; in `rolling` EOS where there is no BOS


def resolve_convention(
    method: Method,
    max_length: int | None = None,
    stride: int | None = None,
    add_bos: bool | None = None,
    *,
    context: int,
    bos_token_id: int | None,
    eos_token_id: int | None,
    adds_bos: bool,
) -> Convention:
    """Fill in defaults and check what is given.

    Args:
        max_length: tokens of a window (default: `context`, which is the most).
        stride: of `sliding` (default: half of max_length).
        add_bos: default: `adds_bos`, the tokenizer's own setting. `rolling` always has BOS if the model has one.
        context: the model's, in tokens.

    Raises:
        ValueError: "field: reason", where field is one of the first four arguments.
    """
    least = 3 if method == "chunks" else 2
    length = context if max_length is None else max_length
    if length > context:
        raise ValueError(f"max_length: {length} is more than the model's context of {context} tokens")
    if length < least:
        raise ValueError(f"max_length: {length} is less than {least}, the least for method {method!r}")
    if method == "sliding":
        stride = length // 2 if stride is None else stride
        if not 1 <= stride < length:
            raise ValueError(f"stride: {stride} is not between 1 and max_length - 1 = {length - 1}")
    elif stride is not None:
        raise ValueError(f"stride: has no meaning for method {method!r}, only for 'sliding'")
    if add_bos and bos_token_id is None:
        raise ValueError("add_bos: the model has no BOS token")
    if method != "rolling":
        add_bos = adds_bos if add_bos is None else add_bos
        return Convention(method, length, stride, add_bos, bos_token_id if add_bos else None)
    if add_bos is False:
        raise ValueError("add_bos: cannot be false for method 'rolling', whose first token follows BOS or EOS")
    if bos_token_id is None and eos_token_id is None:
        raise ValueError("method: 'rolling' needs a BOS or EOS token, and the model has neither")
    prefix = eos_token_id if bos_token_id is None else bos_token_id
    return Convention(method, length, None, bos_token_id is not None, prefix)


def adds_bos(tokenizer: tokenizers.Tokenizer, bos_token_id: int | None) -> bool:
    """The tokenizer's own setting: whether its post-processor puts BOS before a text."""
    first = tokenizer.encode("a").ids[:1]
    return bos_token_id is not None and first == [bos_token_id]


def own_tokens(ids: list[int], convention: Convention) -> list[int]:
    """The text's ids without a BOS of their own that the convention adds anyway."""
    doubled = convention.add_bos and convention.method != "rolling" and ids[:1] == [convention.prefix_token_id]
    return ids[1:] if doubled else ids


def windows(num_tokens: int, convention: Convention) -> Iterator[Window]:
    """The windows of a text of `num_tokens` tokens in order, none where there is nothing to score.

    Raises:
        ValueError: the text has too many tokens for `full` or too few for `chunks`; the message names no field.
    """
    length, prefix = convention.max_length, convention.prefix_token_id
    front = 0 if prefix is None else 1
    total = num_tokens + front
    with_bos = " with BOS" if front else ""
    if convention.method == "full" and total > length:
        raise ValueError(f"has {total} tokens{with_bos}; method 'full' takes at most {length}; use method 'sliding'")
    if convention.method == "chunks" and total < 2 * length:
        raise ValueError(f"has {total} tokens{with_bos}; method 'chunks' needs at least {2 * length}, twice max_length")
    if convention.method == "chunks":
        return _chunks(total // length, length, prefix)
    if convention.method == "rolling":
        return _rolling(num_tokens, length, prefix)
    return _sliding(num_tokens, length, convention.stride or length, prefix)


def _sliding(num_tokens: int, length: int, stride: int, prefix: int | None) -> Iterator[Window]:
    """Over BOS and text as one sequence; `full` is its first window."""
    front = 0 if prefix is None else 1
    start, scored = 0, 1 - front
    while scored < num_tokens:
        end = min(start + length - front, num_tokens)
        yield Window(max(0, start - front), end, scored, prefix if start == 0 else None)
        start, scored = start + stride, end


def _rolling(num_tokens: int, length: int, prefix: int | None) -> Iterator[Window]:
    end = min(length - 1, num_tokens)
    if num_tokens:
        yield Window(0, end, 0, prefix)
    while end < num_tokens:
        scored, end = end, min(end + length - 1, num_tokens)
        yield Window(end - length, end, scored)


def _chunks(count: int, length: int, prefix: int | None) -> Iterator[Window]:
    first = length // 2 + 1
    for start in range(0, count * length, length):
        if prefix is None:
            yield Window(start, start + length, start + first)
        else:  # counted in BOS and text, whose token `start` it replaces
            yield Window(start, start + length - 1, start + first - 1, prefix)


SPACE_BEGINS = re.compile(r"(?<!\s)\s")


def count_words(text: str) -> int:
    r"""Words as lm-evaluation-harness counts them, len(re.split(r"\s+", text)), without holding them all."""
    step = 1 << 16  # characters; other threads run after each
    return 1 + sum(len(SPACE_BEGINS.findall(text, start, start + step)) for start in range(0, len(text), step))


class Tally:
    """Adds up token NLLs, of a text or of a corpus of texts, without rounding: the order does not matter.

    `num_words` and `num_bytes` (UTF-8) are those of whole texts, tokens that are not scored included.
    """

    def __init__(self) -> None:
        self.num_texts = 0  # of a corpus
        self.num_tokens = 0  # scored
        self.num_words = 0
        self.num_bytes = 0
        self._nll = 0
        self._squares = 0
        self._perplexities = 0
        self._num_perplexities = 0

    def add_logprobs(self, logprobs: Sequence[float]) -> None:
        """Scored tokens of this text; ValueError if one is not finite."""
        if not all(map(math.isfinite, logprobs)):
            raise ValueError("the model gave a log-probability that is not a finite number")
        self._nll -= sum(map(_scaled, logprobs))
        self._squares += sum(_scaled(logprob * logprob) for logprob in logprobs)
        self.num_tokens += len(logprobs)

    def count_text(self, text: str) -> None:
        """Words and bytes of this text."""
        self.num_words += count_words(text)
        self.num_bytes += len(text.encode())

    def add_text(self, text: Tally) -> None:
        """A whole text to this corpus."""
        self._nll += text._nll
        self._squares += text._squares
        self.num_texts += 1
        self.num_tokens += text.num_tokens
        self.num_words += text.num_words
        self.num_bytes += text.num_bytes
        perplexity = text.perplexity
        if perplexity is not None:
            self._perplexities += _scaled(perplexity)
            self._num_perplexities += 1

    @property
    def nll_sum(self) -> float:
        """Nats; the exact sum, rounded once."""
        return self._nll / _SCALE

    @property
    def perplexity(self) -> float | None:
        """exp(nll_sum / num_tokens); None where nothing was scored or it is beyond floating point."""
        return _exp_of_quotient(self.nll_sum, self.num_tokens)

    @property
    def nll_stderr(self) -> float | None:
        """Standard error of the mean NLL, from the spread of the n token NLLs x about it.

        sqrt((mean(x^2) - mean(x)^2) / (n - 1)). Tokens are taken as independent, which they are not quite.
        None for fewer than two tokens.
        """
        n = self.num_tokens
        if n < 2:
            return None
        return math.sqrt(max(0.0, (self._squares / (n * _SCALE) - (self.nll_sum / n) ** 2) / (n - 1)))

    @property
    def perplexity_stderr(self) -> float | None:
        """Standard error of the perplexity: that of the mean NLL times the derivative of exp there, as
        llama-perplexity prints after "+/-"."""
        error, perplexity = self.nll_stderr, self.perplexity
        return None if error is None or perplexity is None else perplexity * error

    @property
    def mean_perplexity(self) -> float | None:
        """Mean of the texts' perplexities, each text weighing the same, as Hugging Face's evaluate; of those that
        have one."""
        if not self._num_perplexities:
            return self.perplexity
        return self._perplexities / (self._num_perplexities * _SCALE)

    def metrics(self, method: Method) -> dict[str, float | int | None]:
        """The fields of an answer. None is for no number.

        word_perplexity, byte_perplexity and bits_per_byte divide by the words and bytes of whole texts, as
        lm-evaluation-harness does; for `chunks`, which leaves half of a text unscored, they have no meaning.
        """
        words, text_bytes = (0, 0) if method == "chunks" else (self.num_words, self.num_bytes)
        scored = self.num_tokens > 0
        return {
            "nll_sum": self.nll_sum,
            "num_tokens": self.num_tokens,
            "num_words": self.num_words,
            "num_bytes": self.num_bytes,
            "perplexity": self.perplexity,
            "perplexity_stderr": self.perplexity_stderr,
            "word_perplexity": _exp_of_quotient(self.nll_sum, words if scored else 0),
            "byte_perplexity": _exp_of_quotient(self.nll_sum, text_bytes if scored else 0),
            "bits_per_byte": self.nll_sum / text_bytes / math.log(2) if text_bytes and scored else None,
            "mean_perplexity": self.mean_perplexity,
        }


_SCALE = 2**1074  # every float is a whole number of the smallest one's


def _scaled(value: float) -> int:
    numerator, denominator = value.as_integer_ratio()
    return numerator << (1075 - denominator.bit_length())


def _exp_of_quotient(nll_sum: float, count: int) -> float | None:
    if not count:
        return None
    try:
        return math.exp(nll_sum / count)
    except OverflowError:
        return None
