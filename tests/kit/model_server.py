"""A chat server that serves a small model for real: `ChatServer(model_replies(model, tokenizer))`.

It stands in for `transformers serve`, whose web framework is no dependency of this kit. Answers are greedy, and their
log-probabilities are the model's.
"""

import threading
from collections.abc import Callable

import torch

from kit.chat_server import Reply, completion


def model_replies(model, tokenizer) -> Callable[[dict, int], Reply]:
    lock = threading.Lock()

    @torch.inference_mode()
    def choose(body, before):
        ids = tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        answer, top = [], None
        with lock:
            for _ in range(body["max_tokens"]):
                logprobs = model(torch.cat([ids, torch.tensor([answer], dtype=torch.long)], dim=1)).logits[0, -1]
                logprobs = logprobs.float().log_softmax(-1)
                if top is None and body.get("logprobs"):
                    likeliest = logprobs.topk(body["top_logprobs"])
                    tokens = [tokenizer.decode(token) for token in likeliest.indices.tolist()]
                    top = list(zip(tokens, likeliest.values.tolist(), strict=True))
                answer.append(int(logprobs.argmax()))
        return completion(tokenizer.decode(answer), top, finish="length" if top else "stop")

    return choose
