"""The text encoder as transformers saves it: a small one, made here. Needs the extra "text"."""

import pytest
import torch

from kvruntime.models.prompts import text_encoder

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "cat", "on", "the", "moon"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("t5")
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    sizes = transformers.T5Config(
        vocab_size=9, d_model=32, d_kv=8, d_ff=16, num_layers=2, num_heads=2
    )
    transformers.T5EncoderModel(sizes).save_pretrained(path)
    return path


def test_prompts_of_any_length_are_as_alone(folder):
    encode = text_encoder(folder, torch.device("cpu"))
    prompts = ["a red cat", "the moon", "a cat on the red moon"]
    together = encode(prompts)
    assert [part.shape for part in together] == [(4, 32), (3, 32), (7, 32)]
    for prompt, part in zip(prompts, together, strict=True):
        assert torch.allclose(part, encode([prompt])[0], atol=1e-6)
    assert encode(["cat " * 600])[0].shape == (512, 32), "as the authors cut it"
    assert text_encoder(folder, torch.device("cpu")) is encode, "loaded once"
