"""What `serving.py` starts with the interpreter of an environment with vLLM: tokens per second of the same loads.

    PYTHON benchmarks/_vllm_rates.py SETTINGS

SETTINGS is JSON: model (a folder), dtype, prompts (lists of tokens), tokens (of an answer), rank, running (requests and
adapters at once), rounds, adapters (name -> folder in HF PEFT's format) and sides (name -> the adapter of each request,
or null for the base). The last line that it prints is JSON: the tokens per second of each side in every round but the
first, and vLLM's version.
"""

import itertools
import json
import os
import sys
import time
from typing import Any


def main(settings: dict[str, Any]) -> None:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm
    from vllm.lora.request import LoRARequest

    asked = settings["adapters"]
    longest = len(settings["prompts"][0]) + settings["tokens"]
    model = vllm.LLM(
        model=settings["model"], dtype=settings["dtype"], enable_lora=True, max_loras=settings["running"],
        max_cpu_loras=max(len(asked), settings["running"]), max_lora_rank=settings["rank"], max_model_len=longest,
        max_num_seqs=settings["running"], enable_prefix_caching=False, kv_cache_memory_bytes=1 << 30,
    )  # fmt: skip
    requests = {name: LoRARequest(name, number + 1, folder) for number, (name, folder) in enumerate(asked.items())}
    sampling = vllm.SamplingParams(temperature=0, max_tokens=settings["tokens"], ignore_eos=True)

    def rate(names: list[str | None]) -> float:
        prompts = itertools.islice(itertools.cycle(settings["prompts"]), len(names))
        given = [requests.get(name) for name in names]
        began = time.perf_counter()
        answers = model.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], sampling, lora_request=given, use_tqdm=False
        )
        seconds = time.perf_counter() - began
        made = sum(len(answer.outputs[0].token_ids) for answer in answers)
        assert made == len(names) * settings["tokens"], f"{made} tokens came back"
        return made / seconds

    found: dict[str, list[float]] = {side: [] for side in settings["sides"]}
    for number in range(settings["rounds"] + 1):
        for side, names in settings["sides"].items():
            value = rate(names)
            if number:
                found[side].append(value)
    print("\n" + json.dumps({"rates": found, "vllm": vllm.__version__}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
