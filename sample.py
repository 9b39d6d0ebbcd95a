"""stub"""
import torch
from model import KVCache, generate
def continue_text(model, tokenizer, text, max_tokens=60):
    model.eval()
    ids = torch.tensor([[tokenizer.end_of_text, *tokenizer.encode(text)]], device=model.head.weight.device)
    with torch.inference_mode():
        out = list(generate(model, model.token_embedding(ids), KVCache(model), max_tokens, tokenizer.end_of_text))
    return tokenizer.decode(out)
