"""One door to every architecture."""

from __future__ import annotations

from clearhead.models.config import ModelConfig
from clearhead.models.decoder import Decoder
from clearhead.models.encoder import Encoder
from clearhead.models.feedback import FeedbackDecoder
from clearhead.models.seq2seq import Seq2Seq

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
