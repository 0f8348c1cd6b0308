"""One decoder folder in onnxruntime-genai, timed on request: `python _genai_rounds.py FOLDER`.

For each line on stdin, `PROMPT NEW`, runs one greedy answer and prints the seconds of the prompt
and the median seconds of a step.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
import onnxruntime_genai as og


def main() -> None:
    model = og.Model(sys.argv[1])
    rng = np.random.default_rng(0)
    print("ready", flush=True)
    for line in sys.stdin:
        prompt, new = map(int, line.split())
        settings = og.GeneratorParams(model)
        settings.set_search_options(max_length=prompt + new + 1, min_length=prompt + new + 1)
        generator = og.Generator(model, settings)
        ids = rng.integers(10, 250, prompt).astype(np.int32)
        began = time.perf_counter()
        generator.append_tokens(ids)
        generator.get_logits()
        first = time.perf_counter() - began
        steps = []
        for token in rng.integers(10, 250, new):
            began = time.perf_counter()
            generator.append_tokens(np.array([token], np.int32))
            generator.get_logits()
            steps.append(time.perf_counter() - began)
        print(first, statistics.median(steps), flush=True)


if __name__ == "__main__":
    main()
