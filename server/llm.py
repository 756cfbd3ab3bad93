"""The Python API: a model folder in this process, with the server's own engine, scheduler and scoring.

    from server.llm import LLM, SamplingParams

    with LLM("runs/model", dtype="float32") as llm:
        (story,) = llm.generate("Once upon a time", SamplingParams(max_tokens=64, temperature=0))
        scores = llm.score(["The sun is bright."], method="full")
        likely, unlikely = llm.loglikelihood([("The sun was", " bright."), ("The sun was", " a table.")])
        (words,) = [text.units for text in llm.score("The sun is bright.", method="rolling", unit="word").texts]
        calm, quiet = llm.embed(["The sea was calm.", "The ocean was quiet."])
        (states,) = llm.hidden_states("The sea was calm.", layers=[0, -1])

Where the engine is batch-invariant (its start line says so), texts, log-probabilities, sums and hidden states are those
of the command line and of the server, to the bit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypedDict, TypeVar, Unpack, cast

from pydantic import ValidationError

from lpa_model.perplexity import Convention, Method, Tally
from server.engine.engine import Engine, EngineOptions, StepFailed, build_engine
from server.engine.hidden_states import Floats, HiddenSpec
from server.engine.request import (
    NO_MORE,
    Completion,
    FinishReason,
    GrammarSpec,
    Logprobs,
    Measures,
    Request,
    RequestOutput,
    SamplingParams,
    hidden_request,
    scoring_request,
)
from server.engine.tokenizer import Tokenizer
from server.errors import EngineError, InvalidRequest
from server.protocol.embeddings import Pooling, embedding_of, embedding_spec
from server.protocol.hidden_states import Positions, layers_of, positions_of
from server.protocol.inputs import check_input, entry_loc
from server.protocol.loglikelihood import alternative_of, continuation_fields
from server.protocol.perplexity import PerplexityParameters, UnitName, check_without_unit
from server.protocol.sampling import MAX_LOGPROBS, SamplingBody
from server.scoring.loglikelihood import Pair, PairTokenizer, Unscorable, packs
from server.scoring.perplexity import Corpus, Piece, Text, convention_of, pieces, runs
from server.scoring.units import TextUnits, Units, tokenize_units
from server.settings import load_settings

__all__ = [
    "LLM",
    "Completion",
    "GrammarSpec",
    "Likelihood",
    "Logprobs",
    "SamplingParams",
    "Scores",
    "States",
    "TextScores",
    "Unit",
]

Prompt = str | list[int]
"""A text or its token ids."""

T = TypeVar("T")


class Options(TypedDict, total=False):
    """Settings of `lpa serve` that the engine is built from. None or not given: the LPA_ variable or the default."""

    dtype: Literal["auto", "float32", "bfloat16"] | None
    weights: Literal["auto", "float32", "bfloat16", "int8", "int4"] | None
    device: str | None
    threads: int | None
    max_model_len: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    step_budget_ms: float | None
    block_size: int | None
    kv_cache_layout: Literal["auto", "latent", "mixed", "full"] | None
    kv_cache_dtype: Literal["auto", "int8"] | None
    kv_cache_memory: int | None
    enable_prefix_caching: bool | None
    batch_invariant: bool | None
    chat_template: str | None
    generation_config: Literal["auto", "none"] | None


@dataclass(frozen=True)
class Unit:
    """A word or a region of a text."""

    text: str
    offset: int  # where it begins in the text, in characters
    num_tokens: int
    surprisal: float | None  # bits; None where one of its tokens is not scored


@dataclass(frozen=True)
class TextScores:
    """A scored text. Entry i of the lists but `units` belongs to token i; None where a token is not scored."""

    token_ids: list[int]
    logprobs: list[float | None]  # natural logarithms
    ranks: list[int | None]  # 1 for the most probable token
    sums: Tally
    units: list[Unit]  # empty without a unit


@dataclass(frozen=True)
class Scores:
    """Scored texts, their exact sums, and the convention that says what was scored."""

    convention: Convention
    texts: list[TextScores]
    sums: Tally  # of all texts
    digest: str  # of model, backend, convention and log-probabilities, by which others can check them


@dataclass(frozen=True)
class Likelihood:
    """A continuation after its context."""

    logprob: float  # sum over its tokens, natural logarithm
    is_greedy: bool  # whether every token was the most probable one in its place
    num_tokens: int
    num_bytes: int  # of the continuation as it was given, in UTF-8


@dataclass(frozen=True, eq=False)
class States:
    """Hidden states of a text."""

    token_ids: list[int]  # all of the text's
    layers: tuple[int, ...]  # counted from 0, the embeddings
    positions: Positions  # of the tokens
    values: Floats  # float32 [positions, layers, hidden_size]


class LLM:
    """A model that generates and scores in this process, for one caller at a time.

    As a context manager it closes at the end.
    """

    def __init__(self, folder: str | Path | None = None, **options: Unpack[Options]) -> None:
        """
        Args:
            folder: model folder (default: LPA_MODEL, or the embedded model).
            options: `Options`; `server.settings.Settings` describes each.

        Raises:
            TypeError: an option is not the engine's.
            ValueError: an option is out of range, or does not fit the model or the machine; the message names it.
            lpa_model.folder.CheckpointError: the folder cannot be used; the message names the file or tensor.
        """
        if unknown := options.keys() - {field.name for field in dataclasses.fields(EngineOptions)}:
            raise TypeError(f"LLM: {min(unknown)!r} is not an option of the engine")
        settings = load_settings(model=folder, **options)
        self.name = settings.model_name
        self._engine: Engine | None = build_engine(settings.model, settings.engine_options())
        self.dtype = self._engine.backend.types
        # steps run in a thread of their own, as in the server: a thread that computes keeps a team of OpenMP threads
        self._thread = ThreadPoolExecutor(1, "engine")
        self._thread.submit(self._engine.warm_up).result()
        self._inboxes: dict[str, list[RequestOutput]] = {}  # by request id
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Free model and cache; what is generated or scored meanwhile ends. Closing again does nothing."""
        self._thread.shutdown()
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    @property
    def engine(self) -> Engine:
        """The engine; RuntimeError if the model is closed."""
        if self._engine is None:
            raise RuntimeError("the model is closed")
        return self._engine

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.engine.tokenizer

    @property
    def max_model_len(self) -> int:
        """Longest prompt and completion together, in tokens."""
        return self.engine.max_model_len

    @property
    def default_params(self) -> SamplingParams:
        """SamplingParams(), with what the folder's generation_config.json says if the option has it so."""
        return replace(SamplingParams(), **cast(dict[str, Any], self.engine.sampling_defaults))

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """What follows each prompt, as many at a time as the engine runs.

        Args:
            prompts: a text, its token ids, or a list of either; the tokenizer adds its special tokens to texts.
            params: for all prompts, or one for each (default: `default_params`).

        Raises:
            InvalidRequest: a prompt is empty or has a token id outside the vocabulary, or a parameter is out of range.
            ContextLength: a prompt and its max_tokens are longer than `max_model_len`.
            EngineError: a step of the engine failed.
        """
        values = _as_list(prompts)
        each = [params or self.default_params] * len(values) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(values):
            raise InvalidRequest(f"params: {len(each)} for {len(values)} prompts", param="params")
        requests = [
            self._request(value, one, entry_loc("prompts", i, len(values)))
            for i, (value, one) in enumerate(zip(values, each, strict=True))
        ]
        return [completion for _, completion in self._run((request, request) for request in requests)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """What follows one prompt, piece by piece as it comes; the last piece has a finish_reason.

        Nothing is computed before the first `next`; closing the iterator ends the generation.

        Raises:
            UserError: as `generate`, at once where the request is refused.
        """
        return self._stream(self._request(prompt, params or self.default_params, "prompt"))

    def _stream(self, request: Request) -> Iterator[RequestOutput]:
        inbox = self._submit(request)
        try:
            while True:
                for output in self._next_outputs(inbox):
                    yield output
                    if output.finish_reason is not None:
                        return
        finally:
            self._forget(request)

    def score(
        self,
        texts: Prompt | Sequence[Prompt],
        method: Method = "full",
        *,
        max_length: int | None = None,
        stride: int | None = None,
        add_bos: bool | None = None,
        unit: UnitName | None = None,
        boundary_correction: bool = True,
        region_separator: str = "|",
    ) -> Scores:
        """Log-probabilities of the tokens of each text, and what they come to; `lpa_model/perplexity.py` says how.

        Args:
            texts: a text, its token ids, or a list of either.
            method: "full", "sliding", "rolling" or "chunks".
            max_length: tokens of a window, context included (default: `max_model_len`).
            stride: tokens between the beginnings of sliding windows (default: half of max_length).
            add_bos: whether BOS stands before a text (default: the tokenizer's own setting).
            unit: the surprisal of each "word" or "region" of a text, too; `server/scoring/units.py` says how.
            boundary_correction: with unit: the probability of the space before a word belongs to the word before it.
            region_separator: what stands between regions; it is taken out before scoring.

        Raises:
            InvalidRequest: an argument is wrong or does not fit the model, or a text the method; or no token can be
                scored; or token ids are to be divided into regions.
            ContextLength: a text is too long for "full".
            EngineError: a step of the engine failed, or the model gave a number that is not finite.
        """
        values = _as_list(texts)
        convention = self.convention(method, max_length=max_length, stride=stride, add_bos=add_bos)
        units = None
        if unit is not None:
            units = Units(name=unit, correction=boundary_correction, separator=region_separator)
        else:
            given = {"boundary_correction": boundary_correction, "region_separator": region_separator}
            defaults = PerplexityParameters.model_fields
            check_without_unit([name for name, value in given.items() if value != defaults[name].default])
        tokenized = (
            tokenize_units(
                self.tokenizer, convention, where, check_input(value, where), units, with_offsets=units is not None
            )
            for where, value in ((entry_loc("texts", i, len(values)), value) for i, value in enumerate(values))
        )
        corpus, found = Corpus(convention, self.engine.identity), list[TextScores]()
        logprobs: list[float | None] = []
        ranks: list[int | None] = []
        of_units: list[dict[str, Any]] = []
        of_text = None if units is None else TextUnits(self.tokenizer, units)
        measures = NO_MORE if units is None else Measures(mass_of=self.tokenizer.word_beginnings)
        for piece, scores in self.score_pieces(tokenized, convention, measures):
            if of_text is not None:
                scores, of_units = of_text.add(piece, scores)
            for start, end, of_run in runs(piece, scores):
                logprobs += [None] * (end - start) if of_run is None else of_run.logprobs
                ranks += [None] * (end - start) if of_run is None else of_run.ranks
            if (sums := corpus.add(piece, scores.logprobs)) is not None:
                units_found = [Unit(**entry) for entry in of_units]
                found.append(TextScores(list(piece.text.token_ids), logprobs, ranks, sums, units_found))
                logprobs, ranks = [], []
        corpus.check("texts")
        return Scores(convention, found, corpus.tally, corpus.digest)

    def convention(
        self,
        method: Method,
        *,
        max_length: int | None = None,
        stride: int | None = None,
        add_bos: bool | None = None,
    ) -> Convention:
        """The arguments of `score` with the model's own for those that are None. Raises InvalidRequest."""
        return convention_of(self.tokenizer, self.max_model_len, method, max_length, stride, add_bos)

    def score_pieces(
        self, texts: Iterable[Text], convention: Convention, measures: Measures = NO_MORE
    ) -> Iterator[tuple[Piece, Logprobs]]:
        """Scores of a corpus of any size: its pieces in order, each as soon as it is there.

        `texts` is read as far ahead as the engine scores at once. Raises what `score` raises, and what `texts` does.
        """

        def work() -> Iterator[tuple[Piece, Request | None]]:
            for text in texts:
                for piece in pieces(text, convention, self.max_model_len):
                    if piece.window is None:
                        yield piece, None
                    else:
                        ids, first = piece.sequence(beyond=measures.mass_of is not None)
                        yield piece, scoring_request(self._id(), ids, first, measures)

        for piece, completion in self._run(work()):
            yield piece, completion.prompt_logprobs or Logprobs()

    def loglikelihood(self, pairs: Sequence[tuple[Prompt, Prompt]], *, add_bos: bool | None = None) -> list[Likelihood]:
        """How probable each continuation is after its context, for pairs (context, continuation).

        Continuations of one context are computed together, each as if it stood alone.

        Args:
            pairs: texts or token ids; a context may be empty, a continuation may not.
            add_bos: whether BOS stands before a context (default: the tokenizer's own setting).

        Raises:
            InvalidRequest: a pair cannot be scored; it is named.
            ContextLength: context and continuation are longer than `max_model_len`.
            EngineError: as `score`.
        """
        split = PairTokenizer(self.tokenizer, self.max_model_len, add_bos)
        tokenized: list[Pair] = []
        for pair in split([alternative_of(list(pair), f"pairs[{i}]") for i, pair in enumerate(pairs)]):
            if isinstance(pair, Unscorable):
                raise pair.error
            tokenized.append(pair)
        work = (
            (pack, scoring_request(self._id(), pack.token_ids, pack.branches[0], branches=pack.branches))
            for pack in packs(tokenized, split.max_tokens)
        )
        found: dict[int, Likelihood] = {}
        for pack, completion in self._run(work):
            for scored, scores in pack.scores(completion.prompt_logprobs or Logprobs()):
                entry = continuation_fields(scored.index, scored.where, scores, scored.num_bytes)
                found[scored.index] = Likelihood(
                    entry["logprob"], entry["is_greedy"], entry["num_tokens"], entry["num_bytes"]
                )
        return [found[i] for i in range(len(tokenized))]

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling = "mean",
        dimensions: int | None = None,
        normalize: bool = True,
        add_special_tokens: bool = True,
    ) -> list[Floats]:
        """A vector for each text, float32 [dimensions]: hidden states after the final norm. No embedder was trained.

        Args:
            texts: a text, its token ids, or a list of either.
            pooling: the mean over the tokens, or the last token's.
            dimensions: only the first ones (default: all).
            normalize: whether a vector has length 1.
            add_special_tokens: whether the tokenizer adds its own, such as BOS, to texts.

        Raises:
            InvalidRequest: a text is empty or has a token id outside the vocabulary, or dimensions are out of range.
            ContextLength: a text is longer than `max_model_len`.
            EngineError: as `score`.
        """
        config = self.engine.model_config
        width = config.hidden_size
        if dimensions is not None and not 1 <= dimensions <= width:
            raise InvalidRequest(f"dimensions: {dimensions} is not between 1 and {width}", param="dimensions")
        if pooling not in ("mean", "last"):
            raise InvalidRequest(f"pooling: {pooling!r} is neither 'mean' nor 'last'", param="pooling")

        hidden = self._hidden(
            [
                (ids, embedding_spec(pooling, len(ids), config.num_hidden_layers))
                for _, ids in self._ids(texts, add_special_tokens)
            ]
        )
        return [embedding_of(values[0, 0], dimensions, normalize=normalize) for values in hidden]

    def hidden_states(
        self,
        texts: Prompt | Sequence[Prompt],
        layers: Sequence[int] = (-1,),
        positions: Sequence[int] | None = None,
        *,
        add_special_tokens: bool = True,
    ) -> list[States]:
        """The residual stream of each text at chosen layers and positions.

        Args:
            texts: a text, its token ids, or a list of either.
            layers: as `output_hidden_states` of transformers: 0 for the embeddings, i for what layer i leaves, and the
                number of layers for what the output head reads; negative ones count from the end.
            positions: ascending, of every text; negative ones count from the end (default: all).
            add_special_tokens: whether the tokenizer adds its own, such as BOS, to texts.

        Raises:
            InvalidRequest: a text is empty or has a token id outside the vocabulary; there is no such layer or
                position, or it is given twice.
            ContextLength: a text is longer than `max_model_len`.
            EngineError: as `score`.
        """
        for name, given in (("layers", layers), ("positions", positions)):
            if given is not None and not len(given):
                raise InvalidRequest(f"{name}: is empty", param=name)
        numbers = layers_of(layers, self.engine.model_config.num_hidden_layers)
        wanted = [
            (ids, HiddenSpec(layers=numbers, positions=positions_of(positions, len(ids), where)))
            for where, ids in self._ids(texts, add_special_tokens)
        ]
        return [
            States(ids, numbers, spec.positions, values)
            for (ids, spec), values in zip(wanted, self._hidden(wanted), strict=True)
        ]

    def _ids(self, texts: Prompt | Sequence[Prompt], add_special_tokens: bool) -> list[tuple[str, list[int]]]:
        """(name, token ids) of each text, checked."""
        values, found = _as_list(texts), []
        for i, value in enumerate(values):
            where = entry_loc("texts", i, len(values))
            value = check_input(value, where)
            ids = (
                self.tokenizer.encode(value, add_special_tokens=add_special_tokens) if isinstance(value, str) else value
            )
            self.engine.validate(ids, 0, where)
            found.append((where, ids))
        return found

    def _hidden(self, wanted: Sequence[tuple[list[int], HiddenSpec]]) -> Iterator[Floats]:
        """Each sequence's hidden states [positions, layers, hidden_size]."""
        work = ((None, hidden_request(self._id(), ids, spec)) for ids, spec in wanted)
        for _, completion in self._run(work):
            assert completion.hidden is not None
            yield completion.hidden

    # --- requests --------------------------------------------------------------------------------------------------

    def _id(self) -> str:
        return str(next(self._numbers))

    def _request(self, value: Prompt, params: SamplingParams, where: str) -> Request:
        """What `generate` raises is raised here."""
        value = check_input(value, where)
        ids = self.tokenizer.encode(value) if isinstance(value, str) else value
        params = _checked(params, self.tokenizer)
        self.engine.validate(ids, params.max_tokens, where)
        if params.grammar is not None:
            self.engine.compile_grammar(params.grammar)
        return Request(self._id(), ids, params)

    def _run(self, work: Iterable[tuple[T, Request | None]]) -> Iterator[tuple[T, Completion]]:
        """Each item of `work` with its request's completion, in order; an empty completion for one without a request.

        `work` is read as far as the engine runs at once, and as much again.
        """
        most = 2 * self.engine.scheduler.max_num_seqs
        waiting: deque[tuple[T, Request | None]] = deque()
        completions: dict[str, Completion] = {}
        inbox: list[RequestOutput] = []
        remaining = iter(work)
        try:
            while True:
                for item, request in itertools.islice(remaining, most - len(waiting)):
                    waiting.append((item, request))
                    if request is not None:
                        completions[request.id] = Completion()
                        self._submit(request, inbox)
                if not waiting:
                    return
                item, request = waiting[0]
                completion = Completion() if request is None else completions[request.id]
                if request is None or completion.finish_reason is not None:
                    waiting.popleft()
                    if request is not None:
                        self._forget(request)
                        del completions[request.id]
                    yield item, completion
                    continue
                for output in self._next_outputs(inbox):
                    completions[output.request_id].add(output)
        finally:
            for _, request in waiting:
                if request is not None:
                    self._forget(request)

    def _submit(self, request: Request, inbox: list[RequestOutput] | None = None) -> list[RequestOutput]:
        """Queue a request; its outputs come into the inbox that is returned."""
        inbox = [] if inbox is None else inbox
        self._inboxes[request.id] = inbox
        self.engine.add_request(request)
        return inbox

    def _forget(self, request: Request) -> None:
        """Abort a request and drop its inbox."""
        self._inboxes.pop(request.id, None)
        if self._engine is not None:
            self._engine.abort(request.id)

    def _next_outputs(self, inbox: list[RequestOutput]) -> list[RequestOutput]:
        """The outputs in an inbox; runs steps until there are some.

        Raises:
            InvalidRequest: a request of this inbox cannot be followed, such as its grammar.
            EngineError: the step that held one failed.
        """
        while not inbox:
            try:
                outputs = self._thread.submit(self.engine.step).result()
            except StepFailed as failed:
                outputs = failed.outputs
            self.engine.take_stats()  # nothing else does, and they grow
            for output in outputs:
                if (owner := self._inboxes.get(output.request_id)) is not None:
                    owner.append(output)
        found = inbox.copy()
        inbox.clear()
        for output in found:
            if output.invalid_param is not None:
                raise InvalidRequest(str(output.error), param=output.invalid_param or None)
            if output.finish_reason is FinishReason.ERROR:
                raise EngineError(f"the engine failed on this request: {output.error}")
        return found


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _checked(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """The parameters as the API takes and rounds them. Raises InvalidRequest that names the field."""
    if params.max_tokens < 0:
        raise InvalidRequest(f"max_tokens: {params.max_tokens} is less than 0", param="max_tokens")
    if params.max_tokens == 0 and params.prompt_logprobs is None:
        raise InvalidRequest("max_tokens: 0 needs prompt_logprobs; there is nothing to answer", param="max_tokens")
    if params.logprobs is not None and not -1 <= params.logprobs <= MAX_LOGPROBS:
        raise InvalidRequest(f"logprobs: {params.logprobs} is not between -1 and {MAX_LOGPROBS}", param="logprobs")
    for word in params.bad_words:
        tokenizer.check(word, "bad_words")
    given: dict[str, Any] = {}
    for name in {field.name for field in dataclasses.fields(params)} & SamplingBody.model_fields.keys() - {"bad_words"}:
        value = getattr(params, name)
        given[name] = dict(value) if name == "logit_bias" else list(value) if isinstance(value, tuple) else value
    try:
        body = SamplingBody(model="", **given)
    except ValidationError as invalid:
        first = invalid.errors()[0]
        name = str((*first["loc"], *first.get("ctx", {}).get("loc", ()))[0])
        raise InvalidRequest(f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}", param=name) from None
    body.take_all(tokenizer.vocab_size)
    logprobs = tokenizer.vocab_size if params.logprobs == -1 else params.logprobs
    checked = body.sampling_params(tokenizer, params.max_tokens, logprobs, body.prompt_logprobs, {})
    return replace(params, **{name: getattr(checked, name) for name in (*given, "logprobs")})
