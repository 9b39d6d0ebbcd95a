"""Export to `transformers`: the decoder is exactly a GPT-NeoX, the vision-language model a LLaVA.

`write_folder` makes a folder that AutoModelForCausalLM, or AutoModelForImageTextToText and
AutoProcessor, open without our code. In shapes, C is the width, H heads, D head size.
"""

from pathlib import Path

import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from common.checkpoint import write_json
from common.config import UserError, read_json
from common.images import MEAN, STD
from tokenizer import SPECIALS, gpt2_files

APART = "\ufdd0"  # a noncharacter


def chat_template(**words):
    """chat_template.jinja, its words in capitals replaced: tokenizer.render for Jinja. A message is
    a string, or a list of text and image parts."""
    text = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    for word, meaning in words.items():
        text = text.replace(word, meaning)
    return text


# A user cannot type a special token: a noncharacter splits its spelling, and the tokenizer drops it
# after its search for special tokens.
CHAT_TEMPLATE = chat_template(OPEN="<", TYPED="<|", SHOWN=f"<{APART}|", BETWEEN=APART)
# Prefixes of a LLaVA's weights, and those of llava-hf on the hub, which every version of
# `transformers` reads.
LLAVA_NAMES = {"model.language_model.": "language_model.model.",
               "lm_head.": "language_model.lm_head.",
               "model.vision_tower.": "vision_tower.vision_model.",
               "model.multi_modal_projector.": "multi_modal_projector."}


def neox_config(config):
    """The arguments of `transformers.GPTNeoXConfig` for a GPTConfig."""
    return dict(
        vocab_size=config.vocab_size, hidden_size=config.n_embd,
        intermediate_size=4 * config.n_embd, num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head, hidden_act="relu", use_parallel_residual=False,
        max_position_embeddings=config.max_positions, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta,
                         "partial_rotary_factor": 1.0})  # the default is a quarter of a head


def neox_weights(weights, config, body="gpt_neox."):
    """Weights of a GPT (its state dict) under the names of a `GPTNeoXForCausalLM`, where q, k and v
    are interleaved by head, and every product has a bias: ours are zero. body: the prefix of all
    names except the head's."""
    C = config.n_embd
    named = {f"{body}embed_in.weight": weights["token_embedding.weight"],
             "lm_head.weight": weights["head.weight"]}
    same = {"final_norm": "final_layer_norm"}
    for i in range(config.n_layer):
        own, theirs = f"blocks.{i}.", f"layers.{i}."
        same |= {f"{own}norm1": f"{theirs}input_layernorm",
                 f"{own}norm2": f"{theirs}post_attention_layernorm",
                 f"{own}attention.out": f"{theirs}attention.dense"}
        qkv = weights[f"{own}attention.qkv.weight"]
        qkv = qkv.view(3, config.n_head, -1, C).transpose(0, 1).reshape(3 * C, C)
        for name, weight in (("attention.query_key_value", qkv),
                             ("mlp.dense_h_to_4h", weights[f"{own}mlp.up.weight"]),
                             ("mlp.dense_4h_to_h", weights[f"{own}mlp.down.weight"])):
            named |= {f"{body}{theirs}{name}.weight": weight,
                      f"{body}{theirs}{name}.bias": weight.new_zeros(len(weight))}
    return named | {f"{body}{theirs}.{kind}": weights[f"{own}.{kind}"]
                    for own, theirs in same.items() for kind in ("weight", "bias")}


def their_model(model, tokenizer, dtype=torch.float32):
    """Our model as a GPTNeoXForCausalLM or LlavaForConditionalGeneration with the same weights."""
    import transformers

    text_config = transformers.GPTNeoXConfig(**neox_config(model.config))
    if not hasattr(model, "decoder"):
        theirs = transformers.GPTNeoXForCausalLM(text_config)
        theirs.load_state_dict(neox_weights(model.state_dict(), model.config), strict=True)
        return theirs.to(dtype).eval()
    clip = model.clip_config
    vision_config = transformers.CLIPVisionConfig(
        hidden_size=clip.vision_width, intermediate_size=4 * clip.vision_width,
        num_hidden_layers=clip.vision_layers, num_attention_heads=clip.vision_heads,
        image_size=clip.image_size, patch_size=clip.patch_size, hidden_act=clip.activation)
    theirs = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=vision_config, text_config=text_config, image_token_index=tokenizer.image,
        image_seq_length=clip.n_patches, projector_hidden_act="gelu", vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=False))
    weights = neox_weights(model.decoder.state_dict(), model.config, "model.language_model.")
    for part, prefix in ((model.vision_tower, "model.vision_tower."),
                         (model.projector, "model.multi_modal_projector.")):
        weights |= {prefix + name: weight for name, weight in part.state_dict().items()}
    theirs.load_state_dict(weights, strict=True)
    return theirs.to(dtype).eval()


def their_tokenizer(tokenizer, chats=True, longest=1024):
    """A fast tokenizer of `transformers` with our ids, and our template if the model chats."""
    import transformers

    if tokenizer.name == "gpt2":
        fast = FastTokenizer(models.BPE.from_file(*map(str, gpt2_files())))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
    else:
        fast = FastTokenizer.from_str(tokenizer.source)
    fast.normalizer = normalizers.Replace(APART, "")
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False)
                             for name in SPECIALS])
    for name, i in tokenizer.specials.items():
        if fast.token_to_id(name) != i:
            raise UserError(f"the vocabulary has another id for {name} than {i}")
    ending = "<|end|>" if chats else "<|endoftext|>"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<|endoftext|>", eos_token=ending,
        pad_token="<|endoftext|>", additional_special_tokens=list(SPECIALS[1:]),
        clean_up_tokenization_spaces=False, padding_side="left", model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE if chats else None)


def their_processor(tokenizer, clip):
    """A LlavaProcessor that resizes images as in training. common.images resizes very large padded
    ones in two steps; pixels may differ slightly there."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    size = clip.image_size
    settings = dict(size={"shortest_edge": size}, crop_size={"height": size, "width": size},
                    image_mean=list(MEAN), image_std=list(STD))
    images = (LlavaImageProcessorPil(do_pad=True, **settings) if clip.fit == "pad"
              else CLIPImageProcessorPil(**settings))
    return transformers.LlavaProcessor(
        images, tokenizer, patch_size=clip.patch_size, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<|image|>", chat_template=CHAT_TEMPLATE)


def write_folder(model, tokenizer, stage, to, dtype=torch.float32, max_shard_size="2GB"):
    """Write a decoder or vision-language model for `transformers` into the folder `to`."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    chats, vision = stage != "pretrain", hasattr(model, "decoder")
    theirs = their_model(model, tokenizer, dtype)
    for config in theirs.config, theirs.config.get_text_config(), theirs.generation_config:
        config.bos_token_id = config.pad_token_id = tokenizer.end_of_text
        config.eos_token_id = tokenizer.end if chats else tokenizer.end_of_text
    theirs.generation_config.max_new_tokens = 256
    theirs.generation_config.do_sample = False  # or pipelines sample, unlike ours
    weights = theirs.state_dict()
    if vision:
        weights = {ours + name.removeprefix(prefix): weight for name, weight in weights.items()
                   for prefix, ours in LLAVA_NAMES.items() if name.startswith(prefix)}
    theirs.save_pretrained(to, state_dict=weights, save_original_format=False,
                           max_shard_size=max_shard_size)
    fast = their_tokenizer(tokenizer, chats, model.config.max_positions)
    (their_processor(fast, model.clip_config) if vision else fast).save_pretrained(to)
    # The names that `transformers` 4 reads instead of those of 5, which accepts both. Without them
    # it would rotate a quarter of each head, with another base.
    config = read_json(Path(to, "config.json"))
    config.get("text_config", config).update(rotary_pct=1.0,
                                             rotary_emb_base=model.config.rope_theta)
    write_json(Path(to, "config.json"), config)
    config = read_json(Path(to, "tokenizer_config.json"))
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(Path(to, "tokenizer_config.json"), config)
