"""llama.cpp's tokens, logits and greedy answers, by the package llama-cpp-python in a process of
its own.

The package is not among the requirements (it builds llama.cpp from its source). It is looked for in
this interpreter, or in the one that the variable LLAMA_CPP_PYTHON names.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Optional

import numpy as np

VARIABLE = "LLAMA_CPP_PYTHON"
ABSENT = f"llama-cpp-python cannot be imported: install it, or name an interpreter that has it by {VARIABLE}"


def interpreter() -> Optional[str]:
    """The Python that can import llama_cpp; None where there is none."""
    named = os.environ.get(VARIABLE)
    if named is None:
        return sys.executable if importlib.util.find_spec("llama_cpp") else None
    done = subprocess.run([named, "-c", "import llama_cpp"], capture_output=True, check=False)
    return named if done.returncode == 0 else None


def ask(
    model: Path, lora: Optional[Path] = None, *, prompts: Any = (), answer_tokens: int = 0, texts: Any = ()
) -> dict[str, Any]:
    """What llama.cpp makes of a GGUF file, on one CPU thread and with keys and values in float32.

    prompts: lists of token ids. Returns "logits" after each, (N, vocabulary), "answers" of up to
    `answer_tokens` ids, an end token included, and the "tokens" of each text.
    """
    question = dict(model=str(model), lora=lora and str(lora), answer_tokens=answer_tokens)
    question |= dict(prompts=[list(map(int, prompt)) for prompt in prompts], texts=list(texts))
    with tempfile.TemporaryDirectory() as folder:
        asked, told = Path(folder, "question.json"), Path(folder, "logits.npy")
        asked.write_text(json.dumps(question))
        command = [interpreter() or "", __file__, str(asked), str(told)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"llama.cpp: {done.stderr[-3000:]}")
        return {**json.loads(done.stdout.splitlines()[-1]), "logits": np.load(told)}


def _next_logits(model: Any, tokens: list[int]) -> np.ndarray:
    import llama_cpp

    model.eval(tokens)
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).copy()


def _answer(model: Any, logits: np.ndarray, count: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < count:
        tokens.append(int(logits.argmax()))
        if tokens[-1] == model.token_eos():
            break
        logits = _next_logits(model, tokens[-1:])
    return tokens


def main() -> None:
    from llama_cpp import Llama

    question = json.loads(Path(sys.argv[1]).read_text())
    options = {"n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, "verbose": False}
    model = Llama(question["model"], lora_path=question["lora"], n_ctx=256, **options)
    all_logits, answers = [], []
    for prompt in question["prompts"]:
        model.reset()
        all_logits.append(_next_logits(model, prompt))
        answers.append(_answer(model, all_logits[-1], question["answer_tokens"]))
    texts = [model.tokenize(text.encode(), add_bos=False, special=True) for text in question["texts"]]
    np.save(sys.argv[2], np.array(all_logits))
    print(json.dumps({"answers": answers, "tokens": texts}))


if __name__ == "__main__":
    main()
