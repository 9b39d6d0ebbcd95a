"""The page of sample.py --show=attention: its figures are what the model computed."""

import json
import re

import torch
from conftest import run
from test_conversation import RED, TOKENIZER, new_model, save

from inference.attention_page import attention_page
from inference.conversation import Conversation


def data_of(page):
    return json.loads(re.search(r"^const data = (.*);$", page, re.MULTILINE)[1])


def test_weights_and_candidates_are_those_of_the_answer(tmp_path):
    model = new_model()
    conversation, outputs = Conversation(model, TOKENIZER), []
    said = "".join(conversation.ask("What is red? </script>", [RED], max_tokens=6))
    for block in model.decoder.blocks:
        block.attention.out.register_forward_pre_hook(lambda _, given: outputs.append(given[0]))
    page = attention_page(conversation, {"lineage": [{"stage": "clip_pretrain", "folder": "no"}]})
    data, first = data_of(page), len(conversation.ids()) - 6
    assert "".join(data["tokens"][data["first"] :]) == said and data["first"] == first
    assert page.count("</script>") == 1 and data["clip"] == []  # the CLIP is gone
    assert len(data["patches"]) == model.clip_config.n_patches
    for token, (candidates, layers) in enumerate(
            zip(data["candidates"], data["attention"], strict=True)):
        assert candidates[0][0] == data["tokens"][first + token]  # greedy
        for row in layers:
            assert abs(sum(row) - 1000) < 30 and not any(row[first + token :])
    assert len(outputs) == len(data["attention"][0]) == model.config.n_layer
    save(tmp_path / "model", model)
    RED.save(tmp_path / "red.png")
    flags = f"--image={tmp_path}/red.png", "--prompt=Hello", "--show=attention", "--max_tokens=3"
    result = run("sample.py", tmp_path / "model", *flags, f"--page={tmp_path}/page.html")
    assert result.status == 0, result.err
    assert len(data_of((tmp_path / "page.html").read_text())["attention"]) <= 3


def test_one_head_computes_its_values_weighted_by_the_weights(tmp_path):
    from inference.attention_page import weights
    from model import GPT, GPTConfig, rotary_tables

    torch.manual_seed(0)
    attention = GPT(GPTConfig(64, 1, 1, 16, 32)).blocks[0].attention
    x, (cos, sin) = torch.randn(1, 9, 16), rotary_tables(16, 9, 1e4)
    rotary, seen = (cos[:, None, None], sin[:, None, None]), []
    attention.out.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
    attention(x, rotary, None, None)
    values = attention.qkv(x)[0, :, 32:]
    torch.testing.assert_close(seen[0], weights(attention, x, rotary) @ values)
