"""clip.py: the same function and names as transformers' CLIP; the contrastive loss."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from clip import CLIP, CLIPConfig, contrast, normalise
from common.config import UserError
from common.device import Machine
from common.images import to_pixels
from data import Batch
from evals.validation import retrieval
from evals.zero_shot import caption_choice, contrastive_loss, features_of
from vision import read_transformers_clip

MACHINE = Machine(torch.device("cpu"), torch.float32)
TINY = CLIPConfig(image_size=8, patch_size=4, vision_width=16, vision_layers=2, vision_heads=2,
                  text_width=16, text_layers=2, text_heads=2, context=8, vocab_size=50, end_id=49,
                  embed_dim=16)


def new_clip(config, seed=0):
    """A CLIP with all weights random, and the same model in `transformers`."""
    torch.manual_seed(seed)
    ours, c = CLIP(config).eval(), config
    with torch.no_grad():
        for name, p in ours.named_parameters():
            p.normal_(mean=float("norm" in name and "weight" in name), std=0.05)
        ours.logit_scale.fill_(2.0)
    shared = {"hidden_act": c.activation, "projection_dim": c.embed_dim}
    theirs = transformers.CLIPModel(transformers.CLIPConfig(
        projection_dim=c.embed_dim,
        vision_config=dict(hidden_size=c.vision_width, intermediate_size=4 * c.vision_width,
                           num_hidden_layers=c.vision_layers, num_attention_heads=c.vision_heads,
                           image_size=c.image_size, patch_size=c.patch_size, **shared),
        text_config=dict(hidden_size=c.text_width, intermediate_size=4 * c.text_width,
                         num_hidden_layers=c.text_layers, num_attention_heads=c.text_heads,
                         max_position_embeddings=c.context, vocab_size=c.vocab_size,
                         bos_token_id=c.end_id - 1, eos_token_id=c.end_id, **shared))).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def random_images(n, size, seed=0):
    """uint8 pixels (n, S, S, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, size, size, 3), generator=generator, dtype=torch.uint8)


def draw_weight(name, p):
    """Random weights with unit-variance products, so that attention is far from uniform (which it
    is with the initial values of transformers)."""
    if p.ndim < 2:
        p.uniform_(-0.2, 0.2).add_(float("norm" in name and "weight" in name))
        return
    inputs = 1 if name.endswith(("token_embedding.weight", "position_embedding.weight")) else (
        p[0].numel())
    width = (3 / inputs) ** 0.5  # of variance 1 / inputs
    p.uniform_(-width, width)


L_14 = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, patch_size=14)
L_TEXT = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
GELU = {"hidden_act": "gelu"}  # OpenAI's have quick_gelu


@pytest.mark.parametrize(("vision", "text", "E", "layers"), [
    ({}, {}, 512, 2), ({"patch_size": 16, **GELU}, GELU, 512, 2), (L_14, L_TEXT, 768, 2),
    pytest.param(L_14, L_TEXT, 768, 24, marks=pytest.mark.slow),
], ids=["B32", "B16 with gelu", "L14", "L14 with all layers"])
@torch.no_grad()
def test_clips_of_transformers_open_and_compute_the_same(vision, text, E, layers, tmp_path):
    """B/32 is the default, most of which is omitted in config.json."""
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(
        vision_config={**vision, "num_hidden_layers": layers, "projection_dim": E},
        text_config={**text, "num_hidden_layers": min(layers, 12), "projection_dim": E},
        projection_dim=E)).eval()
    for name, p in theirs.named_parameters():
        draw_weight(name, p)
    theirs.save_pretrained(tmp_path)
    info, weights = read_transformers_clip(tmp_path)
    ours = CLIP(CLIPConfig(**info["clip"])).eval()
    ours.load_state_dict(weights, strict=True)
    pixels = normalise(random_images(1, 224))
    ids = torch.tensor([[49406, 320, 1125, 539, 49407, 49407, 49407],  # padded, as OpenAI does
                        [49406, 518, 49407, 9, 99, 999, 1]])  # what follows the end is ignored
    found = theirs(input_ids=ids, pixel_values=pixels)
    hidden = theirs.vision_model(pixels, output_hidden_states=True).hidden_states
    assert F.cosine_similarity(*found.text_embeds, dim=0) < 0.9 and len(hidden) == layers + 1
    for encode, inputs, expected, scale in (  # 1e-4 is small against the values' scale
            (ours.image_features, pixels, found.image_embeds, 0.02),
            (ours.text_features, ids, found.text_embeds, 0.02),
            (ours.text_features, ids[1:, :3], found.text_embeds[1:], 0.02),
            (ours.vision_model.patches, pixels, hidden[-2][:, 1:], 0.5)):  # of the second-last
        assert expected.std() > scale
        torch.testing.assert_close(encode(inputs), expected, atol=1e-4, rtol=0)
        with Machine(torch.device("cpu"), torch.bfloat16).autocast():
            assert F.cosine_similarity(encode(inputs).float(), expected, dim=-1).min() >= 0.999


def test_the_default_is_vit_l_14_with_the_size_of_openais():
    # If transformers loaded a model first, PyTorch noted its stand-in for torch.linspace.
    torch.utils._device._device_constructors.cache_clear()
    with torch.device("meta"):
        assert sum(p.numel() for p in CLIP(CLIPConfig()).parameters()) == 427_616_513


@pytest.mark.parametrize("files", [("pytorch_model.bin",), (
    "model.safetensors.index.json", "model-00001-of-00002.safetensors")])
def test_other_weight_files_are_refused(files, tmp_path):
    transformers.CLIPConfig().save_pretrained(tmp_path)
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        read_transformers_clip(tmp_path)


SIZES = [(640, 480), (333, 500), (225, 224), (224, 225), (224, 224), (1000, 100), (100, 60)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("how", ["crop", "pad"])
def test_images_are_preprocessed_as_in_clip_and_llava(how, size):
    """Center-cropped as in CLIP or padded as in LLaVA, exactly."""
    processor = CLIPImageProcessorPil() if how == "crop" else LlavaImageProcessorPil(do_pad=True)
    width, height = size
    shades = random_images(1, 40)[0].numpy()
    picture = Image.fromarray(shades).resize((width, height), Image.Resampling.BICUBIC)
    expected = processor(picture, return_tensors="pt").pixel_values
    found = normalise(to_pixels([picture], 224, how))
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("keys", "logit_scale"), [
    ([7, 8, 9], 2.0), ([5, 9, 5], 2.0), ([4, 4, 4], 2.0), ([5, 9, 5], 4.6),
])
@torch.no_grad()
def test_contrastive_loss_by_hand(keys, logit_scale):
    """All images of one caption are its positives, in equal parts."""
    model, _ = new_clip(TINY)
    model.logit_scale.fill_(logit_scale)
    pixels = normalise(random_images(3, 8))
    captions = {key: [key, 3, 49] for key in keys}
    ids = torch.tensor([captions[key] for key in keys])
    images, texts = model.image_features(pixels), model.text_features(ids)
    scale = math.exp(logit_scale)

    def cost(one, others, positives):
        """Cross-entropy of `one` against `others`, its target shared among `positives`."""
        logits = [scale * sum(a * b for a, b in zip(one, other, strict=True)) for other in others]
        total = max(logits) + math.log(sum(math.exp(x - max(logits)) for x in logits))
        return sum(total - logits[p] for p in positives) / len(positives)

    images, texts = images.tolist(), texts.tolist()
    by_hand = 0
    for i, key in enumerate(keys):
        positives = [j for j in range(3) if keys[j] == key]
        by_hand += cost(images[i], texts, positives) + cost(texts[i], images, positives)
    loss = contrast(*model(pixels, ids), torch.tensor(keys))
    assert loss.item() == pytest.approx(by_hand / 6, abs=1e-3)


class Listed:
    """n images whose red channel encodes their caption; the first `repeats` come twice."""

    def __init__(self, n, repeats=0):
        numbers = torch.tensor([*range(repeats), *range(n - repeats)])
        self.pixels = random_images(n, 8)
        self.pixels[..., 0] = numbers[:, None, None].to(torch.uint8)
        self.ids = torch.stack((numbers % 48, numbers // 48, torch.full((n,), 49)), dim=1)
        self.keys = numbers

    def __len__(self):
        return len(self.keys)

    def batch(self, rows):
        rows = list(rows)
        return Batch(self.ids[rows], pixels=self.pixels[rows], keys=self.keys[rows])


class Knowing(torch.nn.Module):
    """A model that is always correct and confident about Listed images."""

    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor(4.0))

    def scale(self):
        return self.logit_scale.exp()

    def image_features(self, pixels):
        red = (pixels[:, 0, 0, 0] * 0.26862954 + 0.48145466) * 255
        return F.one_hot(red.round().long(), 256).float()

    def text_features(self, ids):
        return F.one_hot(ids[:, 0] + 48 * ids[:, 1], 256).float()


def test_an_untrained_model_chooses_by_chance_and_a_perfect_one_correctly():
    """10 of the perfect model's 80 images have the caption of another: the 32 captions to choose
    among are different ones, and in retrieval both images count."""
    untrained = features_of(new_clip(TINY)[0], Listed(256), MACHINE, 256)
    perfect = features_of(Knowing(), Listed(80, repeats=10), MACHINE, 80, batch=33)
    assert sum(caption_choice(*untrained)) / 256 == pytest.approx(
        1 / 32, abs=3 * (1 / 32 / 256) ** 0.5)  # deviations
    assert all(caption_choice(*perfect))
    assert [score.value for score in retrieval(*perfect).values()] == [1] * 6
    for name, score in retrieval(*untrained).items():
        expected = int(name.split("_r")[1]) / 256
        assert score.chance == pytest.approx(expected)
        deviation = (expected * (1 - expected) / 256) ** 0.5
        assert score.value == pytest.approx(expected, abs=3 * deviation)
    for n, keys, chances in ((12, [*range(6)] * 2, [1 / 6, 15 / 22, 65 / 66]),  # 2 are correct
                             (4, range(4), [1 / 4, 1, 1])):  # of the likeliest 1, 5 and 10
        found = retrieval(torch.eye(n), torch.eye(n), keys)
        assert [score.chance for score in found.values()] == pytest.approx(chances * 2)


def test_the_validation_loss_is_the_loss_of_batches_as_large_as_in_training():
    model = new_clip(TINY)[0]
    images, texts, keys = features_of(model, Listed(80), MACHINE, 80)
    losses = [contrast(images[part], texts[part], model.scale(), torch.tensor(keys)[part]).item()
              for part in (slice(0, 32), slice(32, 64), slice(0, 80))]
    assert contrastive_loss(model, images, texts, keys, 32) == pytest.approx(sum(losses[:2]) / 2)
    assert contrastive_loss(model, images, texts, keys, 100) == pytest.approx(losses[2])


def test_the_scale_is_limited_after_the_step_and_comes_back():
    """Two images whose captions are swapped: the best scale is the least."""
    model, _ = new_clip(TINY)
    model.logit_scale.data.fill_(7.0)
    model.limit_scale()
    assert model.scale().item() == pytest.approx(100)
    optimizer = torch.optim.SGD([model.logit_scale], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = contrast(torch.eye(2), torch.eye(2).flip(0), model.scale(), torch.arange(2))
        loss.backward()
        optimizer.step()
        model.limit_scale()
    assert model.scale().item() == 1 and loss.item() == pytest.approx(math.log1p(math.e))
