"""Measures what the host does before a card has anything to do: rendering to tokens, planning packs, laying them out.

    python benchmarks/gpu/bench_host.py
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from kit import Part, part_parser


def rendering(videos: int) -> dict[str, Any]:
    """Records a second that become tokens; four comments a video, a tokenizer trained on the examples."""
    from conftest import make_records, make_tokenizer

    from utils.data.chat import make_chat
    from utils.data.samples import load_samples

    chat = make_chat(make_tokenizer(2000))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = make_records(videos)
        (folder / "data.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        started = time.perf_counter()
        samples = load_samples(folder / "data.json", chat, 512, folder / "cache").samples
        seconds = time.perf_counter() - started
    figures = {"records": len(records), "tokens_a_record": round(float(samples.lengths.mean()), 1)}
    return figures | {"records_per_sec": round(len(records) / seconds)}


def packing(part: Part) -> dict[str, Any]:
    """Samples a second that are planned and laid out, and what is done for each pack before the model runs."""
    from comments import load_comments

    from utils.train.attention import attention_mask
    from utils.train.packing import Layout, PackCost, draw_windows, plan_packs, rank_packs

    samples = load_comments(part.dry)
    epochs = 4 if part.dry else 20
    started = time.perf_counter()
    windows = draw_windows(samples.group, 32, 8, epochs, 42)
    plan = plan_packs(samples, windows, Layout(2048, 1, True, PackCost(10_000, 4096)))
    planned = time.perf_counter()
    packs = [pack for number in range(len(windows)) for pack in rank_packs(samples, plan, number, 0)]
    laid_out = time.perf_counter()
    drawn = epochs * len(samples)
    pack = max(packs, key=lambda pack: len(pack.input_ids))
    return {
        "samples": drawn,
        "planned_per_sec": round(drawn / (planned - started)),
        "laid_out_per_sec": round(drawn / (laid_out - planned)),
        "lay_out_ms_a_pack": round(1000 * (laid_out - planned) / len(packs), 3),
        "pack_tokens": len(pack.input_ids),
        "move_ms_a_pack": part.milliseconds(lambda: pack.to(part.device)),
        "mask_ms_a_pack": part.milliseconds(lambda: attention_mask(pack.to(part.device))),
    }


def main(args: argparse.Namespace) -> None:
    """Measures and writes."""
    part = Part("host", args)
    part.measure("rendering", 15, rendering, 50 if part.dry else 500)
    part.measure("packing", 15, packing, part)


if __name__ == "__main__":
    main(part_parser(__doc__).parse_args())
