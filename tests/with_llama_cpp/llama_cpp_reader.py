"""
Reads a GGUF file with llama.cpp, in an environment that has only that:

    python llama_cpp_reader.py FILE REQUEST.json ANSWER.npz

The request has `sequences` (tokens), `texts`, and `prompt` (tokens) with `new_tokens`. The answer has the logits at
all positions of each sequence, the tokens of each text, and what follows the prompt greedily.
"""

import json
import sys

import numpy as np
from llama_cpp import Llama


def main(model: str, request: str, answer: str) -> None:
    with open(request, encoding="utf-8") as file:
        asked = json.load(file)
    llama = Llama(model, n_ctx=1024, logits_all=True, verbose=False, n_threads=1)
    found: dict[str, np.ndarray] = {}
    for index, sequence in enumerate(asked["sequences"]):
        llama.reset()
        llama.eval(sequence)
        found[f"logits_{index}"] = np.array(llama.scores[: len(sequence)], dtype=np.float32)
    for index, text in enumerate(asked["texts"]):
        ids = llama.tokenize(text.encode(), add_bos=True, special=True)
        found[f"tokens_{index}"] = np.array(ids, dtype=np.int64)
    ids = list(asked["prompt"])
    llama.reset()
    llama.eval(ids)
    for _ in range(asked["new_tokens"]):
        ids.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        if llama.n_tokens + 1 >= llama.n_ctx():
            break
        llama.eval(ids[-1:])
    found["greedy"] = np.array(ids[len(asked["prompt"]) :], dtype=np.int64)
    np.savez(answer, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
