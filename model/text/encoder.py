"""Captions to embeddings: CLIP text encoders, a pretrained one by folder or hub id, and a tiny built-in one.

The embedding of a caption is the last hidden state of CLIP's text model: a row per token, the first for the start mark
and the last valid one for the end mark, which stands for the whole caption (pooled = last valid row).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.text.words import merges, vocabulary
from model.weights import digest_tensors, find_weights, load_part

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
BUILTIN_SEED = "vlfm text encoder 15"
BATCH = 64
"""Captions encoded at once; bounds the memory."""


class TextEncoder:
    """A CLIP text model with its tokenizer, in float32 and in evaluation mode.

    Make one with `builtin_text_encoder`, `pretrained_text_encoder` or `text_encoder_from_spec`.

    id: names the weights and the vocabulary, without a machine path.
    dim: D, width of an embedding.  length: L, most tokens of a caption, start and end marks included.
    digest: sha256 (hex) of weights and vocabulary.
    """

    def __init__(
        self, model: nn.Module, tokenizer: CLIPTokenizer, name: str, spec: Mapping[str, object], device: str = "cpu"
    ) -> None:
        self._model: Any = model.to(device=torch.device(device), dtype=torch.float32).eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._device = torch.device(device)
        config: Any = model.config
        self.dim = int(config.hidden_size)
        self.length = min(int(config.max_position_embeddings), int(tokenizer.model_max_length))
        self.digest = _digest(model, tokenizer)
        revision = spec.get("revision")
        self.id = f"{name}@{str(revision)[:12] if revision else self.digest[:16]}"
        self._spec = {**spec, "digest": self.digest}

    @torch.no_grad()
    def encode(self, captions: Sequence[str], padded: bool = False) -> tuple[Tensor, Tensor]:
        """Embeddings (B, L, D) float32 and lengths (B,) int64 of B captions.

        Rows from a caption's length on are zero. With `padded` they hold what the model gives for its padding tokens:
        the form in which Stable Diffusion's UNet was trained. A caption of more than L tokens is cut (see `truncated`);
        the empty caption has length 2. Raises TypeError for a single string.
        """
        if isinstance(captions, str):
            raise TypeError(f"captions is one string: pass a list, encode([{captions[:40]!r}])")
        embeddings = torch.zeros(len(captions), self.length, self.dim)
        lengths = torch.zeros(len(captions), dtype=torch.int64)
        for first in range(0, len(captions), BATCH):
            batch = slice(first, first + BATCH)
            tokens = self._tokenizer(
                list(captions[batch]),
                padding="max_length",
                max_length=self.length,
                truncation=True,
                return_tensors="pt",
            )
            # The model is causal: valid rows do not depend on the padding, and there is no mask.
            rows = self._model(input_ids=tokens["input_ids"].to(self._device)).last_hidden_state.float().cpu()
            valid = tokens["attention_mask"].bool()
            embeddings[batch] = rows if padded else rows * valid.unsqueeze(-1)
            lengths[batch] = valid.sum(1)
        return embeddings, lengths

    def tokens(self, caption: str) -> list[str]:
        """The tokens of a caption, start and end marks included, before any cut; `</w>` marks the end of a word."""
        numbers = self._tokenizer(caption, padding=False, truncation=False, verbose=False)["input_ids"]
        return list(self._tokenizer.convert_ids_to_tokens(numbers))

    def truncated(self, caption: str) -> bool:
        """Whether the caption has more tokens than the model takes, so that `encode` cuts its end off."""
        return len(self.tokens(caption)) > self.length

    def spec(self) -> dict[str, object]:
        """JSON from which `text_encoder_from_spec` rebuilds the encoder and checks that it is the same."""
        return dict(self._spec)


def pretrained_text_encoder(
    source: str | Path, revision: str | None = None, device: str = "cpu", digest: str | None = None
) -> TextEncoder:
    """The CLIP text encoder of a folder or of a hub id in the local cache; safetensors only, the network is not asked.

    source: holds `text_encoder/` and `tokenizer/` (Stable Diffusion's layout), or the model and its tokenizer together.
    revision: of a hub id, see `find_weights`.  digest: the one the weights must have, if given.
    Raises CodecUnavailable where weights are missing, ValueError where they have another digest.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    weights = find_weights(source, revision)
    layout = ("text_encoder", "tokenizer") if (weights.folder / "text_encoder").is_dir() else ("", "")
    model = load_part(CLIPTextModel.from_pretrained, weights, layout[0])
    tokenizer = load_part(CLIPTokenizer.from_pretrained, weights, layout[1], files=("vocab.json", "tokenizer.json"))
    spec = {"kind": "pretrained", "source": weights.source, "revision": weights.revision}
    return _checked(TextEncoder(model, tokenizer, weights.name, spec, device), digest)


def bundled_tokenizer(length: int = 77, more: str = "") -> CLIPTokenizer:
    """The CLIPTokenizer over the words of `model.text.words` and `more`; captions have at most `length` tokens."""
    from transformers import CLIPTokenizer

    pairs: Any = list(merges(more))  # annotated as strings, taken as pairs
    return CLIPTokenizer(vocab=vocabulary(more), merges=pairs, model_max_length=length)


def new_clip_text_model(
    numbers: Mapping[str, int],
    width: int,
    layers: int,
    heads: int,
    length: int,
    expansion: int = 2,
    activation: str = "quick_gelu",
) -> nn.Module:
    """An untrained CLIPTextModel.

    numbers: the vocabulary, which holds START and END.  width: of an embedding.  length: most tokens of a caption.
    expansion: width of the MLPs' hidden layers over that of an embedding.  activation: theirs, as CLIP names it.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(numbers), hidden_size=width, intermediate_size=expansion * width, num_hidden_layers=layers,
            num_attention_heads=heads, hidden_act=activation, max_position_embeddings=length,
            bos_token_id=numbers[START], eos_token_id=numbers[END], pad_token_id=numbers[END],
        )
    )  # fmt: skip


def builtin_text_encoder(device: str = "cpu", digest: str | None = None) -> TextEncoder:
    """A CLIP text encoder that needs no download: 64 wide, 4 layers, fixed pseudo-random weights, a bundled vocabulary.

    It tells captions apart, also by the order of their words, and the same caption always gives the same embedding; but
    it was never trained and **knows no meaning**: synonyms are as far apart as opposites, and a caption that was not
    trained on is guesswork. For prompts that should mean something use `pretrained_text_encoder`.

    The weights come from SHAKE-256, not from a library's random generator, so they are the same bits on every machine
    and with every version. digest: the one they must have, if given; raises ValueError where it differs.
    """
    numbers, tokenizer = vocabulary(), bundled_tokenizer()
    # Building the model draws from the global generator; the caller's random numbers must not depend on it.
    with torch.random.fork_rng(devices=[]):
        model = new_clip_text_model(numbers, 64, layers=4, heads=4, length=77, expansion=4, activation="tanh")
    _set_fixed_weights(model, [numbers[START], numbers[END]])
    return _checked(TextEncoder(model, tokenizer, "builtin", {"kind": "builtin"}, device), digest)


def text_encoder_from_spec(spec: Mapping[str, object], device: str = "cpu") -> TextEncoder:
    """The encoder a spec describes: `{"kind": "builtin"}` or `{"kind": "pretrained", "source": FOLDER_OR_ID}`.

    `revision` and `digest` are optional; a digest is checked. Raises ValueError for a spec that names no encoder or
    other weights than are found, CodecUnavailable where weights are missing.
    """
    kind, digest = spec.get("kind"), spec.get("digest")
    allowed = {"builtin": {"kind", "digest"}, "pretrained": {"kind", "source", "revision", "digest"}}.get(str(kind))
    if allowed is None:
        raise ValueError(f"text spec has kind {kind!r}: use 'builtin' or 'pretrained'")
    if unknown := sorted(set(spec) - allowed):
        raise ValueError(f"unknown text setting {', '.join(unknown)}: kind {kind!r} reads {', '.join(sorted(allowed))}")
    checked = None if digest is None else str(digest)
    if kind == "builtin":
        return builtin_text_encoder(device, checked)
    if "source" not in spec:
        raise ValueError("text spec of kind 'pretrained' names no source: give it a folder or a hub id")
    revision = spec.get("revision")
    return pretrained_text_encoder(str(spec["source"]), None if revision is None else str(revision), device, checked)


def _checked(encoder: TextEncoder, digest: str | None) -> TextEncoder:
    if digest is not None and digest != encoder.digest:
        raise ValueError(
            f"text encoder {encoder.id} has digest {encoder.digest[:16]}, the embeddings were made with {digest[:16]}: "
            "use the weights (or the version of vlfm) they were made with, or ingest again"
        )
    return encoder


def _digest(model: nn.Module, tokenizer: CLIPTokenizer) -> str:
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    # Merges are written as "a b" or ["a", "b"], depending on the library's version.
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in backend["merges"]]
    words = json.dumps([sorted(backend["vocab"].items()), pairs])
    return hashlib.sha256((digest_tensors(dict(model.named_parameters())) + words).encode()).hexdigest()


LAYER_GAINS = ((0.8, 0.9, 18.0, 2.4), (1.8, 2.6, 24.0, 13.0), (0.4, 1.5, 17.0, 20.0), (0.36, 2.1, 41.0, 20.0))
"""Per layer the gain of queries and keys, of values and outputs, and of the MLP's two matrices (1 keeps the variance).

A random CLIP averages its words away: one changed word of eleven leaves a cosine of 0.98 between two captions. These
gains and the seed come from a search over 866 captions with one word changed (largest cosine 0.88, mean 0.49) and 180
with two phrases swapped (0.65, 0.20): steep tanh units turn small differences into large ones.
"""
POSITION_WAVES = 8
LOOK_BACK = (1, 2, 3)
"""Words that the first layer's heads look back; the order of words would else hardly reach the end mark."""


def _set_fixed_weights(model: nn.Module, marks: list[int]) -> None:
    """Gives every parameter its built-in value. marks: the start and end marks' token numbers."""
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.data.copy_(_fixed_weights(name, parameter.shape))
    tokens = parameters["embeddings.token_embedding.weight"].data
    positions = parameters["embeddings.position_embedding.weight"].data
    # The marks are in every caption: what they say of themselves only hides the words.
    tokens[marks] *= 0.3
    # Words and places do not share dimensions. A place is a wave of each frequency, so a look back is a rotation.
    tokens[:, : 2 * POSITION_WAVES] = 0
    positions.zero_()
    for wave in range(POSITION_WAVES):
        frequency = math.pi * ((wave + 1) * 0.6180339887 % 1)  # spread evenly, without common periods
        for place in range(len(positions)):
            positions[place, 2 * wave : 2 * wave + 2] = 0.3 * _rotation(frequency * place)[0]
        for head, back in enumerate(LOOK_BACK):
            at, wave_at = 2 * (POSITION_WAVES * head + wave), 2 * wave
            for part, turn in (("q_proj", frequency * back), ("k_proj", 0.0)):
                weight = parameters[f"encoder.layers.0.self_attn.{part}.weight"].data
                weight[at : at + 2] = 0
                weight[at : at + 2, wave_at : wave_at + 2] = 3.0 * _rotation(turn)


def _rotation(angle: float) -> Tensor:
    """(2, 2); rounded, so that the last bits of a machine's sine do not enter the digest."""
    rows = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
    return torch.tensor([[round(value * 4096) / 4096 for value in row] for row in rows])


def _fixed_weights(name: str, shape: torch.Size) -> Tensor:
    """Pseudo-random weights of a parameter, uniform around 0; biases are 0 and norms 1."""
    if name.endswith("bias") or "norm" in name:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
    if "embedding" in name:
        spread = 1.0
    else:
        layer, part = int(name.split(".")[2]), name.split(".")[-2]
        kind = ("q_proj k_proj", "v_proj out_proj", "fc1", "fc2")
        gain = LAYER_GAINS[layer][next(index for index, parts in enumerate(kind) if part in parts)]
        spread = gain / math.sqrt(shape[-1])
    stream = hashlib.shake_256(f"{BUILTIN_SEED} {name}".encode()).digest(2 * shape.numel())
    # Odd integers in (-2^16, 2^16): exact in float32, symmetric, never zero. A uniform number's deviation is 1/sqrt(3).
    integers = 2 * torch.frombuffer(bytearray(stream), dtype=torch.int16).float() + 1
    return (integers * (spread * math.sqrt(3) / 2**16)).reshape(shape)
