"""Does a student learn from a teacher behind an API? Held-out loss on its answers before and after, over seeds.

    python benchmarks/check_distill.py --teacher model/google/gemma-3-270m-from-q4 \\
        --student model/HuggingFaceTB/SmolLM2-135M-Instruct-from-q4

Serves the teacher over HTTP, as an OpenAI-compatible API does; collects its answers to the comments of examples/ with
deepspeed_distill/prepare_data.py; and trains the student on them with deepspeed_distill/train.py (LoRA), once a seed.
Prints a markdown table and a JSON line.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.files import from_root  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--teacher", required=True, help="folder of the teacher")
    parser.add_argument("--student", required=True, help="folder of the student")
    parser.add_argument("--work_dir", default="benchmarks/output/distill", help="for data, answers and the runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=5e-4)
    return parser


class Server(ThreadingHTTPServer):
    """A model behind /v1/chat/completions; requests that come together are answered together."""

    def __init__(self, path: Path) -> None:
        from utils.serve.generate import load_for_inference

        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.chat = load_for_inference(path)
        self.tokenizing = threading.Lock()  # Fast tokenizers keep settings of a call in themselves.
        self.waiting: Queue[tuple[list[int], Queue[str]]] = Queue()
        for target in (self.serve_forever, self.answer):
            threading.Thread(target=target, daemon=True).start()

    def answer(self) -> None:
        """Answers what is waiting, up to 16 at a time."""
        from utils.serve.generate import replies

        while True:
            batch = [self.waiting.get()]
            time.sleep(0.05)
            while len(batch) < 16:
                try:
                    batch.append(self.waiting.get_nowait())
                except Empty:
                    break
            with self.tokenizing:
                texts = replies(self.model, self.chat, [prompt for prompt, _ in batch], 48)
            for (_, result), text in zip(batch, texts, strict=True):
                result.put(text)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Answers a chat completion."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        result: Queue[str] = Queue()
        with self.server.tokenizing:
            prompt = self.server.chat.prompt_ids(body["messages"])
        self.server.waiting.put((prompt, result))
        text = result.get()
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        with self.server.tokenizing:
            tokens = len(self.server.chat.tokenizer(text)["input_ids"])
        usage = {"prompt_tokens": len(prompt), "completion_tokens": tokens, "total_tokens": len(prompt) + tokens}
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
        data = json.dumps(answer | {"choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def run(script: str, flags: dict[str, Any]) -> None:
    """Runs a script of the repository."""
    arguments = [text for key, value in flags.items() for text in (f"--{key}", str(value))]
    finished = subprocess.run([sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{script} failed:\n{finished.stdout[-2000:]}\n{finished.stderr[-2000:]}")


def collect(teacher: Path, work: Path) -> float:
    """Collects the teacher's answers to all comments; seconds."""
    started = time.perf_counter()
    server = Server(teacher)
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    (work / "teachers.yaml").write_text(json.dumps({"local": {"base_url": url, "model": teacher.name}}))
    flags = {"model_name": "local", "data_dir": work, "output_dir": work, "teacher_config": work / "teachers.yaml"}
    flags["max_failures"] = 10**6  # A small model may have nothing to say.
    for split in ("train", "test"):
        run("deepspeed_distill/prepare_data.py", flags | {"d_type": split})
    server.shutdown()
    return time.perf_counter() - started


def train(student: Path, work: Path, lr: float, seed: int) -> list[dict[str, float]]:
    """Trains with a seed; the run's metrics."""
    output = work / f"run-{seed}"
    flags = {"student_model_name": student.name, "model_dir": student.parent, "teacher_model_name": "local"}
    flags |= {"answers_dir": work, "data_dir": work, "output_dir": output, "epochs": 2, "batch_size": 8, "lr": lr}
    flags |= {"grad_accum": 1, "eval_steps": 10**6, "eval_samples": -1, "save_steps": 10**6, "max_new_tokens": 1}
    flags["seed"] = seed
    run("deepspeed_distill/train.py", flags)
    (metrics,) = output.rglob("metrics.jsonl")
    return [json.loads(line) for line in metrics.read_text().splitlines()]


def main(args: argparse.Namespace) -> None:
    """Collects, trains and compares."""
    work, teacher, student = from_root(args.work_dir), from_root(args.teacher), from_root(args.student)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    run("prepare_data.py", {"data_dir": ROOT / "examples", "output_dir": work, "test_size": 0.2})
    seconds = collect(teacher, work)
    counts = [sum(1 for _ in (work / f"data_{split}_teacher_local.jsonl").open()) for split in ("train", "test")]
    said = f"{teacher.name} gave {counts[0]} answers to learn and {counts[1]} held-out ones in {seconds:.0f} s."
    print(said, flush=True)
    before, after = [], []
    for seed in range(1, args.seeds + 1):
        losses = [line["eval/loss"] for line in train(student, work, args.lr, seed) if "eval/loss" in line]
        before.append(losses[0])
        after.append(losses[-1])
        print(f"seed {seed}: {losses}", flush=True)
    print("\n| held-out loss on its answers | before | after | nats less |\n|---|---|---|---|")
    for number, (one, two) in enumerate(zip(before, after, strict=True), start=1):
        print(f"| seed {number} | {one:.4f} | {two:.4f} | {one - two:.4f} |")
    print(f"| mean | {statistics.mean(before):.4f} | {statistics.mean(after):.4f} |  |")
    print("\n" + json.dumps({"check": "distill", "answers": counts, "before": before, "after": after}))


if __name__ == "__main__":
    main(build_parser().parse_args())
