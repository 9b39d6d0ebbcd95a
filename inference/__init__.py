"""Token generation: KV cache, sampling, quantized weights, conversations, batched serving."""
