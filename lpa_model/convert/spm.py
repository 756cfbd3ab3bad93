"""SentencePiece's `tokenizer.model` as a `tokenizers.Tokenizer`, in the way of Hugging Face's LLaMA tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from lpa_model.checkpoint import CheckpointError

SPACE = "\u2581"
# sentencepiece_model.proto
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


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
    tokenizer = Tokenizer(_model(proto, path))
    steps = _normalizers(proto.normalizer_spec)
    tokenizer.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    for piece in proto.pieces:
        if piece.type in (UNKNOWN, CONTROL):
            tokenizer.add_special_tokens([AddedToken(piece.piece, special=True, normalized=False)])
        elif piece.type == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(piece.piece, special=False, normalized=False)])
    bos = proto.trainer_spec.bos_piece
    if add_bos and proto.trainer_spec.bos_id >= 0 and (bos_id := tokenizer.token_to_id(bos)) is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def _model(proto: Any, path: Path) -> models.Model:
    spec = proto.trainer_spec
    vocab = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown = next((i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN), None)
    if spec.model_type == UNIGRAM:
        return models.Unigram(vocab, unknown, spec.byte_fallback)
    if spec.model_type == BPE:
        ids = {piece: i for i, (piece, _) in enumerate(vocab)}
        return models.BPE(
            ids,
            _merges(proto, ids),
            unk_token=None if unknown is None else vocab[unknown][0],
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
        )
    raise CheckpointError(f"{path}: a SentencePiece model of words or characters; only BPE and unigram are supported")


def _merges(proto: Any, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of pieces that make a piece, best first: SentencePiece merges what gives the piece of the highest score."""
    normal = [piece for piece in proto.pieces if piece.type == NORMAL]
    found = []
    for piece in sorted(normal, key=lambda piece: -piece.score):
        text = piece.piece
        pairs = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in ids and text[i:] in ids]
        found += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return found


def _normalizers(spec: Any) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]
