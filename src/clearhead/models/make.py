"""One door to every architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clearhead.models.config import ModelConfig
from clearhead.models.decoder import Decoder
from clearhead.models.encoder import Encoder
from clearhead.models.feedback import FeedbackDecoder
from clearhead.models.pretrained_config import PretrainedConfig
from clearhead.models.seq2seq import Seq2Seq

if TYPE_CHECKING:
    from clearhead.hf.model import Pretrained

AnyModel = Decoder | Encoder | FeedbackDecoder | Seq2Seq

ARCHITECTURES: dict[str, type[Decoder] | type[Encoder] | type[FeedbackDecoder] | type[Seq2Seq]] = {
    "decoder": Decoder,
    "encoder": Encoder,
    "feedback": FeedbackDecoder,
    "seq2seq": Seq2Seq,
}


def build_model(config: ModelConfig, seed: int = 0) -> AnyModel:
    """Return the model of a config with the first weights of `seed`, in training mode."""
    model = ARCHITECTURES[config.architecture](config)
    if seed != 0:  # the constructors have drawn seed 0
        model.init_parameters(seed)
    return model.train()


def begin_model(config: ModelConfig | PretrainedConfig, seed: int = 0) -> AnyModel | Pretrained:
    """Return what a run begins from: a model of our own with first weights, or a pretrained one with what learns.

    Pretrained models live in the room `hf`, which stands above this one and is only met here, when one is asked for.
    """
    if isinstance(config, PretrainedConfig):
        from clearhead.hf.model import Pretrained

        return Pretrained.begin(config, seed)
    return build_model(config, seed)
