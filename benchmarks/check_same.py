"""Holds what chat.py and the server write, greedily, against `model.generate` on the rendered prompt.

    python benchmarks/check_same.py --model model/google/gemma-3-270m-from-q4 --adapter deepspeed_ft/output/DS-…/1
    python benchmarks/check_same.py --model … --vllm_python .venv-vllm/bin/python       # on vLLM, too

20 questions, 64 tokens, fp32, the model alone and with the adapter. A text may part from the expected one only where
the model's two likeliest tokens are less than 1e-3 apart, so that rounding decides. Of a character that the limit of
tokens cuts in two, `generate` and the transformers engine show a replacement character, vLLM nothing: both are the same
text here. (The page is a client of the server; a test in Chromium compares it.)
"""

import argparse
import asyncio
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from bench_serve import VLLM, free_port, process, some_messages  # noqa: E402

from utils.files import from_root  # noqa: E402

NEAR = 1e-3  # Of two logits between which rounding decides.
MARK = "@answer@"
CUT = "\ufffd"  # Stands for a part of a character.


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--vllm_python", help="the Python of vLLM's environment")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    return parser


class Expected:
    """What `generate` writes to a question.

    Attributes:
        ids: The tokens.
        gaps: Between the logits of the two likeliest tokens, at each.
        texts: Of the first n tokens, for each n.
    """

    def __init__(self, model: Any, chat: Any, messages: list[dict[str, str]], tokens: int) -> None:
        import torch

        from utils.serve.generate import end_ids

        prompt = torch.tensor([chat.prompt_ids(messages)])
        settings = {"max_new_tokens": tokens, "do_sample": False, "output_logits": True, "pad_token_id": chat.stop_id}
        settings |= {"eos_token_id": end_ids(model.generation_config, chat.stop_id), "return_dict_in_generate": True}
        out = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
        top = torch.stack(out.logits)[:, 0].topk(2).values
        self.ids, self.gaps = out.sequences[0, prompt.shape[1] :].tolist(), (top[:, 0] - top[:, 1]).tolist()
        decode = chat.tokenizer.decode
        self.texts = [decode(self.ids[:n], skip_special_tokens=True) for n in range(len(self.ids) + 1)]

    def verdict(self, text: str) -> str:
        """ "same", "rounding" or "different"."""
        if text.strip().rstrip(CUT).strip() == self.texts[-1].strip().rstrip(CUT).strip():
            return "same"
        # The first token whose text the other one does not begin with any more.
        parted = (n for n, part in enumerate(self.texts) if not text.startswith(part.rstrip(CUT)))
        place = next(parted, len(self.texts))  # One that goes on after the end was to stop there.
        return "rounding" if min(self.gaps[max(place - 2, 0) : place + 1]) < NEAR else "different"


def expected_texts(args: argparse.Namespace) -> dict[str, list[Expected]]:
    """By "base" and "tuned", with plain transformers and PEFT."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from utils.serve.generate import load_for_inference, tuning_of

    adapters = {"tuned": from_root(args.adapter)} if args.adapter else None
    _, chat = load_for_inference(from_root(args.model), adapters=adapters)
    model = AutoModelForCausalLM.from_pretrained(from_root(args.model), dtype=torch.float32).eval()
    numbers = range(args.questions)
    found = {"base": [Expected(model, chat, some_messages(n)[1:], args.tokens) for n in numbers]}
    if args.adapter:
        tuned = PeftModel.from_pretrained(model, tuning_of(from_root(args.adapter)).adapter).eval()
        found["tuned"] = [Expected(tuned, chat, some_messages(n)[1:], args.tokens) for n in numbers]
    return found


def chat_texts(args: argparse.Namespace, name: str) -> list[str]:
    """chat.py's answers."""
    command = [sys.executable, "chat.py", "--model", args.model, "--system", "", "--is_multi_turn", "0"]
    command += ["--temperature", "0", "--max_new_tokens", str(args.tokens), "--bot_name", MARK]
    command += ["--adapter", args.adapter] if name == "tuned" else []
    texts = []
    for number in range(args.questions):
        question = some_messages(number)[1]["content"]
        said = subprocess.run([*command, "--prompt", question], capture_output=True, text=True, check=True, cwd=ROOT)
        texts.append(said.stdout.partition(f"{MARK}: ")[2])
    return texts


async def served_texts(port: int, name: str, route: str, args: argparse.Namespace) -> list[str]:
    """A server's answers to all questions at once."""

    def ask(number: int) -> str:
        question = some_messages(number)[1]
        body: dict[str, Any] = {"model": name, "max_tokens": args.tokens, "temperature": 0}
        body |= {"messages": [question]} if route.startswith("/v1") else {"message": question["content"], "system": ""}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            said = json.load(answer)
        return said["text"][0] if "text" in said else said["choices"][0]["message"]["content"]

    return await asyncio.gather(*[asyncio.to_thread(ask, number) for number in range(args.questions)])


def main(args: argparse.Namespace) -> None:
    """Compares, and ends with an error if anything differs."""
    expected, differing = expected_texts(args), 0

    def report(what: str, name: str, texts: list[str]) -> None:
        nonlocal differing
        verdicts = [one.verdict(text) for one, text in zip(expected[name], texts, strict=True)]
        counts = {verdict: verdicts.count(verdict) for verdict in ("same", "rounding", "different")}
        differing += counts["different"]
        print(f"| {what} | {name} | {counts['same']} | {counts['rounding']} | {counts['different']} |", flush=True)

    print("| | model | same text | parted where rounding decides | different |\n|---|---|---|---|---|")
    for name in expected:
        report("chat.py", name, chat_texts(args, name))
    for engine, python in {"transformers": sys.executable, "vllm": args.vllm_python}.items():
        if not python:
            continue
        port = free_port()
        command = [python, "serve.py", "--model", args.model, "--served_model_name", "base", "--port", str(port)]
        command += ["--engine", engine, "--max_model_len", "1024"]
        command += ["--adapter", f"tuned={args.adapter}"] if args.adapter else []
        with process(command, port, **VLLM):
            for name in expected:
                for route in ("/v1/chat/completions", "/ai/llm/generation_stream"):
                    texts = asyncio.run(served_texts(port, name, route, args))
                    report(f"serve.py, {engine}: {route}", name, texts)
    if differing:
        raise SystemExit(f"{differing} texts differ.")


if __name__ == "__main__":
    main(build_parser().parse_args())
