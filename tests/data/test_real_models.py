"""The real models, where somebody has fetched them: all tensors placed, and answers that only a trained model gives."""

import pytest
import torch

from clearhead.data.cache import cache_folder
from clearhead.data.models import MODELS, model_folder
from clearhead.errors import UserError

transformers = pytest.importorskip("transformers")
REAL = cache_folder()


@pytest.fixture(autouse=True)
def data_folder(monkeypatch):
    """The user's own cache, not the empty one of this room's other tests."""
    monkeypatch.setenv("CLEARHEAD_DATA", str(REAL))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return REAL


def opened(name):
    try:
        folder = model_folder(name)
    except UserError as error:
        pytest.skip(str(error))
    architecture = getattr(transformers, MODELS[name].architecture)
    model, told = architecture.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    assert sum(parameter.numel() for parameter in model.parameters()) == MODELS[name].parameters
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert abs(size / MODELS[name].folder_bytes - 1) < 0.02
    return model.eval(), folder


@torch.no_grad()
def test_minilm_tells_a_paraphrase_from_another_subject():
    model, folder = opened("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = ["A man is eating food.", "A man eats a piece of bread.", "The sky above the port was grey."]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    seen_bt1 = batch.attention_mask[..., None]
    vectors_bd = (model(**batch).last_hidden_state * seen_bt1).sum(1) / seen_bt1.sum(1)
    paraphrase, other = torch.cosine_similarity(vectors_bd[0], vectors_bd[1:], dim=-1)
    assert paraphrase > 0.5
    assert other < 0.2


@torch.no_grad()
def test_antiberty_fills_masked_residues_of_an_antibody():
    model, folder = opened("antiberty")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # The framework of a human heavy chain: not a measure (the model has seen millions like it), a check of loading.
    residues = "EVQLVESGGGLVQPGGSLRLSCAASGFTFSSYAMSWVRQAPGKGLEWVSAISGSGGSTYYADSVKGRFTISRDNSKNTLYLQMNSLRAEDTAVYYCAK"
    ids_t = tokenizer(" ".join(residues), return_tensors="pt").input_ids[0]
    place = torch.arange(1, len(residues) + 1, 4)
    masked_bt = ids_t.repeat(len(place), 1)
    masked_bt[torch.arange(len(place)), place] = tokenizer.mask_token_id
    guesses = model(masked_bt).logits[torch.arange(len(place)), place].argmax(-1)
    assert (guesses == ids_t[place]).double().mean() > 0.8


def test_whisper_loads_with_its_processor():
    model, folder = opened("whisper-tiny")
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer.convert_ids_to_tokens([50257, 50362]) == ["<|startoftranscript|>", "<|notimestamps|>"]
    assert processor.feature_extractor.feature_size == model.config.num_mel_bins == 80
    assert model.generation_config.is_multilingual is False


@pytest.mark.full
@torch.no_grad()
def test_smollm2_prefers_english_in_order():
    model, folder = opened("smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "The cat sat on the mat and looked out of the window, waiting for the rain to stop."
    ids = tokenizer(text, return_tensors="pt").input_ids
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    loss, worse = (float(model(x, labels=x).loss) for x in (ids, shuffled))
    assert loss < 4
    assert worse > loss + 2
