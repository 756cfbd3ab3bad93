"""SentencePiece's `tokenizer.model` as a `tokenizers.Tokenizer`, in the way of Hugging Face's LLaMA tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from lpa_model.folder import CheckpointError

SPACE = "\u2581"
# sentencepiece_model.proto
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def read_sentencepiece(path: Path, *, add_bos: bool = True) -> Tokenizer:
    """The tokenizer of a SentencePiece file; `add_bos` puts its BOS before texts, as LLaMA's does.

    Raises:
        CheckpointError: the extra is not installed, or the file is broken or of a kind that has no equivalent.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise CheckpointError(
            f"{path}: SentencePiece's; `pip install 'lpa-server[sentencepiece]'` converts it, or give a tokenizer.json "
            f"of the same vocabulary with --tokenizer ({error})"
        ) from error
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError
        raise CheckpointError(f"{path}: not a SentencePiece model: {error}") from error
    if not proto.pieces:
        raise CheckpointError(f"{path}: not a SentencePiece model: it has no pieces")
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise CheckpointError(f"{path}: puts spaces behind words (treat_whitespace_as_suffix), which is not supported")
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise CheckpointError(
            f"{path}: a SentencePiece model of words or characters; only BPE and unigram are supported"
        )
    spec = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer = sentencepiece_tokenizer(
        [(piece.piece, piece.score, piece.type) for piece in proto.pieces],
        unigram=proto.trainer_spec.model_type == UNIGRAM,
        byte_fallback=proto.trainer_spec.byte_fallback,
        add_dummy_prefix=spec.add_dummy_prefix,
        first_steps=steps,
    )
    bos = proto.trainer_spec.bos_piece
    if add_bos and proto.trainer_spec.bos_id >= 0 and (bos_id := tokenizer.token_to_id(bos)) is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def sentencepiece_tokenizer(
    pieces: Sequence[tuple[str, float, int]],
    *,
    unigram: bool = False,
    byte_fallback: bool,
    add_dummy_prefix: bool,
    first_steps: Sequence[normalizers.Normalizer] = (),
) -> Tokenizer:
    """The tokenizer of (text, score, type) pieces, a BPE's or a unigram model's.

    `first_steps` normalise before spaces become SPACE; `add_dummy_prefix` puts one before a text.
    """
    unknown = next((i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), None)
    if unigram:
        model: models.Model = models.Unigram([(text, score) for text, score, _ in pieces], unknown, byte_fallback)
    else:
        ids = {text: i for i, (text, _, _) in enumerate(pieces)}
        model = models.BPE(
            ids,
            _merges(pieces, ids),
            unk_token=None if unknown is None else pieces[unknown][0],
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    tokenizer = Tokenizer(model)
    prefix = [normalizers.Prepend(SPACE)] if add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*first_steps, *prefix, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for text, _, kind in pieces:
        if kind in (UNKNOWN, CONTROL):
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, special=False, normalized=False)])
    return tokenizer


def _merges(pieces: Sequence[tuple[str, float, int]], ids: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, best first: SentencePiece merges what gives the piece of the highest score."""
    found = []
    for text, _, _ in sorted((piece for piece in pieces if piece[2] == NORMAL), key=lambda piece: -piece[1]):
        pairs = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in ids and text[i:] in ids]
        found += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return found
