"""Says where the time of LoRA training goes on a CPU, and how near it comes to the machine's matrix products.

    python benchmarks/bench_step.py --model model/HuggingFaceTB/SmolLM2-135M-Instruct-from-q4 --data_dir data

Takes some updates on real comments: laying out packs and making masks, forward and backward, optimizer, by the clock;
then forward and backward once more under torch.profiler. The machine's rate is that of a plain product of 1024 x 2048
and 2048 x 2048 in fp32; the model's is counted from the shapes of its products and attention, masked pairs of tokens
left out, over the whole time. The gathers of attention in blocks count as copies.

Prints a markdown table and a JSON line.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.files import from_root

# What a line of the profile counts as: the first part with a name that stands in it.
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("scaled_dot_product",),
    "softmax of the output head": ("log_softmax", "aten::exp_", "aten::gather", "aten::scatter"),
    "element-wise": ("aten::mul", "aten::add", "silu", "aten::pow", "aten::neg", "aten::mean", "aten::rsqrt"),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::fill_", "aten::sum"),
}


def build_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--data_dir", default="data", help="folder with data_train.json")
    parser.add_argument("--window", type=int, default=32, help="samples in an update")
    parser.add_argument("--group_size", type=int, default=8)
    parser.add_argument("--updates", type=int, default=2)
    return parser


def product_rate() -> float:
    """Floating-point operations a second of a plain fp32 product, the best of five."""
    import torch

    left, right = torch.randn(1024, 2048), torch.randn(2048, 2048)
    rates = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(20):
            left @ right
        rates.append(20 * 2 * 1024 * 2048 * 2048 / (time.perf_counter() - started))
    return max(rates)


def operations(model: Any, packs: list[Any]) -> float:
    """Floating-point operations that forward and backward of packs need, with frozen base weights.

    A frozen weight costs 2 a token forward and 2 backward, a LoRA weight 2 and 4; the output head runs on targets only.
    Attention takes 4 H for each visible pair of tokens and layer forward (H: width of the queries), 8 backward.
    """
    from utils.train.attention import attention_mask

    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    tables = (head, model.get_input_embeddings().weight)
    matrices = [
        weight for weight in model.parameters() if weight.dim() == 2 and all(weight is not table for table in tables)
    ]
    frozen = sum(weight.numel() for weight in matrices if not weight.requires_grad)
    lora = sum(weight.numel() for weight in matrices if weight.requires_grad)
    width = config.num_attention_heads * config.head_dim
    total = 0.0
    for pack in packs:
        pairs = int(attention_mask(pack).sum())
        total += len(pack.input_ids) * (4 * frozen + 6 * lora) + len(pack.target_ids) * 4 * head.numel()
        total += 12 * width * pairs * config.num_hidden_layers
    return total


def parts_of(profile: Any) -> dict[str, float]:
    """Shares of the profiled time by `PARTS`; what no part claims is "Python and the rest"."""
    shares = dict.fromkeys([*PARTS, "Python and the rest"], 0.0)
    for line in profile.key_averages():
        names = [part for part, keys in PARTS.items() if any(key in line.key for key in keys)]
        shares[names[0] if names else "Python and the rest"] += line.self_cpu_time_total
    total = sum(shares.values())
    return {part: time / total for part, time in shares.items()}


def main(args: argparse.Namespace) -> None:
    """Measures and prints."""
    import torch

    from utils.data.chat import make_chat
    from utils.data.samples import load_samples
    from utils.data.tokenizer import load_tokenizer
    from utils.train.forward import model_inputs, trie_format, use_tries
    from utils.train.packing import Layout, draw_windows, pack_cost, plan_packs, rank_packs
    from utils.train.tensors import token_logprobs
    from utils.weights.loading import add_lora, load_model, scale_early

    path = from_root(args.model)
    chat = make_chat(load_tokenizer(path))
    model = add_lora(load_model(path, torch.float32), 16, 32, 0.0, "all-linear").train()
    use_tries(model)
    scale_early(model)
    form = trie_format(model)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-4)
    with tempfile.TemporaryDirectory() as cache:
        samples = load_samples(from_root(args.data_dir) / "data_train.json", chat, 1024, Path(cache)).samples
    windows = draw_windows(samples.group, args.window, args.group_size, 1, 0)[: args.updates]
    plan = plan_packs(samples, windows, Layout(2048, 1, True, pack_cost(model, "cpu")))

    def lay_out(number: int) -> list[Any]:
        return [(pack, model_inputs(pack, form)) for pack in rank_packs(samples, plan, number, 0)]

    def compute(ready: list[Any]) -> None:
        for pack, inputs in ready:
            logits = model(**inputs).logits[0]
            (-token_logprobs(logits, pack.target_ids).sum()).backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def timed(do: Any, *values: Any) -> tuple[Any, float]:
        started = time.perf_counter()
        return do(*values), time.perf_counter() - started

    seconds = dict.fromkeys(["packs and masks", "model", "clipping and AdamW"], 0.0)
    everything = []
    compute(lay_out(0))
    update()
    rate = product_rate()
    for number in range(len(windows)):
        ready, lay_out_sec = timed(lay_out, number)
        times = (lay_out_sec, timed(compute, ready)[1], timed(update)[1])
        seconds = {part: seconds[part] + more for part, more in zip(seconds, times, strict=True)}
        everything += ready
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        compute(everything)
    total = sum(seconds.values())
    reached = operations(model, [pack for pack, _ in everything]) / total
    tokens = sum(len(pack.input_ids) for pack, _ in everything)
    print(
        f"{len(everything)} packs, {tokens:,} tokens, {1000 * total / tokens:.2f} ms each: "
        f"{reached / 1e9:.0f} GFLOP/s, {reached / rate:.0%} of the {rate / 1e9:.0f} of a plain product.\n"
    )
    shares = {part: share * seconds["model"] / total for part, share in parts_of(profile).items()}
    shares |= {part: seconds[part] / total for part in ("packs and masks", "clipping and AdamW")}
    print("| where the time goes | |\n|---|---|")
    for part, share in shares.items():
        print(f"| {part} | {share:.1%} |")
    figures = {"ms_a_token": 1000 * total / tokens, "flops": reached, "product_flops": rate, "shares": shares}
    print("\n" + json.dumps({"bench": "step", "results": figures}))


if __name__ == "__main__":
    main(build_parser().parse_args())
